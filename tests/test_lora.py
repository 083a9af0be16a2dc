"""The adapter against PEFT and against values worked out by hand."""

import hashlib
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model import hub
from model.checkpoint import (
    TOKENIZER_DIR,
    load_model,
    load_tokenizer,
    save_model,
    weights_fingerprint,
)
from model.files import CheckpointError
from model.model_lora import (
    AdapterError,
    LoRALinear,
    LoraSettings,
    apply_lora,
    find_base,
    find_targets,
    load_lora,
    load_minimind_lora,
    lora_layers,
    merge_lora,
    merged_model,
    save_lora,
    select_trainable,
    unmerge_lora,
)
from model.model_minimind import MiniMindForCausalLM, count_parameters, minimind_config
from tests.test_model import make_model
from trainer import merge_lora as merge_lora_script
from trainer.train_lora import freeze_in_half

IDS = torch.tensor([[5, 1, 300, 2, 17, 1, 4000, 99]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved base; 64 wide, k and v 32, MLP 96."""
    save_model(make_model(noise=0.1), TOKENIZER_DIR, tmp_path / "base")
    return tmp_path / "base"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def randomize(model: MiniMindForCausalLM, seed: int = 1) -> None:
    """Moves every trainable parameter away from its start, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


SETTINGS = {
    "all-linear": LoraSettings(rank=4, alpha=12),
    "square": LoraSettings(rank=8, alpha=8, targets="square", init="gaussian"),
    "names": LoraSettings(rank=2, alpha=8, targets="q_proj,up_proj", use_rslora=True),
    "tokens": LoraSettings(rank=4, targets="mlp", train_tokens=(7, 2)),
    "tokens-alone": LoraSettings(rank=0, train_tokens=(300,)),
    "whole": LoraSettings(rank=4, targets="attention", modules_to_save=("embeddings", "norms")),
}


@pytest.fixture(params=SETTINGS)
def trained(request: pytest.FixtureRequest, base: Path) -> tuple[MiniMindForCausalLM, Path]:
    """A base with an adapter that has moved, and the folder it is saved in."""
    model = load_model(base)
    settings = SETTINGS[request.param]
    fingerprint = weights_fingerprint(model)
    apply_lora(model, settings)
    randomize(model)
    save_lora(model, settings, base.parent / "adapter", str(base), fingerprint)
    return model, base.parent / "adapter"


# ---------------------------------------------------------------- arithmetic


def test_forward_is_w_plus_scaled_ba_by_hand() -> None:
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer = LoRALinear(linear, rank=1, scaling=0.5, dropout=0.0, init="kaiming")
    layer.lora_A.data = torch.tensor([[10.0, -1.0]])
    layer.lora_B.data = torch.tensor([[2.0], [-4.0]])
    # W x = (5, 11); A x = 8; half of B A x = (8, -16).
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [13.0, -5.0]
    assert layer.delta().tolist() == [[10.0, -1.0], [-20.0, 2.0]]
    effective = layer.effective_weight()
    layer.unmerged_weight = layer.weight.detach().clone()
    layer.weight.data.copy_(effective)
    assert layer.effective_weight().tolist() == effective.tolist()  # the update counts once


def test_dropout_falls_on_the_adapters_input_alone() -> None:
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.full((2, 2), 10.0)
    layer = LoRALinear(linear, rank=1, scaling=0.5, dropout=0.5, init="kaiming")
    layer.lora_A.data, layer.lora_B.data = torch.ones(1, 2), torch.ones(2, 1)
    torch.manual_seed(0)
    out = layer(torch.ones(2000, 2))[:, 0]
    # Each of two inputs is 0 or 2: half of their sum is 0, 1, 1 or 2, beside 20 of the base.
    values, counts = out.unique(return_counts=True)
    assert values.tolist() == [20, 21, 22]
    assert counts.tolist() == pytest.approx([500, 1000, 500], rel=0.15)
    assert (layer.eval()(torch.ones(8, 2)) == 21).all()


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 2.0), (True, 8.0)])
def test_scaling(use_rslora: bool, expected: float) -> None:
    settings = LoraSettings(rank=16, alpha=32, use_rslora=use_rslora)
    assert settings.scaling == expected


@pytest.mark.parametrize(
    ("init", "spread"), [("kaiming", 1 / math.sqrt(3 * 64)), ("gaussian", 0.02)]
)
def test_inits(init: str, spread: float) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(64, 48, bias=False), 40, 1.0, 0.0, init)
    assert not layer.lora_B.any()
    assert layer.lora_A.std().item() == pytest.approx(spread, rel=0.05)
    if init == "kaiming":  # U(-1/8, 1/8)
        assert 0.12 < layer.lora_A.abs().max().item() <= 1 / 8


