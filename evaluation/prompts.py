"""Reads probing prompts: `qualitative_prompts.md`, or JSONL of conversations.

Markdown: `## Section`, then for every prompt `### id`, the prompt as a block quote, and any of

    - translation: the prompt in English; required where the prompt is Chinese
    - check: a JSON object, see `check_answer` in evaluation/metrics.py
    - reference: an answer that meets the check, as a JSON string

JSONL, plain or gzip: conversations as in training; the last answer becomes the reference. Optional
fields beside the conversation: `id` (default: the file's name and line), `section`, `translation`,
`check`. Anything else in a Markdown file is an error that names the file and the line.
"""

import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import DataError, read_jsonl
from dataset.lm_dataset import encode_conversations, record_messages
from evaluation.metrics import has_cjk, validate_check

PROMPTS_FILE = Path(__file__).resolve().parent / "qualitative_prompts.md"  # ours
PROMPT_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
FIELD = re.compile(r"- (\w+):(.*)")
FIELDS = ("translation", "check", "reference")


class PromptError(DataError):
    """A prompt file that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Prompt:
    """One probe: what is asked, and how the answer can be judged."""

    id: str
    section: str
    messages: list[dict[str, str]]  # ends with the user's turn
    translation: str | None = None
    check: dict | None = None
    reference: str | None = None

    @property
    def text(self) -> str:
        """What the user asks; with roles if there is more than that one message."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def by_language(prompts: list[Prompt]) -> dict[str, np.ndarray]:
    """Which prompts, (prompts,) bool, are in English, and which in Chinese."""
    chinese = np.array([has_cjk(prompt.text) for prompt in prompts])
    return {"English": ~chinese, "Chinese": chinese}


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a Markdown (.md) or JSONL file in its order, at most `limit` of them.

    Raises:
        DataError: the file is missing, empty or broken; the message names it and the line.
    """
    if not path.is_file():
        raise PromptError(f"{path}: no such file; check --prompts")
    if path.suffix == ".md":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"{path}: not UTF-8 ({error.reason}); convert the file") from error
        prompts = parse_markdown(text, str(path))[:limit]
    else:
        prompts = [
            prompt_from_record(record, where, f"{path.name.split('.')[0]}-{number:05}")
            for number, (where, record) in enumerate(islice(read_jsonl(path), limit), start=1)
        ]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise PromptError(f"{path}: two prompts have the id {prompt.id!r}; rename one")
        seen.add(prompt.id)
    return prompts


def prompt_from_record(record: dict, where: str, default_id: str) -> Prompt:
    """A conversation as a prompt: its last answer is taken off and kept as the reference."""
    *messages, answer = record_messages(record, where)
    texts = {
        "id": record.get("id", default_id),
        "section": record.get("section", default_id.rpartition("-")[0]),
        "translation": record.get("translation"),
    }
    for name, value in texts.items():
        if not isinstance(value, str | None) or value == "":
            raise PromptError(f"{where}: {name!r} must be a text, not {value!r}")
    check = record.get("check")
    if check is not None:
        require_check(check, where)
    return Prompt(messages=messages, check=check, reference=answer["content"], **texts)


def require_check(check: object, where: str) -> None:
    """Raises PromptError, naming `where`, if `check` is not one that `check_answer` takes."""
    try:
        validate_check(check)
    except ValueError as error:
        raise PromptError(f"{where}: {error}") from error


def parse_markdown(text: str, name: str) -> list[Prompt]:
    """The prompts of a Markdown document; `name` opens every error message.

    Raises:
        PromptError: a duplicate or malformed id, an empty prompt, an unknown or repeated field,
            bad JSON, a Chinese prompt without a translation, or a line that has no place.
    """
    prompts: list[Prompt] = []
    first_lines: dict[str, int] = {}
    section = ""
    for heading, start, body in split_headings(text):
        where = f"{name}:{start}"
        if heading.startswith("## "):
            section = heading[3:].strip()
        elif heading.startswith("### "):
            prompt_id = heading[4:].strip()
            if not section:
                raise PromptError(f"{where}: a prompt before the first '## Section'")
            if not PROMPT_ID.fullmatch(prompt_id):
                raise PromptError(f"{where}: id {prompt_id!r}: use a-z, 0-9 and single hyphens")
            if prompt_id in first_lines:
                line = first_lines[prompt_id]
                raise PromptError(f"{where}: id {prompt_id!r} is taken by line {line}")
            first_lines[prompt_id] = start
            prompts.append(parse_prompt(prompt_id, section, body, name, start))
    if not prompts:
        raise PromptError(f"{name}: holds no prompt ('### id', then the prompt as a block quote)")
    return prompts


def split_headings(text: str) -> list[tuple[str, int, list[str]]]:
    """Pieces of a document: each heading (empty for the first piece), its line, the lines below."""
    pieces: list[tuple[str, int, list[str]]] = [("", 0, [])]
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#"):
            pieces.append((line, number, []))
        else:
            pieces[-1][2].append(line)
    return pieces


def parse_prompt(prompt_id: str, section: str, body: list[str], name: str, start: int) -> Prompt:
    """The prompt whose heading is on line `start` and whose lines are `body`."""
    quote: list[str] = []
    fields: dict[str, object] = {}
    for number, line in enumerate(body, start=start + 1):
        where = f"{name}:{number}"
        field = FIELD.fullmatch(line.rstrip())
        if line.startswith(">") and not fields:
            quote.append(line[1:].removeprefix(" ").rstrip())
        elif field:
            key, value = field.group(1), field.group(2).strip()
            if key in fields:
                raise PromptError(f"{where}: {key!r} is given twice for {prompt_id!r}")
            fields[key] = parse_field(key, value, where)
        elif line.strip():
            raise PromptError(f"{where}: expected '> prompt' or '- field: value', found {line!r}")
    content = "\n".join(quote).strip()
    if not content:
        raise PromptError(f"{name}:{start}: {prompt_id!r} has no prompt; add a line '> ...'")
    if has_cjk(content) and "translation" not in fields:
        raise PromptError(f"{name}:{start}: {prompt_id!r} is Chinese: add '- translation: ...'")
    return Prompt(prompt_id, section, [{"role": "user", "content": content}], **fields)


def parse_field(key: str, value: str, where: str) -> object:
    """The value of one `- key: value` line."""
    if key not in FIELDS:
        raise PromptError(f"{where}: unknown field {key!r}; known: {', '.join(FIELDS)}")
    if key == "translation":
        if not value:
            raise PromptError(f"{where}: 'translation' is empty")
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: {key!r} is not JSON ({error})") from error
    if key == "check":
        require_check(parsed, where)
    elif not isinstance(parsed, str) or not parsed.strip():
        raise PromptError(f"{where}: 'reference' must be a JSON string with text in it")
    return parsed


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, up to where the assistant's answer begins."""
    conversations = [prompt.messages for prompt in prompts]
    encoded = encode_conversations(tokenizer, conversations, generation_prompt=True)
    return [ids for ids, _ in encoded]
