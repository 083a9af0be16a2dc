"""The generation loop against transformers' `generate`, and its pieces against known values."""

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3ForCausalLM
from transformers.generation.logits_process import TopPLogitsWarper

from model import generation
from model.generation import (
    Decoder,
    Decoding,
    choose,
    continue_prompts,
    generate,
    groups_of,
    nucleus,
    plain_weight,
    shared_length,
)
from model.model_lora import LoraSettings, apply_lora, merge_lora
from model.model_minimind import MiniMindForCausalLM, minimind_config
from tests.tiny import tiny_model

PROMPTS = [[1, 9, 50, 60], [1, 9, 90, 91, 92, 93, 94, 95, 96], [1, 9, 70], [1, 9, 50, 61]]
CROWD = [[*prompt, extra] for prompt in PROMPTS for extra in (40, 41, 42)]  # takes plain attention
NO_PACKING = (generation, "can_pack", lambda weight: False)


def no_draws(prompts: list[list[int]], steps: int) -> torch.Tensor:
    """Draws for greedy decoding, which reads none of them."""
    return torch.full((len(prompts), steps), torch.nan)


def alone(model: torch.nn.Module, prompt: list[int], steps: int) -> list[int]:
    """transformers' greedy answer to one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=steps, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def scaled_model(qk_norm: bool, factor: float, kv_heads: int = 2) -> MiniMindForCausalLM:
    """A tiny model whose larger weights make answers differ."""
    torch.manual_seed(0)
    config = minimind_config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=48, qk_norm=qk_norm,
    )  # fmt: skip
    model = MiniMindForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(factor)
    return model


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("group_tokens", [1, 8, 512])  # a prompt at a time, some, all at once
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("plain_from", [1, 100])
def test_greedy_answers_equal_those_of_transformers(
    qk_norm, group_tokens, packed, plain_from, monkeypatch
):
    monkeypatch.setattr(generation, "GROUP_TOKENS", group_tokens)
    monkeypatch.setattr(generation, "CACHE_BLOCK", 5)  # grows twice
    monkeypatch.setattr(generation, "PLAIN_FROM", plain_from)
    if not packed:
        monkeypatch.setattr(*NO_PACKING)
    model = scaled_model(qk_norm, 8)
    reference = (Qwen3ForCausalLM if qk_norm else LlamaForCausalLM)(model.config).eval()
    reference.load_state_dict(model.state_dict())
    decoder = Decoder(model)
    assert decoder.head.is_packed == (packed and generation.can_pack(decoder.embedding))
    answers = generate(decoder, PROMPTS, Decoding(12), no_draws(PROMPTS, 12))
    assert answers == [alone(reference, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("prompts", [PROMPTS, [[9]], [[9], [1, 50, 60]]])  # one token, too
def test_key_heads_and_prompts_of_every_number(kv_heads, prompts):
    model = scaled_model(False, 8, kv_heads)
    reference = LlamaForCausalLM(model.config).eval()
    reference.load_state_dict(model.state_dict())
    answers = generate(Decoder(model), prompts, Decoding(12), no_draws(prompts, 12))
    assert answers == [alone(reference, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prompts", [PROMPTS[1:2], CROWD])
def test_bfloat16_logits_are_near_those_of_float32_and_repeat(
    qk_norm, packed, prompts, monkeypatch
):
    if not packed:
        monkeypatch.setattr(*NO_PACKING)
    monkeypatch.setattr(generation, "CACHE_BLOCK", 5)
    model = scaled_model(qk_norm, 2)
    decoder = Decoder(model.bfloat16())
    reference = (Qwen3ForCausalLM if qk_norm else LlamaForCausalLM)(model.config).eval()
    reference.load_state_dict(model.state_dict())  # the very numbers that bfloat16 holds
    logits, computed = Decoder.logits, []

    def spy(*args: object) -> torch.Tensor:
        computed.append(logits(*args))
        return computed[-1]

    monkeypatch.setattr(Decoder, "logits", spy)
    answers = generate(decoder, prompts, Decoding(12), no_draws(prompts, 12))
    first = torch.stack(computed[-12:])  # (12, B, V); what is read once comes before
    computed.clear()
    assert generate(decoder, prompts, Decoding(12), no_draws(prompts, 12)) == answers
    assert torch.equal(torch.stack(computed[-12:]), first)
    assert reference.dtype == torch.float32
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        distance = (first[:, row] - expected).norm(dim=-1)
        assert (distance <= 0.05 * expected.norm(dim=-1)).all()


@pytest.mark.parametrize("block", [3, 32])
def test_a_crowd_that_ends_at_many_times_equals_each_alone(block, monkeypatch):
    monkeypatch.setattr(generation, "CACHE_BLOCK", block)
    model = scaled_model(False, 8)
    expected = [alone(model, prompt, 40) for prompt in CROWD]
    found = [token for answer in expected for token in set(answer)]
    end = max(found, key=found.count)  # most answers meet it, by and by
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in expected]
    lengths = sorted(map(len, cut))
    assert len(set(lengths)) > 3 and lengths[4] < lengths[8]  # fewer than PLAIN_FROM, in the end
    assert generate(Decoder(model), CROWD, Decoding(40, end), no_draws(CROWD, 40)) == cut


def test_an_adapted_model_continues_as_its_own_forward_pass():
    model = tiny_model()
    settings = LoraSettings(rank=4, alpha=8.0, targets="all-linear", train_tokens=(1, 2))
    apply_lora(model, settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "rows")):
            parameter.data.normal_()
    unmerged = generate(Decoder(model), PROMPTS, Decoding(8), no_draws(PROMPTS, 8))
    assert unmerged == [alone(model, prompt, 8) for prompt in PROMPTS]
    assert unmerged != generate(Decoder(tiny_model()), PROMPTS, Decoding(8), no_draws(PROMPTS, 8))
    layer = model.model.layers[0].self_attn.q_proj
    before = plain_weight(layer)
    merge_lora(model)
    assert torch.equal(plain_weight(layer), before)


def test_answers_end_at_the_end_token_and_leave_the_batch(monkeypatch):
    decoder = Decoder(tiny_model())
    free = generate(decoder, PROMPTS, Decoding(12), no_draws(PROMPTS, 12))
    end = free[1][2]
    widths = []
    logits = Decoder.logits

    def spy(self: Decoder, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        widths.append(len(ids))
        return logits(self, ids, *rest)

    monkeypatch.setattr(Decoder, "logits", spy)
    ended = generate(decoder, PROMPTS, Decoding(12, eos_token_id=end), no_draws(PROMPTS, 12))
    assert ended == [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    assert len(ended[1]) == 3 and widths[-1] < len(PROMPTS)


def test_an_answer_streams_token_by_token():
    decoder, prompts = Decoder(tiny_model()), PROMPTS[:1]
    steps = list(continue_prompts(decoder, prompts, Decoding(5), no_draws(prompts, 5)))
    (answer,) = generate(decoder, prompts, Decoding(5), no_draws(prompts, 5))
    assert steps == [[(0, token)] for token in answer]


def test_a_sampled_answer_depends_on_its_own_draws_only():
    decoder = Decoder(tiny_model())
    decoding = Decoding(12, do_sample=True, temperature=0.85, top_p=0.85)
    draws = torch.rand(len(PROMPTS), 12, generator=torch.Generator().manual_seed(3))
    together = generate(decoder, PROMPTS, decoding, draws)
    assert together == generate(decoder, PROMPTS, decoding, draws)
    for row, prompt in enumerate(PROMPTS):
        assert generate(decoder, [prompt], decoding, draws[row : row + 1]) == [together[row]]


@pytest.mark.parametrize("likely", [4, 256])  # few are enough for some rows, or for all
@pytest.mark.parametrize("top_p", [0.3, 0.85, 0.999])
def test_nucleus_is_that_of_transformers(top_p, likely, monkeypatch):
    monkeypatch.setattr(generation, "LIKELY_TOKENS", likely)
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 3
    expected = TopPLogitsWarper(top_p)(None, logits).softmax(dim=-1)
    found = nucleus(logits.softmax(dim=-1), top_p)
    assert torch.allclose(found / found.sum(dim=-1, keepdim=True), expected, atol=1e-6)


def test_draws_choose_tokens_by_cumulated_probability():
    # By hand: logits / 0.5 give probabilities .5, 0, .3, .2 in this order.
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log() * 0.5
    draws = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-24])
    decoding = Decoding(1, do_sample=True, temperature=0.5)
    chosen = choose(logits.expand(6, 4), decoding, draws)
    assert chosen.tolist() == [0, 0, 2, 2, 3, 3]
    # A nucleus of .7 holds the first and the third, .625 and .375 of it.
    decoding.top_p = 0.7
    draws = torch.tensor([0.62, 0.63, 1 - 2**-24])
    assert choose(logits.expand(3, 4), decoding, draws).tolist() == [0, 2, 2]
    assert choose(logits.expand(3, 4), Decoding(1), draws).tolist() == [0, 0, 0]


def test_groups():
    assert shared_length(PROMPTS) == 2
    assert shared_length([[1, 2], [1, 2]]) == 1  # a token of each is left to be read
    assert shared_length([[1, 2]]) == 0  # nothing to share it with
    prompts = [[0] * length for length in (200, 240, 300, 900)]
    assert groups_of(prompts, 0) == [slice(0, 2), slice(2, 3), slice(3, 4)]