@pytest.mark.parametrize("name", SETTINGS)
def test_step_zero_equals_the_base(base: Path, name: str) -> None:
    model, adapted = load_model(base), load_model(base)
    apply_lora(adapted, SETTINGS[name])
    assert torch.equal(logits(adapted), logits(model))


def test_loading_an_adapter_changes_the_logits(trained: tuple, base: Path) -> None:
    assert (logits(trained[0]) - logits(load_model(base))).abs().max() > 0.1


# ---------------------------------------------------------------- targets and counts


def test_targets_by_name() -> None:
    model = make_model()
    short = {n.split("layers.")[1] for n in find_targets(model, "square")}
    assert short == {f"{i}.self_attn.{p}_proj" for i in range(3) for p in "qo"}
    assert len(find_targets(model, "attention")) == 12
    assert len(find_targets(model, "mlp")) == 9
    assert len(find_targets(model, "all-linear")) == 21
    assert find_targets(model, "down_proj, lm_head")[-1] == "lm_head"
    assert find_targets(model, "mlp,attention") == find_targets(model, "all-linear")
    short = {n.rsplit(".", 1)[1] for n in find_targets(model, "square,k_proj")}
    assert short == {"q_proj", "o_proj", "k_proj"}


@pytest.mark.parametrize(
    ("targets", "rank", "expected"),
    [
        ("square", 8, 131_072),
        ("square", 16, 262_144),
        ("attention", 8, 212_992),
        ("mlp", 8, 368_640),
        ("all-linear", 8, 581_632),
    ],
)
def test_trainable_parameters_of_minimind2_small(targets: str, rank: int, expected: int) -> None:
    model = MiniMindForCausalLM(minimind_config())
    apply_lora(model, LoraSettings(rank=rank, targets=targets))
    assert count_parameters(model)[1] == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", 6400 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 128) + 64),
        ("square", 3 * 2 * 64 * 64),
        ("attention,mlp", 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)),
        ("embeddings", 6400 * 64),
        ("norms", 7 * 64),
        ("frozen-embeddings", 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 128) + 64),
    ],
)
def test_dense_parts(spec: str, expected: int) -> None:
    model = make_model()
    select_trainable(model, spec)
    assert count_parameters(model)[1] == expected


