"""Text and JSON that others wrote: read strictly, and shown so that it cannot act.

A corpus, a prompt, a model's output or a config may hold escape sequences, markup, or JSON that two
readers understand differently. What a script prints of them goes through `shown`, and every
error through `error_line`.
"""

import json
import re

# Fields of other formats that change what a conversation means, and that the template cannot show.
UNREAD_FIELDS = ("tools", "tool_calls", "function_call", "reasoning_content", "weight", "history")
EMPTY = (None, "", [], {})  # what such a field may be
# Control, zero-width and direction characters: what could steer a terminal or hide text.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def shown(text: str) -> str:
    """`text` with control, zero-width and direction characters written as \\uXXXX.

    Half of a surrogate pair, which no output can encode, is written in the same way.
    """
    inert = UNSAFE.sub(lambda match: json.dumps(match.group())[1:-1], text)
    return inert.encode("utf-8", "backslashreplace").decode()


def has_unread(turn: dict) -> bool:
    """Whether a turn of a conversation holds something in one of `UNREAD_FIELDS`."""
    return any(turn.get(field) not in EMPTY for field in UNREAD_FIELDS)


def error_line(error: Exception | str) -> str:
    """`error: ...` as one inert line, whatever the message quotes."""
    message = shown(str(error)).replace("\n", "\\n").replace("\t", "\\t")
    return f"error: {message}"


def parse_json(text: str) -> object:
    """The JSON value in `text`, refused where readers differ on what it says.

    Raises:
        ValueError: broken JSON, nesting too deep to read, a name given twice in an object (of
            which Python would drop the first value in silence), NaN or an infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_pairs, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        what = error.msg.removesuffix(" at")
        raise ValueError(f"{what} at {place}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict.

    Raises:
        ValueError: a name stands there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:40]!r} is given twice")
    return found


def refuse_constant(name: str) -> float:
    """Python reads `NaN` and `Infinity`, which are no JSON."""
    raise ValueError(f"{name} is no JSON number")
