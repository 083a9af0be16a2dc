"""JSONL -> token ids and labels -> batches.

    {"text": "..."}                                          pretraining
    {"conversations": [{"role": "user", "content": "..."},   fine-tuning; "messages" alike
                       {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."},    the same as ShareGPT has it
                       {"from": "gpt", "value": "..."}]}
    {"prompt": "...", "completion": "..."}                   one turn as TRL has it; each may be a
                                                             list of messages, too
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

from model.cli import UserError, escape_control
from model.files import file_sha256, write_aside, write_text
from model.model_minimind import IGNORE_INDEX

CACHE_DIR = Path(__file__).resolve().parent / "cache"
CACHE_VERSION = 5  # raise it when the stored layout or the tokenization changes
ENCODE_CHUNK = 2_000  # records that are encoded at once, in parallel
SUBSET_SEED = 0  # draws the samples that --max_train_samples keeps
GROUP_BATCHES = 50  # length grouping sorts within this many batches, so order stays random
# Fields that change what a conversation means, and that the chat template does not show.
UNREAD_FIELDS = ("system", "history", "tools", "tool_calls", "function_call", "reasoning_content")
CHAT_FIELDS = (
    '"messages" or "conversations" (also ShareGPT\'s), "prompt" and "completion" (TRL\'s), '
    'or "instruction" and "output"'
)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
CONTENT_SLOT = "\ue000\ue001\ue000"  # private use: stands for a content in the chat template
Encoded = tuple[list[int], list[bool]]  # token ids, and for each whether loss falls on it
Sample = tuple[np.ndarray, np.ndarray]  # token ids and labels
Shape = tuple[int, int]  # of a batch: tokens of a row, labels


# ---------------------------------------------------------------- records


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield `("file:line", record)` for each non-empty line of a plain or gzip JSONL file."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    record = None
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if record is None and line.lstrip().startswith(b"["):
                    raise ValueError("an array; write one object a line")
                record = json.loads(line)
                if b"\\u" in line:  # such an escape may be half of a character
                    json.dumps(record, ensure_ascii=False).encode()
                if not isinstance(record, dict):
                    raise ValueError(f"found: {type(record).__name__}")
                yield f"{path}:{number}", record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read after line {number} ({error})") from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
        raise UserError(f"{path}:{number}: no JSON object ({reason}); mend the line") from error
    except ValueError as error:  # of UTF-8, or another JSON value
        raise UserError(f"{path}:{number}: no JSON object ({error}); mend the line") from error
    if record is None:
        raise UserError(f"{path}: holds no record; expected one JSON object a line")


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write JSON lines, whole or not at all; control characters are escaped."""
    lines = [escape_control(json.dumps(record, ensure_ascii=False)) for record in records]
    write_text(path, "".join(f"{line}\n" for line in lines))


def turns(*texts: str) -> list[dict[str, str]]:
    """Make messages of user and assistant in turn."""
    messages = []
    for place, text in enumerate(texts):
        role = "assistant" if place % 2 else "user"
        messages.append({"role": role, "content": text})
    return messages


def record_text(record: dict, where: str) -> str:
    """Return the text of a pretraining record."""
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: pretraining reads a non-empty string "text"')
    return text


def find_messages(record: dict, where: str) -> object:
    """Find the list of messages in a fine-tuning record of any form; it may be of another type."""
    messages = record.get("conversations", record.get("messages"))
    if messages is not None:
        return messages
    if "completion" in record:
        return join_completion(record, where)
    if "output" not in record:
        return None
    parts = {"instruction": record.get("instruction"), "input": record.get("input") or ""}
    for name, part in parts.items():
        if not isinstance(part, str):
            raise UserError(f'{where}: "{name}" must be a string; mend the record')
    question = "\n".join(part for part in parts.values() if part.strip())
    check_text(question, "instruction", where)
    check_text(record["output"], "output", where)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": record["output"]},
    ]