def test_trained_rows_are_the_chosen_tokens_alone(base: Path) -> None:
    model, before = load_model(base), load_model(base).model.embed_tokens.weight
    apply_lora(model, LoraSettings(rank=0, train_tokens=(1, 2)))
    assert count_parameters(model)[1] == 2 * 64
    randomize(model)
    after = model.model.embed_tokens.effective_weight()
    changed = (after != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [1, 2]
    assert model.lm_head.rows is model.model.embed_tokens.rows


def test_gradient_reaches_rows_from_both_ends(base: Path) -> None:
    model, dense = load_model(base), load_model(base)
    apply_lora(model, LoraSettings(rank=0, train_tokens=(1, 2)))
    for either in (model, dense):
        either(IDS, labels=IDS).loss.backward()
    expected = dense.model.embed_tokens.weight.grad[[1, 2]]
    assert torch.allclose(model.model.embed_tokens.rows.grad, expected, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_training_steps_leave_the_base_bit_unchanged(base: Path, name: str) -> None:
    model, before = load_model(base), load_model(base).state_dict()
    settings = SETTINGS[name]
    apply_lora(model, settings)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = ("embed_tokens", "lm_head", "norm") if settings.modules_to_save else ()
    for tensor_name, tensor in model.state_dict().items():
        if tensor_name in before and not any(part in tensor_name for part in whole):
            assert torch.equal(tensor, before[tensor_name]), tensor_name


# ---------------------------------------------------------------- files and PEFT


def test_saved_adapter_loads_to_the_same_logits(trained: tuple, base: Path) -> None:
    model, folder = trained
    again = load_model(base)
    load_lora(again, folder)
    assert torch.equal(logits(again), logits(model))
    assert count_parameters(again) == count_parameters(model)


def test_peft_loads_our_adapter(trained: tuple, base: Path) -> None:
    model, folder = trained
    reference = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected keys would warn
        warnings.filterwarnings("default", message=".*tie_word_embeddings.*")
        reference = PeftModel.from_pretrained(reference, folder)
    assert torch.allclose(logits(model), logits(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {
            "r": 3,
            "target_modules": ["v_proj"],
            "trainable_token_indices": {"embed_tokens": [7, 1]},
        },
        {"r": 3, "target_modules": ["v_proj"], "modules_to_save": ["norm", "input_layernorm"]},
        {
            "r": 3,
            "target_modules": ["v_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ],
    ids=["names", "all-linear-rslora", "orthogonal", "tokens", "norms", "embeddings"],
)
def test_we_load_pefts_adapter(base: Path, options: dict) -> None:
    reference = AutoModelForCausalLM.from_pretrained(base)
    reference = get_peft_model(reference, LoraConfig(task_type="CAUSAL_LM", **options))
    randomize(reference)
    reference.save_pretrained(base.parent / "peft")
    model = load_model(base)
    load_lora(model, base.parent / "peft")
    assert (logits(model) - logits(load_model(base))).abs().max() > 0.05
    assert torch.allclose(logits(model), logits(reference), rtol=0, atol=1e-5)


def test_minimind_adapter_pth_loads(base: Path) -> None:
    torch.manual_seed(3)
    a, b = 0.1 * torch.randn(8, 64), 0.1 * torch.randn(64, 8)
    name = "model.layers.1.self_attn.o_proj"
    tensors = {f"{name}.lora.A.weight": a.half(), f"{name}.lora.B.weight": b.half()}
    torch.save(tensors, base.parent / "lora_medical_64.pth")
    model, dense = load_model(base), load_model(base)
    settings = load_minimind_lora(model, base.parent / "lora_medical_64.pth")
    assert settings.scaling == 1.0
    dense.get_submodule(name).weight.data += b.half().float() @ a.half().float()
    assert torch.allclose(logits(model), logits(dense), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- merging


def test_merged_equals_unmerged_and_unmerging_restores_the_bits(trained: tuple) -> None:
    model, _ = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unmerged = logits(model)
    merge_lora(model)
    assert torch.allclose(logits(model), unmerged, rtol=0, atol=1e-5)
    if list(lora_layers(model)):
        with pytest.raises(AdapterError, match="merged already"):
            merge_lora(model)
    unmerge_lora(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(logits(model), unmerged)


def test_merged_model_saves_as_a_plain_checkpoint(trained: tuple, tmp_path: Path) -> None:
    model, _ = trained
    unmerged = logits(model)
    save_model(merged_model(model), TOKENIZER_DIR, tmp_path / "merged")
    assert torch.equal(logits(model), unmerged)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(reference), unmerged, rtol=0, atol=1e-5)


def test_merge_casts_once() -> None:
    linear = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    layer = LoRALinear(linear, 2, 0.3, 0.0, "kaiming")
    layer.lora_B.data.normal_()
    update = 0.3 * (layer.lora_B @ layer.lora_A).detach()
    expected = (linear.weight.detach().float() + update).bfloat16()
    model = make_model()
    model.model.layers[0].self_attn.q_proj = layer
    merge_lora(model)
    assert torch.equal(layer.weight, expected)


def test_merging_into_a_tied_head_is_refused(base: Path) -> None:
    model = load_model(base)
    apply_lora(model, LoraSettings(rank=2, targets="lm_head,q_proj"))
    randomize(model)
    before = weights_fingerprint(model)
    with pytest.raises(AdapterError, match="lm_head is tied to the embedding"):
        merge_lora(model)
    assert weights_fingerprint(model) == before
    loss = model(IDS, labels=IDS).loss  # the adapter on the head counts in the loss too
    expected = torch.nn.functional.cross_entropy(logits(model)[0, :-1], IDS[0, 1:])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_compile_works_with_the_adapter_in_place(base: Path) -> None:
    plain, compiled = load_model(base), load_model(base)
    for model in (plain, compiled):
        torch.manual_seed(0)
        apply_lora(model, LoraSettings(rank=4))
        randomize(model)
    report = torch._dynamo.explain(compiled.model.layers[0])(
        torch.randn(1, 8, 64), (torch.ones(1, 1, 8, 16), torch.zeros(1, 1, 8, 16))
    )
    assert report.graph_break_count == 0
    for layer in compiled.model.layers:
        layer.compile()
    for model in (plain, compiled):
        model(IDS, labels=IDS).loss.backward()
    for (name, ours), (_, fast) in zip(lora_layers(plain), lora_layers(compiled), strict=True):
        assert torch.allclose(ours.lora_A.grad, fast.lora_A.grad, atol=1e-5), name


def test_frozen_weights_in_bfloat16_train_as_if_cast_at_every_step(base: Path) -> None:
    cast, kept = load_model(base), load_model(base)
    losses = []
    for model in (cast, kept):
        torch.manual_seed(0)
        apply_lora(model, LoraSettings(rank=4, modules_to_save=("norms",)))
        randomize(model)
    freeze_in_half(kept, "bfloat16")
    assert kept.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert kept.model.embed_tokens.weight.dtype == torch.float32
    for model in (cast, kept):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    names = [name for name, parameter in kept.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 21 + 7  # matrices' A and B, norms
    for name in names:
        assert torch.equal(cast.get_parameter(name).grad, kept.get_parameter(name).grad), name


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoraSettings(targets="qproj"), "no linear is called 'qproj'; use square"),
        (LoraSettings(rank=33), r"--lora_rank 33: .*k_proj is \(32, 64\), so its rank is 1 to 32"),
        (LoraSettings(init="zeros"), "--lora_init 'zeros'"),
        (LoraSettings(modules_to_save=("heads",)), "'heads' names no embedding or norm"),
        (LoraSettings(modules_to_save=("q_proj",)), "'q_proj' names no embedding or norm"),
        (LoraSettings(targets="lm_head", dropout=0.1), "--lora_dropout: not on lm_head"),
        (LoraSettings(rank=0), "nothing to train"),
        (LoraSettings(train_tokens=(6400,)), "0..6399"),
        (LoraSettings(train_tokens=(1,), modules_to_save=("embeddings",)), "drop one of both"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: LoraSettings, message: str) -> None:
    model = make_model()
    with pytest.raises(AdapterError, match=message):
        apply_lora(model, settings)
    assert all(p.requires_grad for p in model.parameters())
    assert not list(lora_layers(model))


def test_square_is_refused_where_no_linear_is() -> None:
    config = minimind_config(hidden_size=64, num_attention_heads=4, num_key_value_heads=1)
    config.head_dim, config.num_hidden_layers = 32, 1  # q is 128 x 64, k and v 32 x 64
    with pytest.raises(AdapterError, match="^square: this model has no square matrix; use"):
        apply_lora(MiniMindForCausalLM(config), LoraSettings(targets="square"))


@pytest.mark.parametrize(
    "settings",
    [LoraSettings(train_tokens=(1,)), LoraSettings(modules_to_save=("embeddings",))],
)
def test_rows_and_embeddings_of_an_untied_model_are_refused(settings: LoraSettings) -> None:
    config = minimind_config(hidden_size=64, num_hidden_layers=1, intermediate_size=96)
    config.tie_word_embeddings = False
    with pytest.raises(AdapterError, match="ties its head"):
        apply_lora(MiniMindForCausalLM(config), settings)


@pytest.mark.parametrize("spec", ["frozen-embeddings", "norms,embeddings"])
def test_embeddings_of_an_untied_model_are_refused_in_full_fine_tuning(spec: str) -> None:
    config = minimind_config(hidden_size=64, num_hidden_layers=1, intermediate_size=96)
    config.tie_word_embeddings = False
    with pytest.raises(AdapterError, match=f"--trainable {spec}: .* ties its head"):
        select_trainable(MiniMindForCausalLM(config), spec)


def test_base_on_the_hub_is_found(trained: tuple, base: Path, monkeypatch) -> None:
    folder = trained[1]
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/small"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    asked = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return str(base)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert find_base(folder) == base
    assert asked == ["someone/small"]

    def fail(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="the base someone/small: neither a local path nor"):
        find_base(folder)
    config["base_model_name_or_path"] = "out/gone"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="the base out/gone is not there"):
        find_base(folder)


def test_wrong_base_is_refused(trained: tuple) -> None:
    with pytest.raises(AdapterError, match="was trained on another base"):
        load_lora(make_model(seed=9), trained[1])


def test_fingerprint_is_in_the_adapters_metadata(trained: tuple, base: Path) -> None:
    with safe_open(trained[1] / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["base_fingerprint"] == weights_fingerprint(load_model(base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' may change the base"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": None}, "r is missing"),
        ({"r": 3}, "lora_A.weight is .*the model has"),
    ],
)
def test_adapter_configs_that_are_not_computed_are_refused(
    base: Path, change: dict, message: str
) -> None:
    model, folder = load_model(base), base.parent / "adapter"
    settings = SETTINGS["all-linear"]
    fingerprint = weights_fingerprint(model)
    apply_lora(model, settings)
    save_lora(model, settings, folder, str(base), fingerprint)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        load_lora(load_model(base), folder)


def test_missing_and_unknown_adapter_tensors_are_named(base: Path) -> None:
    model, folder = load_model(base), base.parent / "adapter"
    settings = SETTINGS["square"]
    apply_lora(model, settings)
    save_lora(model, settings, folder, str(base), weights_fingerprint(load_model(base)))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(AdapterError, match="lacks model.layers.0.self_attn.q_proj.lora_B"):
        load_lora(load_model(base), folder)
    save_file({"base_model.model.lm_tail.weight": torch.ones(1)} | tensors, path)
    with pytest.raises(AdapterError, match="'lm_tail' names no embedding"):
        load_lora(load_model(base), folder)
    path.write_bytes(b"no tensors here")
    with pytest.raises(AdapterError, match="adapter_model.safetensors: corrupt"):
        load_lora(load_model(base), folder)


def test_merge_script_writes_a_plain_checkpoint_from_either_form(base: Path) -> None:
    model, settings = load_model(base), LoraSettings(rank=8, alpha=8, targets="q_proj")
    fingerprint = weights_fingerprint(model)
    apply_lora(model, settings)
    randomize(model)
    save_lora(model, settings, base.parent / "adapter", str(base), fingerprint)
    pth = {
        f"{name}.lora.{part}.weight": getattr(layer, f"lora_{part}").detach()
        for name, layer in lora_layers(model)
        for part in "AB"
    }
    torch.save(pth, base.parent / "lora.pth")
    for adapter, extra in (("adapter", []), ("lora.pth", ["--base", str(base)])):
        out = base.parent / f"merged_{adapter}"
        words = ["--adapter", str(base.parent / adapter), "--output_dir", str(out), *extra]
        assert merge_lora_script.main(words) == 0
        record = json.loads((out / "run.json").read_text())
        assert (record["status"], record["stage"]) == ("completed", "merge_lora")
        assert record["base_fingerprint"] == fingerprint
        files = {"adapter": base.parent / "adapter/adapter_model.safetensors"}
        weights = files.get(adapter, base.parent / adapter).read_bytes()
        assert record["adapter_sha256"] == hashlib.sha256(weights).hexdigest()
        told = record["settings"]
        name = adapter.removesuffix(".pth")
        assert (told["base"], told["tuned"]) == (base.name, name)
        assert told["adapter"]["rank"] == told["adapter"]["alpha"] == 8
        assert len(told["adapter"]["targets"]) == model.config.num_hidden_layers
        assert record["parameters"] == sum(p.numel() for p in load_model(base).parameters())
        reference = AutoModelForCausalLM.from_pretrained(out)
        assert torch.allclose(logits(reference), logits(model), rtol=0, atol=1e-5)


def test_a_base_whose_tokenizer_is_for_no_chat_is_merged_with_it(base: Path) -> None:
    """As most bases of the hub are: no pad token, no template."""
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": "<|im_end|>"}))
    model, settings = load_model(base), LoraSettings(rank=2, targets="q_proj")
    fingerprint = weights_fingerprint(model)
    apply_lora(model, settings)
    save_lora(model, settings, base.parent / "adapter", str(base), fingerprint)
    out = base.parent / "merged"
    words = ["--adapter", str(base.parent / "adapter"), "--output_dir", str(out)]
    assert merge_lora_script.main(words) == 0
    assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_pth_base_is_merged_with_the_tokenizer_that_is_named(base: Path) -> None:
    model, folder = load_model(base), base.parent
    torch.save(model.state_dict(), folder / "base.pth")
    fingerprint = weights_fingerprint(model)
    apply_lora(model, LoraSettings(rank=2, targets="q_proj"))
    save_lora(model, LoraSettings(rank=2, targets="q_proj"), folder / "a", "none", fingerprint)
    heads = str(model.config.num_attention_heads)
    words = ["--adapter", str(folder / "a"), "--base", str(folder / "base.pth"), "--output_dir"]
    words += [str(folder / "out"), "--num_attention_heads", heads, "--tokenizer_path"]
    assert merge_lora_script.main([*words, str(base)]) == 0
    assert len(load_tokenizer(folder / "out")) == model.config.vocab_size
    larger = load_tokenizer()
    larger.add_tokens(["<|one_more|>"])
    larger.save_pretrained(folder / "larger")
    words[5] = str(folder / "out2")
    with pytest.raises(CheckpointError, match="base.pth: 6400 tokens, but the tokenizer has 6401"):
        merge_lora_script.main([*words, str(folder / "larger")])
    assert not (folder / "out2").exists()
