"""Read prompts: `qualitative_prompts.md`, or JSONL of conversations.

A Markdown file has sections (`## Title`, then prose) and prompts (`### id`). A prompt is a block
quote and a list of fields, one a line:

    ### camel-home
    > Where do camels live? Use capital letters.

    - reference: A CAMEL MAKES ITS HOME IN THE DESERT.
    - check: about = ["animal.home"], upper = true

`translation`, `reference` and `check` are optional. A check is a TOML inline table
without its braces; `dataset/world/checks.py` defines its keys. A line `> ***` parts the turns of a
conversation: user, assistant, user.

JSONL, plain or gzip, holds conversations as in training; the last answer becomes the reference.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dataset.lm_dataset import read_jsonl, record_messages, turns
from dataset.world.checks import judge_answer, world_vocabulary
from model.cli import UserError

PROMPTS_FILE = Path(__file__).resolve().parents[1] / "qualitative_prompts.md"
HEADING = re.compile(r"^(##|###) +(.+?) *$", re.MULTILINE)
FIELD = re.compile(r"- (translation|reference|check): +(\S.*)")
# What dataset/world/checks.py knows.
CHECK_KEYS = {
    "about",
    "any",
    "begins",
    "contains",
    "ends",
    "exact",
    "lines",
    "quoted",
    "upper",
    "words",
}
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")  # Chinese or Japanese


@dataclass(frozen=True)
class Prompt:
    """A question, and what its answer is checked against."""

    id: str
    section: str
    messages: list[dict[str, str]]  # end with the user's turn
    translation: str | None = None
    check: dict | None = None
    reference: str | None = None

    @property
    def text(self) -> str:
        """Return the user's words; a conversation has a line a turn, with its role."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)

    def judge(self, answer: str, ended: bool) -> str:
        """Return "correct" or the kind of mistake; the reference names the things."""
        reference = {"role": "assistant", "content": self.reference}
        record = {"conversations": [*self.messages, reference], "check": self.check}
        return judge_answer(answer, ended, record)


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read a Markdown or JSONL file, at most `limit` prompts; references must pass their checks."""
    if path.suffix == ".md":
        parsed = parse_markdown(path)
    else:
        parsed = (parse_record(where, record, path) for where, record in read_jsonl(path))
    prompts = list(islice(parsed, limit))
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write '### id', and below it '> the question'")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: two prompts have the id {max(ids, key=ids.count)!r}; rename one")
    for prompt in prompts:
        problem = find_problem(prompt)
        if problem:
            raise UserError(f"{path}: {prompt.id}: the reference fails its check: {problem}")
    return prompts


def find_problem(prompt: Prompt) -> str | None:
    """Tell why a prompt's reference fails its check; None if it passes."""
    if prompt.check is None:
        return None
    if not isinstance(prompt.check, dict):
        return 'it must be an object, such as {"exact": true}'
    unknown_keys = prompt.check.keys() - CHECK_KEYS
    if unknown_keys:
        return f"it has no key {min(unknown_keys)!r}"
    about = prompt.check.get("about", [])
    if not isinstance(about, list | dict):
        return "its key 'about' must be a list of names, or an object of lists"
    if not isinstance(about, dict):  # names of the world's lists; a dict gives its own
        unknown = [name for name in about if name not in world_vocabulary().values]
        if unknown:
            return f"the world has no list {unknown[0]!r}"
    outcome = prompt.judge(prompt.reference, ended=True)
    return None if outcome == "correct" else outcome


def parse_record(where: str, record: dict, path: Path) -> Prompt:
    """Make a prompt of a conversation: its last answer becomes the reference."""
    *messages, answer = record_messages(record, where)
    stem = path.name.split(".")[0]
    return Prompt(
        id=str(record.get("id", f"{stem}-{where.rpartition(':')[2]}")),
        section=str(record.get("section") or record.get("set") or stem),
        messages=messages,
        translation=record.get("translation"),
        check=record.get("check"),
        reference=answer["content"],
    )


def parse_markdown(path: Path) -> Iterator[Prompt]:
    """Yield the prompts of a Markdown file; errors name the prompt."""
    try:
        _, *pieces = HEADING.split(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    section = path.stem
    for mark, title, body in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        if mark == "##":
            section = title
        else:
            yield parse_prompt(title, section, body, f"{path}: prompt {title!r}")


def parse_prompt(prompt_id: str, section: str, body: str, where: str) -> Prompt:
    """Read one prompt's block quote and fields."""
    lines = [line.rstrip() for line in body.splitlines() if line.strip()]
    quoted = [line[1:].removeprefix(" ") for line in lines if line.startswith(">")]
    matches = [FIELD.fullmatch(line) for line in lines if not line.startswith(">")]
    if not quoted or None in matches:
        raise UserError(f"{where}: write '> the question', then lines '- reference: text'")
    fields = {name: text.replace("\\n", "\n") for name, text in map(re.Match.groups, matches)}
    messages = turns(*"\n".join(quoted).split("\n***\n"))
    if len(messages) % 2 == 0:
        raise UserError(f"{where}: the last turn is the assistant's; end with the user's")
    if "check" in fields:
        if "reference" not in fields:
            raise UserError(f"{where}: a check compares with a reference; add one")
        try:
            fields["check"] = tomllib.loads(f"check = {{ {fields['check']} }}")["check"]
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{where}: the check is no TOML ({error})") from error
    return Prompt(prompt_id, section, messages, **fields)
