"""Batched greedy and nucleus decoding with the model's own forward pass and a cache.

Prompts are padded on the left. Greedy answers equal those of transformers' `generate`. Each sampled
answer has its own random numbers. An answer depends on its batch only by floating-point rounding.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from model.cli import UserError
from model.model_minimind import MiniMindForCausalLM

MAX_NEW_TOKENS = 96  # of an answer, where no flag says otherwise
LIKELY_TOKENS = 256  # a nucleus is looked for among so many first: faster than to sort all


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the most likely one at temperature 0, else by sampling."""

    name: str
    temperature: float = 0.0
    top_p: float = 1.0

    @classmethod
    def parse(cls, name: str) -> "Decoding":
        """Read a name: `greedy`, or temperature and nucleus as in `t1.0` and `t0.85p0.85`."""
        if name == "greedy":
            return cls(name)
        match = re.fullmatch(r"t(\d+\.?\d*)(?:p(\d+\.?\d*))?", name)
        if match:
            temperature = float(match[1])
            top_p = float(match[2] or 1)
            if temperature > 0 and 0 < top_p <= 1:
                return cls(name, temperature, top_p)
        raise UserError(f"--decoding {name}: use greedy, or a form such as t1.0 or t0.85p0.85")


def generate(
    model: MiniMindForCausalLM,
    prompts: list[list[int]],
    decoding: Decoding,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    end_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """Answer each prompt with new token ids; an end token that was produced is last.

    A sampled answer depends on `seed` and on the place of its prompt, not on the other prompts nor
    on `max_new_tokens`, which only cuts it. Results of the study up to its third round drew one
    matrix for all prompts and tokens, so their sampled answers are others.
    """
    draws = draw_numbers(len(prompts), max_new_tokens, seed)
    # Prompts of like length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        chosen = [prompts[place] for place in batch]
        for step in continue_prompts(model, chosen, decoding, draws[batch], end_ids):
            for index, token in step:
                answers[batch[index]].append(token)
    return answers


def draw_numbers(prompts: int, steps: int, seed: int) -> Tensor:
    """Draw numbers in [0, 1), (prompts, steps), from a generator for each prompt."""
    generators = [np.random.default_rng([seed, place]) for place in range(prompts)]
    rows = [generator.random(steps, dtype=np.float32) for generator in generators]
    return torch.from_numpy(np.array(rows, np.float32).reshape(prompts, steps))


@torch.inference_mode()
def continue_prompts(
    model: MiniMindForCausalLM,
    prompts: list[list[int]],
    decoding: Decoding,
    draws: Tensor,
    end_ids: tuple[int, ...] = (),
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, (index, token) of each prompt whose answer has not ended.

    Leaves the model in evaluation mode; `draws` is (B, steps), see `choose_tokens`.
    """
    model.eval()
    device = model.device
    draws = draws.to(device)
    ends = torch.tensor(end_ids, dtype=torch.long, device=device)
    ids, mask = pad_left(prompts)
    ids = ids.to(device)
    mask = mask.to(device)
    rows = torch.arange(len(prompts), device=device)  # prompts whose answers go on
    cache = DynamicCache(config=model.config)
    for step in range(draws.shape[1]):
        logits = model(ids, attention_mask=mask, cache=cache, logits_to_keep=1).logits[:, -1]
        tokens = choose_tokens(logits.float(), decoding, draws[rows, step])
        yield list(zip(rows.tolist(), tokens.tolist(), strict=True))
        going = ~torch.isin(tokens, ends)
        if not going.any():
            return
        if not going.all():  # answers that have ended leave the batch
            rows = rows[going]
            tokens = tokens[going]
            mask = mask[going]
            cache.batch_select_indices(going)
        ids = tokens[:, None]
        mask = F.pad(mask, (0, 1), value=True)


def pad_left(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Stack prompts with 0 on the left: ids and "is no padding", each (B, longest)."""
    width = max(map(len, prompts))
    ids = []
    mask = []
    for prompt in prompts:
        padding = width - len(prompt)
        ids.append([0] * padding + prompt)
        mask.append([False] * padding + [True] * len(prompt))
    return torch.tensor(ids), torch.tensor(mask)


def choose_tokens(logits: Tensor, decoding: Decoding, draws: Tensor) -> Tensor:
    """Choose the next tokens, (B,) int64, from (B, V) logits.

    A token is where the cumulated probabilities reach its row's draw, (B,), uniform in [0, 1): so
    an answer depends on its own draws only.
    """
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / decoding.temperature).softmax(dim=-1)
    if decoding.top_p < 1:
        probabilities = cut_to_nucleus(probabilities, decoding.top_p)
    cumulated = probabilities.cumsum(dim=-1)
    reached = draws[:, None] * cumulated[:, -1:]
    # To the right of equal values: a token of probability 0 is never chosen.
    tokens = torch.searchsorted(cumulated, reached.contiguous(), right=True)[:, 0]
    # Rounding may bring the product up to the sum itself: then the last possible token is chosen.
    last_possible = (cumulated < cumulated[:, -1:]).sum(dim=-1)
    return tokens.minimum(last_possible)


def cut_to_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the most likely tokens that together reach `top_p` (ties with the last, too); else 0.

    Not renormalized. Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751, eq. 3).
    """
    vocab_size = probabilities.shape[-1]
    for count in (min(LIKELY_TOKENS, vocab_size), vocab_size):
        likely = probabilities.topk(count).values
        cumulated = likely.cumsum(dim=-1)
        if (cumulated[:, -1] >= top_p).all():
            break
    # A token is kept if the more likely ones fall short of `top_p`; so is the most likely one.
    more_likely = cumulated - likely
    kept = (more_likely < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    least = likely.gather(-1, kept - 1)
    return probabilities.where(probabilities >= least, 0.0)
