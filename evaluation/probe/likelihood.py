"""Measure with likelihoods: NLL of held-out data, and whether an answer fits its prompt.

An answer is off topic if a judge model finds it, by log p(answer | prompt), at least as likely
under one of 9 other prompts. By chance 9 of 10 answers are off topic.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset.lm_dataset import Sample, chunks, collate, encode_conversations, load_dataset
from evaluation.probe.intervals import paired_bootstrap
from evaluation.probe.measures import COMPARISON
from evaluation.probe.prompts import CJK, Prompt
from model.checkpoint import Checkpoint
from model.cli import UserError
from model.model_minimind import IGNORE_INDEX, MiniMindForCausalLM

CANDIDATES = 10  # the prompt of an answer and 9 others


@torch.inference_mode()
def sum_nats(
    model: MiniMindForCausalLM, samples: list[Sample], batch_size: int, end_id: int = -1
) -> np.ndarray:
    """Sum NLL over each sample's labeled tokens, in nats: (samples, 2), of all and of `end_id`."""
    by_length = sorted(range(len(samples)), key=lambda i: len(samples[i][0]))
    nats = np.zeros((len(samples), 2))
    for rows in tqdm([*chunks(by_length, batch_size)], desc="NLL", leave=False, disable=None):
        batch = collate([samples[i] for i in rows])
        hidden = model.model(batch["input_ids"].to(model.device))[:, :-1]
        targets = batch["labels"][:, 1:].to(model.device)
        for i, states, ids in zip(rows, hidden, targets, strict=True):
            states, ids = states[ids != IGNORE_INDEX], ids[ids != IGNORE_INDEX]
            losses = F.cross_entropy(model.lm_head(states).float(), ids, reduction="none")
            nats[i] = losses.sum().item(), losses[ids == end_id].sum().item()
    return nats


def measure_nll(
    checkpoint: Checkpoint, kind: str, paths: list[Path], max_seq_len: int, batch_size: int
) -> dict:
    """Measure the NLL of held-out data in nats per token.

    `kind`: "sft" (response tokens), "pretrain" or "pretrain_wrapped" (text in packed blocks).
    `sequences` holds nats and tokens of each, and the part of end tokens in both ("sft" alone).
    """
    model, tokenizer = checkpoint
    dataset = load_dataset(kind, paths, tokenizer, max_seq_len)
    samples = [dataset[i] for i in range(len(dataset))]
    end_id = tokenizer.eos_token_id if kind == "sft" else -1  # no label
    nats = sum_nats(model, samples, batch_size, end_id)
    tokens = dataset.targets.tolist()
    ends = [int((labels[1:] == end_id).sum()) for _, labels in samples]
    return {
        "data": dataset.info["files"],
        "max_seq_len": max_seq_len,
        "tokens": sum(tokens),
        "nats_per_token": round(nats[:, 0].sum() / sum(tokens), 6),
        "sequences": {
            "nats": nats[:, 0].round(6).tolist(),
            "tokens": tokens,
            "end_nats": nats[:, 1].round(6).tolist(),
            "ends": ends,
        },
    }


def compare_nll(a: dict[str, dict], b: dict[str, dict]) -> pd.DataFrame:
    """Compare B's NLLs with A's, sequence by sequence, in the columns of `measures.compare`."""
    rows = []
    for name in a:
        one, other = a[name]["sequences"], b[name]["sequences"]
        if one["tokens"] != other["tokens"]:
            raise UserError(f"--{name}_data: two models have other tokenizers; measure them apart")
        tokens = np.array([one["tokens"]])
        found = paired_bootstrap(np.subtract([other["nats"]], [one["nats"]]) / tokens, tokens)
        means = (a[name]["nats_per_token"], b[name]["nats_per_token"])
        rows.append(["-", name, *means, *found])
    return pd.DataFrame(rows, columns=COMPARISON)


def draw_candidates(prompts: list[Prompt]) -> list[list[int]]:
    """Draw for each prompt its own index and 9 others', of the same script where there are 9."""
    if len({prompt.text for prompt in prompts}) < CANDIDATES:
        raise UserError(f"--judge: needs {CANDIDATES} different prompts; ask more")
    is_latin, candidates = [CJK.search(prompt.text) is None for prompt in prompts], []
    for own, prompt in enumerate(prompts):
        others = [i for i, other in enumerate(prompts) if other.text != prompt.text]
        np.random.default_rng([0, own]).shuffle(others)
        others.sort(key=lambda i: is_latin[i] != is_latin[own])  # stable
        candidates.append([own, *others[: CANDIDATES - 1]])
    return candidates


def add_topic_measures(
    judge: Checkpoint, prompts: list[Prompt], samples: list[dict], batch_size: int
) -> None:
    """Set `off_topic` of each sample; a blank answer is likely under all prompts, so off topic."""
    model, tokenizer = judge
    candidates = {prompts[own[0]].id: own for own in draw_candidates(prompts)}
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    pairs = []
    for sample in samples:
        answer = {"role": "assistant", "content": special.sub("", sample["output"])}
        talks = [[*prompts[i].messages, answer] for i in candidates[sample["id"]]]
        for ids, labeled in encode_conversations(tokenizer, talks):
            ids, labels = np.array(ids), np.full(len(ids), IGNORE_INDEX)
            end = np.flatnonzero(labeled)[-1]  # left out: not all answers have an end token
            start = np.flatnonzero(np.invert(labeled[:end]))[-1] + 1  # of the last answer
            labels[start:end] = ids[start:end]
            pairs.append((ids, labels))
    scores = sum_nats(model, pairs, batch_size)[:, 0].reshape(-1, CANDIDATES)
    for sample, nats in zip(samples, scores, strict=True):
        sample["off_topic"] = bool(nats[0] >= nats[1:].min())
