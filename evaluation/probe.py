"""Asks a model prompts: generation, and every answer as a line of samples.jsonl."""

import hashlib
from collections.abc import Iterator

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import DataError
from dataset.lm_dataset import encode_batch
from evaluation.metrics import (
    check_answer,
    content_recall,
    diversity,
    is_blank,
    is_loop,
    is_runaway,
    seq_rep_n,
)
from evaluation.outputs import rounded
from evaluation.prompts import Prompt, encode_prompts
from model.generation import Decoder, Decoding, generate
from model.model_minimind import MiniMindForCausalLM

DECODINGS = {
    "greedy": {"do_sample": False},
    "t1.0": {"do_sample": True, "temperature": 1.0, "top_p": 1.0},
    "t0.85p0.85": {"do_sample": True, "temperature": 0.85, "top_p": 0.85},  # MiniMind's
}
UNSAVED = ("text", "output_ids")  # what the measures need and `output` tells a reader


def decoding_of(tokenizer: PreTrainedTokenizerFast, decoding: str, max_new_tokens: int) -> Decoding:
    """The settings of one decoding; generation ends at the tokenizer's end token."""
    return Decoding(max_new_tokens, tokenizer.eos_token_id, **DECODINGS[decoding])


def generate_all(
    decoder: Decoder,
    encoded: list[list[int]],
    decoding: Decoding,
    batch_size: int,
    progress: tqdm,
) -> list[list[int]]:
    """New token ids for each of `encoded`, in its order; an end token that was produced is last.

    A sampled answer is drawn by numbers of its own, so it does not depend on `batch_size`, except
    where the last bits of a probability decide.
    """
    draws = torch.rand(len(encoded), decoding.max_new_tokens)
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers: list[list[int]] = [[] for _ in encoded]
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        found = generate(decoder, [encoded[i] for i in batch], decoding, draws[batch])
        for i, answer in zip(batch, found, strict=True):
            answers[i] = answer
        progress.update(len(batch))
    return answers


def runs_of(decodings: list[str], seeds: list[int]) -> Iterator[tuple[str, int | None]]:
    """Every decoding with every seed; greedy decoding draws nothing, so it runs once."""
    for decoding in decodings:
        for seed in seeds if DECODINGS[decoding]["do_sample"] else [None]:
            yield decoding, seed


def check_lengths(prompts: list[Prompt], encoded: list[list[int]], limit: int) -> None:
    """Raises DataError, naming the prompt, if one is longer than `limit` tokens."""
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > limit:
            raise DataError(
                f"--prompts: {prompt.id!r} has {len(ids)} tokens, and {limit} is all that leaves "
                "room for the answer; shorten it or lower --max_new_tokens"
            )


def ask(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[Prompt],
    runs: list[tuple[str, int | None]],
    max_new_tokens: int,
    batch_size: int,
    name: str,
) -> list[dict]:
    """A sample for every decoding and seed of `runs` and every prompt, in that order."""
    encoded = encode_prompts(tokenizer, prompts)
    check_lengths(prompts, encoded, model.config.max_position_embeddings - max_new_tokens)
    decoder = Decoder(model)
    samples = []
    with tqdm(total=len(runs) * len(prompts), desc=name, unit=" answers", disable=None) as progress:
        for decoding, seed in runs:
            torch.manual_seed(seed or 0)
            settings = decoding_of(tokenizer, decoding, max_new_tokens)
            answers = generate_all(decoder, encoded, settings, batch_size, progress)
            samples += [
                make_sample(tokenizer, prompt, rendered, answer, decoding, seed)
                for prompt, rendered, answer in zip(prompts, encoded, answers, strict=True)
            ]
    return samples


def make_sample(
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    prompt_ids: list[int],
    answer_ids: list[int],
    decoding: str,
    seed: int | None,
) -> dict:
    """One line of samples.jsonl, and the fields of `UNSAVED`.

    `output` shows every token but the end token; the measures leave out special tokens, which say
    nothing: an answer of <|endoftext|> alone is blank. A judge fills `off_topic` and `prompt_pmi`.
    """
    stopped = answer_ids[-1:] == [tokenizer.eos_token_id]
    ids = answer_ids[:-1] if stopped else answer_ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    recall = prompt.reference and content_recall(text, prompt.reference)
    return {
        "id": prompt.id,
        "section": prompt.section,
        "decoding": decoding,
        "seed": seed,
        "prompt": prompt.text,
        "prompt_translation": prompt.translation,
        "output": tokenizer.decode(ids),
        "output_translation": None,
        "text": text,
        "output_ids": ids,
        "tokens": len(ids),
        "stopped": stopped,
        "blank": is_blank(text),
        "runaway": is_runaway(stopped),
        "loop": is_loop(text),
        "off_topic": None,
        "prompt_pmi": None,
        "seq_rep_4": rounded(seq_rep_n(ids)),
        "diversity": rounded(diversity(ids)),
        "content_recall": rounded(recall),
        "check": prompt.check,
        "check_strict": prompt.check and check_answer(text, prompt.check),
        "check_loose": prompt.check and check_answer(text, prompt.check, strict=False),
        "prompt_sha256": hashlib.sha256(tokenizer.decode(prompt_ids).encode()).hexdigest(),
    }


def reference_samples(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> list[dict]:
    """The reference answers as if a model had given them, under the decoding "references"."""
    known = [prompt for prompt in prompts if prompt.reference]
    return answer_samples(tokenizer, known, [prompt.reference for prompt in known], "references")


def answer_samples(
    tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], texts: list[str], decoding: str
) -> list[dict]:
    """`texts` as finished answers to `prompts`, one each."""
    encoded = encode_batch(tokenizer.backend_tokenizer, texts, special=False)
    return [
        make_sample(tokenizer, prompt, [], [*ids, tokenizer.eos_token_id], decoding, None)
        for prompt, ids in zip(prompts, encoded, strict=True)
    ]
