"""Ranks by hand; updates of a checkpoint and an adapter, and cut ones."""

import json
import math
from pathlib import Path

import pytest
import torch

from evaluation.updates import update_analysis
from model.checkpoint import TOKENIZER_DIR, load_model, save_model
from model.files import UserError
from model.model_lora import LoraSettings
from tests.model.small import make_model, save_adapter


def test_ranks_and_norms_of_known_spectra() -> None:
    """Equal values have full rank by all three measures, and 9 of 10 hold 90%."""
    names = ("r90", "effective_rank", "stable_rank", "frobenius", "relative")
    w0 = 2 * torch.eye(10).double()
    equal = update_analysis.describe_matrix(w0, torch.eye(10).double())
    assert [equal[name] for name in names] == pytest.approx([9, 10, 10, math.sqrt(10), 0.5])
    two = update_analysis.describe_matrix(w0, torch.diag(torch.tensor([3, 1])).double())
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # the squares are 9 and 1
    assert [two[name] for name in names[:3]] == pytest.approx([1, math.exp(entropy), 10 / 9])
    assert two["singular_values"] == pytest.approx([3, 1]) and two["shape"] == [2, 2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base with its tokenizer; beside it `tuned`, which differs in every weight."""
    folder, model = tmp_path_factory.mktemp("updates"), make_model()
    save_model(model, TOKENIZER_DIR, folder / "base")
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    save_model(model, TOKENIZER_DIR, folder / "tuned")
    return folder / "base"


def analyze(base: Path, tuned: Path, *words: object) -> dict:
    update_analysis.main(["--base", str(base), "--tuned", str(tuned), *map(str, words)])
    path = tuned / "update_analysis.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_truncated_updates(base: Path) -> None:
    """Linear layers keep the 2 largest directions of their update, the embedding all of its own."""
    tuned = base.with_name("tuned")
    assert analyze(base, tuned, "--truncate", 2) == {}
    paths = base, tuned, base.with_name("tuned_rank2")
    before, whole, cut = (load_model(path).state_dict() for path in paths)
    name = "model.layers.1.self_attn.q_proj.weight"
    values = torch.linalg.svdvals(whole[name] - before[name])
    found = torch.linalg.svdvals(cut[name] - before[name])
    assert torch.allclose(found[:2], values[:2], rtol=1e-4) and found[2:].max() < 1e-4
    embedding = "model.embed_tokens.weight"
    assert torch.allclose(cut[embedding], whole[embedding], atol=1e-6)
    with pytest.raises(UserError, match="tuned_rank2: exists"):
        analyze(base, tuned, "--truncate", 2)


def test_analysis_of_a_checkpoint(base: Path) -> None:
    """Shares sum to 1, and each of the 7 matrices of 3 blocks and the embedding has a line."""
    result = analyze(base, base.with_name("tuned"))
    assert len(result["matrices"]) == 3 * 7 + 1 and result["unchanged"] == []
    for table in result["shares"].values():
        for column in ("update", "parameters"):
            assert sum(row[column] for row in table.values()) == pytest.approx(1)
    assert list(result["shares"]["by_layer"]) == ["embed_tokens", "0", "1", "2", "norm"]
    embedding = 6400 * 64 / load_model(base).num_parameters()
    assert result["shares"]["by_kind"]["embed_tokens"]["parameters"] == pytest.approx(embedding)
    with pytest.raises(UserError, match="no update"):
        analyze(base, base)


def test_update_of_an_adapter_has_its_rank(base: Path) -> None:
    """An adapter of rank 4 on q and o changes these matrices alone."""
    adapter = base.with_name("adapter")
    save_adapter(base, LoraSettings(rank=4, targets="square"), adapter)
    matrices = analyze(base, adapter)["matrices"]
    assert {row["name"].rpartition(".")[2] for row in matrices} == {"q_proj", "o_proj"}
    assert all(max(row["singular_values"][4:]) < 1e-4 for row in matrices)
