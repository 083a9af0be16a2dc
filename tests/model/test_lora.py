"""The adapter against PEFT and against values worked out by hand."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM

from model.checkpoint import TOKENIZER_DIR, load_model, save_model
from model.cli import UserError
from model.model_lora import (
    DoRALinear,
    LoRALinear,
    LoraSettings,
    apply_lora,
    load_lora,
    merge_lora,
    name_roles,
    select_trainable,
)
from model.model_minimind import MiniMindForCausalLM, minimind_config
from tests.model.small import (
    IDS,
    ROUNDING,
    compute_logits,
    lora_layers,
    make_model,
    move_parameters,
    save_adapter,
)
from trainer.trainer_utils import compile_parts

SETTINGS = {
    "all-linear": LoraSettings(rank=4, alpha=12),
    "square": LoraSettings(rank=8, alpha=8, targets="square", init="gaussian"),
    "names": LoraSettings(rank=2, alpha=8, targets="q_proj,up_proj", use_rslora=True),
    "dora": LoraSettings(rank=4, alpha=12, use_dora=True),
    "dora-beside": LoraSettings(
        rank=2, targets="q_proj,mlp", use_rslora=True, use_dora=True, modules_to_save=("norms",)
    ),
    "tokens": LoraSettings(rank=4, targets="mlp", train_tokens=(7, 2)),
    "tokens-alone": LoraSettings(rank=0, train_tokens=(300,)),
    "whole": LoraSettings(rank=4, targets="attention", modules_to_save=("embeddings", "norms")),
    "embedding": LoraSettings(rank=4, alpha=8, targets="all-linear,embedding"),
    "embedding-alone": LoraSettings(rank=2, targets="embedding", modules_to_save=("norms",)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base; 64 wide, k and v 32, MLP 96."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    save_model(make_model(noise=0.1), TOKENIZER_DIR, folder)
    return folder


# ---------------------------------------------------------------- arithmetic


def test_forward_is_w_plus_scaled_ba_by_hand() -> None:
    layer = LoRALinear(torch.nn.Linear(2, 2, bias=False), LoraSettings(rank=1, alpha=0.5))
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer.lora_A.weight.data = torch.tensor([[10.0, -1.0]])
    layer.lora_B.weight.data = torch.tensor([[2.0], [-4.0]])
    # W x = (5, 11); A x = 8; half of B A x = (8, -16).
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [13.0, -5.0]
    assert layer.compute_weight().tolist() == [[11.0, 1.0], [-17.0, 6.0]]
    assert LoraSettings(rank=16, alpha=32).scaling == 2
    assert LoraSettings(rank=16, alpha=32, use_rslora=True).scaling == 8


def test_dora_scales_rows_to_their_trained_length_by_hand() -> None:
    settings = LoraSettings(rank=1, alpha=0.5, use_dora=True)
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    layer = DoRALinear(linear, settings)
    assert layer.lora_magnitude_vector.tolist() == [5, 1]  # at the start, of W's rows
    layer.lora_A.weight.data = torch.tensor([[2.0, -1.0]])
    layer.lora_B.weight.data = torch.tensor([[-1.0], [2.0]])
    layer.lora_magnitude_vector.data = torch.tensor([4.0, 10.0])
    # Rows (3, 4) + (-1, .5) and (1, 0) + (2, -1), each stretched to its length.
    rows = torch.tensor([[2.0, 4.5], [3.0, -1.0]])
    expected = rows / rows.norm(dim=1, keepdim=True) * torch.tensor([[4.0], [10.0]])
    assert torch.allclose(layer.compute_weight(), expected)
    assert torch.allclose(layer(torch.tensor([1.0, 2.0])), expected @ torch.tensor([1.0, 2.0]))
    assert {*layer.adapter_parameters()} == {"A", "B", "magnitude"}


def test_dropout_falls_on_the_adapters_input_alone() -> None:
    settings = LoraSettings(rank=1, alpha=0.5, dropout=0.5)
    layer = LoRALinear(torch.nn.Linear(2, 2, bias=False), settings)
    for part, value in ((layer, 10), (layer.lora_A, 1), (layer.lora_B, 1)):
        part.weight.data.fill_(value)
    torch.manual_seed(0)
    out = layer(torch.ones(2000, 2))[:, 0]
    # Each of two inputs is 0 or 2: half of their sum is 0, 1, 1 or 2, beside 20 of the base.
    values, counts = out.unique(return_counts=True)
    assert values.tolist() == [20, 21, 22]
    assert counts.tolist() == pytest.approx([500, 1000, 500], rel=0.15)
    assert (layer.eval()(torch.ones(8, 2)) == 21).all()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_factors_start_as_in_peft_or_minimind(init: str) -> None:
    model = make_model()
    apply_lora(model, LoraSettings(rank=32, targets="q_proj,embedding", init=init))
    spread, largest = {"kaiming": (1 / math.sqrt(3 * 64), 1 / 8), "gaussian": (0.02, 0.2)}[init]
    for layer in lora_layers(model):
        start = layer.lora_A.weight
        assert start.std().item() == pytest.approx(spread, rel=0.05)
        assert start.abs().max().item() <= largest
        assert not layer.lora_B.weight.any()


@pytest.mark.parametrize("name", SETTINGS)
def test_starts_as_the_base_and_leaves_its_bits_unchanged(base: Path, name: str) -> None:
    model, plain, settings = load_model(base), load_model(base), SETTINGS[name]
    apply_lora(model, settings)
    tolerance = 1e-5 if settings.train_tokens else 0  # their logits are a product of another shape
    assert torch.allclose(compute_logits(model), compute_logits(plain), rtol=0, atol=tolerance)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = {"embeddings": ("embed_tokens", "lm_head"), "norms": ("norm",)}
    whole = [name for part in settings.modules_to_save for name in parts[part]]
    for name, before in plain.state_dict().items():
        changes = any(part in name for part in whole)
        assert torch.equal(model.state_dict()[name], before) != changes, name


def test_gradients_of_rows_and_factors_come_from_both_ends(base: Path) -> None:
    rows, factors = load_model(base), load_model(base)
    apply_lora(rows, LoraSettings(rank=0, train_tokens=(1, 2)))
    apply_lora(factors, LoraSettings(rank=4, alpha=8, targets="embedding"))
    for model in (rows, factors):
        move_parameters(model)
        dense = merge_lora(model)
        model(IDS, labels=IDS).loss.backward()
        dense(IDS, labels=IDS).loss.backward()
        full = dense.model.embed_tokens.weight.grad
        if model is rows:
            assert torch.allclose(rows.lm_head.rows.grad, full[[1, 2]], atol=1e-5)
    # W + 2 B A: by the chain rule dB = 2 dW A^T and dA = 2 B^T dW.
    a, b = factors.lm_head.lora_A.weight, factors.lm_head.lora_B.weight
    assert torch.allclose(b.grad, 2 * full @ a.T, atol=1e-5)
    assert torch.allclose(a.grad, 2 * b.T @ full, atol=1e-5)


@pytest.mark.parametrize("name", ["none", *SETTINGS])
def test_one_compiled_graph_serves_all_layers_and_shapes(name: str) -> None:
    """One graph serves all layers whose input needs a gradient, another one the loss."""
    torch.compiler.reset()
    plain = make_model(noise=0.1, num_hidden_layers=3)
    if name in SETTINGS:
        apply_lora(plain, SETTINGS[name])
        move_parameters(plain)
    model = deepcopy(plain)
    graphs = []

    def keep_graph(graph: GraphModule, _: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compile_parts(model, backend=keep_graph)
    for rows, stance in ((2, "default"), (3, "fail_on_recompile")):
        ids = IDS.repeat(rows, rows)[:, 1:]  # an odd length, as no width is, see `warm_up`
        batch = {"input_ids": ids, "labels": ids, "label_positions": torch.arange(4 * rows + 1)}
        with torch.compiler.set_stance(stance):
            model(**batch).loss.backward()
        plain(**batch).loss.backward()
    # Nothing below the first layer trains in most LoRAs, so its graph has less to do backward.
    trains_below = plain.model.embed_tokens(IDS).requires_grad
    assert len(graphs) == (2 if trains_below else 3)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(model.get_parameter(name).grad, parameter.grad, atol=1e-5), name


def test_many_adapters_compile_in_one_process() -> None:
    """All share the code of a layer, of which Dynamo keeps 8 graphs; each adapter needs 2."""
    batch = {"input_ids": IDS, "labels": IDS, "label_positions": torch.arange(4)}
    for rank in range(1, 6):
        model = make_model()
        apply_lora(model, LoraSettings(rank=rank))
        compile_parts(model, backend="eager")
        model(**batch).loss.backward()


def test_parameters_have_roles() -> None:
    """What trains, and nothing else, by the part that the optimizer treats alike."""
    model = make_model()
    settings = LoraSettings(targets="q_proj", train_tokens=(5,), modules_to_save=("norms",))
    apply_lora(model, settings)
    roles = name_roles(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == roles.keys()
    assert Counter(roles.values()) == {"A": 3, "B": 3, "rows": 1, "whole": 7}
    assert roles["model.layers.0.self_attn.q_proj.lora_B.weight"] == "B"
    assert roles["lm_head.rows"] == "rows" and roles["model.norm.weight"] == "whole"


def test_targets_of_minimind2_small() -> None:
    for targets, modules, trained in [
        ("square", 8 * 2, 8 * 2 * 8 * (512 + 512)),  # q_proj and o_proj
        ("attention", 8 * 4, 212_992),
        (" mlp,down_proj", 8 * 3, 368_640),
        ("all-linear,embedding", 8 * 7 + 1, 212_992 + 368_640 + 8 * (6400 + 512)),
        ("v_proj,lm_head", 8 + 1, 8 * 8 * (512 + 128) + 8 * (6400 + 512)),
    ]:
        with torch.device("meta"):
            model = MiniMindForCausalLM(minimind_config())
        assert len(apply_lora(model, LoraSettings(rank=8, targets=targets))) == modules, targets
        assert model.num_parameters(only_trainable=True) == trained, targets


def test_dense_parts() -> None:
    square, attention, mlp = 3 * 2 * 64 * 64, 3 * (2 * 64 * 64 + 2 * 64 * 32), 3 * 3 * 64 * 96
    for spec, expected in [
        ("all", 6400 * 64 + attention + mlp + 7 * 64),
        ("square", square),
        ("attention, mlp", attention + mlp),
        ("embeddings", 6400 * 64),
        ("norms", 7 * 64),
        ("frozen-embeddings", attention + mlp + 7 * 64),
    ]:
        model = make_model()
        select_trainable(model, spec)
        assert model.num_parameters(only_trainable=True) == expected, spec


# ---------------------------------------------------------------- files and PEFT


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_our_adapter_gives_its_logits_loaded_in_peft_and_merged(
    base: Path, tmp_path: Path, name: str
) -> None:
    saved = save_adapter(base, SETTINGS[name], tmp_path)
    model, expected = load_model(base), compute_logits(saved)
    assert (expected - compute_logits(model)).abs().max() > 0.1
    load_lora(model, tmp_path)
    assert torch.equal(compute_logits(model), expected)
    assert model.num_parameters(True) == saved.num_parameters(True)
    reference = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected keys would warn
        warnings.filterwarnings("default", message=".*tie_word_embeddings.*")
        reference = PeftModel.from_pretrained(reference, tmp_path)
    assert torch.allclose(compute_logits(reference), expected, rtol=0, atol=ROUNDING)
    merged = merge_lora(model)
    assert torch.allclose(compute_logits(merged), expected, rtol=0, atol=ROUNDING)
    save_model(merged, TOKENIZER_DIR, tmp_path / "merged")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(compute_logits(reference), expected, rtol=0, atol=ROUNDING)
    for tensor_name, tensor in saved.state_dict().items():  # unchanged, to the bit
        assert torch.equal(model.state_dict()[tensor_name], tensor), tensor_name


V_PROJ, EMBEDDING = ({"r": 3, "target_modules": [name]} for name in ("v_proj", "embed_tokens"))
PEFT_OPTIONS = {
    "rslora": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True},
    "orthogonal": V_PROJ | {"r": 4, "init_lora_weights": "orthogonal"},
    "tokens": V_PROJ | {"trainable_token_indices": {"embed_tokens": [7, 1]}},
    "norms": V_PROJ | {"modules_to_save": ["norm", "input_layernorm"]},
    "whole": V_PROJ | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding": EMBEDDING | {"ensure_weight_tying": True},
}


def train_with_peft(base: Path, folder: Path, options: dict) -> torch.nn.Module:
    """Move and save the parameters of PEFT's adapter; its tied ends share memory."""
    reference = AutoModelForCausalLM.from_pretrained(base)
    reference = get_peft_model(reference, LoraConfig(task_type="CAUSAL_LM", **options))
    move_parameters(reference)
    reference.save_pretrained(folder)
    return reference


@pytest.mark.gpu
@pytest.mark.parametrize("name", PEFT_OPTIONS)
def test_we_load_pefts_adapter(base: Path, tmp_path: Path, name: str) -> None:
    reference, model = train_with_peft(base, tmp_path, PEFT_OPTIONS[name]), load_model(base)
    before = compute_logits(model)
    load_lora(model, tmp_path)
    assert (compute_logits(model) - before).abs().max() > 0.05
    assert torch.allclose(compute_logits(model), compute_logits(reference), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["rslora", "dora"])
def test_gradients_are_those_of_peft(base: Path, tmp_path: Path, name: str) -> None:
    reference, model = train_with_peft(base, tmp_path, PEFT_OPTIONS[name]), load_model(base)
    load_lora(model, tmp_path)
    model(IDS, labels=IDS).loss.backward()
    reference(IDS, labels=IDS).loss.backward()
    roles = name_roles(model)
    assert {*roles.values()} == ({"A", "B", "magnitude"} if name == "dora" else {"A", "B"})
    found = 0
    for parameter_name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            ours = parameter_name.removeprefix("base_model.model.").replace(".default", "")
            ours = ours.replace("magnitude_vector.weight", "magnitude_vector")
            gradient = model.get_parameter(ours).grad
            assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-5), ours
            found += 1
    assert found == len(roles)


