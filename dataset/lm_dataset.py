"""JSONL -> token ids and labels -> batches.

    {"text": "..."}                                          pretraining
    {"conversations": [{"role": "user", "content": "..."},   fine-tuning
                       {"role": "assistant", "content": "..."}]}

Plain or gzip, one or several files. `messages` is read like `conversations`, and
`instruction`/`input`/`output` as one turn.

The way of a record: `read_jsonl` yields it, `record_text` or `record_messages` checks it,
`encode_conversations` makes token ids and labels, `load_dataset` keeps them in one memory-mapped
file, `StepPlan` says which samples make a step, `collate` pads them.

Pretraining reads packed blocks. Fine-tuning reads length-grouped batches, padded on the right:
under causal attention no real token sees the padding, so no attention mask is needed. Loss falls
on the assistant's tokens and its end token only.
"""

import gzip
import hashlib
import json
import reprlib
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from model.files import UserError, file_sha256, replace_file
from model.model_minimind import IGNORE_INDEX

CACHE_DIR = Path(__file__).resolve().parent / "cache"
CACHE_VERSION = 3  # raise it when the stored layout or the tokenization changes
ENCODE_CHUNK = 2_000  # records that are encoded at once, in parallel
SUBSET_SEED = 0  # draws the samples that --max_train_samples keeps
GROUP_BATCHES = 50  # length grouping sorts within this many batches, so order stays random
# Fields that change what a conversation means, and that the chat template does not show.
UNREAD_FIELDS = ("tools", "tool_calls", "function_call", "reasoning_content", "weight")
# Stands for a message's content while the chat template is rendered: private-use characters.
CONTENT_SLOT = "\ue000\ue001\ue000"


class DataError(UserError):
    """Input data that cannot be used; the message names the file and the line."""


