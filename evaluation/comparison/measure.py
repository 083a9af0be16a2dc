"""What compare.py trains on and measures with: pairs in three parts, prompts, and other text.

Results are kept in measured/, so that a comparison that was stopped loses none.
"""

import argparse
import hashlib
import json
import math
import time
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from dataset.lm_dataset import load_dataset, read_jsonl, record_messages
from evaluation.probe.answers import encode_prompts, probe
from evaluation.probe.likelihood import measure_nll
from evaluation.probe.prompts import Prompt, parse_record
from model.checkpoint import Checkpoint, load_checkpoint
from model.cli import UserError, escape_control
from model.files import read_json, write_json, write_text
from model.machine import choose_device

MOST_HELD_OUT = 500  # pairs that are split off where no held-out file is given
LEAST_PAIRS = 100  # of each held-out half, and of checked prompts; fewer order nothing
MOST_PROMPTS = 200  # of the held-out ones that are asked
HELD_OUT = "held-out pairs"  # the section of these prompts
SHORTEST_LIMIT = 32  # tokens of an answer
DIVERGED = (math.inf, math.inf)
Loss = tuple[float, float]  # share of wrong answers (0 without checks), then NLL


def print_progress(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {escape_control(text)}", flush=True)


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Pairs:
    """The user's conversations in three parts, and a sentence about how they were parted."""

    train: list[list[dict]]
    choose: list[list[dict]]  # chooses the learning rates
    judge: list[list[dict]]
    note: str


def read_pairs(paths: list[Path]) -> list[tuple[str, list[dict]]]:
    """Read conversations, each with its hash."""
    pairs = []
    for path in paths:
        for where, record in read_jsonl(path):
            messages = record_messages(record, where)
            digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
            pairs.append((digest, messages))
    return pairs


def find_prompt(messages: list[dict]) -> str:
    """Return all that comes before the first answer, as text that can be compared.

    Each answer of a conversation trains, so all that begin alike stay on one side.
    """
    roles = [message["role"] for message in messages]
    return json.dumps(messages[: roles.index("assistant")])


def choose_held_out(pairs: list[tuple[str, list[dict]]]) -> dict[str, list[dict]]:
    """Choose a tenth of the different prompts, at most 500: those with the lowest hashes.

    Of several conversations with one prompt the lowest hash stands for all.
    """
    by_prompt = {}
    for digest, messages in sorted(pairs, key=itemgetter(0)):
        by_prompt.setdefault(find_prompt(messages), (digest, messages))
    candidates = list(by_prompt.values())
    return dict(candidates[: min(MOST_HELD_OUT, len(candidates) // 10)])


def split_pairs(data_paths: list[Path], eval_paths: list[Path]) -> Pairs:
    """Part the pairs; the same conversation never stands on both sides.

    Neither does the same prompt, unless a held-out file of the user's own has it.
    """
    pairs = read_pairs(data_paths)
    held_out = dict(read_pairs(eval_paths)) if eval_paths else choose_held_out(pairs)
    prompts = {find_prompt(messages) for messages in held_out.values()}
    others = [messages for digest, messages in pairs if digest not in held_out]
    repeated = [messages for messages in others if find_prompt(messages) in prompts]
    if eval_paths:
        train = others
        note = "The held-out pairs are those of --eval_data_path."
        if len(others) < len(pairs):
            note += f" {len(pairs) - len(others)} pairs stand in both files and do not train."
        if repeated:
            note += f" {len(repeated)} training pairs have the prompt of a held-out one."
    else:
        train = [messages for messages in others if find_prompt(messages) not in prompts]
        note = "The held-out pairs were split off the data by a hash of the conversation."
        if repeated:
            note += f" {len(repeated)} others have the prompt of one of them and do not train."
    # Sorted by hash, so that neither half depends on the order in the file.
    halves = [held_out[digest] for digest in sorted(held_out)]
    if len(halves) < 2 or not train:
        count = f"{len(train)} to train on and {len(halves)} held out"
        remedy = (
            "give at least 20 different prompts, or --eval_data_path with 2 or more other pairs"
        )
        raise UserError(f"{data_paths[0]}: too few examples ({count}); {remedy}")
    return Pairs(train, halves[::2], halves[1::2], note)


def write_pairs(pairs: Pairs, folder: Path) -> None:
    """Write the three parts as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    write_conversations(folder / "train.jsonl", pairs.train)
    write_conversations(folder / "choose.jsonl", pairs.choose)
    write_conversations(folder / "judge.jsonl", pairs.judge)


def write_conversations(path: Path, conversations: list[list[dict]]) -> None:
    """Write conversations as JSONL."""
    lines = [json.dumps({"conversations": messages}) for messages in conversations]
    write_text(path, "\n".join(lines) + "\n")


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Yardstick:
    """What every model is asked and measured with."""

    folder: Path
    batch_size: int
    max_seq_len: int
    asked: list[Prompt]  # held-out prompts, then those of --prompts
    choosing: list[Prompt]  # with checks: they choose the learning rates, if there are any
    max_new_tokens: int
    text: Path  # whose likelihood says what is forgotten
    text_kind: str  # see `measure_nll`

    def load(self, path: str | Path) -> Checkpoint:
        """Load a checkpoint onto the device."""
        model, tokenizer = load_checkpoint(path)
        return model.to(choose_device("auto")), tokenizer

    def ask(self, checkpoint: Checkpoint, prompts: list[Prompt], decoding: str) -> list[dict]:
        """Ask prompts once each; return a sample for each."""
        return probe(checkpoint, prompts, [decoding], [0], self.max_new_tokens, self.batch_size)

    def measure(self, name: str, path: str | Path) -> dict:
        """Measure NLL of the pairs that judge and of the other text, and ask the prompts."""
        kept = self.folder / "measured" / f"{name}.json"
        if kept.is_file():
            return read_json(kept)
        print_progress(f"measuring {name}")
        checkpoint = self.load(path)
        pairs = [self.folder / "data" / "judge.jsonl"]
        sizes = (self.max_seq_len, self.batch_size)
        nll = measure_nll(checkpoint, "sft", pairs, *sizes)
        text = measure_nll(checkpoint, self.text_kind, [self.text], *sizes)
        samples = self.ask(checkpoint, self.asked, "greedy")
        measured = {"nll": nll["sequences"], "text": text["sequences"], "samples": samples}
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, measured)
        return measured

    def score(self, run: Path) -> Loss:
        """Return what chooses between a method's learning rates: the lower, the better."""
        record = read_json(run / "run.json")
        if record["status"] == "diverged":
            return DIVERGED
        if not self.choosing:
            return 0.0, record["eval_loss"]
        kept = self.folder / "measured" / f"{run.name}-choose.json"
        if not kept.is_file():
            samples = self.ask(self.load(run), self.choosing, "greedy")
            wrong = [sample["outcome"] != "correct" for sample in samples]
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, {"wrong": float(np.mean(wrong))})
        return read_json(kept)["wrong"], record["eval_loss"]

    def write_base_answers(self, base: str) -> None:
        """Let the base answer the prompts, sampled at temperature 1, unless other text is given.

        By how much their NLL rises estimates the KL divergence from the base to a tuned model on
        these prompts. It goes with what is forgotten elsewhere (Shenfeld et al. 2025, arXiv
        2509.04259), although part of it is what the user wants to change.
        """
        if self.text.is_file():
            return
        print_progress("sampling the base's own answers")
        samples = self.ask(self.load(base), self.asked, "t1.0")
        pairs = []
        for prompt, sample in zip(self.asked, samples, strict=True):
            if sample["output"].strip():
                answer = {"role": "assistant", "content": sample["output"]}
                pairs.append([*prompt.messages, answer])
        if not pairs:
            raise UserError(f"{base}: answers nothing, so give --text_data to measure forgetting")
        write_conversations(self.text, pairs)


def make_yardstick(
    args: argparse.Namespace,
    folder: Path,
    checkpoint: Checkpoint,
    judging: list[list[dict]],
    prompts: list[Prompt],
) -> Yardstick:
    """Choose what is asked and measured: the pairs that judge, and the user's own prompts."""
    model, tokenizer = checkpoint
    asked = make_prompts(judging[:MOST_PROMPTS])
    references = [tokenizer.encode(p.reference, add_special_tokens=False) for p in asked]
    # Twice the longest held-out answer: what is longer will hardly end.
    longest = max(len(ids) for ids in references)
    max_new_tokens = min(args.max_seq_len, max(SHORTEST_LIMIT, 2 * longest))
    choosing, others = split_prompts(prompts)
    asked += others
    room = min(args.max_seq_len, model.config.max_position_embeddings - max_new_tokens)
    text_kind = "sft"
    if args.text_data:
        text_kind = "pretrain_wrapped" if args.wrap_documents else "pretrain"
        # Every line is read now, so that a broken one is refused before anything trains.
        load_dataset(text_kind, [args.text_data], tokenizer, args.max_seq_len)
    return Yardstick(
        folder=folder,
        batch_size=args.batch_size,
        max_seq_len=args.max_seq_len,
        asked=select_fitting(tokenizer, asked, room),
        choosing=select_fitting(tokenizer, choosing, room),
        max_new_tokens=max_new_tokens,
        text=args.text_data or folder / "data" / "base_answers.jsonl",
        text_kind=text_kind,
    )


def make_prompts(conversations: list[list[dict]]) -> list[Prompt]:
    """Make prompts of conversations; their section tells them from the user's own prompts."""
    path = Path(f"{HELD_OUT}.jsonl")
    prompts = []
    for number, messages in enumerate(conversations, start=1):
        prompts.append(parse_record(f"{path}:{number}", {"conversations": messages}, path))
    return prompts


def split_prompts(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Part prompts into those that choose the rates and the others, which judge or are only shown.

    Too few with checks choose nothing: likelihood does.
    """
    checked = [prompt for prompt in prompts if prompt.check]
    if len(checked) < 2 * LEAST_PAIRS:
        return [], prompts
    choosing = checked[::2]
    ids = {prompt.id for prompt in choosing}
    return choosing, [prompt for prompt in prompts if prompt.id not in ids]


def select_fitting(
    tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], room: int
) -> list[Prompt]:
    """Leave out prompts of more than `room` tokens, and say how many they are."""
    encoded = encode_prompts(tokenizer, prompts)
    fitting = [prompt for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) <= room]
    if prompts and not fitting:
        raise UserError(f"no held-out prompt has {room} tokens or fewer; raise --max_seq_len")
    if len(fitting) < len(prompts):
        print(f"note: {len(prompts) - len(fitting)} prompts are too long to be asked")
    return fitting
