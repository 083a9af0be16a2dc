"""Decoding against transformers' `generate`, and its pieces against known values."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from model.cli import UserError
from model.generation import Decoding, choose_tokens, draw_numbers, generate
from tests import DEVICE
from tests.model.small import make_model

PROMPTS = [[1, 9, 50, 60], [1, 9, 90, 91, 92, 93, 94, 95, 96], [9], [1, 9, 70], [1, 9, 50, 61]]
GREEDY, SAMPLED = Decoding.parse("greedy"), Decoding.parse("t0.85p0.85")
NEVER = (100,)  # no token of the small model


def answer_alone(model: torch.nn.Module, prompt: list[int], steps: int) -> list[int]:
    """Answer one prompt greedily with transformers' `generate`."""
    ids = torch.tensor([prompt], device=DEVICE)
    out = model.generate(ids, max_new_tokens=steps, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("qk_norm", [False, True])
def test_greedy_answers_equal_those_of_transformers(qk_norm: bool) -> None:
    model = make_model(qk_norm=qk_norm).to(DEVICE)
    reference = (Qwen3ForCausalLM if qk_norm else LlamaForCausalLM)(model.config).eval().to(DEVICE)
    reference.load_state_dict(model.state_dict())
    expected = [answer_alone(reference, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    for batch_size in (1, 2, 5):
        assert generate(model, PROMPTS, GREEDY, 0, 12, batch_size, NEVER) == expected


def test_answers_end_at_an_end_token() -> None:
    model = make_model()
    free = generate(model, PROMPTS, GREEDY, 0, 20, 5, NEVER)
    ends = (free[1][2], free[3][7])
    cut = [next((a[: i + 1] for i, t in enumerate(a) if t in ends), a) for a in free]
    assert {len(answer) for answer in cut} >= {3, 20}
    assert generate(model, PROMPTS, GREEDY, 0, 20, 5, ends) == cut


def test_a_sampled_answer_depends_on_seed_and_place_not_on_its_batch() -> None:
    model = make_model()
    together = generate(model, PROMPTS, SAMPLED, 3, 12, 5, NEVER)
    assert generate(model, PROMPTS, SAMPLED, 3, 12, 2, NEVER) == together
    assert generate(model, PROMPTS[:2], SAMPLED, 3, 12, 5, NEVER) == together[:2]
    assert generate(model, PROMPTS, SAMPLED, 4, 12, 5, NEVER) != together


def test_a_sampled_answer_does_not_depend_on_the_most_tokens() -> None:
    model = make_model()
    most = generate(model, PROMPTS, SAMPLED, 3, 40, 5, NEVER)
    for fewer in (1, 9, 16):
        assert generate(model, PROMPTS, SAMPLED, 3, fewer, 5, NEVER) == [a[:fewer] for a in most]
    alike = generate(model, PROMPTS[:1] * 2, SAMPLED, 3, 9, 5, NEVER)
    assert alike[0] != alike[1]  # each place has numbers of its own


def sample_alone(model: torch.nn.Module, prompt: list[int], draws: np.ndarray) -> list[int]:
    """Sample one answer at temperature 0.85 from a nucleus of 0.85, in plain numpy."""
    ids = list(prompt)
    for draw in draws:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
        weights = np.exp(logits / 0.85)
        probabilities = weights / weights.sum()
        from_likely = np.argsort(-probabilities)
        reached = probabilities[from_likely].cumsum()
        nucleus = from_likely[: np.searchsorted(reached, 0.85) + 1]
        kept = np.zeros_like(probabilities)
        kept[nucleus] = probabilities[nucleus]
        cumulated = kept.cumsum()
        ids.append(int(np.searchsorted(cumulated, draw * cumulated[-1], side="right")))
    return ids[len(prompt) :]


def test_sampled_answers_equal_those_of_plain_numpy() -> None:
    model = make_model().eval()
    reference = LlamaForCausalLM(model.config).eval()
    reference.load_state_dict(model.state_dict())
    draws = draw_numbers(len(PROMPTS), 12, seed=3).numpy()
    expected = [sample_alone(reference, *pair) for pair in zip(PROMPTS, draws, strict=True)]
    assert generate(model, PROMPTS, SAMPLED, 3, 12, 5, NEVER) == expected


def test_draws_choose_tokens_by_cumulated_probability() -> None:
    # By hand: probabilities .5, 0, .3, .2 in this order.
    scores = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    draws = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-24])
    assert choose_tokens(scores.expand(6, 4), draws).tolist() == [0, 0, 2, 2, 3, 3]
    # Where a nucleus leaves the first and the third, .625 and .375 of it.
    scores = torch.tensor([0.5, 0.0, 0.3, 0.0]).log()
    draws = torch.tensor([0.62, 0.63, 1 - 2**-24])
    assert choose_tokens(scores.expand(3, 4), draws).tolist() == [0, 2, 2]


def test_decodings_by_name() -> None:
    assert Decoding.parse("t1.0") == Decoding("t1.0", 1.0, 1.0)
    assert Decoding.parse("t0.85p0.85") == Decoding("t0.85p0.85", 0.85, 0.85)
    for name in ("t0", "t0.8p1.5", "nucleus", "t.5p"):
        with pytest.raises(UserError, match=f"--decoding {name}: use greedy"):
            Decoding.parse(name)
