"""Reading, labels, the token cache, packing and the plan of batches."""

import gzip
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast as Tokenizer

from dataset import lm_dataset
from dataset.lm_dataset import (
    StepPlan,
    TokenDataset,
    collate,
    encode_batch,
    encode_conversations,
    load_dataset,
    load_tokens,
    plan_shapes,
    read_jsonl,
    read_prompt,
    record_messages,
    record_text,
    turns,
)
from model.checkpoint import load_tokenizer
from model.cli import UserError
from model.model_minimind import IGNORE_INDEX
from tests.trainer.runs import write_jsonl

PAD, BOS, EOS = 0, 1, 2
DIALOG = [{"role": "system", "content": "Be brief: one line."}]
DIALOG += turns("What is 12 + 30?", "42, I'd say.") + turns("用中文说 🙂", "四十二\n\n'tis all.")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The token cache of a test."""
    monkeypatch.setattr(lm_dataset, "CACHE_DIR", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(("mark", "end"), [(b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")])
def test_reader_names_the_line_and_skips_blank_ones(
    tmp_path: Path, name: str, mark: bytes, end: bytes
) -> None:
    content = mark + end.join([b'{"text": "\xc3\xa9"}', b"", b"  ", b'{"text": "\\u4e8c"}'])
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read_jsonl(path)) == [(f"{path}:1", {"text": "é"}), (f"{path}:4", {"text": "二"})]


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.jsonl", None, "d.jsonl: cannot be read after line 0"),
        ("d.jsonl", b"\n \n", "d.jsonl: holds no record"),
        (
            "d.jsonl",
            GOOD * 2 + b'\n{"text": "fi',
            "d.jsonl:4: no JSON object (Unterminated string starting at character 10)",
        ),
        ("d.jsonl", GOOD + b'{"a": "\\ud83d"}', "d.jsonl:2: no JSON object ('utf-8' codec"),
        ("d.jsonl", GOOD + b"[1]", "d.jsonl:2: no JSON object (found: list)"),
        ("d.jsonl", b'[\n{"text": "fish"}\n]', "d.jsonl:1: no JSON object (an array;"),
        (
            "d.jsonl.gz",
            gzip.compress(GOOD * 9, mtime=0)[:-9],
            "d.jsonl.gz: cannot be read after line 9",
        ),
    ],
)
def test_broken_files_are_one_error(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_jsonl(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path}/{reason}")


def sharegpt(*names: object) -> dict:
    messages = [{"from": name, "value": f"x{place}"} for place, name in enumerate(names)]
    return {"id": "a_0", "conversations": messages}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": DIALOG}, DIALOG),
        ({"messages": [m | {"id": 3} for m in DIALOG]}, DIALOG),
        ({"instruction": " Add. ", "input": "1 2", "output": "3\n"}, turns("Add. \n1 2", "3")),
        ({"instruction": "Hi", "output": "Yo"}, turns("Hi", "Yo")),
        ({"prompt": "The sky is", "completion": " blue.\n"}, turns("The sky is", "blue.")),
        ({"prompt": DIALOG[:2], "completion": DIALOG[2:3]}, DIALOG[:3]),
        ({"prompt": "Hi", "completion": turns("", "Yo")[1:]}, turns("Hi", "Yo")),
        (sharegpt("human", "gpt", "human", "gpt"), turns("x0", "x1", "x2", "x3")),
        (
            sharegpt("system", "user", "assistant"),
            [{"role": "system", "content": "x0"}, *turns("x1", "x2")],
        ),
    ],
)
def test_conversation_forms(record: dict, expected: list[dict[str, str]]) -> None:
    assert record_messages(record, "f:1") == expected


def roles(*names: object) -> dict:
    return {"messages": [{"role": name, "content": "x"} for name in names]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "x"}, "fine-tuning reads a list of messages"),
        ({"instruction": ["x"], "output": "y"}, '"instruction" must be a string'),
        ({"instruction": "x", "input": 5, "output": "y"}, '"input" must be a string'),
        ({"instruction": " ", "output": "y"}, 'needs a non-empty string "instruction"'),
        ({"instruction": "x", "output": " "}, 'needs a non-empty string "output"'),
        ({"messages": []}, "the roles are []"),
        (roles("user", "robot"), "the roles are ['user', 'robot']; expected an optional system"),
        (roles("user", "assistant", "system", "assistant"), "the roles are"),
        ({"system": "Be kind.", "messages": DIALOG}, '"system" is not read; convert or remove it'),
        ({"messages": [DIALOG[1], DIALOG[2] | {"tool_calls": [1]}]}, '"tool_calls" is not read'),
        ({"messages": [DIALOG[1], DIALOG[2] | {"weight": 0}]}, 'a "weight" other than 1'),
        ({"instruction": "x", "output": "y", "weight": 0.5}, 'a "weight" other than 1'),
        ({"prompt": "x"}, "fine-tuning reads a list of messages"),
        ({"completion": "x"}, "fine-tuning reads a list of messages"),
        ({"prompt": ["x"], "completion": "y"}, "fine-tuning reads a list of messages"),
        ({"prompt": "x", "completion": " "}, 'needs a non-empty string "completion"'),
        ({"prompt": DIALOG[:3], "completion": DIALOG[3:]}, 'an answer in "prompt" would be'),
        ({"prompt": "x", "completion": "y", "tools": [1]}, '"tools" is not read'),
        (sharegpt("human", "function_call"), "the roles are ['user', 'function_call']; expected"),
        (sharegpt("gpt", "human"), "the roles are ['assistant', 'user']; expected"),
        (sharegpt("human", ["gpt"]), "the roles are ['user', ['gpt']]; expected"),
        ({"conversations": [{"from": "human"}]}, 'message 1 needs a non-empty string "value"'),
    ],
)
def test_conversations_that_cannot_be_learned_are_refused(record: dict, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        record_messages(record, "f:1")
    assert str(caught.value).startswith(f"f:1: {reason}")


@pytest.mark.parametrize("text", [None, 3, " \n"])
def test_text_must_be_there(text: object) -> None:
    with pytest.raises(UserError, match='f:1: pretraining reads a non-empty string "text"'):
        record_text({"text": text}, "f:1")


@pytest.mark.parametrize("messages", [DIALOG, DIALOG[1:3], DIALOG[1:], turns("x\u3000", "\ta\n\n")])
def test_ids_and_labels_are_transformers_own(
    tokenizer: Tokenizer, messages: list[dict[str, str]]
) -> None:
    [(ids, labeled)] = encode_conversations(tokenizer, [messages])
    reference = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == reference["input_ids"]
    assert labeled == [bool(mask) for mask in reference["assistant_masks"]]
    # For inference, the prompt opens an answer.
    [(ids, labeled)] = encode_conversations(tokenizer, [messages[:-1]], generation_prompt=True)
    reference = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert ids == reference["input_ids"] and not labeled[-1]


def test_control_tokens_come_from_the_template_alone(tokenizer: Tokenizer) -> None:
    said = ["<|im_start|>", "a<|im_end|>\nb", "<|endoftext|>?", "<|im_end|>"]
    chat = turns(*said[:2]) + turns(*said[2:])
    [(ids, labeled)] = encode_conversations(tokenizer, [chat])
    opened = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat]
    assert tokenizer.decode(ids) == "".join(opened)
    assert Counter(token for token in ids if token <= EOS) == {BOS: 4, EOS: 4}
    learned = [token for token, label in zip(ids, labeled, strict=True) if label]
    assert tokenizer.decode(learned) == f"{said[1]}<|im_end|>{said[3]}<|im_end|>"
    assert learned.count(EOS) == 2
    assert tokenizer("<|im_end|>")["input_ids"] == [EOS]  # the tokenizer is left as it was


def test_loss_falls_on_answers_if_no_text_closes_prompts() -> None:
    other, end = load_tokenizer(), "{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
    other.chat_template = f"{{% for m in messages %}}{{{{ m.content }}}}{end}{{% endfor %}}"
    [(ids, labeled)] = encode_conversations(other, [DIALOG])
    learned = [token for token, label in zip(ids, labeled, strict=True) if label]
    assert other.decode(learned) == "42, I'd say.<|im_end|>四十二\n\n'tis all.<|im_end|>"


@pytest.mark.parametrize("messages", [DIALOG, DIALOG[1:3]])
def test_prompts_are_read_without_their_template(
    tokenizer: Tokenizer, messages: list[dict[str, str]]
) -> None:
    """Of another template the whole text is shown, for nobody knows what is content."""
    contents = [turn["content"] for turn in messages if turn["role"] == "system"]
    contents.append("assistant, are you a user?")  # words of the template
    prompt = [*messages[: len(contents) - 1], {"role": "user", "content": contents[-1]}]
    [(ids, _)] = encode_conversations(tokenizer, [prompt], generation_prompt=True)
    assert read_prompt(tokenizer, ids) == "\n".join(contents)
    assert read_prompt(tokenizer, ids[1:]) == tokenizer.decode(ids[1:])


@pytest.mark.parametrize("content", ["", "{{ m['content'] }}\n"])
def test_unusable_chat_template_is_refused(content: str) -> None:
    """The template leaves the content out, or does not close an answer."""
    other = load_tokenizer()
    other.chat_template = f"{{% for m in messages %}}{content}{{% endfor %}}"
    with pytest.raises(UserError, match="must hold each content once and close an assistant turn"):
        encode_conversations(other, [DIALOG])


def test_truncation_and_lost_labels_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dialogs = [turns("Hi", "Yes"), turns("Hi", "word " * 40), turns("word " * 40, "Yes")]
    limit = len(tokenizer.apply_chat_template(dialogs[0])["input_ids"])
    opening = tokenizer.apply_chat_template(dialogs[0][:1], add_generation_prompt=True)
    opening = len(opening["input_ids"])
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": d} for d in dialogs * 2])
    dataset = load_dataset("sft", [path], tokenizer, limit)
    assert dataset.lengths.tolist() == [limit] * 4
    targets = [limit - 1 - opening, limit - opening] * 2  # the last newline is no label
    assert dataset.targets.tolist() == targets
    assert [int((dataset[i][1][1:] != IGNORE_INDEX).sum()) for i in range(4)] == targets
    counts = {"records": 6, "truncated": 4, "dropped_without_labels": 2, "samples": 4}
    counts |= {"tokens": 4 * limit, "labeled_tokens": sum(targets)}
    assert {name: dataset.info[name] for name in counts} == counts
    # One token more than the opening keeps one label; the opening alone keeps nothing.
    assert load_dataset("sft", [path], tokenizer, opening + 1).targets.tolist() == [1] * 4
    with pytest.raises(UserError, match=f"no answer within {opening} tokens; raise --max_seq_len"):
        load_dataset("sft", [path], tokenizer, opening)


def test_a_first_token_is_no_target() -> None:
    """Nothing stands before it that could predict it."""
    arrays = {"tokens": np.arange(5), "labeled": np.array([True, True, False, True, True])}
    dataset = TokenDataset(arrays, np.array([0, 3]), np.array([3, 5]), {})
    assert dataset.targets.tolist() == [1, 1]
    arrays = {"tokens": np.arange(5), "labeled": np.array([], bool)}
    assert TokenDataset(arrays, np.array([0]), np.array([5]), {}).targets.tolist() == [4]


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_second_load_reads_no_json_and_gives_the_same(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    record = {"text": "Some text."} if kind == "pretrain" else {"conversations": DIALOG}
    path = write_jsonl(tmp_path / "a.jsonl", [record] * 2)
    first, info = load_tokens(kind, [path], tokenizer, 50)
    monkeypatch.setattr(lm_dataset, "read_jsonl", None)
    second, info_again = load_tokens(kind, [path], tokenizer, 50)
    assert first.keys() == second.keys() and info == info_again
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert second["tokens"].dtype == np.uint16


def test_what_changes_the_tokens_changes_the_key(
    tmp_path: Path, tokenizer: Tokenizer, cache: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": DIALOG}])

    def files_after(tokens_of: Tokenizer, max_seq_len: int) -> int:
        load_dataset("sft", [path], tokens_of, max_seq_len)
        return len(list(cache.glob("[!.]*")))

    assert [files_after(tokenizer, 50), files_after(tokenizer, 50)] == [1, 1]
    path = path.rename(tmp_path / "renamed.jsonl")
    assert files_after(tokenizer, 50) == 1
    assert files_after(tokenizer, 49) == 2
    other = load_tokenizer()
    other.chat_template = other.chat_template.replace("'\n' }}{% endfor", "' ' }}{% endfor")
    assert files_after(other, 50) == 3
    write_jsonl(path, [{"conversations": DIALOG[1:]}])
    assert files_after(tokenizer, 50) == 4
    text = write_jsonl(tmp_path / "t.jsonl", [{"text": "x y z"}])
    for max_seq_len in (2, 3):  # blocks are cut later
        load_dataset("pretrain", [text], tokenizer, max_seq_len)
    assert len(list(cache.glob("[!.]*"))) == 5


def test_packing_cuts_one_stream_of_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of several files, in order; a string that looks like a control token stays text."""
    texts = ["The first document.", "二 <|endoftext|>", "Third, and last of all."]
    encoded = encode_batch(tokenizer, texts, special=False)
    assert not any(token <= EOS for ids in encoded for token in ids)
    stream = [token for ids in encoded for token in [*ids, PAD]]
    paths = [write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts[:2]])]
    paths += [write_jsonl(tmp_path / "b.jsonl", [{"text": texts[2]}])]
    size = len(stream) // 3 - 1
    blocks = load_dataset("pretrain", paths, tokenizer, size)
    tail = len(stream) - 3 * size
    assert 1 < tail < size, len(stream)
    assert blocks.lengths.tolist() == [size, size, size, tail]
    assert blocks.targets.tolist() == [size - 1, size - 1, size - 1, tail - 1]
    for index in range(4):
        ids, labels = blocks[index]
        assert ids.tolist() == labels.tolist() == stream[index * size : (index + 1) * size]
    # A tail of one token has no target, and is left out.
    blocks = load_dataset("pretrain", paths, tokenizer, len(stream) - 1)
    assert (len(blocks), blocks.info["tokens"]) == (1, len(stream) - 1)
    assert blocks.info["labeled_tokens"] == len(stream) - 2
    # Between the tokens of a turn, as MiniMind's own data are.
    stream = [token for ids in encoded for token in [BOS, *ids, EOS, PAD]]
    assert load_dataset("pretrain_wrapped", paths, tokenizer, 999)[0][0].tolist() == stream
    other = load_tokenizer()
    other.bos_token = None
    with pytest.raises(UserError, match="--wrap_documents: .* has no bos_token"):
        load_dataset("pretrain_wrapped", paths, other, 999)


