"""JSONL -> token batches, tokenized once.

Two record forms, plain or gzip, one or several files (the forms MiniMind reads):

    {"text": "..."}                                          pretraining
    {"conversations": [{"role": "user", "content": "..."},   fine-tuning
                       {"role": "assistant", "content": "..."}]}

`messages` is read like `conversations`, and `instruction`/`input`/`output` as one turn.

Tokens are written once to `dataset/cache/<key>/`, where the key covers the content of the files,
the tokenizer, the chat template and the length, and memory-mapped from then on: a warm start reads
no JSON. Pretraining serves packed blocks; fine-tuning serves length-grouped batches, padded on the
right to their longest sample (under causal attention no real token sees the padding, so no
attention mask is needed). Loss falls on the assistant's tokens and its end token only.
"""

import contextlib
import gc
import hashlib
import json
import os
import re
import reprlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import DataError, check_file, file_sha256, read_jsonl
from dataset.untrusted import EMPTY, UNREAD_FIELDS, parse_json
from model.model_minimind import IGNORE_INDEX

CACHE_DIR = Path(__file__).resolve().parent / "cache"
CACHE_VERSION = 2  # raise it when the stored layout or the tokenization changes
ROLES = ("system", "user", "assistant")

ENCODE_CHUNK = 2_000  # records that are encoded at once
SUBSET_SEED = 0  # draws the samples that --max_train_samples keeps
KNOWN_WORDS = 2**19  # words whose tokens are remembered between chunks, some 100 MB
# What a byte-level tokenizer splits an ASCII text at: GPT-2's expression, whose classes of letters
# and digits of all scripts Python's re does not have.
ASCII_WORDS = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)
GROUP_BATCHES = 50  # length grouping sorts within this many batches, so order stays random
# What a template may raise: it is code that comes with a tokenizer. transformers runs it in Jinja's
# sandbox, which ends an attempt to leave it with a TemplateError.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError)
TEMPLATE_ERRORS += (ValueError, MemoryError, RecursionError)
# Stands where a message's content goes while the chat template is rendered; private-use
# characters, so that no chat template can contain it.
CONTENT_SLOT = "\ue000\ue001\ue000"


# ---------------------------------------------------------------- records


