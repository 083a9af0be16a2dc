"""Properties that hold for any input: the reader, the masks, the plan of batches, and merging."""

import gzip
import json
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import DataError, read_jsonl
from dataset.lm_dataset import (
    IGNORE_INDEX,
    ROLES,
    StepSampler,
    collate,
    encode_batch,
    encode_conversations,
    record_messages,
)
from dataset.untrusted import error_line, shown
from model.checkpoint import load_tokenizer

# The same examples at every run, so that a failure is the code's, and its case is printed.
settings.register_profile(
    "repeatable",
    derandomize=True,
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Any characters that UTF-8 can hold, often with the strings of control tokens among them.
TEXT = st.lists(st.text(max_size=8) | st.sampled_from((*SPECIAL, "\n", " word")), max_size=6).map(
    "".join
)
CONTENT = TEXT.filter(lambda text: text.strip())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
RECORDS = st.lists(st.dictionaries(TEXT, JSON, max_size=3), min_size=1, max_size=5)
BLANK_LINES = st.sampled_from([b"", b"\n", b" \t\r\n"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer()


def read_bytes(content: bytes, name: str) -> list[tuple[str, dict]]:
    """What the reader makes of a file of these bytes; its places without the folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return [(where.removeprefix(f"{folder}/"), r) for where, r in read_jsonl(path)]


# ---------------------------------------------------------------- the reader


@given(
    records=RECORDS,
    ascii_only=st.booleans(),
    ending=st.sampled_from([b"\n", b"\r\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    blank=BLANK_LINES,
    last=st.booleans(),
    packed=st.booleans(),
)
def test_records_that_are_written_are_read(
    records: list[dict],
    ascii_only: bool,
    ending: bytes,
    mark: bytes,
    blank: bytes,
    last: bool,
    packed: bool,
) -> None:
    lines = [json.dumps(record, ensure_ascii=ascii_only).encode() for record in records]
    content = mark + (ending + blank).join(lines) + (ending if last else b"")
    name = "d.jsonl.gz" if packed else "d.jsonl"
    found = read_bytes(gzip.compress(content, 1) if packed else content, name)
    step = 2 if blank else 1
    assert found == [(f"{name}:{1 + i * step}", record) for i, record in enumerate(records)]


@settings(max_examples=100)
@given(
    content=st.binary(max_size=60)
    | st.tuples(RECORDS, st.binary(max_size=4), st.integers(0, 80)).map(
        lambda parts: spoiled(json.dumps(parts[0][0]).encode() * 2, parts[1], parts[2])
    ),
    name=st.sampled_from(["d.jsonl", "d.jsonl.gz"]),
    pack=st.booleans(),
)
def test_any_bytes_give_records_or_one_error(content: bytes, name: str, pack: bool) -> None:
    if pack:
        content = gzip.compress(content, 1)[: len(content) + 10]
    try:
        found = read_bytes(content, name)
    except DataError as error:
        assert f"/{name}:" in str(error)
        assert error_line(error).isprintable()
    else:
        assert found and all(isinstance(record, dict) for _, record in found)


def spoiled(content: bytes, noise: bytes, place: int) -> bytes:
    """`content` with some bytes replaced."""
    return content[:place] + noise + content[place + len(noise) :]


FIELDS = ("conversations", "messages", "instruction", "input", "output", "text", "system")
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "tools"]), st.sampled_from(ROLES) | JSON
)
ANY_RECORD = st.dictionaries(st.sampled_from(FIELDS), JSON) | st.lists(MESSAGE, max_size=4).map(
    lambda turns: {"messages": turns}
)


@settings(max_examples=100)
@given(record=ANY_RECORD)
def test_any_record_is_a_conversation_or_one_error(record: dict) -> None:
    try:
        messages = record_messages(record, "f:1")
    except DataError as error:
        assert str(error).startswith("f:1: ")
        assert error_line(error).isprintable()
    else:
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"].strip() for message in messages)


BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@given(text=st.text())
def test_shown_text_has_no_character_that_acts(text: str) -> None:
    line = error_line(text)
    assert line.startswith("error: ")
    assert not {unicodedata.category(c) for c in line} & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(c) for c in line} & BIDI_CONTROLS
    assert shown(shown(text)) == shown(text)
    plain = "".join(c for c in text if c.isascii() and c.isprintable())
    assert shown(plain) == plain


# ---------------------------------------------------------------- masks


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    """An optional system message, then one to three questions with answers."""
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3))
    return [{"role": role, "content": draw(CONTENT)} for role in roles]


@given(batch=st.lists(conversations(), min_size=1, max_size=3))
def test_labels_are_the_answers_and_their_ends(
    tokenizer: PreTrainedTokenizerFast, batch: list[list[dict[str, str]]]
) -> None:
    for messages, (ids, labeled) in zip(batch, encode_conversations(tokenizer, batch), strict=True):
        contents = [message["content"].strip() for message in messages]
        roles = [message["role"] for message in messages]
        turns = list(zip(roles, contents, strict=True))
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        assert tokenizer.decode(ids) == text
        answers = [content for role, content in turns if role == "assistant"]
        learned = [token for token, label in zip(ids, labeled, strict=True) if label]
        assert tokenizer.decode(learned) == "".join(f"{answer}<|im_end|>" for answer in answers)
        # Control tokens come from the template alone, whatever the contents say.
        special = Counter(token for token in ids if token in tokenizer.all_special_ids)
        assert special == dict.fromkeys(
            (tokenizer.bos_token_id, tokenizer.eos_token_id), len(messages)
        )
        assert learned.count(tokenizer.eos_token_id) == len(answers)


@given(texts=st.lists(TEXT, max_size=4))
def test_text_comes_back_and_holds_no_control_token(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    for text, ids in zip(
        texts, encode_batch(tokenizer.backend_tokenizer, texts, special=False), strict=True
    ):
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


# Where GPT-2's expression splits: contractions, runs of white space, signs, control characters.
ASCII_TEXT = st.lists(
    st.text(st.characters(max_codepoint=127), max_size=8)
    | st.sampled_from((*SPECIAL, "  ", "\n\n", " don't", "'S", "it's", "\t", "\x1c", "_", "10")),
    max_size=12,
).map("".join)


@given(parts=st.lists(st.lists(ASCII_TEXT | TEXT, max_size=4), max_size=3))
@settings(max_examples=200)
def test_encoding_by_words_is_encoding(
    tokenizer: PreTrainedTokenizerFast, parts: list[list[str]]
) -> None:
    backend, known = tokenizer.backend_tokenizer, {}
    for texts in parts:
        found = encode_batch(backend, texts, special=False, known=known)
        assert found == encode_batch(backend, texts, special=False)


def test_other_tokenizers_are_not_encoded_by_words(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    (found,) = encode_batch(backend, ["word"], special=False, known={})
    assert found == encode_batch(tokenizer.backend_tokenizer, [" word"], special=False)[0]


# ---------------------------------------------------------------- batches


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60),
    batch_size=st.integers(1, 7),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    resumed=st.integers(0, 100),
)
def test_every_sample_comes_once_an_epoch(
    lengths: list[int], batch_size: int, accumulation: int, world: int, seed: int, resumed: int
) -> None:
    def plan(rank: int, first: int) -> list[list[list[int]]]:
        sampler = StepSampler(np.array(lengths), batch_size, accumulation, world, rank, seed, first)
        sampler.max_steps = 2 * sampler.steps_per_epoch
        return list(sampler)

    shares = [plan(rank, 0) for rank in range(world)]
    steps = len(shares[0])
    for epoch in (range(steps // 2), range(steps // 2, steps)):
        seen = Counter(i for share in shares for s in epoch for micro in share[s] for i in micro)
        assert {i: n for i, n in seen.items() if i >= 0} == dict.fromkeys(range(len(lengths)), 1)
    for step in zip(*shares, strict=True):  # processes in step, none with more than it may hold
        assert len({len(micros) for micros in step}) == 1 and len(step[0]) <= accumulation
        assert all(1 <= len(micro) <= batch_size for micros in step for micro in micros)
    first = resumed % (steps + 1)
    assert [plan(rank, first) for rank in range(world)] == [share[first:] for share in shares]


SAMPLE = st.lists(st.tuples(st.integers(0, 6399), st.booleans()), min_size=1, max_size=12)


@given(samples=st.lists(SAMPLE, min_size=1, max_size=6), pad=st.integers(0, 6399))
def test_collated_samples_come_back(samples: list[list[tuple[int, bool]]], pad: int) -> None:
    pairs = [
        (np.array([i for i, _ in s]), np.array([i if on else IGNORE_INDEX for i, on in s]))
        for s in samples
    ]
    batch = collate(pairs, pad)
    longest = max(map(len, samples))
    assert batch["input_ids"].shape == batch["labels"].shape == (len(samples), longest)
    for row, (ids, labels) in enumerate(pairs):
        padding = longest - len(ids)
        assert batch["input_ids"][row].tolist() == ids.tolist() + [pad] * padding
        assert batch["labels"][row].tolist() == labels.tolist() + [IGNORE_INDEX] * padding
    learning = [len(s) for s in samples if any(on for _, on in s)]
    assert int(batch["num_tokens"]) == sum(learning)