def test_pefts_embedding_without_its_head_is_refused(base: Path, tmp_path: Path) -> None:
    train_with_peft(base, tmp_path, EMBEDDING)
    with pytest.raises(UserError, match="Missing key.*lm_head.lora_A.weight"):
        load_lora(load_model(base), tmp_path)


def test_merge_adds_in_float32_and_casts_once() -> None:
    model = make_model().bfloat16()
    apply_lora(model, LoraSettings(rank=2, alpha=0.6, targets="q_proj,embedding"))
    move_parameters(model)
    merged = merge_lora(model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            update = 0.3 * (layer.lora_B.weight.float() @ layer.lora_A.weight.float())
            expected = (layer.weight.float() + update).bfloat16().float()
            assert torch.equal(merged.get_submodule(name).weight, expected), name
    assert torch.equal(merged.model.embed_tokens.weight, merged.lm_head.weight)


def test_merging_into_a_tied_head_alone_is_refused(base: Path) -> None:
    model = load_model(base)
    apply_lora(model, LoraSettings(rank=2, targets="lm_head,q_proj"))
    move_parameters(model)
    with pytest.raises(UserError, match="lm_head is tied to the embedding"):
        merge_lora(model)
    assert torch.equal(model.lm_head.weight, load_model(base).lm_head.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoraSettings(targets="qproj"), "--lora_targets: 'qproj' selects nothing; use .*square"),
        (LoraSettings(rank=33), "--lora_rank 33: the rank of .*k_proj is 32 at most"),
        (LoraSettings(modules_to_save=("q_proj",)), "--modules_to_save: 'q_proj' selects nothing"),
        (LoraSettings(rank=0), "nothing to train"),
        (LoraSettings(train_tokens=(6400,)), "0..6399"),
        (LoraSettings(train_tokens=(1,), modules_to_save=("embeddings",)), "the same matrix"),
        (LoraSettings(targets="embedding,lm_head"), "the same matrix; keep one"),
        (LoraSettings(targets="embedding", use_dora=True), "--use_dora: .*; drop embedding"),
        (LoraSettings(targets="embedding"), "needs a model that ties its head"),
        (LoraSettings(modules_to_save=("lm_head",)), "--modules_to_save lm_head: .*ties its head"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: LoraSettings, message: str) -> None:
    model = make_model()
    model.config.tie_word_embeddings = "ties its head" not in message
    with pytest.raises(UserError, match=message):
        apply_lora(model, settings)
    assert all(p.requires_grad for p in model.parameters())
    assert not lora_layers(model)


def test_adapters_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(base, SETTINGS["embedding"], tmp_path)
    with pytest.raises(UserError, match="was trained on another base"):
        load_lora(make_model(seed=9), tmp_path)
    weights, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(path.read_text())
    lora_b = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    head, extra = "base_model.model.lm_head.lora_B.weight", "base_model.model.lm_tail.weight"
    for change, name, value, message in [
        ({"peft_type": "IA3"}, "", None, "peft_type 'IA3' is not computed here"),
        ({"alpha_pattern": {"q_proj": 4}}, "", None, "alpha_pattern {'q_proj': 4}"),
        ({"alora_invocation_tokens": [1]}, "", None, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "", None, "init_lora_weights 'pissa'"),
        ({"r": None}, "", None, "config.json: r None, lora_alpha 8: expected numbers"),
        ({"r": "4"}, "", None, "config.json: r '4', lora_alpha 8: expected numbers"),
        ({"lora_alpha": None}, "", None, "config.json: r 4, lora_alpha None: expected"),
        ({"r": 3}, "", None, r"size mismatch for .*lora_A.weight.*\[4, 64\]"),
        ({}, lora_b, None, "Missing key.*q_proj.lora_B.weight"),
        ({}, extra, torch.ones(1), "does not fit this model: .*'lm_tail' selects nothing"),
        ({}, head, torch.ones(6400, 4), "differs from the other end"),
    ]:
        path.write_text(json.dumps(config | change))
        changed = tensors | {name: value}
        save_file({k: tensor for k, tensor in changed.items() if tensor is not None}, weights)
        with pytest.raises(UserError, match=message):
            load_lora(load_model(base), tmp_path)
    weights.write_bytes(b"no tensors here")
    with pytest.raises(UserError, match="adapter_model.safetensors: missing or corrupt"):
        load_lora(load_model(base), tmp_path)