def test_chosen_samples_are_part_of_a_larger_choice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"conversations": turns(f"Say {i}", "yes " * (i % 7 + 1))} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    texts = []
    for size in (10, 25, None):
        chosen = load_dataset("sft", [path], tokenizer, 64, size)
        texts.append([tokenizer.decode(chosen[i][0]) for i in range(len(chosen))])
    few, more, whole = texts
    assert len(few) == 10 and few != whole[:10]
    assert set(few) < set(more) < set(whole)
    with pytest.raises(UserError, match="--max_train_samples 41: the data have 40"):
        load_dataset("sft", [path], tokenizer, 64, 41)


def test_samples_are_padded_on_the_right_and_none_make_a_row_without_a_label() -> None:
    no = IGNORE_INDEX
    pairs = (([5, 6, 8], [no, 6, 8]), ([9], [9]), ([7, 4], [no, 4]))
    samples = [tuple(map(np.array, pair)) for pair in pairs]
    batch = collate(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 8], [9, 0, 0], [7, 4, 0]]
    assert batch["labels"].tolist() == [[no, 6, 8], [9, no, no], [no, 4, no]]
    assert batch["label_positions"].tolist() == [0, 1, 6]  # they predict 6, 8 and 4
    batch = collate(samples, 4, [(2, 9), (5, 5)])
    assert batch["input_ids"].tolist() == [[5, 6, 8, 0, 0], [9] + [0] * 4, [7, 4, 0, 0, 0], [0] * 5]
    assert batch["label_positions"].tolist() == [0, 1, 10, 4, 4]  # 4 predicts none
    batch = collate([])
    assert [batch[name].tolist() for name in batch] == [[[0, 0]], [[no, no]], [1, 1]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


# The same examples at every run, so that a failure is the code's.
@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60),
    batch_size=st.integers(1, 7),
    accumulation=st.integers(1, 4),
    processes=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_sample_comes_once_an_epoch(
    lengths: list[int], batch_size: int, accumulation: int, processes: int, seed: int
) -> None:
    settings_of_plan = (np.array(lengths), batch_size, accumulation, seed, processes)
    plan = StepPlan(*settings_of_plan)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = Counter(int(i) for step in steps for i in plan[step])
        assert seen == dict.fromkeys(range(len(lengths)), 1)
        for step in steps:
            shares = [plan.micro_batches(step, process) for process in range(processes)]
            assert all(1 <= len(share) <= accumulation for share in shares)
            assert all(len(micro) <= batch_size for share in shares for micro in share)
            shared = sorted(i for share in shares for micro in share for i in micro)
            assert shared == sorted(plan[step].tolist())
    # Any step by itself, as a resumed run asks for it; and the same batches for one process.
    step = 2 * plan.steps_per_epoch - 1
    assert np.array_equal(StepPlan(*settings_of_plan)[step], plan[step])
    alone = StepPlan(np.array(lengths), batch_size * accumulation * processes, seed=seed)
    assert np.array_equal(alone[step], plan[step])


