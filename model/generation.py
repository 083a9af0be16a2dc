"""Thin stand-in until the merge: one prompt at a time, by transformers."""

import re
from dataclasses import dataclass

import torch

from model.files import UserError
from model.model_minimind import MiniMindForCausalLM


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen; greedily at temperature 0."""

    name: str
    temperature: float
    top_p: float

    @classmethod
    def parse(cls, name: str) -> "Decoding":
        """Read a name such as greedy, t1.0 or t0.85p0.85."""
        if name == "greedy":
            return cls(name, 0.0, 1.0)
        found = re.fullmatch(r"t(\d+\.?\d*)(?:p(\d+\.?\d*))?", name)
        if not found:
            raise UserError(f"--decoding {name}: write greedy, t1.0 or t0.85p0.85")
        return cls(name, float(found[1]), float(found[2] or 1))


@torch.inference_mode()
def generate(
    model: MiniMindForCausalLM,
    prompts: list[list[int]],
    decoding: Decoding,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    end_ids: set[int],
) -> list[list[int]]:
    """Generate new token ids for each prompt; an end token that was produced is last."""
    sampling = {"do_sample": False}
    if decoding.temperature:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p}
        sampling["top_k"] = 0
    answers = []
    for number, ids in enumerate(prompts):
        torch.manual_seed(1000 * seed + number)
        out = model.generate(
            torch.tensor([ids], device=model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids),
            pad_token_id=0,
            **sampling,
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers
