"""Values that the code before the rebuilding gave: fingerprints, logits, answers, adapter files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from model.checkpoint import load_model, weights_fingerprint
from model.generation import Decoding, generate
from model.model_lora import LoraSettings, apply_lora, load_lora, merge_lora, save_lora
from model.model_minimind import MiniMindForCausalLM, minimind_config

REPO = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((REPO / "tests/goldens/model.json").read_text())
BASE = next(REPO.glob("evaluation/**/bases/xs-plain42"))
ADAPTERS = {
    "square": LoraSettings(rank=8, alpha=8, targets="square", init="gaussian"),
    "all-linear": LoraSettings(rank=4, alpha=12, use_rslora=True),
    "rows": LoraSettings(rank=2, targets="q_proj,mlp", train_tokens=(1, 2)),
    "whole": LoraSettings(rank=2, targets="attention", modules_to_save=("embeddings", "norms")),
}


def summarize(tensor: torch.Tensor) -> list[float]:
    """Compute numbers that move if a value, or the order of the values, moves."""
    values = tensor.detach().double().flatten()
    ramp = torch.linspace(-1, 1, len(values), dtype=torch.float64)
    return [values.sum().item(), values.square().sum().item(), (values * ramp).sum().item()]


def make_ids(rows: int) -> torch.Tensor:
    """Build rows of 40 tokens of every part of the vocabulary."""
    return (torch.arange(40 * rows) * 2_654_435 % 6400).view(rows, 40)


def summarize_outputs(model: torch.nn.Module) -> list[float]:
    """Compute a summary of the logits, and the loss."""
    ids = make_ids(3)
    with torch.no_grad():
        return [*summarize(model.eval()(ids).logits), model(ids, labels=ids).loss.item()]


def test_logits_and_answers() -> None:
    model = load_model(BASE)
    assert weights_fingerprint(model) == GOLDEN["fingerprint"]
    assert summarize_outputs(model) == pytest.approx(GOLDEN["logits"], rel=1e-6)
    for name, answers in (("greedy", GOLDEN["answers"]), ("t0.85p0.85", GOLDEN["sampled"])):
        assert generate(model, GOLDEN["prompts"], Decoding.parse(name), 3, 48, 32, (2,)) == answers


@pytest.mark.parametrize("adapted", [False, True])
def test_training(adapted: bool) -> None:
    start, old_losses, old_weights = GOLDEN["trained"][adapted]
    torch.manual_seed(1)
    model = MiniMindForCausalLM(minimind_config(hidden_size=64, num_hidden_layers=2))
    assert weights_fingerprint(model) == start
    if adapted:
        apply_lora(model, LoraSettings(rank=4, dropout=0.1, train_tokens=(1, 2)))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses, ids = torch.optim.AdamW(trainable, lr=1e-3), [], make_ids(4)
    for _ in range(6):
        loss = model(ids, labels=ids.where(ids % 3 > 0, -100), num_items_in_batch=100).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(old_losses, rel=1e-5)
    weights = sorted(summarize(parameter) for parameter in trainable)
    assert sum(weights, []) == pytest.approx(sum(old_weights, []), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name: str, tmp_path: Path) -> None:
    old, model, again = GOLDEN["adapters"][name], load_model(BASE), load_model(BASE)
    torch.manual_seed(5)
    assert apply_lora(model, ADAPTERS[name]) == old["adapted"]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = sorted(map(summarize, trainable))
    assert sum(start, []) == pytest.approx(sum(old["start"], []), rel=1e-6)
    with torch.no_grad():
        for parameter in trainable:
            parameter.add_(torch.linspace(-0.05, 0.07, parameter.numel()).view_as(parameter))
    save_lora(model, ADAPTERS[name], tmp_path, "base", GOLDEN["fingerprint"])
    configs = [json.loads((tmp_path / "adapter_config.json").read_text()), old["config"]]
    for config in configs:  # of which the order says nothing
        config["modules_to_save"] = sorted(config["modules_to_save"] or [])
    assert configs[0] == configs[1]
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == old["metadata"]
    load_lora(again, tmp_path)
    assert summarize_outputs(again) == pytest.approx(old["logits"], rel=1e-5)
    merged = merge_lora(again).state_dict()
    for tensors, summaries in ((load_file(path), old["file"]), (merged, old["merged"])):
        assert tensors.keys() == summaries.keys()
        for key, summary in summaries.items():
            assert summarize(tensors[key]) == pytest.approx(summary, rel=1e-6, abs=1e-5), key
