"""The update of a full checkpoint and of an adapter, and checkpoints with a part of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from evaluation.updates import update_analysis
from model.checkpoint import load_model, save_model, weights_fingerprint
from model.model_lora import LoraSettings, apply_lora, save_lora
from model.model_minimind import MiniMindForCausalLM, minimind_config

TOKENIZER = Path(__file__).resolve().parents[2] / "model"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Write a small base with its tokenizer."""
    torch.manual_seed(0)
    config = minimind_config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    save_model(MiniMindForCausalLM(config), TOKENIZER, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(base: Path) -> Path:
    """Write a checkpoint that differs from the base in every weight."""
    model = load_model(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    save_model(model, TOKENIZER, base.parent / "tuned")
    return base.parent / "tuned"


def call_script(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    """Run update_analysis.py with these words as its command line."""
    monkeypatch.setattr(sys, "argv", ["update_analysis.py", *map(str, words)])
    update_analysis.main()


def read_delta(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the difference of two checkpoints, by name."""
    first, second = (dict(load_model(path).named_parameters()) for path in (base, folder))
    return {name: (second[name] - first[name]).detach() for name in first}


def test_analysis_of_a_checkpoint(monkeypatch, base, tuned) -> None:
    """Shares sum to 1, and each of the 7 matrices of each block and the embedding has a line."""
    call_script(monkeypatch, "--base", base, "--tuned", tuned)
    result = json.loads((tuned / "update_analysis.json").read_text())
    assert len(result["matrices"]) == 2 * 7 + 1
    for table in ("by_kind", "by_layer"):
        rows = result["shares"][table].values()
        assert sum(row["update"] for row in rows) == pytest.approx(1)
        assert sum(row["parameters"] for row in rows) == pytest.approx(1)


def test_truncated_and_kept_parts(monkeypatch, base, tuned) -> None:
    """Linear layers are cut to rank 2, the embedding stays whole; --keep zeroes all other parts."""
    call_script(
        monkeypatch, "--base", base, "--tuned", tuned, "--truncate", 2, "--keep", "mlp,norms",
        "--random_rank", 2, "--rest", "drop",
    )  # fmt: skip
    whole = read_delta(base, tuned)
    cut = read_delta(base, tuned.with_name("tuned_rank2_rest_drop"))
    kept = read_delta(base, tuned.with_name("tuned_only_mlp_norms"))
    random = read_delta(base, tuned.with_name("tuned_random_rank2_seed0_rest_drop"))
    query, gate = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert torch.linalg.matrix_rank(cut[query], rtol=1e-4) == 2
    assert not cut["model.embed_tokens.weight"].any()
    assert random[query].norm().item() == pytest.approx(whole[query].norm().item(), rel=1e-4)
    assert torch.allclose(kept[gate], whole[gate], atol=1e-6)
    assert not kept[query].any()
    record = json.loads((tuned.with_name("tuned_only_mlp_norms") / "run.json").read_text())
    assert record["part_of_update"] == "only_mlp_norms"


def test_update_of_an_adapter_has_its_rank(monkeypatch, base) -> None:
    """An adapter of rank 4 on q and o changes these matrices alone."""
    model = load_model(base)
    fingerprint = weights_fingerprint(model)
    settings = LoraSettings(rank=4, targets="square")
    apply_lora(model, settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapter = base.parent / "adapter"
    save_lora(model, settings, adapter, str(base), fingerprint)
    call_script(monkeypatch, "--base", base, "--tuned", adapter)
    result = json.loads((adapter / "update_analysis.json").read_text())
    assert {row["name"].rpartition(".")[2] for row in result["matrices"]} == {"q_proj", "o_proj"}
    assert all(max(row["singular_values"][4:]) < 1e-4 for row in result["matrices"])


def test_refuses_the_base_itself(monkeypatch, base) -> None:
    """A checkpoint without an update has nothing to analyze."""
    with pytest.raises(ValueError, match="no update"):
        call_script(monkeypatch, "--base", base, "--tuned", base)
