"""Batched greedy and nucleus decoding with the model's own forward pass and a cache.

Prompts are padded on the left. Greedy answers are those of transformers' `generate`. A sampled
answer is drawn by numbers of its own, so neither depends on its batch, except where the last bits
of a probability decide.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache

from model.files import UserError
from model.model_minimind import MiniMindForCausalLM

# Tokens among which a nucleus is looked for first: to find these is faster than to sort all.
LIKELY_TOKENS = 256


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the most likely one at temperature 0, else sampled."""

    name: str
    temperature: float = 0.0
    top_p: float = 1.0

    @classmethod
    def parse(cls, name: str) -> "Decoding":
        """Read a name: `greedy`, or temperature and nucleus as in `t1.0` and `t0.85p0.85`."""
        found = re.fullmatch(r"t(\d+\.?\d*)(?:p(\d+\.?\d*))?", name)
        if name == "greedy":
            return cls(name)
        if not found or float(found[1]) == 0 or not 0 < float(found[2] or 1) <= 1:
            raise UserError(f"--decoding {name}: use greedy, or a form such as t1.0 or t0.85p0.85")
        return cls(name, float(found[1]), float(found[2] or 1))


def generate(
    model: MiniMindForCausalLM,
    prompts: list[list[int]],
    decoding: Decoding,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    end_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """Answer each prompt with new token ids; an end token that was produced is last."""
    draws = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        chosen = [prompts[row] for row in batch]
        for tokens in continue_prompts(model, chosen, decoding, draws[batch], end_ids):
            for index, token in tokens:
                answers[batch[index]].append(token)
    return answers


@torch.inference_mode()
def continue_prompts(
    model: MiniMindForCausalLM,
    prompts: list[list[int]],
    decoding: Decoding,
    draws: torch.Tensor,
    end_ids: tuple[int, ...] = (),
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, (index, token) of each prompt whose answer has not ended.

    Leaves the model in evaluation mode.

    Args:
        draws: (B, steps) uniform numbers in [0, 1), one a token; see `choose_tokens`.
        end_ids: tokens that end an answer.
    """
    model.eval()
    device = model.device
    draws, ends = draws.to(device), torch.tensor(end_ids, dtype=torch.long, device=device)
    rows = torch.arange(len(prompts), device=device)  # of `prompts`, in the batch that is left
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    padding = torch.tensor([width - len(p) for p in prompts], device=device)
    mask = torch.arange(width, device=device) >= padding[:, None]
    cache = DynamicCache(config=model.config)
    for step in range(draws.shape[1]):
        logits = model(ids, attention_mask=mask, cache=cache, logits_to_keep=1).logits[:, -1]
        tokens = choose_tokens(logits.float(), decoding, draws[rows, step])
        yield list(zip(rows.tolist(), tokens.tolist(), strict=True))
        going = ~torch.isin(tokens, ends)
        if not going.all():
            rows, tokens, mask = rows[going], tokens[going], mask[going]
            cache.batch_select_indices(going)
        if len(rows) == 0:
            return
        ids, mask = tokens[:, None], torch.nn.functional.pad(mask, (0, 1), value=True)


def choose_tokens(logits: torch.Tensor, decoding: Decoding, draws: torch.Tensor) -> torch.Tensor:
    """Choose the next tokens, (B,) int64, from (B, V) logits.

    Args:
        draws: (B,) uniform numbers in [0, 1). A token is the place where the cumulated
            probabilities reach its row's draw, so an answer depends on its own draws only.
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
    # Rounding may bring the product up to the sum itself; then the last possible token is meant.
    last = (cumulated < cumulated[:, -1:]).sum(dim=-1)
    return tokens.minimum(last)


def cut_to_nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the most likely tokens that together reach `top_p`; 0 elsewhere, not renormalized.

    Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751, eq. 3).
    """
    likely = probabilities.topk(min(LIKELY_TOKENS, probabilities.shape[-1])).values
    floor = find_least_kept(likely, top_p)
    wide = likely.sum(dim=-1) < top_p
    if wide.any():
        floor[wide] = find_least_kept(probabilities[wide].sort(descending=True).values, top_p)
    return probabilities.where(probabilities >= floor, 0.0)


def find_least_kept(descending: torch.Tensor, top_p: float) -> torch.Tensor:
    """Find each row's least probability whose predecessors fall short of `top_p`, (B, 1)."""
    before = descending.cumsum(dim=-1) - descending
    kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return descending.gather(-1, kept - 1)