def check_text(text: object, field: str, where: str) -> None:
    """Refuse a record whose field is no text or an empty one."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: needs a non-empty string "{field}"')


def join_completion(record: dict, where: str) -> list | None:
    """Join TRL's prompt and completion, each a string or a list of messages."""
    prompt = record.get("prompt")
    completion = record["completion"]
    if isinstance(prompt, str):
        check_text(prompt, "prompt", where)
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        check_text(completion, "completion", where)
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        return None
    if any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in prompt):
        reason = 'an answer in "prompt" would be trained, too, and TRL trains the completion alone'
        raise UserError(f'{where}: {reason}; if it may, join both lists as "messages"')
    return prompt + completion


def rename_fields(message: dict) -> dict:
    """Give a message of ShareGPT the names of ours; any other message stays as it is."""
    if "from" not in message or "role" in message:
        return message
    role = SHAREGPT_ROLES.get(str(message["from"]), message["from"])
    return message | {"role": role, "content": message.get("value")}


def record_messages(record: dict, where: str) -> list[dict[str, str]]:
    """Return the messages of a fine-tuning record, white space around their contents stripped."""
    messages = find_messages(record, where)
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise UserError(f"{where}: fine-tuning reads a list of messages: {CHAT_FIELDS}")
    messages = [rename_fields(message) for message in messages]
    for part in (record, *messages):
        for name in UNREAD_FIELDS:
            if part.get(name):
                raise UserError(f'{where}: "{name}" is not read; convert or remove it')
        if part.get("weight") not in (None, 1):  # 0: no loss
            raise UserError(f'{where}: a "weight" other than 1 is not read; remove the record')
    for turn, message in enumerate(messages, start=1):
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            field = "value" if "from" in message else "content"
            raise UserError(f'{where}: message {turn} needs a non-empty string "{field}"')
    check_roles([message.get("role") for message in messages], where)
    return [{"role": turn["role"], "content": turn["content"].strip()} for turn in messages]


def check_roles(roles: list[object], where: str) -> None:
    """Refuse messages whose roles are not in turn."""
    pairs = roles[1:] if roles[:1] == ["system"] else roles
    if not pairs or pairs != ["user", "assistant"] * (len(pairs) // 2):
        expected = "an optional system, then user and assistant in turn"
        raise UserError(f"{where}: the roles are {roles}; expected {expected}")


# ---------------------------------------------------------------- token ids and labels


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
) -> list[Encoded]:
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
        ids = list(opening)
        labeled = [False] * len(opening)
        for role, closing in zip(roles, closings, strict=True):
            content = next(encoded)
            is_answer = role == "assistant"
            ids += content + closing
            labeled += [is_answer] * len(content)
            # The end token is the first of what closes an answer. No text at all may close a
            # prompt.
            labeled += [is_answer and i == 0 for i in range(len(closing))]
        samples.append((ids, labeled))
    return samples


def encode_template(
    tokenizer: Tokenizer, generation_prompt: bool, roles: tuple[str, ...]
) -> list[list[int]]:
    """Encode the chat template's text around the contents: `len(roles) + 1` pieces."""
    slots = [{"role": role, "content": CONTENT_SLOT} for role in roles]
    text = tokenizer.apply_chat_template(
        slots,
        add_generation_prompt=generation_prompt,
        tokenize=False,
        enable_thinking=False,  # Qwen3's prompt as its training text
    )
    pieces = encode_batch(tokenizer, text.split(CONTENT_SLOT), special=True)
    is_usable = len(pieces) == len(roles) + 1
    if is_usable:
        for role, closing in zip(roles, pieces[1:], strict=True):
            if role == "assistant" and closing[:1] != [tokenizer.eos_token_id]:
                is_usable = False
    if not is_usable:
        rule = f"hold each content once and close an assistant turn with {tokenizer.eos_token}"
        raise UserError(f"{tokenizer.name_or_path}: the chat template must {rule}")
    return pieces