# ---------------------------------------------------------------- records


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield `("file:line", record)` for each non-empty line of a plain or gzip JSONL file."""
    number, record = 0, None
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"{type(record).__name__} in place of an object")
                    yield f"{path}:{number}", record
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number} ({error})") from error
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise DataError(f"{path}:{number}: broken JSON ({error}); mend the line") from error
    if record is None:
        raise DataError(f"{path}: holds no record; expected one JSON object a line")


def record_text(record: dict, where: str) -> str:
    """Return the text of a pretraining record."""
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: pretraining reads a non-empty string "text"')
    return text


def record_messages(record: dict, where: str) -> list[dict[str, str]]:
    """Return the messages of a fine-tuning record, white space around their contents stripped.

    The roles are an optional system turn, then user and assistant in turn.
    """
    messages = record.get("conversations", record.get("messages"))
    if messages is None and "output" in record:
        parts = [record.get("instruction"), record.get("input") or ""]
        is_text = all(isinstance(part, str) for part in parts)
        question = "\n".join(part for part in parts if part.strip()) if is_text else None
        messages = [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": record["output"]}]
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise DataError(
            f'{where}: fine-tuning reads a list of messages, "conversations" or "messages", or '
            '"instruction" and "output"'
        )
    unread = [name for name in ("system", "history") if record.get(name)]
    unread += [
        name for name in UNREAD_FIELDS if any(turn.get(name) for turn in (record, *messages))
    ]
    if unread:
        raise DataError(f'{where}: "{unread[0]}" is not read; convert or remove it')
    for turn, message in enumerate(messages, start=1):
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise DataError(f'{where}: message {turn} needs a non-empty string "content"')
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            f"{where}: the roles are {reprlib.repr(roles)}; expected an optional system, then user "
            "and assistant in turn"
        )
    return [{"role": turn["role"], "content": turn["content"].strip()} for turn in messages]


# ---------------------------------------------------------------- token ids and labels


def encode_batch(backend: Tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    """Encode many texts in parallel.

    Args:
        special: whether strings such as `<|im_end|>` in a text become control tokens. Only the
            chat template's own text may: in a corpus or a message they stay ordinary text.
    """
    backend.encode_special_tokens = not special
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    backend.encode_special_tokens = False
    return [encoding.ids for encoding in encodings]


def encode_template(
    tokenizer: PreTrainedTokenizerFast, roles: tuple[str, ...], generation_prompt: bool
) -> list[list[int]]:
    """Encode the chat template's text around the contents: `len(roles) + 1` pieces."""
    slots = [{"role": role, "content": CONTENT_SLOT} for role in roles]
    try:
        text = tokenizer.apply_chat_template(
            slots, tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        raise DataError(f"{tokenizer.name_or_path}: the chat template fails ({error})") from error
    pieces = encode_batch(tokenizer.backend_tokenizer, text.split(CONTENT_SLOT), special=True)
    ends = [ids[:1] for role, ids in zip(roles, pieces[1:], strict=False) if role == "assistant"]
    if len(pieces) != len(roles) + 1 or any(end != [tokenizer.eos_token_id] for end in ends):
        raise DataError(
            f"{tokenizer.name_or_path}: the chat template must hold each content once and close an "
            f"assistant turn with {tokenizer.eos_token}; use another tokenizer"
        )
    return pieces


def encode_conversations(
    tokenizer: PreTrainedTokenizerFast,
    conversations: list[list[dict[str, str]]],
    generation_prompt: bool = False,
) -> list[tuple[list[int], list[bool]]]:
    """Encode conversations: token ids, and for each whether loss falls on it.

    The template's text and the contents are encoded apart, so a special-token string in a content
    stays ordinary text. Loss falls on an assistant's content and on the end token that follows.

    Args:
        generation_prompt: append the template's opening of an assistant turn (for inference).
    """
    contents = [turn["content"].strip() for messages in conversations for turn in messages]
    encoded = iter(encode_batch(tokenizer.backend_tokenizer, contents, special=False))
    templates: dict[tuple[str, ...], list[list[int]]] = {}
    samples = []
    for messages in conversations:
        roles = tuple(message["role"] for message in messages)
        if roles not in templates:
            templates[roles] = encode_template(tokenizer, roles, generation_prompt)
        opening, *closings = templates[roles]
        ids, labeled = list(opening), [False] * len(opening)
        for role, closing in zip(roles, closings, strict=True):
            content, is_answer = next(encoded), role == "assistant"
            ids += content + closing
            labeled += [is_answer] * len(content)
            labeled += [is_answer and position == 0 for position in range(len(closing))]
        samples.append((ids, labeled))
    return samples


def encode_records(
    kind: str, records: list[tuple[str, dict]], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[list[int], list[bool]]]:
    """Encode records of a kind (see `load_dataset`); a document has no labels of its own."""
    if kind == "sft":
        conversations = [record_messages(record, where) for where, record in records]
        return encode_conversations(tokenizer, conversations)
    texts = [record_text(record, where) for where, record in records]
    opening, closing = [], [tokenizer.pad_token_id]
    if kind == "pretrain_wrapped":
        opening, closing = [tokenizer.bos_token_id], [tokenizer.eos_token_id, *closing]
        if tokenizer.bos_token_id is None:
            raise DataError(f"--wrap_documents: {tokenizer.name_or_path} has no bos_token")
    encoded = encode_batch(tokenizer.backend_tokenizer, texts, special=False)
    return [(opening + ids + closing, []) for ids in encoded]


# ---------------------------------------------------------------- the token cache


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Yield consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def encode_files(
    kind: str, paths: list[Path], tokenizer: PreTrainedTokenizerFast, max_seq_len: int
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Tokenize files into flat arrays, and count what was cut, dropped and found twice."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    tokens, labels, digests = [], [], []
    counts = {"records": 0, "truncated": 0, "dropped_without_labels": 0}
    records = tqdm(
        (item for path in paths for item in read_jsonl(path)),
        desc="tokenizing", unit=" records", disable=None, file=sys.stderr,
    )  # fmt: skip
    for chunk in chunks(records, ENCODE_CHUNK):
        counts["records"] += len(chunk)
        for ids, labeled in encode_records(kind, chunk, tokenizer):
            if kind == "sft":
                counts["truncated"] += len(ids) > max_seq_len
                ids, labeled = ids[:max_seq_len], labeled[:max_seq_len]
                if not any(labeled[1:]):  # the first token is never predicted
                    counts["dropped_without_labels"] += 1
                    continue
            tokens.append(np.array(ids, dtype=dtype))
            labels.append(np.array(labeled, dtype=bool))
            digests.append(hashlib.blake2b(tokens[-1].tobytes(), digest_size=8).digest())
    if not tokens:
        raise DataError(f"{paths[0]}: no answer within {max_seq_len} tokens; raise --max_seq_len")
    arrays = {
        "tokens": np.concatenate(tokens),
        "starts": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        "labeled": np.concatenate(labels),
        "digests": np.array([int.from_bytes(d, "little") for d in digests], dtype=np.uint64),
    }
    counts |= {"samples": len(tokens), "tokens": len(arrays["tokens"])}
    counts["labeled_tokens"] = int(arrays["labeled"].sum())
    counts["duplicates"] = len(digests) - len(set(digests))
    return arrays, counts


def load_tokens(
    kind: str,
    paths: list[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
    cache_dir: Path,
) -> tuple[dict[str, np.ndarray], dict]:
    """Return the memory-mapped arrays of `encode_files`, and what run.json says of the data.

    The cache is a safetensors file, whole or not there. Its name is the hash of all that the
    tokens depend on; its header names the vocabulary's size, the tokenizer's hash and each dtype.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the flag that names it")
    files = [{"name": path.name, "sha256": file_sha256(path)} for path in paths]
    described = tokenizer.backend_tokenizer.to_str() + "\n" + (tokenizer.chat_template or "")
    key = {
        "version": CACHE_VERSION,
        "kind": kind,
        "files": [file["sha256"] for file in files],
        "tokenizer": hashlib.sha256(described.encode()).hexdigest(),
        "vocab_size": len(tokenizer),
        "ids": [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id],
        "max_seq_len": max_seq_len if kind == "sft" else None,  # blocks are cut later
    }
    cached = cache_dir / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"
    if not cached.is_file():
        arrays, counts = encode_files(kind, paths, tokenizer, max_seq_len)
        cache_dir.mkdir(parents=True, exist_ok=True)
        # In a folder of its own: another process may write the same, equal, file now.
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix="tmp") as folder:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            header = {"key": json.dumps(key), "counts": json.dumps(counts)}
            save_file(tensors, Path(folder) / "tokens", metadata=header)
            replace_file(Path(folder) / "tokens", cached)
    try:
        with safe_open(cached, framework="pt") as file:  # torch maps the file, numpy reads it
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            counts = json.loads(file.metadata()["counts"])
    except SafetensorError as error:
        raise DataError(f"{cached}: a damaged token cache ({error}); delete the file") from error
    return arrays, {"files": files, "tokenizer_sha256": key["tokenizer"], **counts}


# ---------------------------------------------------------------- samples


@dataclass(frozen=True)
class TokenDataset(torch.utils.data.Dataset):
    """Samples of token ids and labels: sample i is `tokens[starts[i]:ends[i]]`."""

    tokens: np.ndarray  # uint16 or uint32
    starts: np.ndarray
    ends: np.ndarray
    labeled: np.ndarray | None  # bool, a token; None: loss falls on all
    digests: np.ndarray  # a record; equal for equal tokens
    info: dict  # files with hashes, and counts

    @cached_property
    def lengths(self) -> np.ndarray:
        """Count the tokens of each sample."""
        return self.ends - self.starts

    @cached_property
    def targets(self) -> np.ndarray:
        """Count the tokens of each sample on which loss falls; the first is never predicted."""
        if self.labeled is None:
            return self.lengths - 1
        before = np.append(0, np.cumsum(self.labeled))  # labels before each token
        return before[self.ends] - before[self.starts + 1]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and labels, not shifted, each (length,) int64."""
        span = slice(self.starts[index], self.ends[index])
        ids = self.tokens[span].astype(np.int64)
        return ids, ids if self.labeled is None else np.where(self.labeled[span], ids, IGNORE_INDEX)


def load_dataset(
    kind: str,
    paths: list[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
    max_samples: int | None = None,
    cache_dir: Path = CACHE_DIR,
) -> TokenDataset:
    """Load the data of a stage, tokenized once.

    Args:
        kind: `"sft"`, `"pretrain"` (documents end with the pad/end-of-text token), or
            `"pretrain_wrapped"` (a chat turn's tokens around each document besides).
        max_seq_len: tokens of a block, or of the longest conversation; longer ones are cut.
        max_samples: conversations to keep, drawn at random; a smaller set is part of a larger.
    """
    arrays, info = load_tokens(kind, paths, tokenizer, max_seq_len, cache_dir)
    tokens, digests = arrays["tokens"], arrays["digests"]
    if kind != "sft":
        starts = np.arange(0, len(tokens) - 1, max_seq_len)  # a last token alone has no target
        ends = np.minimum(starts + max_seq_len, len(tokens))
        info["labeled_tokens"] = int((ends - starts - 1).sum())
        info["dropped_tail_tokens"] = len(tokens) - int(ends[-1])
        return TokenDataset(tokens, starts, ends, None, digests, info)
    starts, ends = arrays["starts"][:-1], arrays["starts"][1:]
    if max_samples is None:
        return TokenDataset(tokens, starts, ends, arrays["labeled"], digests, info)
    if max_samples > len(starts):
        raise DataError(f"--max_train_samples {max_samples}: the data have {len(starts):,} samples")
    kept = np.sort(np.random.default_rng(SUBSET_SEED).permutation(len(starts))[:max_samples])
    subset = TokenDataset(tokens, starts[kept], ends[kept], arrays["labeled"], digests[kept], info)
    info["kept"] = {
        "samples": len(kept),
        "tokens": int(subset.lengths.sum()),
        "labeled_tokens": int(subset.targets.sum()),
    }
    return subset


def describe_sample(tokenizer: PreTrainedTokenizerFast, dataset: TokenDataset, index: int) -> str:
    """Lay out a sample as a table of position, token, and the label that the position predicts."""
    ids, labels = dataset[index]
    targets = np.append(labels[1:], IGNORE_INDEX)
    lines = [f"sample {index}: {len(ids)} tokens", f"{'pos':>5}  {'token':<24} predicts"]
    for position, (token, target) in enumerate(zip(ids, targets, strict=True)):
        label = "-" if target == IGNORE_INDEX else repr(tokenizer.decode([int(target)]))
        lines.append(f"{position:>5}  {tokenizer.decode([int(token)])!r:<24} {label}")
    return "\n".join(lines)


# ---------------------------------------------------------------- batches


class StepPlan:
    """The samples of each optimizer step, as a pure function of the seed and the step.

    Samples are shuffled by `(seed, epoch)`, grouped by length when lengths differ, and cut into
    batches of `batch_size * accumulation_steps * processes`. So a resumed run continues with the
    very batch that it would have seen, and one process and two train on the same batches.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        accumulation_steps: int = 1,
        seed: int = 42,
        processes: int = 1,
    ):
        self.lengths, self.batch_size = lengths, batch_size
        self.seed, self.processes = seed, processes
        self.global_batch = batch_size * accumulation_steps * processes
        self.steps_per_epoch = -(-len(lengths) // self.global_batch)
        self.epoch, self.batches = -1, []  # the epoch that was asked for last

    def __getitem__(self, step: int) -> np.ndarray:
        """Return the samples of a step, those of all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self.draw_epoch(epoch)
        return self.batches[position]

    def draw_epoch(self, epoch: int) -> list[np.ndarray]:
        """Draw the batches of an epoch, each sorted by length, in random order."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        if self.lengths.min() == self.lengths.max():
            return np.split(order, range(self.global_batch, len(order), self.global_batch))
        batches = []
        for start in range(0, len(order), GROUP_BATCHES * self.global_batch):
            group = order[start : start + GROUP_BATCHES * self.global_batch]
            group = group[np.argsort(self.lengths[group], kind="stable")]
            batches += np.split(group, range(self.global_batch, len(group), self.global_batch))
        return [batches[i] for i in generator.permutation(len(batches))]

    def micro_batches(self, step: int, process: int = 0) -> list[list[int]]:
        """Return a process's share of a step in parts of `batch_size`; an empty one if it has none.

        The parts of two processes may differ in number: gradients are exchanged once, at the last.
        """
        mine = self[step][process :: self.processes].tolist()
        return list(chunks(mine, self.batch_size)) or [[]]


def collate(samples: list[tuple[np.ndarray, np.ndarray]], pad_id: int) -> dict[str, torch.Tensor]:
    """Stack samples as `input_ids` and `labels`, (batch, longest) int64, padded on the right.

    No samples make a row of padding without a label: it keeps a process in step with the others.
    """
    longest = max((len(ids) for ids, _ in samples), default=2)
    input_ids = np.full((max(len(samples), 1), longest), pad_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for row, (ids, targets) in enumerate(samples):
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = targets
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