def record_text(record: dict, where: str) -> str:
    """The text of a pretraining record."""
    if "text" not in record:
        hint = " (a conversation: is this a fine-tuning file?)" if "conversations" in record else ""
        raise DataError(f'{where}: no field "text"{hint}; pretraining reads {{"text": ...}}')
    text = record["text"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: "text" must be a non-empty string; mend or remove the record')
    return text


def record_messages(record: dict, where: str) -> list[dict[str, str]]:
    """A fine-tuning record as messages: an optional system turn, then user and assistant in turn.

    Raises:
        DataError: an unknown role, an empty or non-string content, turns out of order, no
            assistant turn at the end, or fields that say more than the messages do.
    """
    forms = [name for name in ("conversations", "messages", "instruction") if name in record]
    if len(forms) > 1:
        raise DataError(f"{where}: holds {' and '.join(forms)}; keep one of them")
    refuse_unread((*UNREAD_FIELDS, "system"), record, where)
    if forms == ["instruction"] and "output" in record:
        parts = [record["instruction"], record.get("input", ""), record["output"]]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(
                f'{where}: "instruction", "input" and "output" must be strings; mend the record'
            )
        messages = [
            {"role": "user", "content": "\n".join(part for part in parts[:2] if part.strip())},
            {"role": "assistant", "content": record["output"]},
        ]
    elif forms and forms != ["instruction"]:
        messages = record[forms[0]]
    else:
        hint = " (a pretraining file?)" if "text" in record else ""
        raise DataError(
            f'{where}: no field "conversations"{hint}; fine-tuning reads "conversations", '
            '"messages" or "instruction"/"output"'
        )
    return check_messages(messages, where)


def refuse_unread(names: tuple[str, ...], fields: dict, where: str) -> None:
    """Refuses non-empty fields that would be dropped although they change what is learned."""
    for name in names:
        if fields.get(name) not in EMPTY:
            raise DataError(f'{where}: "{name}" is not read; convert or remove it')


def check_messages(messages: object, where: str) -> list[dict[str, str]]:
    """Validates the turns of one conversation and strips the white space around contents."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: the conversation must be a non-empty list of messages")
    clean = []
    for turn, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {turn} must be an object with role and content")
        refuse_unread(UNREAD_FIELDS, message, f"{where}: message {turn}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(
                f"{where}: message {turn} has role {reprlib.repr(role)}; known: {', '.join(ROLES)}"
            )
        if not isinstance(content, str) or not content.strip():
            raise DataError(f'{where}: message {turn} ({role}) needs a non-empty string "content"')
        clean.append({"role": role, "content": content.strip()})
    check_turns([message["role"] for message in clean], where)
    return clean


def check_turns(roles: list[str], where: str) -> None:
    """Refuses roles that are not an optional system, then user and assistant in turn."""
    opening = roles[:1] == ["system"]
    for turn, role in enumerate(roles[opening:], start=1 + opening):
        expected = "user" if (turn - opening) % 2 else "assistant"
        if role != expected:
            raise DataError(f"{where}: message {turn} is the {role}'s, expected the {expected}'s")
    if roles[-1] != "assistant":
        raise DataError(f"{where}: ends with the {roles[-1]}'s message; the assistant must be last")


# ---------------------------------------------------------------- tokenizing


def encode_batch(
    backend: Tokenizer,
    texts: list[str],
    special: bool,
    known: dict[str, list[int]] | None = None,
) -> list[list[int]]:
    """Token ids of many texts.

    Args:
        special: whether strings such as `<|im_end|>` in a text become control tokens. Only the
            chat template's own text may; a corpus or a user's message that contains such a
            string keeps it as ordinary characters.
        known: token ids by word, to which new words are added: with it, texts that come in parts
            are encoded faster (see `encode_words`).
    """
    if special or known is None or not splits_as_gpt2(backend):
        return encode_whole(backend, texts, special)
    plain = iter(encode_words(backend, [text for text in texts if text.isascii()], known))
    rest = iter(encode_whole(backend, [text for text in texts if not text.isascii()], special))
    return [next(plain if text.isascii() else rest) for text in texts]


def encode_whole(backend: Tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    """Token ids of many texts, encoded in parallel by the Rust tokenizer."""
    backend.encode_special_tokens = not special
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    backend.encode_special_tokens = False
    return [encoding.ids for encoding in encodings]


def splits_as_gpt2(backend: Tokenizer) -> bool:
    """Whether a text's tokens are those of its words, as `ASCII_WORDS` finds them."""
    split = backend.pre_tokenizer
    return (
        isinstance(split, pre_tokenizers.ByteLevel)
        and split.use_regex
        and not split.add_prefix_space
        and isinstance(backend.model, models.BPE)
        and backend.model.dropout is None
        and backend.normalizer is None
        and all(token.special for token in backend.get_added_tokens_decoder().values())
    )


def encode_words(
    backend: Tokenizer, texts: list[str], known: dict[str, list[int]]
) -> list[list[int]]:
    """Token ids of ASCII texts without control tokens, each different word encoded once.

    No token spans two words, and texts repeat most of theirs. On two cores a sixth faster than the
    whole texts for the demo corpus (`make bench`), a tenth at most for Simple English Wikipedia.
    """
    if len(known) > KNOWN_WORDS:
        known.clear()
    split = [ASCII_WORDS.findall(text) for text in texts]
    new = list(set(chain.from_iterable(split)) - known.keys())
    known.update(zip(new, encode_whole(backend, new, special=False), strict=True))
    return [list(chain.from_iterable(map(known.__getitem__, words))) for words in split]


def render_template(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], generation_prompt: bool
) -> list[str]:
    """The chat template's text around the contents: `len(messages) + 1` pieces."""
    slots = [{"role": message["role"], "content": CONTENT_SLOT} for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(
            slots, tokenize=False, add_generation_prompt=generation_prompt
        )
    except TEMPLATE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{tokenizer.name_or_path}: the chat template fails ({reason}); use another tokenizer"
        ) from error
    pieces = rendered.split(CONTENT_SLOT)
    if len(pieces) != len(messages) + 1:
        raise DataError(
            f"{tokenizer.name_or_path}: the chat template drops or repeats a message's content; "
            "use another tokenizer"
        )
    return pieces


