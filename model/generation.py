"""Batched greedy and nucleus decoding by transformers' `generate`, each answer with its own draws.

Prompts are padded on the left. An answer depends on its batch only by floating-point rounding.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from model.cli import UserError
from model.model_minimind import MiniMindForCausalLM

MAX_NEW_TOKENS = 96  # of an answer, where no flag says otherwise


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
    end_ids: Sequence[int],
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
        places = order[start : start + batch_size]
        batch = [prompts[place] for place in places]
        ended = answer_batch(model, batch, decoding, draws[places], end_ids)
        for place, answer in zip(places, ended, strict=True):
            answers[place] = answer
    return answers


def draw_numbers(prompts: int, steps: int, seed: int) -> Tensor:
    """Draw numbers in [0, 1), (prompts, steps), from a generator for each prompt."""
    generators = [np.random.default_rng([seed, place]) for place in range(prompts)]
    rows = [generator.random(steps, dtype=np.float32) for generator in generators]
    return torch.from_numpy(np.array(rows, np.float32).reshape(prompts, steps))


def answer_batch(
    model: MiniMindForCausalLM,
    prompts: list[list[int]],
    decoding: Decoding,
    draws: Tensor,
    end_ids: Sequence[int],
    streamer: TextStreamer | None = None,
) -> list[list[int]]:
    """Answer the prompts in one batch, up to their end tokens or as many tokens as draws.

    Leaves the model in evaluation mode. `draws` is (B, steps), see `DrawnToken`; a streamer takes
    the tokens of one prompt as they come.
    """
    model.eval()
    ids, mask = pad_left(prompts)
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
        processors.append(TopPLogitsWarper(decoding.top_p))
        processors.append(DrawnToken(draws.to(model.device), prompt_length=ids.shape[1]))
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        logits_processor=processors,
        do_sample=False,  # the most likely token, or the only one that the last processor leaves
        max_new_tokens=draws.shape[1],
        eos_token_id=list(end_ids),
        pad_token_id=0,
        streamer=streamer,
    )
    answers = output[:, ids.shape[1] :].tolist()
    return [cut_at_end(answer, end_ids) for answer in answers]


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


def cut_at_end(answer: list[int], end_ids: Sequence[int]) -> list[int]:
    """Return an answer up to its first end token; what follows is padding of the batch."""
    for index, token in enumerate(answer):
        if token in end_ids:
            return answer[: index + 1]
    return answer


class DrawnToken(LogitsProcessor):
    """Leave each row one next token: the one at which its random number stands.

    `generate` draws by one generator for a whole batch, so that an answer would depend on its
    neighbors. Here it depends on its own draws alone, (B, steps), uniform in [0, 1).
    """

    def __init__(self, draws: Tensor, prompt_length: int) -> None:
        self.draws = draws
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T) ids so far and (B, V) scores -> (B, V) scores, -inf but for one token a row."""
        step = input_ids.shape[1] - self.prompt_length
        tokens = choose_tokens(scores, self.draws[:, step])
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, tokens[:, None], 0.0)


def choose_tokens(scores: Tensor, draws: Tensor) -> Tensor:
    """Choose the tokens, (B,) int64, where cumulated probabilities reach their rows' draws, (B,).

    Scores are (B, V) logits; a token of -inf is never chosen.
    """
    cumulated = scores.softmax(dim=-1).cumsum(dim=-1)
    reached = draws[:, None] * cumulated[:, -1:]
    # To the right of equal values: a token of probability 0 is never chosen.
    tokens = torch.searchsorted(cumulated, reached.contiguous(), right=True)[:, 0]
    # Rounding may bring the product up to the sum itself: then the last possible token is chosen.
    last_possible = (cumulated < cumulated[:, -1:]).sum(dim=-1)
    return tokens.minimum(last_possible)
