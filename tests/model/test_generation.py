"""Decoding against transformers' `generate`, and its pieces against known values."""

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3ForCausalLM, TopPLogitsWarper

from model import generation
from model.cli import UserError
from model.generation import Decoding, choose_tokens, cut_to_nucleus, generate
from tests import DEVICE
from tests.model.small import make_model

PROMPTS = [[1, 9, 50, 60], [1, 9, 90, 91, 92, 93, 94, 95, 96], [9], [1, 9, 70], [1, 9, 50, 61]]
GREEDY, SAMPLED = Decoding.parse("greedy"), Decoding.parse("t0.85p0.85")


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
        assert generate(model, PROMPTS, GREEDY, 0, 12, batch_size) == expected


def test_answers_end_at_an_end_token_and_leave_the_batch() -> None:
    model = make_model()
    free = generate(model, PROMPTS, GREEDY, 0, 20, 5)
    ends = (free[1][2], free[3][7])
    cut = [next((a[: i + 1] for i, t in enumerate(a) if t in ends), a) for a in free]
    assert {len(answer) for answer in cut} >= {3, 20}
    assert generate(model, PROMPTS, GREEDY, 0, 20, 5, ends) == cut


def test_a_sampled_answer_depends_on_seed_and_place_not_on_its_batch() -> None:
    model = make_model()
    together = generate(model, PROMPTS, SAMPLED, 3, 12, 5)
    assert generate(model, PROMPTS, SAMPLED, 3, 12, 2) == together
    assert generate(model, PROMPTS[:2], SAMPLED, 3, 12, 5) == together[:2]
    assert generate(model, PROMPTS, SAMPLED, 4, 12, 5) != together


def test_a_sampled_answer_does_not_depend_on_the_most_tokens() -> None:
    model = make_model()
    most = generate(model, PROMPTS, SAMPLED, 3, 40, 5)
    for fewer in (1, 9, 16):
        assert generate(model, PROMPTS, SAMPLED, 3, fewer, 5) == [a[:fewer] for a in most]
    alike = generate(model, PROMPTS[:1] * 2, SAMPLED, 3, 9, 5)
    assert alike[0] != alike[1]  # each place has numbers of its own


@pytest.mark.parametrize("likely", [4, 256])  # enough for some rows, or for all
@pytest.mark.parametrize("top_p", [0.3, 0.85, 0.999])
def test_nucleus(top_p: float, likely: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LIKELY_TOKENS", likely)
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 3
    expected = TopPLogitsWarper(top_p)(None, logits).softmax(dim=-1)
    found = cut_to_nucleus(logits.softmax(dim=-1), top_p)
    assert torch.allclose(found / found.sum(dim=-1, keepdim=True), expected, atol=1e-6)


def test_draws_choose_tokens_by_cumulated_probability() -> None:
    # By hand: logits / 0.5 give probabilities .5, 0, .3, .2 in this order.
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log() * 0.5
    draws = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-24])
    chosen = choose_tokens(logits.expand(6, 4), Decoding.parse("t0.5"), draws)
    assert chosen.tolist() == [0, 0, 2, 2, 3, 3]
    # A nucleus of .7 holds the first and the third, .625 and .375 of it.
    draws = torch.tensor([0.62, 0.63, 1 - 2**-24])
    chosen = choose_tokens(logits.expand(3, 4), Decoding.parse("t0.5p0.7"), draws)
    assert chosen.tolist() == [0, 2, 2]
    assert choose_tokens(logits.expand(3, 4), GREEDY, draws).tolist() == [0, 0, 0]


def test_decodings_by_name() -> None:
    assert Decoding.parse("t1.0") == Decoding("t1.0", 1.0, 1.0)
    assert Decoding.parse("t0.85p0.85") == Decoding("t0.85p0.85", 0.85, 0.85)
    for name in ("t0", "t0.8p1.5", "nucleus", "t.5p"):
        with pytest.raises(UserError, match=f"--decoding {name}: use greedy"):
            Decoding.parse(name)