def encode_conversations(
    tokenizer: PreTrainedTokenizerFast,
    conversations: list[list[dict[str, str]]],
    generation_prompt: bool = False,
    known: dict[str, list[int]] | None = None,
) -> list[tuple[list[int], list[bool]]]:
    """Token ids, and for each whether loss falls on it, of many conversations.

    The template's text and the contents are encoded apart, so special-token strings in a content
    stay ordinary text. Loss falls on an assistant's content and on the end token that follows.

    Args:
        generation_prompt: append the template's opening of an assistant turn (for inference).
        known: see `encode_batch`.
    """
    pieces_by_roles: dict[tuple[str, ...], list[list[int]]] = {}
    for messages in conversations:
        roles = tuple(message["role"] for message in messages)
        if roles not in pieces_by_roles:
            pieces = render_template(tokenizer, messages, generation_prompt)
            pieces_by_roles[roles] = encode_batch(tokenizer.backend_tokenizer, pieces, special=True)
    contents = [message["content"].strip() for messages in conversations for message in messages]
    encoded = iter(encode_batch(tokenizer.backend_tokenizer, contents, special=False, known=known))
    samples = []
    for messages in conversations:
        roles = tuple(message["role"] for message in messages)
        pieces = pieces_by_roles[roles]
        ids, labeled = list(pieces[0]), [False] * len(pieces[0])
        for role, piece in zip(roles, pieces[1:], strict=True):
            content = next(encoded)
            is_answer = role == "assistant"
            if is_answer and piece[:1] != [tokenizer.eos_token_id]:
                raise DataError(
                    f"{tokenizer.name_or_path}: the chat template must close an assistant turn "
                    f"with {tokenizer.eos_token}; use another tokenizer"
                )
            ids += content + piece
            labeled += [is_answer] * len(content)
            labeled += [is_answer and position == 0 for position in range(len(piece))]
        samples.append((ids, labeled))
    return samples


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


