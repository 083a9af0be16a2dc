"""Spectra and intruder dimensions by hand; updates of a checkpoint and an adapter, and parts."""

import json
import math
from pathlib import Path

import pytest
import torch

from dataset.lm_dataset import turns
from evaluation.updates import update_analysis as updates
from model.checkpoint import TOKENIZER_DIR, load_model, load_tokenizer, save_model
from model.cli import UserError
from model.model_lora import LoraSettings, apply_lora, save_lora
from model.model_minimind import weights_fingerprint
from tests.model.small import make_model
from tests.trainer.runs import write_jsonl

EMBEDDING = "model.embed_tokens.weight"


def test_ranks_of_known_spectra() -> None:
    """Equal values have full rank by all three measures, and 9 of 10 hold 90%."""
    equal = updates.measure_ranks(torch.ones(10, dtype=torch.float64))
    assert list(equal.values()) == pytest.approx([9, 10, 10])
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)  # their squares are 9 and 1
    ranks = updates.measure_ranks(values)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert list(ranks.values()) == pytest.approx([1, math.exp(entropy), 10 / 9])


def test_low_rank_keeps_the_largest_directions() -> None:
    """A diagonal is cut to its largest entries."""
    entries = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    cut = updates.cut_to_rank(torch.diag(entries), 2)
    assert torch.allclose(cut, torch.diag(entries * torch.tensor([1, 1, 0])))


def test_intruders() -> None:
    """A large update in a new direction intrudes, a scaled W0 does not."""
    w0 = torch.diag(torch.linspace(2, 1, 128, dtype=torch.float64))
    assert updates.count_intruders(w0, w0.clone())["count"] == 0
    flat = torch.full((128,), 128**-0.5, dtype=torch.float64)  # cos 0.09 with each axis
    delta = 100 * torch.outer(flat, flat)
    intruders = updates.count_intruders(w0, delta)
    assert intruders["k"] == 3
    assert intruders["count"] >= 1
    assert min(intruders["max_cos"]) < 0.5


def test_description_of_half_the_base() -> None:
    """Sizes are relative to the base; singular values descend."""
    w0 = torch.eye(8, dtype=torch.float64)
    row = updates.describe_matrix(w0, 0.5 * w0)
    assert row["shape"] == [8, 8]
    assert row["r90"] == 8
    assert row["relative"] == pytest.approx(0.5)
    assert row["singular_values"] == pytest.approx([0.5] * 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base; beside it `tuned`, which differs in every weight and in the tokenizer."""
    folder = tmp_path_factory.mktemp("updates")
    model = make_model()
    save_model(model, TOKENIZER_DIR, folder / "base")
    (folder / "base" / "chat_template.jinja").write_text("another")
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    save_model(model, TOKENIZER_DIR, folder / "tuned")
    return folder / "base"


def analyze(base: Path, tuned: Path, *words: object) -> dict:
    """Run the script; return the analysis that it wrote, if it did."""
    flags = ["--base", base, "--tuned", tuned, *words]
    updates.main([str(flag) for flag in flags])
    path = tuned / "update_analysis.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read_delta(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the difference of two checkpoints, by name."""
    before = load_model(base).state_dict()
    after = load_model(folder).state_dict()
    return {name: after[name] - before[name] for name in before}


def test_truncated_and_kept_parts(base: Path) -> None:
    """Linear layers are cut to rank 2, the embedding is kept; --keep zeroes all other parts."""
    tuned = base.with_name("tuned")
    assert analyze(base, tuned, "--truncate", 2, "--keep", "mlp,norms") == {}
    whole = read_delta(base, tuned)
    cut = read_delta(base, base.with_name("tuned_rank2"))
    kept_folder = base.with_name("tuned_only_mlp_norms")
    kept = read_delta(base, kept_folder)
    query = "model.layers.1.self_attn.q_proj.weight"
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.linalg.matrix_rank(cut[query], rtol=1e-4) == 2
    assert torch.allclose(cut[EMBEDDING], whole[EMBEDDING], atol=1e-6)
    assert torch.allclose(kept[gate], whole[gate], atol=1e-6)
    assert not kept[query].any()
    record = json.loads((kept_folder / "run.json").read_text())
    assert record["part_of_update"] == "only_mlp_norms"


def test_restored_rows(base: Path, tmp_path: Path) -> None:
    """Rows of tokens that no conversation has are the base's; all other weights are tuned."""
    chat = turns("one two", "three")
    write_jsonl(tmp_path / "chats.jsonl", [{"conversations": chat}])
    analyze(base, base.with_name("tuned"), "--restore_rows", tmp_path / "chats.jsonl")
    tokenizer = load_tokenizer()
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    seen_ids = sorted(set(tokenizer(text).input_ids))
    assert len(seen_ids) < 30
    whole = read_delta(base, base.with_name("tuned"))
    kept = read_delta(base, base.with_name("tuned_read_rows"))
    rows = kept.pop(EMBEDDING)
    assert rows.any(dim=1).nonzero().flatten().tolist() == seen_ids
    assert torch.allclose(rows[seen_ids], whole[EMBEDDING][seen_ids], atol=1e-6)
    del kept["lm_head.weight"]  # tied to the embedding
    for name, delta in kept.items():
        assert torch.allclose(delta, whole[name], atol=1e-6), name


def test_analysis_of_a_checkpoint(base: Path) -> None:
    """Shares sum to 1, and each of the 7 matrices of 3 blocks and the embedding has a line."""
    result = analyze(base, base.with_name("tuned"))
    assert len(result["matrices"]) == 3 * 7 + 1 and result["unchanged"] == []
    for table in result["shares"].values():
        for column in ("update", "parameters"):
            assert sum(row[column] for row in table.values()) == pytest.approx(1)
    shares = result["shares"]
    assert list(shares["by_layer"]) == ["embed_tokens", "0", "1", "2", "norm"]
    embedding = 6400 * 64 / load_model(base).num_parameters()
    assert shares["by_kind"]["embed_tokens"]["parameters"] == pytest.approx(embedding)
    with pytest.raises(UserError, match="no update"):
        analyze(base, base)


def test_update_of_an_adapter_has_its_rank(base: Path) -> None:
    """An adapter of rank 4 on q and o changes these matrices alone."""
    model = load_model(base)
    fingerprint = weights_fingerprint(model)
    settings = LoraSettings(rank=4, targets="square")
    apply_lora(model, settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    adapter = base.with_name("adapter")
    save_lora(model, settings, str(base), fingerprint, adapter)
    matrices = analyze(base, adapter)["matrices"]
    kinds = {row["name"].split(".")[-1] for row in matrices}
    assert kinds == {"q_proj", "o_proj"}
    for row in matrices:
        assert max(row["singular_values"][4:]) < 1e-4
