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
    """Sum NLL over each sample's labeled tokens, in nats: (samples, 2), of all and of `end_id`.

    A sample is a pair of ids and labels, (tokens,) each. Samples of similar lengths share a batch,
    so that little of it is padding.
    """
    by_length = sorted(range(len(samples)), key=lambda index: len(samples[index][0]))
    batches = [*chunks(by_length, batch_size)]
    nats = np.zeros((len(samples), 2))
    for indices in tqdm(batches, desc="NLL", leave=False, disable=None):
        batch = collate([samples[index] for index in indices])
        input_ids = batch["input_ids"].to(model.device)
        labels = batch["labels"].to(model.device)
        # The state at a token predicts the next one: (samples, tokens - 1, width).
        hidden = model.model(input_ids)[:, :-1]
        targets = labels[:, 1:]
        for index, states, ids in zip(indices, hidden, targets, strict=True):
            is_labeled = ids != IGNORE_INDEX
            ids = ids[is_labeled]
            # Logits of labeled tokens alone: those of a whole batch are large.
            logits = model.compute_logits(states[is_labeled]).float()
            losses = F.cross_entropy(logits, ids, reduction="none")
            nats[index, 0] = losses.sum().item()
            nats[index, 1] = losses[ids == end_id].sum().item()
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
    total = sum(tokens)
    ends = [int((labels[1:] == end_id).sum()) for _, labels in samples]
    return {
        "data": dataset.info["files"],
        "max_seq_len": max_seq_len,
        "tokens": total,
        "nats_per_token": round(nats[:, 0].sum() / total, 6),
        "sequences": {
            "nats": nats[:, 0].round(6).tolist(),
            "tokens": tokens,
            "end_nats": nats[:, 1].round(6).tolist(),
            "ends": ends,
        },
    }


def compare_nll(a: dict[str, dict], b: dict[str, dict]) -> pd.DataFrame:
    """Compare B's NLLs with A's, sequence by sequence, in the columns of `measures.compare`.

    `a` and `b` have what `measure_nll` returns, by the name of the data. The difference is in nats
    per token.
    """
    rows = []
    for name in a:
        sequences_a = a[name]["sequences"]
        sequences_b = b[name]["sequences"]
        if sequences_a["tokens"] != sequences_b["tokens"]:
            raise UserError(f"--{name}_data: two models have other tokenizers; measure them apart")
        # One row, since nothing was drawn: (1, sequences).
        tokens = np.array([sequences_a["tokens"]])
        nats = np.subtract([sequences_b["nats"]], [sequences_a["nats"]])
        difference = paired_bootstrap(nats / tokens, tokens)
        means = (a[name]["nats_per_token"], b[name]["nats_per_token"])
        rows.append(["-", name, *means, *difference])
    return pd.DataFrame(rows, columns=COMPARISON)


def draw_candidates(prompts: list[Prompt]) -> list[list[int]]:
    """Draw for each prompt its own index and 9 others', of the same script where there are 9."""
    texts = [prompt.text for prompt in prompts]
    if len(set(texts)) < CANDIDATES:
        raise UserError(f"--judge: needs {CANDIDATES} different prompts; ask more")
    is_latin = [CJK.search(text) is None for text in texts]
    candidates = []
    for own, own_text in enumerate(texts):
        others = [index for index, text in enumerate(texts) if text != own_text]
        np.random.default_rng([0, own]).shuffle(others)
        # Those of the same script first; the sort is stable, so they stay in random order.
        others.sort(key=lambda index: is_latin[index] != is_latin[own])
        candidates.append([own, *others[: CANDIDATES - 1]])
    return candidates


def label_answer(ids: list[int], is_answer: list[bool]) -> Sample:
    """Return ids and labels, (tokens,) each, where only the last answer's text has labels.

    Its end token has none, because not all answers have one.
    """
    last = np.flatnonzero(is_answer)[-1]  # the end token
    before = np.flatnonzero(np.invert(is_answer[:last]))
    start = before[-1] + 1
    input_ids = np.array(ids)
    labels = np.full(len(ids), IGNORE_INDEX)
    labels[start:last] = input_ids[start:last]
    return input_ids, labels


def add_topic_measures(
    judge: Checkpoint, prompts: list[Prompt], samples: list[dict], batch_size: int
) -> None:
    """Set `off_topic` of each sample; a blank answer is likely under all prompts, so off topic."""
    model, tokenizer = judge
    candidates = {}
    for indices in draw_candidates(prompts):
        own = prompts[indices[0]]
        candidates[own.id] = indices
    # An answer may spell a special token, which would end the turn.
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    labeled = []
    for sample in samples:
        text = special.sub("", sample["output"])
        answer = {"role": "assistant", "content": text}
        talks = [[*prompts[index].messages, answer] for index in candidates[sample["id"]]]
        for ids, is_answer in encode_conversations(tokenizer, talks):
            labeled.append(label_answer(ids, is_answer))
    nats = sum_nats(model, labeled, batch_size)[:, 0]
    scores = nats.reshape(-1, CANDIDATES)  # a row an answer; its own prompt comes first
    for sample, of_prompts in zip(samples, scores, strict=True):
        sample["off_topic"] = bool(of_prompts[0] >= of_prompts[1:].min())