# ---------------------------------------------------------------- token cache


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hex SHA-256 of vocabulary, merges, special tokens and chat template."""
    content = tokenizer.backend_tokenizer.to_str() + "\n" + (tokenizer.chat_template or "")
    return hashlib.sha256(content.encode()).hexdigest()


def token_dtype(tokenizer: PreTrainedTokenizerFast) -> type:
    """The smallest unsigned integer that holds every token id."""
    return np.uint16 if len(tokenizer) <= 2**16 else np.uint32


@dataclass(frozen=True)
class TokenStore:
    """Tokens of a data set, memory-mapped: sample i is `tokens[starts[i]:starts[i + 1]]`."""

    tokens: np.ndarray  # (number of tokens,) uint16 or uint32
    starts: np.ndarray  # (samples + 1,) int64
    labeled: np.ndarray  # (number of tokens,) bool; empty for pretraining
    info: dict  # files with hashes, and counts of what was kept, truncated, dropped and repeated
    digests: np.ndarray  # (samples,) uint64: equal for samples of the same tokens


def load_tokens(
    kind: str,
    paths: list[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
    cache_dir: Path = CACHE_DIR,
) -> TokenStore:
    """The tokens of `paths`, from the cache or tokenized now.

    Args:
        kind: `"sft"`, `"pretrain"` (documents end with the pad/end-of-text token), or
            `"pretrain_wrapped"` (a chat turn's tokens around each document besides).
        max_seq_len: longest conversation in tokens; longer ones are cut and counted, and those
            that lose every label are dropped and counted.

    Raises:
        DataError: see `read_jsonl`, `record_text` and `record_messages`.
    """
    for path in paths:
        check_file(path)
    files = [{"name": path.name, "sha256": file_sha256(path)} for path in paths]
    key = {
        "version": CACHE_VERSION,
        "kind": kind,
        "files": [file["sha256"] for file in files],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "ids": [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id],
        "max_seq_len": max_seq_len if kind == "sft" else None,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / f"{kind}-{digest}"
    if not folder.is_dir():
        build_store(folder, kind, paths, tokenizer, max_seq_len)
    store = read_store(folder, token_dtype(tokenizer))
    info = {"files": files, "tokenizer_sha256": key["tokenizer"], **store.info}
    if kind != "sft":
        tail = tail_length(len(store.tokens), max_seq_len)
        dropped = len(store.tokens) % max_seq_len - tail
        served = len(store.tokens) - dropped
        blocks = -(-served // max_seq_len)
        info |= {"dropped_tail_tokens": dropped, "labeled_tokens": served - blocks}
    return replace(store, info=info)


def read_store(folder: Path, dtype: type) -> TokenStore:
    """A store that `write_store` wrote.

    Raises:
        DataError: files are missing, broken, or not as long as each other says.
    """
    try:
        info = parse_json((folder / "info.json").read_text(encoding="utf-8"))
        store = TokenStore(
            tokens=np.memmap(folder / "tokens.bin", dtype=dtype, mode="r"),
            starts=np.load(folder / "starts.npy", mmap_mode="r"),
            labeled=np.load(folder / "labeled.npy", mmap_mode="r"),
            info=info,
            digests=np.load(folder / "digests.npy", mmap_mode="r"),
        )
        lengths = [len(store.tokens), store.starts[-1], len(store.starts) - 1, len(store.digests)]
        whole = lengths == [info["tokens"], info["tokens"], info["samples"], info["samples"]]
        whole = whole and len(store.labeled) in (0, info["tokens"])
    except (OSError, EOFError, ValueError, TypeError, LookupError) as error:
        raise DataError(f"{folder}: a damaged token cache ({error}); delete the folder") from error
    if not whole:
        raise DataError(f"{folder}: a damaged token cache (files cut short); delete the folder")
    return store


def build_store(
    folder: Path,
    kind: str,
    paths: list[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
) -> None:
    """Tokenizes `paths` into `folder`: written aside, then moved into place in one step.

    Two processes may build the same store at once; the first to finish puts its copy in place
    and the other's, which is identical, is discarded.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        write_store(aside, kind, paths, tokenizer, max_seq_len)
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_store(
    folder: Path,
    kind: str,
    paths: list[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
) -> None:
    """Writes the arrays of a `TokenStore` and `info.json` to `folder`."""
    dtype = token_dtype(tokenizer)
    lengths: list[int] = []
    labeled: list[np.ndarray] = []
    digests = bytearray()
    known: dict[str, list[int]] = {}
    counts = {"records": 0, "truncated": 0, "dropped_without_labels": 0}
    encode = ENCODERS[kind]
    bar = tqdm(desc="tokenizing", unit=" records", disable=None, file=sys.stderr)
    with (folder / "tokens.bin").open("wb") as out, bar, no_collection():
        records = (item for path in paths for item in read_jsonl(path))
        for chunk in chunks(records, ENCODE_CHUNK):
            for ids, mask in encode(tokenizer, chunk, max_seq_len, counts, known):
                content = np.asarray(ids, dtype=dtype).tobytes()
                out.write(content)
                digests += hashlib.blake2b(content, digest_size=8).digest()
                lengths.append(len(ids))
                labeled.append(np.asarray(mask, dtype=bool))
            counts["records"] += len(chunk)
            bar.update(len(chunk))
    if not lengths:
        raise DataError(
            f"{paths[0]}: no sample keeps an assistant token within {max_seq_len} tokens; "
            "raise --max_seq_len"
        )
    flat = np.concatenate(labeled)
    np.save(folder / "labeled.npy", flat)
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    per_sample = np.frombuffer(bytes(digests), dtype=np.uint64)
    np.save(folder / "digests.npy", per_sample)
    counts |= {"samples": len(lengths), "tokens": sum(lengths), "labeled_tokens": int(flat.sum())}
    counts["duplicates"] = len(per_sample) - len(np.unique(per_sample))
    (folder / "info.json").write_text(json.dumps(counts))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pauses the garbage collector, which would take half of the time to scan a chunk's lists."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def encode_documents(
    tokenizer: PreTrainedTokenizerFast,
    chunk: list[tuple[str, dict]],
    _: int,
    __: dict,
    known: dict[str, list[int]],
) -> list[tuple[list[int], list[bool]]]:
    """Documents, each closed by the end-of-text token; no mask, since every token is a target."""
    texts = [record_text(record, where) for where, record in chunk]
    encoded = encode_batch(tokenizer.backend_tokenizer, texts, special=False, known=known)
    return [(ids + [tokenizer.pad_token_id], []) for ids in encoded]


def encode_wrapped(
    tokenizer: PreTrainedTokenizerFast,
    chunk: list[tuple[str, dict]],
    length: int,
    counts: dict,
    known: dict[str, list[int]],
) -> list[tuple[list[int], list[bool]]]:
    """Documents between the tokens that open and close a chat turn, as MiniMind's own data are."""
    opening, closing = tokenizer.bos_token_id, tokenizer.eos_token_id
    if opening is None:
        raise DataError(
            f"--wrap_documents: {tokenizer.name_or_path} has no bos_token to open a turn with; "
            "name another --tokenizer_path"
        )
    plain = encode_documents(tokenizer, chunk, length, counts, known)
    return [([opening, *ids[:-1], closing, ids[-1]], mask) for ids, mask in plain]


def encode_samples(
    tokenizer: PreTrainedTokenizerFast,
    chunk: list[tuple[str, dict]],
    max_seq_len: int,
    counts: dict[str, int],
    known: dict[str, list[int]],
) -> list[tuple[list[int], list[bool]]]:
    """Conversations cut at `max_seq_len` tokens; adds what was cut and dropped to `counts`."""
    conversations = [record_messages(record, where) for where, record in chunk]
    kept = []
    for ids, mask in encode_conversations(tokenizer, conversations, known=known):
        counts["truncated"] += len(ids) > max_seq_len
        # The first token is never predicted, so a label there would train nothing.
        if any(mask[1:max_seq_len]):
            kept.append((ids[:max_seq_len], mask[:max_seq_len]))
        else:
            counts["dropped_without_labels"] += 1
    return kept


ENCODERS = {
    "sft": encode_samples,
    "pretrain": encode_documents,
    "pretrain_wrapped": encode_wrapped,
}


def count_shared(store: TokenStore, other: TokenStore) -> int:
    """How many samples of `store` are in `other` too, token for token."""
    return int(np.isin(store.digests, other.digests).sum())


def data_notes(info: dict) -> list[str]:
    """What was cut, dropped or found twice, a sentence each; `info` is a store's."""
    notes = {
        "truncated": "cut at --max_seq_len tokens",
        "dropped_without_labels": "dropped: --max_seq_len leaves no token of the assistant",
        "duplicates": "the same as an earlier one, and stay in",
        "also_in_training": "also in the training data, so not held out",
    }
    names = ", ".join(file["name"] for file in info["files"])
    return [
        f"{names}: {info[key]:,} of {info['records']:,} records are {note}"
        for key, note in notes.items()
        if info.get(key)
    ]


# ---------------------------------------------------------------- samples and batches


def tail_length(total: int, max_seq_len: int) -> int:
    """Tokens of the last, shorter block; a single token has no target and is left out."""
    tail = total % max_seq_len
    return tail if tail > 1 else 0


class PackedDataset(Dataset):
    """Pretraining blocks of `max_seq_len` tokens from one stream of documents.

    Every token but the first of a block is a target. A last, shorter block is served too.
    """

    def __init__(self, store: TokenStore, max_seq_len: int):
        self.store = store
        self.max_seq_len = max_seq_len
        total = len(store.tokens)
        tail = tail_length(total, max_seq_len)
        self.lengths = np.full(total // max_seq_len, max_seq_len)
        if tail:
            self.lengths = np.append(self.lengths, tail)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels of block `index`, each (length,) int64."""
        start = index * self.max_seq_len
        ids = self.store.tokens[start : start + self.lengths[index]].astype(np.int64)
        return ids, ids


class ConversationDataset(Dataset):
    """Fine-tuning samples: one conversation each, with labels on the assistant's tokens.

    Args:
        max_samples: how many to keep, drawn at random. The draw depends on nothing else: runs of
            all seeds share their samples, and a smaller set is part of a larger one.

    Raises:
        DataError: there are fewer.
    """

    def __init__(self, store: TokenStore, max_samples: int | None = None):
        lengths = np.diff(store.starts)
        if max_samples is not None and max_samples > len(lengths):
            raise DataError(
                f"--max_train_samples {max_samples}: the data have {len(lengths):,} conversations; "
                "lower it or drop it"
            )
        order = np.random.default_rng(SUBSET_SEED).permutation(len(lengths))
        self.kept = np.sort(order[:max_samples])
        self.lengths = lengths[self.kept]
        self.store = store if max_samples is None else with_subset(store, self.kept)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels (`IGNORE_INDEX` off the assistant), each (length,) int64."""
        first = self.kept[index]
        span = slice(self.store.starts[first], self.store.starts[first + 1])
        ids = self.store.tokens[span].astype(np.int64)
        return ids, np.where(self.store.labeled[span], ids, IGNORE_INDEX)


def with_subset(store: TokenStore, kept: np.ndarray) -> TokenStore:
    """The store with the digests of the samples `kept` (indices), counted apart in `info`."""
    spans = [slice(store.starts[i], store.starts[i + 1]) for i in kept]
    counts = {
        "samples": len(kept),
        "tokens": sum(int(span.stop - span.start) for span in spans),
        "labeled_tokens": sum(int(store.labeled[span].sum()) for span in spans),
    }
    return replace(store, digests=store.digests[kept], info=store.info | {"kept": counts})


def load_dataset(
    kind: str,
    paths: list[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
    cache_dir: Path = CACHE_DIR,
    max_samples: int | None = None,
) -> PackedDataset | ConversationDataset:
    """The data set of a stage: `kind` is that of `load_tokens`.

    Args:
        max_samples: conversations to keep, by default all.
    """
    store = load_tokens(kind, paths, tokenizer, max_seq_len, cache_dir)
    if kind == "sft":
        return ConversationDataset(store, max_samples)
    return PackedDataset(store, max_seq_len)


def collate(samples: list[tuple[np.ndarray, np.ndarray]], pad_id: int) -> dict[str, torch.Tensor]:
    """Samples as `input_ids` and `labels`, (batch, longest) int64, padded on the right.

    `num_tokens`, a scalar, counts the tokens that are not padding, fillers left out.
    """
    longest = max(len(ids) for ids, _ in samples)
    input_ids = np.full((len(samples), longest), pad_id, dtype=np.int64)
    labels = np.full((len(samples), longest), IGNORE_INDEX, dtype=np.int64)
    for row, (ids, targets) in enumerate(samples):
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = targets
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "num_tokens": torch.tensor(
            sum(len(ids) for ids, targets in samples if (targets != IGNORE_INDEX).any())
        ),
    }


class StepCollator:
    """One optimizer step of one process, from indices to a list of micro-batches.

    A negative index `~i` is sample i without labels: a filler that keeps processes in step when
    a last batch runs short.
    """

    def __init__(self, dataset: PackedDataset | ConversationDataset, pad_id: int):
        self.dataset = dataset
        self.pad_id = pad_id

    def __call__(self, step: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        return [collate([self.fetch(i) for i in micro], self.pad_id) for micro in step]

    def fetch(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample `index`; for a filler, its tokens with nothing to learn."""
        if index >= 0:
            return self.dataset[index]
        ids, labels = self.dataset[~index]
        return ids, np.full_like(labels, IGNORE_INDEX)


class StepSampler(Sampler):
    """Plans the whole run: one item is one optimizer step of one process.

    An item is a list of micro-batches, each a list of sample indices. Samples are shuffled by
    `(seed, epoch)`, grouped by length when lengths differ, and cut into global batches of
    `batch_size * accumulation_steps * world_size`. Which samples form a global batch does not
    depend on how many processes share it, so one process and two train on the same batches; and
    since the plan is a pure function of its arguments, a resumed run continues with the very
    batch that it would have seen.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        accumulation_steps: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 42,
        first_step: int = 0,
        max_steps: int | None = None,
    ):
        self.lengths = lengths
        self.batch_size = batch_size
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.global_batch = batch_size * accumulation_steps * world_size
        self.steps_per_epoch = -(-len(lengths) // self.global_batch)
        self.first_step = first_step
        self.max_steps = max_steps

    def __len__(self) -> int:
        return self.max_steps - self.first_step

    def __iter__(self) -> Iterator[list[list[int]]]:
        step = self.first_step
        while step < self.max_steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            for batch in self.epoch_batches(epoch)[position : position + self.max_steps - step]:
                yield self.share(batch)
                step += 1

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """The global batches of an epoch, each sorted by length, in random order."""
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

    def share(self, batch: np.ndarray) -> list[list[int]]:
        """This process's micro-batches of a global batch, the same number on every process."""
        mine = batch[self.rank :: self.world_size].tolist()
        largest_share = -(-len(batch) // self.world_size)
        micro_batches = list(chunks(mine, self.batch_size))
        while len(micro_batches) < -(-largest_share // self.batch_size):
            micro_batches.append([~int(batch[0])])
        return micro_batches


def describe_sample(
    tokenizer: PreTrainedTokenizerFast, dataset: PackedDataset | ConversationDataset, index: int
) -> str:
    """Sample `index` as a table of position, token, and the label that this position predicts."""
    ids, labels = dataset[index]
    targets = np.append(labels[1:], IGNORE_INDEX)
    lines = [f"sample {index}: {len(ids)} tokens", f"{'pos':>5}  {'token':<24} predicts"]
    for position, (token, target) in enumerate(zip(ids, targets, strict=True)):
        shown = "-" if target == IGNORE_INDEX else repr(tokenizer.decode([int(target)]))
        lines.append(f"{position:>5}  {tokenizer.decode([int(token)])!r:<24} {shown}")
    return "\n".join(lines)
