"""The model against transformers' Llama and Qwen3, and against values worked out by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM

from dataset.lm_dataset import collate
from model.checkpoint import TOKENIZER_DIR, save_model
from model.cli import UserError
from model.model_minimind import MiniMindForCausalLM, make_mask, minimind_config
from tests import DEVICE
from tests.model.small import ROUNDING, SMALL, make_model


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """Make every tensor and model of a test on `DEVICE`."""
    with torch.device(DEVICE):
        yield


@pytest.fixture(params=[False, True], ids=["llama", "qk_norm"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[MiniMindForCausalLM, nn.Module]:
    """Our model, and transformers' own loaded from the folder that we saved."""
    model = make_model(qk_norm=request.param)
    save_model(model, TOKENIZER_DIR, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(reference) is (Qwen3ForCausalLM if request.param else LlamaForCausalLM)
    return model, reference


def test_default_shape_has_minimind2_smalls_parameters() -> None:
    with torch.device("meta"):
        model = MiniMindForCausalLM(minimind_config())
    matrices = 2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1408
    total = 6400 * 512 + 8 * (matrices + 2 * 512) + 512
    assert model.num_parameters() == total == 25_829_888
    assert model.config.rope_parameters["rope_theta"] == 1e6


def test_weights_start_with_the_spread_of_minimind() -> None:
    model = MiniMindForCausalLM(minimind_config(**SMALL))
    for weight in (model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="hidden_size 65"):
        minimind_config(**(SMALL | {"hidden_size": 65}))
    with pytest.raises(UserError, match=r"and these of num_key_value_heads \(3\)"):
        minimind_config(**(SMALL | {"num_key_value_heads": 3}))


@pytest.mark.gpu
def test_logits_equal_transformers_with_padding_or_a_cache(pair: tuple) -> None:
    model, reference = pair
    ids = torch.randint(3, 6400, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(ids).logits
        assert torch.allclose(model(ids).logits, expected, rtol=0, atol=ROUNDING)
        rest = model(ids[:, 9:16], cache=model(ids[:, :9], use_cache=True).cache).logits
        ours = model(ids, attention_mask=mask).logits
        theirs = reference(ids, attention_mask=mask, position_ids=positions).logits
        alone = model(ids[:1, 7:]).logits
    assert torch.allclose(rest, expected[:, 9:16], rtol=0, atol=ROUNDING)
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=ROUNDING)
    assert torch.allclose(ours[0, 7:], alone[0], rtol=0, atol=ROUNDING)


def test_padding_sees_itself_and_no_row_of_the_mask_is_empty() -> None:
    """By hand: of 4 tokens seen, the first 2 are padding; the last 3 are new."""
    mask = make_mask(torch.tensor([[0, 0, 1, 1]]), 3)
    assert mask.shape == (1, 1, 3, 4)
    assert mask[0, 0].int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.gpu
def test_transformers_generates_with_our_model_as_with_its_own(pair: tuple) -> None:
    (model, reference), ids = pair, torch.randint(3, 6400, (2, 9))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = reference.generate(ids, **options)
    assert expected[:, 9:].unique().numel() > 10  # a constant answer would compare nothing
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids, use_cache=use_cache, **options), expected)


# ---------------------------------------------------------------- the loss


@pytest.mark.gpu
def test_a_batch_equals_conversations_one_by_one_in_transformers(pair: tuple) -> None:
    """Padding, rows without tokens and filled positions add nothing to loss and gradients."""
    (model, reference), samples, nats = pair, [], 0.0
    for length, start in ((5, 2), (9, 4), (3, 1), (7, 0)):
        ids = torch.randint(3, 6400, (1, length))
        labels = ids.where(torch.arange(length) >= start, -100)
        samples.append((ids[0].numpy(force=True), labels[0].numpy(force=True)))
        loss = reference(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss
        loss.backward()
        nats += loss.item()
    expected = dict(reference.named_parameters())
    filled = collate(samples, 6, [(8, 40), (16, 40)])
    for batch in (collate(samples), filled, filled | {"label_positions": None}):
        model.zero_grad()
        batch = {name: t if t is None else t.to(DEVICE) for name, t in batch.items()}
        loss = model(**batch, num_items_in_batch=10).loss
        loss.backward()
        assert loss.item() == pytest.approx(nats, rel=ROUNDING)
        for name, parameter in model.named_parameters():
            error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
            assert error < 10 * ROUNDING, name


def test_loss_is_the_shifted_mean_over_labels_by_hand() -> None:
    model, ids = make_model(), torch.randint(3, 6400, (1, 6))
    labels = torch.tensor([[5, -100, int(ids[0, 2]), -100, -100, int(ids[0, 5])]])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[0]
        out, by_four = model(ids, labels=labels), model(ids, labels=labels, num_items_in_batch=4)
    # The first label is never predicted; positions 1 and 4 predict the tokens at 2 and 5.
    total = -(log_probs[1, ids[0, 2]] + log_probs[4, ids[0, 5]]).item()
    assert (out.loss.item(), by_four.loss.item()) == pytest.approx((total / 2, total / 4), abs=1e-5)
    assert out.logits is None


@pytest.mark.gpu
@pytest.mark.parametrize("is_autocast", [True, False])
def test_loss_in_bfloat16_sums_in_float32(is_autocast: bool) -> None:
    """Matrix products are rounded; exponentials and sums are not, whether or not autocast asks."""
    model = make_model()
    states, ids = torch.randn(40, 64), torch.randint(0, 6400, (1, 40))
    model.model.forward = lambda *_: states[None]
    model.model.norm = torch.nn.Identity()
    if not is_autocast:
        model.bfloat16()
        states = states.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=is_autocast):
        loss = model(ids, labels=ids, num_items_in_batch=1).loss
    logits = (states[:-1].bfloat16() @ model.lm_head.weight.bfloat16().T).float()
    expected = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_without_any_label_is_zero_and_trains_nothing() -> None:
    model, ids = make_model(), torch.randint(3, 6400, (1, 6))
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=3).loss
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.parameters())
