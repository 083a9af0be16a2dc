"""Read prompts: `qualitative_prompts.md`, or JSONL of conversations.

A Markdown file has sections (`## Title`, then prose) and prompts (`### id`). A prompt is a block
quote and a list of fields, one a line:

    ### camel-home
    > Where do camels live? Use capital letters.

    - reference: A CAMEL MAKES ITS HOME IN THE DESERT.
    - check: about = ["animal.home"], upper = true

`system`, `translation`, `reference` and `check` are optional. A check is a TOML inline table
without its braces; `dataset/checks.py` defines its keys. A line `> ***` parts the turns of a
conversation: user, assistant, user.

JSONL, plain or gzip, holds conversations as in training; the last answer becomes the reference.
"""

import re
import tomllib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from dataset.checks import judge_answer
from dataset.lm_dataset import encode_conversations, read_jsonl, record_messages
from model.files import UserError

PROMPTS_FILE = Path(__file__).resolve().parents[1] / "qualitative_prompts.md"
HEADING = re.compile(r"^(##|###) +(.+?) *$", re.MULTILINE)
FIELD = re.compile(r"- (system|translation|reference|check): +(\S.*)")


@dataclass(frozen=True)
class Prompt:
    """What is asked, and what the answer is checked against."""

    id: str
    section: str
    messages: list[dict[str, str]]  # end with the user's turn
    translation: str | None = None
    check: dict | None = None
    reference: str | None = None

    @property
    def text(self) -> str:
        """The user's words; with roles where more was said."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)

    @property
    def record(self) -> dict:
        """The conversation with its reference and check, as `judge_answer` takes it."""
        reference = {"role": "assistant", "content": self.reference}
        return {"conversations": [*self.messages, reference], "check": self.check}


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read the prompts of a Markdown or JSONL file, at most `limit`.

    Raises:
        UserError: the file is missing, empty or broken, an id stands twice, or a reference fails
            its own check.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; check --prompts")
    if path.suffix == ".md":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8; convert the file") from error
        prompts = parse_markdown(text, str(path))[:limit]
    else:
        prompts = [parse_record(*line, path) for line in islice(read_jsonl(path), limit)]
    ids = [prompt.id for prompt in prompts]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice or not prompts:
        what = f"two prompts have the id {twice[0]!r}; rename one" if twice else "holds no prompt"
        raise UserError(f"{path}: {what}")
    for prompt in (prompt for prompt in prompts if prompt.check is not None):
        try:
            outcome = judge_answer(prompt.reference, True, prompt.record)
        except KeyError as error:
            outcome = f"the world has no list {error}"
        if outcome != "correct":
            raise UserError(f"{path}: {prompt.id}: the reference fails its check: {outcome}")
    return prompts


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


def parse_markdown(text: str, name: str) -> list[Prompt]:
    """Read the prompts of a Markdown document; errors name the prompt."""
    section, prompts = "", []
    _, *pieces = HEADING.split(text)
    for mark, title, body in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        if mark == "##":
            section = title
        else:
            prompts.append(parse_prompt(title, section, body, f"{name}: prompt {title!r}"))
    return prompts


def parse_prompt(prompt_id: str, section: str, body: str, where: str) -> Prompt:
    """Read one prompt's block quote and fields."""
    lines = [line.rstrip() for line in body.splitlines() if line.strip()]
    quoted = [line for line in lines if line.startswith(">")]
    matches = [FIELD.fullmatch(line) for line in lines if not line.startswith(">")]
    if not quoted or None in matches:
        raise UserError(f"{where}: write '> the question', then lines '- reference: text'")
    fields = {name: text.replace("\\n", "\n") for name, text in map(re.Match.groups, matches)}
    turns = re.split(r"^> \*\*\*$", "\n".join(quoted), flags=re.MULTILINE)
    texts = [re.sub(r"^> ?", "", turn.strip(), flags=re.MULTILINE) for turn in turns]
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    if "system" in fields:
        messages.insert(0, {"role": "system", "content": fields.pop("system")})
    if "check" in fields:
        try:
            fields["check"] = tomllib.loads(f"check = {{ {fields['check']} }}")["check"]
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{where}: the check is no TOML ({error})") from error
        if "reference" not in fields:
            raise UserError(f"{where}: a check compares with a reference; add one")
    return Prompt(prompt_id, section, messages, **fields)


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> list[list[int]]:
    """Encode each prompt up to where the answer begins."""
    conversations = [prompt.messages for prompt in prompts]
    encoded = encode_conversations(tokenizer, conversations, generation_prompt=True)
    return [ids for ids, _ in encoded]