def read_prompt(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of an encoded first prompt, without what the chat template puts around it.

    After a system turn both contents are returned, a line each.
    """
    for roles in (("user",), ("system", "user")):
        contents = cut_contents(ids, encode_template(tokenizer, True, roles))
        if contents is not None:
            return "\n".join(tokenizer.batch_decode(contents))
    return tokenizer.decode(ids)


def cut_contents(ids: list[int], pieces: list[list[int]]) -> list[list[int]] | None:
    """Cut ids at the pieces of a chat template; None if another template has made them."""
    opening, *closings = pieces
    start = len(opening)
    if ids[:start] != opening:
        return None
    contents = []
    for closing in closings:
        ends = range(start, len(ids) - len(closing) + 1)
        end = next((i for i in ends if ids[i : i + len(closing)] == closing), None)
        if end is None:
            return None
        contents.append(ids[start:end])
        start = end + len(closing)
    return contents if start == len(ids) else None


def encode_records(
    kind: str, records: list[tuple[str, dict]], tokenizer: Tokenizer
) -> list[Encoded]:
    """Check and encode what `read_jsonl` yields; without labels, loss falls on all tokens."""
    if kind == "sft":
        conversations = [record_messages(record, where) for where, record in records]
        return encode_conversations(tokenizer, conversations)
    opening = []
    closing = [tokenizer.pad_token_id]
    if kind == "pretrain_wrapped":
        if tokenizer.bos_token_id is None:
            raise UserError(f"--wrap_documents: {tokenizer.name_or_path} has no bos_token")
        opening = [tokenizer.bos_token_id]
        closing = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    texts = [record_text(record, where) for where, record in records]
    encoded = encode_batch(tokenizer, texts, special=False)
    return [(opening + ids + closing, []) for ids in encoded]


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
    tokens = []
    labels = []
    truncated = 0
    dropped = 0
    records = chain.from_iterable(read_jsonl(path) for path in paths)
    records = tqdm(records, "tokenizing", disable=None)
    for chunk in chunks(records, ENCODE_CHUNK):
        for ids, labeled in encode_records(kind, chunk, tokenizer):
            if kind == "sft":
                truncated += len(ids) > max_seq_len
                ids = ids[:max_seq_len]
                labeled = labeled[:max_seq_len]
                if not any(labeled[1:]):  # the first token is never predicted
                    dropped += 1
                    continue
            tokens.append(np.array(ids, dtype=dtype))
            labels.append(np.array(labeled, dtype=bool))
    if not tokens:
        raise UserError(f"{paths[0]}: no answer within {max_seq_len} tokens; raise --max_seq_len")
    arrays = {
        "tokens": np.concatenate(tokens),
        "labeled": np.concatenate(labels),
        "starts": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
    }
    counts = {
        "records": len(tokens) + dropped,
        "samples": len(tokens),
        "truncated": truncated,
        "dropped_without_labels": dropped,
    }
    return arrays, counts


# ---------------------------------------------------------------- the token cache


def hash_text(text: str) -> str:
    """Hash a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def load_tokens(
    kind: str, paths: list[Path], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[dict[str, np.ndarray], dict]:
    """Return the memory-mapped arrays of `encode_files`, and the facts for run.json.

    The cache's name is the hash of all that the tokens depend on.
    """
    files = [{"name": path.name, "sha256": file_sha256(path)} for path in paths]
    template = tokenizer.chat_template or ""
    tokenizer_sha256 = hash_text(tokenizer.backend_tokenizer.to_str() + "\n" + template)
    key = {
        "version": CACHE_VERSION,
        "kind": kind,
        "files": [file["sha256"] for file in files],
        "tokenizer": tokenizer_sha256,
        "size": len(tokenizer),
        "ids": [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id],
        "max_seq_len": max_seq_len if kind == "sft" else None,  # blocks are cut later
    }
    path = CACHE_DIR / f"{kind}-{hash_text(json.dumps(key))[:32]}"
    if not path.is_file():
        CACHE_DIR.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():  # of several processes, the first one tokenizes
                arrays, counts = encode_files(kind, paths, tokenizer, max_seq_len)
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                header = {"counts": json.dumps(counts)}
                write_aside(path, partial(save_file, tensors, metadata=header))
    with safe_open(path, framework="pt") as file:  # torch maps the file, numpy reads it
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        counts = json.loads(file.metadata()["counts"])
    return arrays, {"files": files, "tokenizer_sha256": tokenizer_sha256, **counts}


# ---------------------------------------------------------------- samples


class TokenDataset(torch.utils.data.Dataset):
    """Samples of token ids and labels: sample i is `tokens[starts[i]:ends[i]]`.

    Of each sample, `lengths` counts the tokens and `targets` those on which loss falls, never the
    first. `info` has facts for run.json.
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], starts: np.ndarray, ends: np.ndarray, info: dict
    ) -> None:
        self.tokens = arrays["tokens"]
        self.labeled = arrays["labeled"]
        self.is_text = len(self.labeled) == 0  # loss falls on all of it
        self.starts = starts
        self.ends = ends
        self.info = info
        self.lengths = ends - starts
        if self.is_text:
            self.targets = self.lengths - 1
        else:
            before = np.append(0, np.cumsum(self.labeled))  # labels before each token
            self.targets = before[ends] - before[starts + 1]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Sample:
        """Return token ids and labels, not shifted, each (length,) int64."""
        span = slice(self.starts[index], self.ends[index])
        ids = self.tokens[span].astype(np.int64)
        if self.is_text:
            return ids, ids
        return ids, np.where(self.labeled[span], ids, IGNORE_INDEX)

    def describe(self, index: int, tokenizer: Tokenizer) -> str:
        """Lay out a sample: positions, tokens, and the labels that the positions predict."""
        ids, labels = self[index]
        predicted = [*labels[1:], IGNORE_INDEX]
        lines = [f"{'pos':>5}  {'token':<24} predicts"]
        for position, (token, label) in enumerate(zip(ids, predicted, strict=True)):
            text = tokenizer.decode([int(token)])
            target = "-" if label == IGNORE_INDEX else repr(tokenizer.decode([int(label)]))
            lines.append(f"{position:>5}  {text!r:<24} {target}")
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
        paths: plain or gzip JSONL, read in this order.
        tokenizer: the model's own.
        max_seq_len: tokens of a block, or of the longest conversation; longer ones are cut.
        max_samples: conversations to keep, drawn at random; a smaller set is part of a larger.
    """
    arrays, info = load_tokens(kind, paths, tokenizer, max_seq_len)
    if kind == "sft":
        starts = arrays["starts"][:-1]
        ends = arrays["starts"][1:]
    else:  # one stream of documents, cut into blocks
        total = len(arrays["tokens"])
        starts = np.arange(0, total - 1, max_seq_len)  # a last token alone has no target
        ends = np.minimum(starts + max_seq_len, total)
    if max_samples is not None:
        if max_samples > len(starts):
            raise UserError(f"--max_train_samples {max_samples}: the data have {len(starts):,}")
        order = np.random.default_rng(SUBSET_SEED).permutation(len(starts))
        chosen = np.sort(order[:max_samples])
        starts = starts[chosen]
        ends = ends[chosen]
        info["samples"] = max_samples
    dataset = TokenDataset(arrays, starts, ends, info)
    info["tokens"] = int(dataset.lengths.sum())
    info["labeled_tokens"] = int(dataset.targets.sum())
    return dataset


# ---------------------------------------------------------------- batches


class StepPlan:
    """The samples of each optimizer step, as a pure function of the seed and the step.

    Samples are shuffled by `(seed, epoch)`, grouped by length when lengths differ, and cut into
    batches of `batch_size * accumulation_steps * processes`. So a resumed run continues with the
    batch that it would have seen, and one process and two train on the same batches.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        accumulation_steps: int = 1,
        seed: int = 42,
        processes: int = 1,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.processes = processes
        self.global_batch = batch_size * accumulation_steps * processes
        self.steps_per_epoch = -(-len(lengths) // self.global_batch)  # rounded up
        self.find_epoch = lru_cache(2)(self.draw_epoch)  # the loader may be an epoch ahead

    def __getitem__(self, step: int) -> np.ndarray:
        """Return the samples of a step, those of all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.find_epoch(epoch)[position]

    def draw_epoch(self, epoch: int) -> list[np.ndarray]:
        """Draw the batches of an epoch, each sorted by length, in random order."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        if self.lengths.min() == self.lengths.max():
            return cut(order, self.global_batch)
        batches = []
        for group in cut(order, GROUP_BATCHES * self.global_batch):
            by_length = np.argsort(self.lengths[group], kind="stable")
            batches += cut(group[by_length], self.global_batch)
        return [batches[i] for i in generator.permutation(len(batches))]

    def micro_batches(self, step: int, process: int = 0) -> list[list[int]]:
        """Return a process's share of a step in parts of `batch_size`; an empty one if it has none.

        The parts of two processes may differ in number: gradients are exchanged once, at the last.
        """
        share = self[step][process :: self.processes].tolist()
        return list(chunks(share, self.batch_size)) or [[]]

    def iterate(self, start: int, end: int, process: int) -> Iterator[list[int]]:
        """Yield a process's micro-batches of the steps from `start` to before `end`."""
        for step in range(start, end):
            yield from self.micro_batches(step, process)


def cut(array: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut an array into parts of `size`; the last may be shorter."""
    return np.split(array, range(size, len(array), size))


def plan_shapes(plan: StepPlan, targets: np.ndarray, steps: int, most: int = 6) -> list[Shape]:
    """Choose at most `most` shapes into which every micro-batch of a run fits.

    Each length is the longest of an equal share of the batches; `targets` counts a sample's labels.
    """
    lengths = []
    labels = []
    for process in range(plan.processes):
        for batch in plan.iterate(0, steps, process):
            lengths.append(plan.lengths[batch].max(initial=2))
            labels.append(targets[batch].sum())
    lengths = np.array(lengths)
    labels = np.array(labels)
    shares = np.arange(1, most + 1) / most
    ends = np.quantile(lengths, shares, method="inverted_cdf")
    return [(int(end), int(labels[lengths <= end].max())) for end in np.unique(ends)]


def collate(
    samples: list[Sample], rows: int = 0, shapes: Iterable[Shape] = ()
) -> dict[str, Tensor]:
    """Stack samples as `input_ids` and `labels`, (batch, longest) int64, with 0 on the right.

    `label_positions` are those of the flattened batch that predict a label. For compiled code the
    batch fills up to `rows`, without labels, and to the first of `shapes` that is long enough.
    """
    length = max((len(ids) for ids, _ in samples), default=2)
    least_positions = 2  # compiled code treats sizes 0 and 1 apart
    for shape_length, shape_positions in shapes:  # from short to long
        if shape_length >= length:
            length = shape_length
            least_positions = shape_positions
            break
    size = (max(rows, len(samples), 1), length)
    input_ids = np.zeros(size, np.int64)
    labels = np.full(size, IGNORE_INDEX)
    for row, (sample_ids, sample_labels) in enumerate(samples):
        input_ids[row, : len(sample_ids)] = sample_ids
        labels[row, : len(sample_ids)] = sample_labels
    label_rows, label_columns = np.nonzero(labels[:, 1:] != IGNORE_INDEX)
    count = len(label_rows)
    # A row's last position predicts nothing, so that it can fill up.
    positions = np.full(max(least_positions, count), length - 1)
    positions[:count] = label_rows * length + label_columns
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "label_positions": torch.from_numpy(positions),
    }
