"""JSONL -> token ids and labels -> batches.

    {"text": "..."}                                          pretraining
    {"conversations": [{"role": "user", "content": "..."},   fine-tuning; "messages" alike
                       {"role": "assistant", "content": "..."}]}
    {"instruction": "...", "input": "...", "output": "..."}  fine-tuning, one turn

The way of a record: `read_jsonl` yields it, `encode_records` checks it and makes token ids and
labels, `load_dataset` keeps them in one memory-mapped file, `StepPlan` says which samples make a
step, `collate` pads them on the right. Under causal attention no real token sees the padding, so
no attention mask is needed.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast as Tokenizer

from model.files import UserError, file_sha256, write_aside
from model.model_minimind import IGNORE_INDEX

CACHE_DIR = Path(__file__).resolve().parent / "cache"
CACHE_VERSION = 5  # raise it when the stored layout or the tokenization changes
ENCODE_CHUNK = 2_000  # records that are encoded at once, in parallel
SUBSET_SEED = 0  # draws the samples that --max_train_samples keeps
GROUP_BATCHES = 50  # length grouping sorts within this many batches, so order stays random
# Fields that change what a conversation means, and that the chat template does not show.
UNREAD_FIELDS = ("system", "history", "tools", "tool_calls", "function_call", "reasoning_content")
CONTENT_SLOT = "\ue000\ue001\ue000"  # private use: stands for a content in the chat template
Sample = tuple[np.ndarray, np.ndarray]  # token ids and labels
Shape = tuple[int, int]  # of a batch: tokens of a row, labels


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield `("file:line", record)` for each non-empty line of a plain or gzip JSONL file."""
    number, record = 0, None
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(line)
                    if b"\\u" in line:  # such an escape may be half of a character
                        json.dumps(record, ensure_ascii=False).encode()
                    if not isinstance(record, dict):
                        raise ValueError(f"found: {type(record).__name__}")
                    yield f"{path}:{number}", record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read after line {number} ({error})") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{path}:{number}: no JSON object ({error}); mend the line") from error
    if record is None:
        raise UserError(f"{path}: holds no record; expected one JSON object a line")


def record_text(record: dict, where: str) -> str:
    """Return the text of a pretraining record."""
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: pretraining reads a non-empty string "text"')
    return text