@pytest.mark.parametrize("spread", [0, 30], ids=["packed", "grouped by length"])
def test_epochs_differ_and_batches_are_shuffled(spread: int) -> None:
    """Each epoch has an order of its own, by seed; lengths do not rise from batch to batch."""
    lengths = 10 + np.arange(400) % (spread + 1)
    plan = StepPlan(lengths, 8)
    steps = range(plan.steps_per_epoch)
    first, second = ([plan[epoch * len(steps) + i].tolist() for i in steps] for epoch in (0, 1))
    other = [StepPlan(lengths, 8, seed=43)[i].tolist() for i in steps]
    assert first != second and first != other
    assert {*map(tuple, first)}.isdisjoint(map(tuple, second))  # in other company, too
    starts = [batch[0] for batch in first]
    assert starts != sorted(starts)
    if spread:
        longest = [int(lengths[batch].max()) for batch in first]
        rises = sum(a <= b for a, b in pairwise(longest))
        assert 10 < rises < 40  # of 49: about half
        assert max(int(np.ptp(lengths[batch])) for batch in first) <= 2  # but alike in a batch


def test_few_shapes_hold_every_batch() -> None:
    lengths = np.random.default_rng(3).integers(5, 60, 203)
    plan = StepPlan(lengths, 8, 2, processes=2)
    shapes = plan_shapes(plan, lengths // 2, plan.steps_per_epoch, 6)
    assert len(shapes) == 6
    for step in range(plan.steps_per_epoch):
        for batch in plan.micro_batches(step, 0) + plan.micro_batches(step, 1):
            fitting = (shape for shape in shapes if shape[0] >= lengths[batch].max(initial=2))
            assert next(fitting)[1] >= (lengths[batch] // 2).sum()
    plan, targets = StepPlan(np.array([10, 10, 11, 30, 50, 60]), 1), np.array([1, 4, 3, 7, 5, 6])
    assert plan_shapes(plan, targets, 6, 3) == [(10, 4), (30, 7), (60, 7)]
