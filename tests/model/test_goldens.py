"""Values that the code before the rebuilding gave: fingerprints, logits, answers, adapter files."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from model.checkpoint import load_model, weights_fingerprint
from model.generation import Decoding, generate
from model.model_lora import LoraSettings, apply_lora, build_merged, load_lora, save_lora
from model.model_minimind import MiniMindForCausalLM, minimind_config

REPO = Path(__file__).resolve().parents[2]
GOLDENS = REPO / "tests/goldens/model.json"
BASE = next(REPO.glob("evaluation/**/bases/xs-plain42"))
ADAPTERS = {
    "square": LoraSettings(rank=8, alpha=8, targets="square", init="gaussian"),
    "all-linear": LoraSettings(rank=4, alpha=12, use_rslora=True),
    "rows": LoraSettings(rank=2, targets="q_proj,mlp", train_tokens=(1, 2)),
    "whole": LoraSettings(rank=2, targets="attention", modules_to_save=("embeddings", "norms")),
}
TOKENS, PROMPTS, NEW_TOKENS = 40, 20, 48


def prompts() -> list[list[int]]:
    """Pieces of 3 to 22 tokens of the prompts' file at the time of freezing."""
    return json.loads(GOLDENS.read_text())["prompts"]


def summarize(tensor: torch.Tensor) -> list[float]:
    """Numbers that move if a value, or the order of the values, moves."""
    values = tensor.detach().double().flatten()
    ramp = torch.linspace(-1, 1, len(values), dtype=torch.float64)
    return [values.sum().item(), values.square().sum().item(), (values * ramp).sum().item()]


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().contiguous().numpy()).hexdigest()


def logits_of(model: torch.nn.Module) -> list[float]:
    """A summary of a forward pass on tokens of every part of the vocabulary, and its loss."""
    ids = (torch.arange(3 * TOKENS) * 2_654_435 % 6400).view(3, TOKENS)
    with torch.no_grad():
        return [*summarize(model.eval()(ids).logits), model(ids, labels=ids).loss.item()]


def answers(model: torch.nn.Module, is_greedy: bool) -> list[list[int]]:
    """Greedy answers, and those sampled at T=.85 in a nucleus of .85 with seed 3."""
    decoding = Decoding.parse("greedy" if is_greedy else "t0.85p0.85")
    return generate(model, prompts(), decoding, 3, NEW_TOKENS, 32, (2,))


def train(adapted: bool) -> list[list[float]]:
    """Losses and weights of 6 steps of AdamW from random weights."""
    torch.manual_seed(1)
    model = MiniMindForCausalLM(minimind_config(hidden_size=64, num_hidden_layers=2))
    start = weights_fingerprint(model)
    if adapted:
        apply_lora(model, LoraSettings(rank=4, dropout=0.1, train_tokens=(1, 2)))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-3), []
    ids = (torch.arange(4 * TOKENS) * 2_654_435 % 6400).view(4, TOKENS)
    labels = ids.where(ids % 3 > 0, -100)
    for _ in range(6):
        loss = model(ids, labels=labels, num_items_in_batch=100).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [start, losses, sorted(summarize(parameter) for parameter in trainable)]


def adapter(name: str, folder: Path) -> dict:
    """What an adapter with moved weights writes, reads and merges to."""
    model, fingerprint = load_model(BASE), weights_fingerprint(load_model(BASE))
    torch.manual_seed(5)
    adapted = apply_lora(model, ADAPTERS[name])
    start = {n: summarize(p) for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.05, 0.07, parameter.numel()).view_as(parameter))
    save_lora(model, ADAPTERS[name], folder, "base", fingerprint)
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    again = load_model(BASE)
    load_lora(again, folder)
    return {
        "adapted": adapted,
        "start": sorted(start.values()),
        "config": json.loads((folder / "adapter_config.json").read_text()),
        "metadata": metadata,
        "file": {n: summarize(t) for n, t in load_file(path).items()},
        "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "logits": logits_of(again),
        "merged": {n: summarize(t) for n, t in build_merged(again).state_dict().items()},
        "merged_sha256": weights_fingerprint(build_merged(again)),
    }


GOLDEN = json.loads(GOLDENS.read_text())


def test_logits_and_answers() -> None:
    model = load_model(BASE)
    assert weights_fingerprint(model) == GOLDEN["fingerprint"]
    assert logits_of(model) == pytest.approx(GOLDEN["logits"], rel=1e-6)
    assert answers(model, True) == GOLDEN["answers"]
    assert answers(model, False) == GOLDEN["sampled"]


@pytest.mark.parametrize("adapted", [False, True])
def test_training(adapted: bool) -> None:
    start, losses, weights = train(adapted)
    old_start, old_losses, old_weights = GOLDEN["trained"][adapted]
    assert start == old_start
    assert losses == pytest.approx(old_losses, rel=1e-5)
    assert sum(weights, []) == pytest.approx(sum(old_weights, []), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name: str, tmp_path: Path) -> None:
    ours, old = adapter(name, tmp_path), GOLDEN["adapters"][name]
    for key in ("adapted", "metadata"):
        assert ours[key] == old[key]
    for config in (ours["config"], old["config"]):  # of which the order says nothing
        config["modules_to_save"] = sorted(config["modules_to_save"] or [])
    assert ours["config"] == old["config"]
    assert sum(ours["start"], []) == pytest.approx(sum(old["start"], []), rel=1e-6)
    assert ours["logits"] == pytest.approx(old["logits"], rel=1e-5)
    for key in ("file", "merged"):
        assert ours[key].keys() == old[key].keys()
        for tensor, summary in ours[key].items():
            assert summary == pytest.approx(old[key][tensor], rel=1e-6, abs=1e-5), tensor