def record_messages(record: dict, where: str) -> list[dict[str, str]]:
    """Return the messages of a fine-tuning record, white space around their contents stripped."""
    messages = record.get("conversations", record.get("messages"))
    if messages is None and "output" in record:
        parts = [record.get("instruction"), record.get("input") or ""]
        is_text = all(isinstance(part, str) for part in parts)
        question = "\n".join(filter(str.strip, parts)) if is_text else None
        messages = [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": record["output"]}]
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        fields = '"conversations", "messages", or "instruction" and "output"'
        raise UserError(f"{where}: fine-tuning reads a list of messages: {fields}")
    for name in UNREAD_FIELDS:
        if any(turn.get(name) for turn in (record, *messages)):
            raise UserError(f'{where}: "{name}" is not read; convert or remove it')
    if any(turn.get("weight") not in (None, 1) for turn in (record, *messages)):  # 0: no loss
        raise UserError(f'{where}: a "weight" other than 1 is not read; remove the record')
    for turn, message in enumerate(messages, start=1):
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise UserError(f'{where}: message {turn} needs a non-empty string "content"')
    roles = [message.get("role") for message in messages]
    pairs = roles[roles[:1] == ["system"] :]
    if not pairs or pairs != ["user", "assistant"] * (len(pairs) // 2):
        expected = "an optional system, then user and assistant in turn"
        raise UserError(f"{where}: the roles are {roles}; expected {expected}")
    return [{"role": turn["role"], "content": turn["content"].strip()} for turn in messages]


def encode_batch(tokenizer: Tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    """Encode many texts in parallel; `special` turns strings such as `<|im_end|>` into tokens.

    Only the chat template's own text may: in a corpus or a message they stay ordinary text.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not special
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    backend.encode_special_tokens = False
    return [encoding.ids for encoding in encodings]


def encode_conversations(
    tokenizer: Tokenizer, conversations: list[list[dict]], generation_prompt: bool = False
) -> list[tuple[list[int], list[bool]]]:
    """Encode conversations: token ids, and for each whether loss falls on it.

    The template's text and the contents are encoded apart, so a special-token string in a content
    stays ordinary text. Loss falls on an assistant's content and on the end token that follows.
    `generation_prompt` appends the template's opening of an assistant turn, for inference.
    """
    contents = [turn["content"].strip() for messages in conversations for turn in messages]
    encoded = iter(encode_batch(tokenizer, contents, special=False))
    find_template = lru_cache(partial(encode_template, tokenizer, generation_prompt))
    samples = []
    for messages in conversations:
        roles = tuple(message["role"] for message in messages)
        opening, *closings = find_template(roles)
        ids, labeled = list(opening), [False] * len(opening)
        for role, closing in zip(roles, closings, strict=True):
            content, is_answer = next(encoded), role == "assistant"
            ids += content + closing
            labeled += [is_answer and i <= len(content) for i in range(len(content + closing))]
        samples.append((ids, labeled))
    return samples


def encode_template(
    tokenizer: Tokenizer, generation_prompt: bool, roles: tuple[str, ...]
) -> list[list[int]]:
    """Encode the chat template's text around the contents: `len(roles) + 1` pieces."""
    slots = [{"role": role, "content": CONTENT_SLOT} for role in roles]
    options = {"tokenize": False, "enable_thinking": False}  # Qwen3's prompt as its training text
    text = tokenizer.apply_chat_template(slots, add_generation_prompt=generation_prompt, **options)
    pieces = encode_batch(tokenizer, text.split(CONTENT_SLOT), special=True)
    ends = (pieces[i][:1] for i, role in enumerate(roles, start=1) if role == "assistant")
    if len(pieces) != len(roles) + 1 or any(end != [tokenizer.eos_token_id] for end in ends):
        rule = f"hold each content once and close an assistant turn with {tokenizer.eos_token}"
        raise UserError(f"{tokenizer.name_or_path}: the chat template must {rule}")
    return pieces


def encode_records(
    kind: str, records: list[tuple[str, dict]], tokenizer: Tokenizer
) -> list[tuple[list[int], list[bool]]]:
    """Check and encode what `read_jsonl` yields; without labels, loss falls on all tokens."""
    if kind == "sft":
        conversations = [record_messages(record, where) for where, record in records]
        return encode_conversations(tokenizer, conversations)
    opening, closing = [], [tokenizer.pad_token_id]
    if kind == "pretrain_wrapped":
        if tokenizer.bos_token_id is None:
            raise UserError(f"--wrap_documents: {tokenizer.name_or_path} has no bos_token")
        opening, closing = [tokenizer.bos_token_id], [tokenizer.eos_token_id, *closing]
    texts = [record_text(record, where) for where, record in records]
    return [(opening + ids + closing, []) for ids in encode_batch(tokenizer, texts, special=False)]


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Yield consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def encode_files(
    kind: str, paths: list[Path], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Tokenize files into flat arrays, and count what was cut and dropped."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    tokens, labels, truncated, dropped = [], [], 0, 0
    records = tqdm(chain.from_iterable(map(read_jsonl, paths)), "tokenizing", disable=None)
    for chunk in chunks(records, ENCODE_CHUNK):
        for ids, labeled in encode_records(kind, chunk, tokenizer):
            if kind == "sft":
                truncated += len(ids) > max_seq_len
                ids, labeled = ids[:max_seq_len], labeled[:max_seq_len]
                if not any(labeled[1:]):  # the first token is never predicted
                    dropped += 1
                    continue
            tokens.append(np.array(ids, dtype=dtype))
            labels.append(np.array(labeled, dtype=bool))
    if not tokens:
        raise UserError(f"{paths[0]}: no answer within {max_seq_len} tokens; raise --max_seq_len")
    arrays = {"tokens": np.concatenate(tokens), "labeled": np.concatenate(labels)}
    arrays["starts"] = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    counts = {"records": len(tokens) + dropped, "samples": len(tokens)}
    return arrays, counts | {"truncated": truncated, "dropped_without_labels": dropped}


def load_tokens(
    kind: str, paths: list[Path], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[dict[str, np.ndarray], dict]:
    """Return the memory-mapped arrays of `encode_files`, and the facts for run.json.

    The cache's name is the hash of all that the tokens depend on.
    """
    files = [{"name": path.name, "sha256": file_sha256(path)} for path in paths]
    described = tokenizer.backend_tokenizer.to_str() + "\n" + (tokenizer.chat_template or "")
    key = {"version": CACHE_VERSION, "kind": kind, "files": [file["sha256"] for file in files]}
    key |= {"tokenizer": hashlib.sha256(described.encode()).hexdigest(), "size": len(tokenizer)}
    key["ids"] = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    key["max_seq_len"] = max_seq_len if kind == "sft" else None  # blocks are cut later
    cached = CACHE_DIR / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"
    if not cached.is_file():
        CACHE_DIR.mkdir(parents=True, exist_ok=True)
        with FileLock(cached.with_name(f".{cached.name}.lock")):
            if not cached.is_file():  # of several processes, the first one tokenizes
                arrays, counts = encode_files(kind, paths, tokenizer, max_seq_len)
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                header = {"counts": json.dumps(counts)}
                write_aside(cached, partial(save_file, tensors, metadata=header))
    with safe_open(cached, framework="pt") as file:  # torch maps the file, numpy reads it
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        counts = json.loads(file.metadata()["counts"])
    return arrays, {"files": files, "tokenizer_sha256": key["tokenizer"], **counts}


class TokenDataset(torch.utils.data.Dataset):
    """Samples of token ids and labels: sample i is `tokens[starts[i]:ends[i]]`.

    Of each sample, `lengths` counts the tokens and `targets` those on which loss falls, never the
    first. `info` has facts for run.json.
    """

    def __init__(self, arrays: dict, starts: np.ndarray, ends: np.ndarray, info: dict):
        self.tokens, self.labeled = arrays["tokens"], arrays["labeled"]
        self.starts, self.ends, self.lengths, self.info = starts, ends, ends - starts, info
        if len(self.labeled):
            before = np.append(0, np.cumsum(self.labeled))  # labels before each token
            self.targets = before[ends] - before[starts + 1]
        else:  # of text, loss falls on all
            self.targets = self.lengths - 1

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Sample:
        """Return token ids and labels, not shifted, each (length,) int64."""
        span = slice(self.starts[index], self.ends[index])
        ids = self.tokens[span].astype(np.int64)
        return ids, np.where(self.labeled[span], ids, IGNORE_INDEX) if len(self.labeled) else ids

    def describe(self, index: int, tokenizer: Tokenizer) -> str:
        """Lay out a sample: positions, tokens, and the labels that the positions predict."""
        ids, labels = self[index]
        lines = [f"{'pos':>5}  {'token':<24} predicts"]
        for i, (token, label) in enumerate(zip(ids, [*labels[1:], IGNORE_INDEX], strict=True)):
            target = "-" if label == IGNORE_INDEX else repr(tokenizer.decode([int(label)]))
            lines.append(f"{i:>5}  {tokenizer.decode([int(token)])!r:<24} {target}")
        return "\n".join(lines)


def load_dataset(
    kind: str,
    paths: list[Path],
    tokenizer: Tokenizer,
    max_seq_len: int,
    max_samples: int | None = None,
) -> TokenDataset:
    """Load the data of a stage, tokenized once.

    Args:
        kind: `"sft"`, `"pretrain"` (documents end with the pad/end-of-text token), or
            `"pretrain_wrapped"` (a chat turn's tokens around each document besides).
        max_seq_len: tokens of a block, or of the longest conversation; longer ones are cut.
        max_samples: conversations to keep, drawn at random; a smaller set is part of a larger.
    """
    arrays, info = load_tokens(kind, paths, tokenizer, max_seq_len)
    starts, ends = arrays["starts"][:-1], arrays["starts"][1:]
    if kind != "sft":
        total = len(arrays["tokens"])
        starts = np.arange(0, total - 1, max_seq_len)  # a last token alone has no target
        ends = np.minimum(starts + max_seq_len, total)
    if max_samples is not None:
        if max_samples > len(starts):
            raise UserError(f"--max_train_samples {max_samples}: the data have {len(starts):,}")
        order = np.random.default_rng(SUBSET_SEED).permutation(len(starts))
        chosen = np.sort(order[:max_samples])
        starts, ends, info["samples"] = starts[chosen], ends[chosen], max_samples
    dataset = TokenDataset(arrays, starts, ends, info)
    info |= {"tokens": int(dataset.lengths.sum()), "labeled_tokens": int(dataset.targets.sum())}
    return dataset


@dataclass
class StepPlan:
    """The samples of each optimizer step, as a pure function of the seed and the step.

    Samples are shuffled by `(seed, epoch)`, grouped by length when lengths differ, and cut into
    batches of `batch_size * accumulation_steps * processes`. So a resumed run continues with the
    batch that it would have seen, and one process and two train on the same batches.
    """

    lengths: np.ndarray
    batch_size: int
    accumulation_steps: int = 1
    seed: int = 42
    processes: int = 1

    def __post_init__(self) -> None:
        self.global_batch = self.batch_size * self.accumulation_steps * self.processes
        self.steps_per_epoch = -(-len(self.lengths) // self.global_batch)
        self.draw_epoch = lru_cache(2)(self.draw_epoch)  # the loader may be an epoch ahead

    def __getitem__(self, step: int) -> np.ndarray:
        """Return the samples of a step, those of all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.draw_epoch(epoch)[position]

    def draw_epoch(self, epoch: int) -> list[np.ndarray]:
        """Draw the batches of an epoch, each sorted by length, in random order."""
        generator, size = np.random.default_rng([self.seed, epoch]), self.global_batch
        order, group = generator.permutation(len(self.lengths)), GROUP_BATCHES * size
        if self.lengths.min() == self.lengths.max():
            return np.split(order, range(size, len(order), size))
        batches = []
        for part in np.split(order, range(group, len(order), group)):
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += np.split(part, range(size, len(part), size))
        return [batches[i] for i in generator.permutation(len(batches))]

    def micro_batches(self, step: int, process: int = 0) -> list[list[int]]:
        """Return a process's share of a step in parts of `batch_size`; an empty one if it has none.

        The parts of two processes may differ in number: gradients are exchanged once, at the last.
        """
        mine = self[step][process :: self.processes].tolist()
        return list(chunks(mine, self.batch_size)) or [[]]


def plan_shapes(plan: StepPlan, targets: np.ndarray, steps: int, most: int = 6) -> list[Shape]:
    """Choose at most `most` shapes into which every micro-batch of a run fits.

    Each length is the longest of an equal share of the batches; `targets` counts a sample's labels.
    """
    parts = [plan.micro_batches(step, i) for step in range(steps) for i in range(plan.processes)]
    lengths = np.array([plan.lengths[batch].max(initial=2) for part in parts for batch in part])
    labels = np.array([targets[batch].sum() for part in parts for batch in part])
    ends = np.quantile(lengths, np.arange(1, most + 1) / most, method="inverted_cdf")
    return [(int(end), int(labels[lengths <= end].max())) for end in np.unique(ends)]


def collate(samples: list[Sample], rows: int = 0, shapes: list[Shape] = ()) -> dict[str, Tensor]:
    """Stack samples as `input_ids` and `labels`, (batch, longest) int64, with 0 on the right.

    `label_positions` are those of the flattened batch that predict a label. For compiled code the
    batch fills up to `rows`, without labels, and to the first of `shapes` that is long enough.
    """
    longest = max((len(ids) for ids, _ in samples), default=2)
    length, count = next((shape for shape in shapes if shape[0] >= longest), (longest, 2))
    size = (max(rows, len(samples), 1), length)
    ids, labels = np.zeros(size, np.int64), np.full(size, IGNORE_INDEX)
    for row, (own_ids, own_labels) in enumerate(samples):
        ids[row, : len(own_ids)], labels[row, : len(own_ids)] = own_ids, own_labels
    row, column = np.nonzero(labels[:, 1:] != IGNORE_INDEX)
    positions = np.full(max(count, len(row)), length - 1)  # a row's last one predicts nothing
    positions[: len(row)] = row * length + column
    batch = {"input_ids": ids, "labels": labels, "label_positions": positions}
    return {name: torch.from_numpy(array) for name, array in batch.items()}
