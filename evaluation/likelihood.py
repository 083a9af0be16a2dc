"""What a model's likelihood tells: NLL of held-out data, and whether an answer fits its prompt.

Prompt retrieval. An answer y is on topic if an independent judge model finds it likelier under its
own prompt x than under any of nine other prompts, by log p(y|x) - log p(y); by chance one answer
in ten is. For one answer, log p(y) is the same under all ten prompts, so it cannot change their
order, and whether an answer is on topic needs only log p(y|x). What subtracting it adds is a number
that can be compared between answers: log p(y|x) alone is low for every long or rare text. So
`prompt_pmi` is reported beside the flag, with p(y) the mean of p(y|x') over the ten prompts, which
costs no further pass: 0 says that the prompt explains nothing, ln 10 = 2.30 is the most that ten
prompts can show, and far below 0 another prompt explains the answer better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import logsumexp
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import DataError, file_sha256
from dataset.lm_dataset import CACHE_DIR, IGNORE_INDEX, collate, encode_batch, load_dataset
from evaluation.checkpoints import Checkpoint
from evaluation.metrics import has_cjk
from evaluation.outputs import NLL_UNITS, rounded
from evaluation.prompts import Prompt, encode_prompts
from model.checkpoint import load_model, weights_fingerprint
from model.files import CheckpointError
from model.model_minimind import MiniMindForCausalLM
from trainer.run_folder import weights_sha256

# What tokenizing lost or found twice, as the token store counts it.
COUNTS = ("truncated", "dropped_without_labels", "dropped_tail_tokens", "duplicates")
CANDIDATES = 10  # the prompt of an answer and nine distractors
DISTRACTOR_SEED = 0


@torch.inference_mode()
def sequence_nats(
    model: MiniMindForCausalLM,
    samples: Dataset | Sequence[tuple[np.ndarray, np.ndarray]],
    pad_id: int,
    batch_size: int,
    name: str,
    end_id: int | None = None,
) -> np.ndarray:
    """Summed negative log-likelihood of each sample's labeled tokens: (samples, 2) float64, nats.

    Args:
        samples: token ids and labels of each, as `collate` takes them.
        name: what the progress bar is called.
        end_id: the token whose share of the sum the second column is; None: 0 there.
    """
    by_length = sorted(range(len(samples)), key=lambda i: len(samples[i][0]))
    nats = np.zeros((len(samples), 2))
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, desc=name, leave=False, disable=None):
        chosen = by_length[start : start + batch_size]
        batch = collate([samples[i] for i in chosen], pad_id)
        hidden = model.model(batch["input_ids"].to(model.device))[:, :-1]
        targets = batch["labels"][:, 1:].to(model.device)
        for i, states, ids in zip(chosen, hidden, targets, strict=True):
            counted = [ids != IGNORE_INDEX] + ([] if end_id is None else [ids == end_id])
            for column, places in enumerate(counted):
                nats[i, column] = model.summed_loss(states[places], ids[places]).item()
    return nats


def held_out_nll(
    kind: str,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    paths: list[Path],
    max_seq_len: int,
    batch_size: int,
    cache_dir: Path = CACHE_DIR,
) -> dict:
    """Mean negative log-likelihood of held-out data in nats per token, as training reports it.

    Args:
        kind: "sft" for the response tokens of conversations, "pretrain" for every token but the
            first of blocks packed to `max_seq_len`.

    Returns:
        data, counts and `nats_per_token`; `sequences` holds nats and tokens of each sequence, and
        of conversations also those of the end tokens, which are among them.
    """
    dataset = load_dataset(kind, paths, tokenizer, max_seq_len, cache_dir)
    end_id = tokenizer.eos_token_id if kind == "sft" else None
    nats = sequence_nats(model, dataset, tokenizer.pad_token_id, batch_size, f"{kind} NLL", end_id)
    labels = [dataset[i][1][1:] for i in range(len(dataset))]
    tokens = [int((of_one != IGNORE_INDEX).sum()) for of_one in labels]
    columns = [map(rounded, nats[:, 0].tolist()), tokens]
    if kind == "sft":
        columns += [map(rounded, nats[:, 1].tolist()), [int((x == end_id).sum()) for x in labels]]
    sequences, targets = NLL_UNITS["nll" if kind == "sft" else "text_nll"]
    info = dataset.store.info
    return {
        "data": [{"name": path.name, "sha256": file_sha256(path)} for path in paths],
        sequences: len(dataset),
        "max_seq_len": max_seq_len,
        **{name: info[name] for name in COUNTS if name in info},
        targets: sum(tokens),
        "nats_per_token": rounded(nats[:, 0].sum() / sum(tokens)),
        "sequences": list(map(list, zip(*columns, strict=True))),
    }


# ------------------------------------------------------------------------------- prompt retrieval


@dataclass(frozen=True)
class Judge:
    """A checkpoint that tells whether answers fit their prompts."""

    checkpoint: Checkpoint
    model: MiniMindForCausalLM
    tokenizer: PreTrainedTokenizerFast


def check_independence(judge: Judge, checkpoints: list[Checkpoint]) -> list[str]:
    """Refuses a judge that is a probed checkpoint or the base of one.

    A model finds its own answers likely, on topic or not, and an adapter or a fine-tuned model is
    close to its base: such a judge favors one arm. One that was fine-tuned from a probed base, or
    from the same base as a probed checkpoint, favors all that share the base alike, so it is
    allowed and named.

    Returns:
        The names of probed checkpoints that share the judge's base, or are it.

    Raises:
        CheckpointError: names the probed checkpoint.
    """
    own = weights_sha256(judge.checkpoint.path)
    fingerprint = own_fingerprint(judge.checkpoint)  # of the file's weights: the judge's are cast
    judge_base = judge.checkpoint.run_record().get("base_fingerprint")
    relatives = []
    for checkpoint in checkpoints:
        base = checkpoint.run_record().get("base_fingerprint")
        parts = {weights_sha256(checkpoint.path), weights_sha256(checkpoint.model_path)}
        if own in parts or (fingerprint is not None and base == fingerprint):
            raise CheckpointError(
                f"--judge {judge.checkpoint.path}: is the probed {checkpoint.name} or its base; "
                "give a checkpoint trained apart from it"
            )
        if judge_base is not None and judge_base in (base, own_fingerprint(checkpoint)):
            relatives.append(checkpoint.name)
    return relatives


def own_fingerprint(checkpoint: Checkpoint) -> str | None:
    """What runs that started from a checkpoint record of it; None for an adapter."""
    return None if checkpoint.base else weights_fingerprint(load_model(checkpoint.path))


def draw_candidates(prompts: list[Prompt]) -> list[list[int]]:
    """For each prompt its own index, then nine others', drawn from a fixed seed.

    A distractor asks something else in the same script (Chinese or not): an English answer would be
    told from Chinese prompts by its script alone. Where a script has too few prompts, others join.

    Raises:
        DataError: fewer than nine other prompts.
    """
    texts = [prompt.text for prompt in prompts]
    is_chinese = [has_cjk(text) for text in texts]
    candidates = []
    for own, text in enumerate(texts):
        others = [i for i in range(len(prompts)) if texts[i] != text]
        if len(others) < CANDIDATES - 1:
            raise DataError(
                f"--judge: {len(others) + 1} different prompts, and telling an answer's prompt "
                f"from {CANDIDATES - 1} others needs {CANDIDATES}; ask more"
            )
        np.random.default_rng([DISTRACTOR_SEED, own]).shuffle(others)
        others.sort(key=lambda i: is_chinese[i] != is_chinese[own])  # stable
        candidates.append([own, *others[: CANDIDATES - 1]])
    return candidates


def add_topic_measures(
    judge: Judge, prompts: list[Prompt], samples: list[dict], batch_size: int
) -> None:
    """Sets `off_topic` and `prompt_pmi` (nats) of every sample, whose `text` is judged.

    A blank answer is equally likely under every prompt, so it is off topic, with a PMI of 0.
    """
    candidates = draw_candidates(prompts)
    index = {prompt.id: i for i, prompt in enumerate(prompts)}
    prompt_ids = encode_prompts(judge.tokenizer, prompts)
    texts = [sample["text"].strip() for sample in samples]
    answer_ids = encode_batch(judge.tokenizer.backend_tokenizer, texts, special=False)
    pairs = [
        labeled_answer(prompt_ids[candidate], answer)
        for sample, answer in zip(samples, answer_ids, strict=True)
        for candidate in candidates[index[sample["id"]]]
    ]
    pad_id = judge.tokenizer.pad_token_id
    nats = sequence_nats(judge.model, pairs, pad_id, batch_size, "judging")[:, 0]
    for sample, scores in zip(samples, -nats.reshape(-1, CANDIDATES), strict=True):
        sample["off_topic"], pmi = topic_of(scores)
        sample["prompt_pmi"] = rounded(pmi)


def labeled_answer(prompt_ids: list[int], answer_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of an answer after a prompt; the end token is left out: not all have one."""
    ids = np.array(prompt_ids + answer_ids)
    return ids, np.where(np.arange(len(ids)) < len(prompt_ids), IGNORE_INDEX, ids)


def topic_of(scores: np.ndarray) -> tuple[bool, float]:
    """Whether an answer is off topic, and its PMI with its prompt in nats.

    Args:
        scores: (candidates,) log p(y|x) in nats; the answer's own prompt is first.
    """
    log_p = logsumexp(scores) - np.log(len(scores))
    return bool(scores[0] <= scores[1:].max()), float(scores[0] - log_p)
