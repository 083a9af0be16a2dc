"""Update analysis against matrices whose answers are known in closed form, and its checkpoints."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from evaluation import update_analysis
from evaluation.spectra import (
    amplification,
    chance_cosine,
    describe_intruders,
    effective_rank,
    energy_rank,
    excess_similarity,
    intruder_directions,
    intruders_at_equal_norm,
    low_rank,
    random_directions,
    random_low_rank,
    ranks_to_show,
    right_directions,
    similarity,
    stable_rank,
    svd_of_update,
)
from evaluation.update_analysis import load_base, load_update, shares
from model.checkpoint import TOKENIZER_DIR, load_model, save_model, weights_fingerprint
from model.model_lora import (
    AdapterError,
    LoraSettings,
    apply_lora,
    load_lora,
    merged_model,
    save_lora,
)
from model.model_minimind import MiniMindForCausalLM
from tests.test_lora import SETTINGS, logits, randomize
from tests.test_model import make_model
from tests.tiny import exit_code


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """Columns with a uniformly random span."""
    return torch.linalg.qr(gaussian(rows, columns, seed=seed)).Q


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def unit(size: int, *indices: int) -> Tensor:
    """Columns of the identity."""
    return torch.eye(size, dtype=torch.float64)[:, list(indices)]


# ---------------------------------------------------------------- spectra


def test_spectrum_of_a_product_of_orthogonal_factors() -> None:
    known = torch.tensor([9.0, 2.0, 1.0], dtype=torch.float64)
    delta = (orthonormal(30, 3, 0) * known) @ orthonormal(20, 3, 1).T
    u, s, vh = svd_of_update(delta)
    assert s.tolist() == pytest.approx([9, 2, 1], abs=1e-12)  # three, not twenty
    assert torch.allclose((u * s) @ vh, delta)
    # Squared: 81 + 4 + 1 = 86, of which .9 is 77.4 and .95 is 81.7.
    assert energy_rank(s, 0.9) == 1
    assert energy_rank(s, 0.95) == 2
    assert stable_rank(s) == pytest.approx(86 / 81)
    # p = 9/12, 2/12, 1/12.
    entropy = math.log(12) - (9 * math.log(9) + 2 * math.log(2)) / 12
    assert effective_rank(s) == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("size", [1, 9, 10, 64])
def test_equal_singular_values_have_every_rank_full(size: int) -> None:
    _, s, _ = svd_of_update(0.3 * orthonormal(size, size, size))
    assert effective_rank(s) == pytest.approx(size)
    assert stable_rank(s) == pytest.approx(size)
    assert energy_rank(s, 0.9) == math.ceil(size * 9 / 10)


def test_nine_of_ten_equal_values_hold_nine_tenths_whatever_the_rounding() -> None:
    for value in (0.1, 0.3, 0.7, 1.1):
        for size in (10, 20, 70, 130):
            assert (
                energy_rank(torch.full((size,), value, dtype=torch.float64), 0.9) == size * 9 // 10
            )


def test_low_rank_keeps_the_largest_singular_values() -> None:
    u, v = orthonormal(7, 3, 0), orthonormal(5, 3, 1)
    delta = (u * torch.tensor([3.0, 2.0, 1.0])) @ v.T
    expected = 3 * u[:, :1] @ v[:, :1].T + 2 * u[:, 1:2] @ v[:, 1:2].T
    assert torch.allclose(low_rank(delta, 2), expected)
    assert not low_rank(delta, 0).any()
    assert torch.allclose(low_rank(delta, 5), delta)
    vector = gaussian(6, seed=2)
    assert torch.allclose(low_rank(vector, 1), vector)
    assert not low_rank(vector, 0).any()


def test_random_updates_have_the_norm_rank_and_spectrum_asked_for() -> None:
    delta, generator = gaussian(12, 9, seed=0), torch.Generator().manual_seed(0)
    made = random_low_rank(delta, 4, generator)
    assert made.norm().item() == pytest.approx(delta.norm().item())
    assert torch.linalg.matrix_rank(made) == 4
    assert torch.linalg.matrix_rank(random_low_rank(delta, 50, generator)) == 9
    assert not torch.allclose(made, random_low_rank(delta, 4, generator))
    s = torch.tensor([5.0, 2.0], dtype=torch.float64)
    assert torch.allclose(svd_of_update(random_directions(s, delta.shape, generator))[1], s)


def test_ranks_to_show() -> None:
    assert ranks_to_show(1) == [1]
    assert ranks_to_show(6) == [1, 2, 4, 6]
    assert ranks_to_show(8) == [1, 2, 4, 8]
    assert ranks_to_show(64) == ranks_to_show(128) == [1, 2, 4, 8, 16, 32, 64]


# ---------------------------------------------------------------- intruders


def built_by_hand() -> tuple[Tensor, Tensor]:
    """W0 (12, 8) with s = 8..1 on the first axes, and an update that makes one intruder.

    The update moves the last right singular vector's left partner, of size 1, to a new axis with
    size 20, and lengthens the first: W has left vectors e_8 (20), e_0 (9), e_1 (7)...
    """
    w0 = torch.zeros(12, 8, dtype=torch.float64)
    w0[:8] = diagonal(8, 7, 6, 5, 4, 3, 2, 1)
    delta = torch.zeros_like(w0)
    delta[8, 7], delta[7, 7], delta[0, 0] = 20, -1, 1
    return w0, delta


def test_an_intruder_built_by_hand_is_counted() -> None:
    w0, delta = built_by_hand()
    found = describe_intruders(w0, unit(12, *range(8)), delta, torch.Generator().manual_seed(0))
    assert found["k"] == 3
    assert found["max_cos"] == pytest.approx([0, 1, 1], abs=1e-12)
    assert found["count"] == 1
    rest = 81 + 49 + 36 + 25 + 16 + 9 + 4
    assert found["weight_share"] == pytest.approx(400 / (400 + rest))
    assert found["update_share"] == pytest.approx(400 / 402)
    assert torch.allclose(intruder_directions(w0, delta).abs(), unit(12, 8))


def test_random_updates_make_intruders_by_their_size() -> None:
    w0 = gaussian(300, 40, seed=0)
    u0 = torch.linalg.svd(w0, full_matrices=False).U
    axes = u0[:, :3] @ diagonal(3, 2, 1) @ unit(40, 0, 1, 2).T  # no new left direction
    for size, expected in ((1e-6, 0), (1e6, 3)):
        found = describe_intruders(w0, u0, size * axes, torch.Generator().manual_seed(0))
        assert (found["count"], found["random"]) == (0, expected)


def test_a_rotation_inside_the_cosine_limit_is_no_intruder() -> None:
    w0 = diagonal(*range(20, 0, -1))
    for cosine, expected in ((0.51, 0), (0.49, 1)):
        # The top left vector turns away from its axis towards the others, evenly.
        top = torch.full((20,), math.sqrt((1 - cosine**2) / 19), dtype=torch.float64)
        top[0] = cosine
        basis = torch.linalg.qr(torch.column_stack([top, unit(20, *range(1, 20))])).Q
        tuned = basis @ diagonal(1000, *range(19, 0, -1))
        # Only the first of the three candidates lies along `top`.
        found = describe_intruders(w0, unit(20, *range(20)), tuned - w0, torch.Generator())
        assert found["max_cos"][0] == pytest.approx(cosine)
        assert (found["max_cos"][0] < 0.5) == bool(expected)
        assert found["max_cos"][1] > 0.5 and found["max_cos"][2] > 0.5
        assert found["count"] == expected


def test_candidates_are_a_fiftieth_of_the_width_and_at_least_three() -> None:
    for shape, k in (((512, 600), 10), ((256, 128), 3), ((64, 256), 3), ((300, 300), 6)):
        w0 = gaussian(*shape, seed=0)
        u0 = torch.linalg.svd(w0, full_matrices=False).U
        found = describe_intruders(w0, u0, 1e-9 * w0, torch.Generator())
        assert (found["k"], found["count"], found["random"]) == (k, 0, 0)


@pytest.mark.parametrize(("m", "p"), [(128, 128), (64, 64), (352, 128)])
def test_chance_cosine_agrees_with_random_directions(m: int, p: int) -> None:
    directions = torch.randn(40_000, m, generator=torch.Generator().manual_seed(m))
    cosines = directions[:, :p].abs().amax(1) / directions.norm(dim=1)
    expected = cosines.quantile(0.95).item()
    # Repeated draws of the quantile differ by .2%; a normal in place of the Beta is 1.6% off at
    # m = 128.
    assert chance_cosine(torch.Size((m, p)), 0.05) == pytest.approx(expected, rel=0.006)


def test_chance_cosine_beyond_a_half_is_exact() -> None:
    # On the circle the angle to the nearer of two axes is uniform in 0..45 degrees: |cos| is above
    # cos(4.5 degrees) a tenth of the time. Above sqrt(1/2) no two axes are exceeded at once.
    value = chance_cosine(torch.Size((2, 2)), 0.1)
    assert value == pytest.approx(math.cos(math.pi / 40))


def test_equal_norm_scales_the_larger_update_down() -> None:
    w0, delta = built_by_hand()
    small = torch.zeros_like(delta)
    small[9, 7] = 0.5  # at size .5 the new direction does not reach the top three
    found = intruders_at_equal_norm(w0, delta, small)
    assert found == {"frobenius": pytest.approx(0.5), "tuned": 0, "other": 0}
    large = torch.zeros_like(delta)
    large[9, 7] = 1000
    found = intruders_at_equal_norm(w0, delta, large)
    assert found == {"frobenius": pytest.approx(math.sqrt(402)), "tuned": 1, "other": 1}


# ---------------------------------------------------------------- subspaces


def test_similarity_of_known_subspaces() -> None:
    first, turned = unit(10, 0, 1, 2, 3), unit(10, 0, 1, 2, 3) @ orthonormal(4, 4, 0)
    assert similarity(first, turned, 4, 4) == pytest.approx(1)
    assert similarity(first, unit(10, 4, 5, 6), 4, 3) == 0
    # Two of the three leading axes are shared.
    assert similarity(first, unit(10, 1, 2, 9), 3, 3) == pytest.approx(2 / 3)
    assert similarity(first, unit(10, 1, 2, 9), 2, 1) == 1  # a line inside the plane
    assert similarity(first, unit(10, 1, 2, 9), 1, 2) == 0


def test_right_directions_are_those_of_the_row_space() -> None:
    rows = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0], [0.0, 6.0, 0.0, 0.0]])
    found = right_directions(rows.double())
    # Two dimensions: sqrt(9 + 36) along axis 1, then 5 along axis 3.
    assert torch.allclose(found.abs(), unit(4, 1, 3))


@pytest.mark.parametrize(("i", "j"), [(1, 1), (3, 8), (8, 3), (8, 8)])
def test_the_null_of_similarity_agrees_with_random_subspaces(i: int, j: int) -> None:
    size, fixed, draws = 32, unit(32, *range(8)), 4000
    bases = torch.linalg.qr(gaussian(draws, size, 8, seed=0)).Q
    phi = [similarity(fixed, basis, i, j) for basis in bases]
    mean, error = torch.tensor(phi).mean().item(), torch.tensor(phi).std().item() / draws**0.5
    assert error < 0.03 * mean
    assert mean == pytest.approx(max(i, j) / size, abs=4 * error)
    assert excess_similarity(mean, i, j, size) == pytest.approx(0, abs=5 * error)


def test_excess_similarity_by_hand() -> None:
    assert excess_similarity(1.0, 2, 8, 32) == 1
    assert excess_similarity(0.625, 2, 8, 32) == 0.5  # null 1/4: 3/8 of 3/4
    assert excess_similarity(1.0, 2, 32, 32) is None


# ---------------------------------------------------------------- amplification


def test_amplification_by_hand() -> None:
    w0 = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    delta = torch.tensor([[0.0, 0.0], [12.0, 0.0]], dtype=torch.float64)
    # U = e_2, V = e_1: U^T W0 V = 3. Random: ||W0||_F / 2. Top: W0's first singular value.
    found = amplification(w0, torch.linalg.svdvals(w0), delta)
    assert found["r"] == [1]
    assert found["factor"] == pytest.approx([4.0])
    assert found["random"] == pytest.approx([24 / math.sqrt(30)])
    largest = math.sqrt(15 + math.sqrt(221))  # W0^T W0 has trace 30 and determinant 4
    assert found["top"] == pytest.approx([12 / largest])


def test_amplification_of_the_top_directions_takes_the_update_along_them() -> None:
    w0, delta = diagonal(1, 2, 6), diagonal(30, 20, 0)
    found = amplification(w0, torch.linalg.svdvals(w0), delta)
    assert found["r"] == [1, 2]
    assert found["factor"] == pytest.approx([30 / 1, math.sqrt(1300) / math.sqrt(5)])
    assert found["top"] == pytest.approx([30 / 6, math.sqrt(1300 / 40)])


def test_random_null_of_amplification_agrees_with_random_directions() -> None:
    w0, rank, draws = gaussian(20, 12, seed=0) * torch.linspace(0.1, 3, 12), 3, 3000
    u = torch.linalg.qr(gaussian(draws, 20, rank, seed=1)).Q
    v = torch.linalg.qr(gaussian(draws, 12, rank, seed=2)).Q
    inside = (u.mT @ w0 @ v).square().sum((1, 2)).mean().sqrt().item()
    delta = low_rank(gaussian(20, 12, seed=3), rank)
    found = amplification(w0, torch.linalg.svdvals(w0), delta)
    assert found["random"][-1] == pytest.approx(delta.norm().item() / inside, rel=0.03)


# ---------------------------------------------------------------- runs


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved base; 64 wide, k and v 32, MLP 96."""
    save_model(make_model(noise=0.1), TOKENIZER_DIR, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(base: Path) -> Path:
    """The base with every weight moved."""
    model = load_model(base)
    randomize(model)
    save_model(model, TOKENIZER_DIR, base.parent / "tuned")
    return base.parent / "tuned"


def adapter(base: Path, settings: LoraSettings, name: str = "lora", seed: int = 1) -> Path:
    """A saved adapter that has moved."""
    model = load_model(base)
    fingerprint = weights_fingerprint(model)
    torch.manual_seed(seed)
    apply_lora(model, settings)
    randomize(model, seed)
    save_lora(model, settings, base.parent / name, str(base), fingerprint)
    return base.parent / name


def call(base: Path, tuned: Path, flags: str) -> int:
    """The script's `main()` with these flags."""
    return update_analysis.main(["--base", str(base), "--tuned", str(tuned), *flags.split()])


def same(first: MiniMindForCausalLM, second: MiniMindForCausalLM, tolerance: float) -> bool:
    """Whether all weights agree."""
    theirs = second.state_dict()
    return all(
        torch.allclose(tensor, theirs[name], rtol=0, atol=tolerance)
        for name, tensor in first.state_dict().items()
    )


def test_analysis_of_a_full_checkpoint(base: Path, tuned: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "results" / "full.json"
    assert call(base, tuned, f"--output {output}") == 0
    result = json.loads(output.read_text())
    assert len(result["matrices"]) == 3 * 7 + 1
    assert len(result["vectors"]) == 3 * 2 + 1
    assert result["unchanged"] == []
    before, after = load_model(base).state_dict(), load_model(tuned).state_dict()
    for row in result["matrices"]:
        w0 = before[f"{row['name']}.weight"].double()
        delta = after[f"{row['name']}.weight"].double() - w0
        assert row["shape"] == list(delta.shape)
        assert row["relative"] == pytest.approx((delta.norm() / w0.norm()).item(), rel=1e-4)
        expected = torch.linalg.svdvals(delta).tolist()
        assert row["singular_values"] == pytest.approx(expected, rel=1e-4)
    row = result["matrices"][1]
    assert (row["name"], row["kind"], row["layer"]) == (
        "model.layers.0.self_attn.q_proj",
        "q_proj",
        0,
    )
    for table in result["shares"].values():
        for column in ("update", "parameters"):
            assert sum(entry[column] for entry in table.values()) == pytest.approx(1, abs=1e-3)
    assert result["shares"]["by_kind"]["q_proj"]["parameters"] == pytest.approx(
        3 * 64 * 64 / (6400 * 64 + 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 128) + 64),
        rel=1e-4,
    )
    assert list(result["shares"]["by_layer"]) == ["embed_tokens", "0", "1", "2", "norm"]
    first = output.read_bytes()
    assert call(base, tuned, f"--output {output}") == 0
    assert output.read_bytes() == first
    assert "model.layers.2.mlp.down_proj" in capsys.readouterr().out


def test_shares_by_hand() -> None:
    delta = {
        "model.embed_tokens.weight": torch.full((2, 2), 1.0),  # 4
        "model.layers.0.mlp.up_proj.weight": torch.tensor([[2.0, 1.0]]),  # 5
        "model.layers.1.mlp.up_proj.weight": torch.tensor([[0.0, 1.0]]),  # 1
    }
    found = shares(delta)
    assert {key: row["update"] for key, row in found["by_kind"].items()} == pytest.approx(
        {"embed_tokens": 0.4, "up_proj": 0.6}
    )
    assert {key: row["update"] for key, row in found["by_layer"].items()} == pytest.approx(
        {"embed_tokens": 0.4, "0": 0.5, "1": 0.1}
    )
    assert found["by_kind"]["up_proj"]["parameters"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapters_update_is_that_of_the_merged_model(base: Path, name: str) -> None:
    path = adapter(base, SETTINGS[name])
    start = load_base(base)
    update = load_update(start, path)
    model = load_model(base)
    load_lora(model, path)
    merged = merged_model(model).state_dict()
    for weight, w0 in start.weights.items():
        assert torch.allclose(w0 + update.delta[weight], merged[weight].double(), atol=1e-6)
    for weight in update.lora_a:
        assert len(svd_of_update(update.delta[weight])[1]) == SETTINGS[name].rank
    rows = update.delta["model.embed_tokens.weight"].any(dim=1).nonzero().flatten().tolist()
    whole = "embeddings" in SETTINGS[name].modules_to_save
    assert rows == (list(range(6400)) if whole else sorted(SETTINGS[name].train_tokens))


def test_comparison_of_adapters_is_of_a_and_of_others_of_dw(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    low = adapter(base, LoraSettings(rank=4, targets="q_proj,up_proj"), "r4")
    high = adapter(base, LoraSettings(rank=16, targets="q_proj,down_proj"), "r16", seed=2)
    output = tmp_path / "pair.json"
    assert call(base, low, f"--compare {high} --output {output}") == 0
    rows = json.loads(output.read_text())["matrices"]
    assert [row["kind"] for row in rows] == ["q_proj"] * 3
    row = rows[0]
    assert (row["of"], row["i"], row["j"]) == ("A", [1, 2, 4], [1, 2, 4, 8, 16])
    start = load_base(base)
    a = [
        load_update(start, path).lora_a["model.layers.0.self_attn.q_proj.weight"]
        for path in (low, high)
    ]
    v = [torch.linalg.svd(matrix, full_matrices=False).Vh for matrix in a]
    expected = (v[0][:2] @ v[1][:8].T).norm() ** 2 / 2
    assert row["phi"][1][3] == pytest.approx(expected.item(), rel=1e-4)
    assert row["excess"][1][3] == pytest.approx((expected.item() - 1 / 8) / (7 / 8), rel=1e-3)

    assert call(base, low, f"--compare {tuned} --output {output}") == 0
    rows = json.loads(output.read_text())["matrices"]
    assert {row["of"] for row in rows} == {"dW"}
    assert rows[0]["j"] == [1, 2, 4, 8, 16, 32, 64]
    assert rows[0]["excess"][0][-1] is None  # 64 of 64 dimensions hold everything
    assert rows[0]["phi"][0][-1] == pytest.approx(1)


# ---------------------------------------------------------------- checkpoints


def test_truncation_from_the_base_to_the_tuned_weights(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    out = f"--output_dir {tmp_path / 'out'}"
    assert call(base, tuned, f"--truncate 0 3 64 {out}") == 0
    assert call(base, tuned, f"--truncate 0 3 --rest drop {out}") == 0
    assert call(base, tuned, f"--truncate 3 --rest alike {out}") == 0
    before, after = load_model(base), load_model(tuned)

    def load(name: str) -> MiniMindForCausalLM:
        return load_model(tmp_path / "out" / name)

    assert same(load("tuned_rank64"), after, 1e-6)
    assert same(load("tuned_rank0_rest_drop"), before, 0)
    assert not same(load("tuned_rank0"), before, 1e-3)
    for name, rest in (
        ("tuned_rank3", "keep"),
        ("tuned_rank3_rest_drop", "drop"),
        ("tuned_rank3_rest_alike", "alike"),
    ):
        model = load(name)
        for weight in ("model.layers.1.self_attn.k_proj", "model.embed_tokens"):
            w0 = before.get_submodule(weight).weight.detach()
            delta = model.get_submodule(weight).weight.detach() - w0
            rank = int(torch.linalg.matrix_rank(delta, atol=1e-4))
            expected = {"keep": 64, "drop": 0, "alike": 3}[rest]
            assert rank == (3 if "k_proj" in weight else expected), (name, weight)
        norm = model.model.norm.weight
        assert torch.equal(norm, (before if rest == "drop" else after).model.norm.weight)


def test_transplants(base: Path, tuned: Path, tmp_path: Path) -> None:
    flags = f"--keep square mlp,norms attention,mlp,embeddings,norms --output_dir {tmp_path}"
    assert call(base, tuned, flags) == 0
    before, after = load_model(base).state_dict(), load_model(tuned).state_dict()
    kept = {
        "tuned_only_square": ("q_proj", "o_proj"),
        "tuned_only_mlp_norms": ("mlp.", "norm"),
        "tuned_only_attention_mlp_embeddings_norms": ("",),
    }
    for name, parts in kept.items():
        for weight, tensor in load_model(tmp_path / name).state_dict().items():
            source = after if any(part in weight for part in parts) else before
            assert torch.allclose(tensor, source[weight], rtol=0, atol=1e-7), (name, weight)


def test_random_control_has_the_norms_of_the_update(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    for seed in (0, 1):
        flags = f"--random_rank 2 --seed {seed} --rest drop --output_dir {tmp_path}"
        assert call(base, tuned, flags) == 0
    start = load_base(base)
    run = load_update(start, tuned)
    made = [
        load_update(start, tmp_path / f"tuned_random_rank2_seed{seed}_rest_drop") for seed in (0, 1)
    ]
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        for update in made:
            found = update.delta[name]
            assert found.norm().item() == pytest.approx(run.delta[name].norm().item(), rel=1e-5)
            assert torch.linalg.matrix_rank(found, atol=1e-4) == 2
        assert not torch.allclose(made[0].delta[name], made[1].delta[name], atol=1e-3)
    assert not made[0].delta["model.embed_tokens.weight"].any()


def test_shrink_takes_the_intruder_out_and_its_control_has_the_same_norm(
    base: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.gate_proj"  # (96, 64): 32 directions that W0 does not use
    model = load_model(base)
    weight = model.get_submodule(name).weight.data
    u, s, vh = torch.linalg.svd(weight.double())
    new, old = u[:, 70:71] @ vh[-1:], u[:, :1] @ vh[:1]
    weight += (10 * s[0] * new + 0.5 * s[0] * old).float()
    save_model(model, TOKENIZER_DIR, tmp_path / "tuned")
    assert call(base, tmp_path / "tuned", f"--shrink --output_dir {tmp_path}") == 0
    start = load_base(base)
    without, control = (
        load_update(start, tmp_path / f"tuned_{which}").delta[f"{name}.weight"]
        for which in ("no_intruders", "shrunk")
    )
    # The intruder is 10 s_1 u_70 + s_last u_last, almost u_70: what is left is the other part.
    assert torch.allclose(without, 0.5 * s[0] * old, rtol=0, atol=0.02 * s[0].item())
    assert control.norm().item() == pytest.approx(without.norm().item(), rel=1e-5)
    both = torch.stack([control.flatten(), (10 * new + 0.5 * old).flatten()])
    assert torch.linalg.matrix_rank(both, rtol=1e-4) == 1  # the update's own direction
    record = json.loads((tmp_path / "tuned_shrunk" / "run.json").read_text())
    kept = without.norm() ** 2 / (s[0] * (10 * new + 0.5 * old)).norm() ** 2
    assert record["squared_norm_over_tuned"] == {
        "linears": pytest.approx(kept.item(), rel=1e-3),
        "rest": None,
    }


def test_an_adapter_cut_to_its_own_rank_is_the_merged_adapter(base: Path, tmp_path: Path) -> None:
    path = adapter(base, SETTINGS["whole"])
    assert call(base, path, f"--truncate 4 --output_dir {tmp_path}") == 0
    model = load_model(base)
    load_lora(model, path)
    assert same(load_model(tmp_path / "lora_rank4"), merged_model(model), 1e-6)


def test_a_truncated_checkpoint_loads_in_transformers(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    assert call(base, tuned, f"--truncate 8 --output_dir {tmp_path}") == 0
    folder = tmp_path / "tuned_rank8"
    model = load_model(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(model), logits(reference), rtol=0, atol=1e-5)
    assert (logits(model) - logits(load_model(tuned))).abs().max() > 0.01
    record = json.loads((folder / "run.json").read_text())
    assert record["stage"] == "update_analysis"
    assert record["settings"] == {
        "base": "base",
        "tuned": "tuned",
        "change": "linears cut to rank 8, embedding and norms: keep",
    }
    assert record["base_fingerprint"] == weights_fingerprint(load_model(base))
    assert record["tuned_fingerprint"] == weights_fingerprint(load_model(tuned))
    assert record["squared_norm_over_tuned"]["rest"] == 1
    assert load_update(load_base(base), folder).name == "tuned_rank8"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--truncate 65", "--truncate 65: the largest rank of a linear is 64"),
        ("--truncate 4 4", "tuned_rank4: asked for twice"),
        ("--truncate 2 1", "tuned_rank1: exists"),
        ("--random_rank 0", "--random_rank 0: must lie between 1 and 64"),
        ("--keep mlp,norm", "--keep 'norm': known are square"),
        ("--keep mlp --rest drop", "--rest: would be ignored"),
        ("--truncate 1 --output x.json", "--output: would be ignored"),
        ("--output_dir x", "--output_dir: would be ignored"),
        ("--truncate 1 --seed 3", "--seed: would be ignored"),
        ("--truncate 1 --compare x", "--compare writes no checkpoint"),
        ("--seed -1", "--seed -1: must be 0 or more"),
        ("--compare nothing", "nothing: no such folder"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_written(
    base: Path, tuned: Path, flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out = base.parent / "out"
    (out / "tuned_rank1").mkdir(parents=True)
    monkeypatch.setattr(update_analysis, "OUT_DIR", out)
    monkeypatch.setattr(update_analysis, "RESULTS_DIR", out)
    words = ["--base", str(base), "--tuned", str(tuned), *flags.split()]
    assert exit_code(update_analysis.main, words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["tuned_rank1"]


def test_wrong_bases_are_refused(base: Path, tuned: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_model(make_model(seed=9), TOKENIZER_DIR, other)
    start = load_base(other)
    with pytest.raises(AdapterError, match="was trained on another base"):
        load_update(start, adapter(base, SETTINGS["square"]))
    fingerprint = weights_fingerprint(load_model(base))
    (tuned / "run.json").write_text(json.dumps({"base_fingerprint": fingerprint}))
    assert load_update(load_base(base), tuned).delta
    with pytest.raises(ValueError, match="run.json: the run started from another base"):
        load_update(start, tuned)
    save_model(make_model(num_hidden_layers=2), TOKENIZER_DIR, tmp_path / "shallow")
    with pytest.raises(ValueError, match="layers.2.input_layernorm.weight is missing, in .*other"):
        load_update(start, tmp_path / "shallow")
    shutil.copytree(other, tmp_path / "copy")
    with pytest.raises(ValueError, match="copy: has the weights of"):
        load_update(start, tmp_path / "copy")


def test_an_adapter_of_the_tied_head_is_refused(base: Path) -> None:
    path = adapter(base, LoraSettings(rank=2, targets="lm_head,q_proj"))
    with pytest.raises(AdapterError, match="lm_head is tied to the embedding"):
        load_update(load_base(base), path)


def test_no_intruder_no_shrunk_checkpoint(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    model.model.layers[0].self_attn.q_proj.weight.data *= 1.1  # every direction stays
    save_model(model, TOKENIZER_DIR, tmp_path / "tuned")
    with pytest.raises(ValueError, match="no intruder"):
        call(base, tmp_path / "tuned", f"--shrink --output_dir {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_diverged_run_is_refused(base: Path, tuned: Path) -> None:
    model = load_model(tuned)
    model.model.norm.weight.data[0] = math.nan
    save_model(model, TOKENIZER_DIR, tuned)
    with pytest.raises(ValueError, match="norm.weight holds values that are no numbers"):
        load_update(load_base(base), tuned)
