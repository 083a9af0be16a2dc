"""Saved folders: written whole, loaded bit for bit, and refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from dataset.lm_dataset import read_jsonl
from model import checkpoint
from model.checkpoint import (
    TOKENIZER_DIR,
    find_base,
    load_checkpoint,
    load_model,
    save_model,
    save_rounded,
)
from model.cli import UserError
from model.files import REPO_DIR
from model.model_lora import LoraSettings
from model.model_minimind import weights_fingerprint
from tests.model.small import IDS, ROUNDING, SMALL, compute_logits, make_model, save_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(make_model(), TOKENIZER_DIR, tmp_path / "base")
    return tmp_path / "base"


def test_the_base_that_ships_is_that_of_the_committed_runs() -> None:
    runs = [run for _, run in read_jsonl(REPO_DIR / "evaluation/study/runs.jsonl")]
    (base,) = [run for run in runs if run["id"] == "xs-world-wrapped42"]
    assert weights_fingerprint(load_model(REPO_DIR / "model/base_xs")) == base["weights"]


def edit_json(path: Path, **changes: object) -> None:
    """Rewrite values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_folder_loads_bit_for_bit_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    save_model(model, TOKENIZER_DIR, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    again = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == torch.float32
        assert torch.equal(tensor.float(), again.state_dict()[name]), name
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert weights_fingerprint(again) == weights_fingerprint(model)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert not list(tmp_path.glob("*.tmp"))


def test_fingerprint_tells_weights_and_shapes_apart() -> None:
    model, other = make_model(), make_model(num_attention_heads=2, num_key_value_heads=1)
    before = weights_fingerprint(model)
    other.load_state_dict(model.state_dict())
    assert weights_fingerprint(other) != before
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert weights_fingerprint(model) != before


# Heads wider than hidden_size / heads; the base of rotary angles as before transformers 5.
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Qwen3Config, {"head_dim": 32}),
        (LlamaConfig, {"tie_word_embeddings": False}),
        (LlamaConfig, {"rope_theta": 5e4, "rope_parameters": None}),
    ],
)
def test_folders_of_transformers_load(tmp_path: Path, kind: type, changes: dict) -> None:
    torch.manual_seed(0)
    config = kind(**SMALL | {"vocab_size": 6400, "tie_word_embeddings": True} | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    if "rope_theta" in changes:
        edit_json(tmp_path / "config.json", **changes)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert torch.allclose(compute_logits(model), compute_logits(reference), rtol=0, atol=1e-5)


def test_either_kind_of_folder_loads_with_its_tokenizer(folder: Path) -> None:
    model, tokenizer = load_checkpoint(folder)
    assert torch.equal(compute_logits(model), compute_logits(load_model(folder)))
    assert (len(tokenizer), tokenizer.padding_side) == (6400, "right")
    settings, adapter = LoraSettings(rank=2, dropout=0.5), folder.parent / "adapter"
    model = save_adapter(folder, settings, adapter, folder.name)  # found beside the adapter
    again, _ = load_checkpoint(adapter)
    assert not again.training
    assert torch.equal(again(IDS).logits, compute_logits(model))


def test_weights_and_configs_that_do_not_fit_are_refused(folder: Path) -> None:
    path, norm, head = folder / "model.safetensors", "model.norm.weight", "lm_head.weight"
    before, tensors = (folder / "config.json").read_text(), load_file(path)
    renamed = {name.replace(norm, "model.extra"): tensor for name, tensor in tensors.items()}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    for wrong, change, message in [
        (renamed, {}, "weights do not fit.*model.norm.*model.extra"),
        (tensors | {norm: torch.ones(65)}, {}, r"weights do not fit.*norm.weight.*\[65\]"),
        (tensors | {head: torch.zeros(6400, 64)}, {}, "lm_head.weight differs from the embedding"),
        (tensors, {"num_hidden_layers": 4}, "weights do not fit.*model.layers.3"),
        (tensors, {"model_type": "gpt2"}, "model_type 'gpt2'"),
        (tensors, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not computed"),
        (tensors, {"rope_parameters": rope}, "rope_type 'linear'"),
    ]:
        save_file(wrong, path)
        (folder / "config.json").write_text(before)
        edit_json(folder / "config.json", **change)
        with pytest.raises(UserError, match=message):
            load_model(folder)


def test_a_diverged_model_loads(folder: Path) -> None:
    """No NaN equals another one: this must not pass for a head that differs."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][7, 3] = float("nan")
    for stored in (tensors, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}):
        save_file({name: tensor.clone() for name, tensor in stored.items()}, path)
        assert load_model(folder).lm_head.weight[7, 3].isnan()


def test_broken_and_missing_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="model.safetensors: corrupt"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"code": make_model}, folder / "pytorch_model.bin")  # never read
    with pytest.raises(UserError, match="model.safetensors: missing; mend the path"):
        load_model(folder)


def test_tokenizers_load_as_transformers_loads_them_or_are_refused(folder: Path) -> None:
    tokenizer = checkpoint.load_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("<|im_start|>a<|im_end|>")["input_ids"][::2] == [1, 2]
    with pytest.raises(UserError, match="has 6400 tokens, the model 6399; give the model's own"):
        checkpoint.load_tokenizer(folder, 6399)
    edit_json(folder / "tokenizer_config.json", eos_token=None)  # older ones have another file
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    checkpoint.save_tokenizer(folder, copy := folder.parent)
    assert checkpoint.load_tokenizer(copy).eos_token_id == 2
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(UserError, match="the tokenizer has no chat_template; write one"):
        checkpoint.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json: broken JSON"):
        checkpoint.load_tokenizer(folder)


def test_bases_are_found_by_path_or_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(source: str, name: str) -> str:
        if source != "someone/small":
            raise OSError("offline\nsecond line")
        return str(folder / name)

    monkeypatch.setattr(checkpoint, "cached_file", download)
    adapter = folder.parent / "adapter"
    save_adapter(folder, LoraSettings(rank=2), adapter, "someone/small")
    hub_model = load_model(find_base(adapter))
    assert weights_fingerprint(hub_model) == weights_fingerprint(load_model(folder))
    with pytest.raises(UserError, match=r"else/small: neither a folder nor on the hub \(offline\)"):
        load_model("else/small")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="../gone/base")
    with pytest.raises(UserError, match="the base '../gone/base' is not there"):
        find_base(adapter)


def test_an_adapter_opens_in_peft_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO_DIR)
    adapter = tmp_path / "adapter"
    base = REPO_DIR / "model" / "base_xs"
    adapted = save_adapter(Path("model/base_xs"), LoraSettings(rank=2), adapter)
    monkeypatch.chdir(tmp_path)
    reference = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    logits = compute_logits(adapted)
    assert torch.allclose(compute_logits(reference), logits, rtol=0, atol=ROUNDING)
    # We find the base from every folder as well, also in a clone that has moved.
    for named in (base, "model/base_xs", "/gone/clone/model/base_xs"):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(named))
        assert find_base(adapter) == base
        model, _ = load_checkpoint(adapter)
        assert torch.equal(compute_logits(model), logits)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/gone/model")
    with pytest.raises(UserError, match="config.json: missing"):
        load_checkpoint(adapter)


def test_shipped_adapters_name_their_base_from_the_root() -> None:
    paths = list(REPO_DIR.glob("model/trained/*/adapter_config.json"))
    assert paths
    for path in paths:
        base = json.loads(path.read_text())["base_model_name_or_path"]
        assert not Path(base).is_absolute(), path
        assert find_base(path.parent) == REPO_DIR / base or Path(base).is_dir(), path


def test_rounded_folders_hold_the_nearest_bfloat16(folder: Path, tmp_path: Path) -> None:
    """A model and an adapter, loaded again, have each weight rounded once."""
    adapted = save_adapter(folder, LoraSettings(targets="square", rank=2), tmp_path / "adapter")
    for source, loaded in ((folder, load_model(folder)), (tmp_path / "adapter", adapted)):
        rounded = tmp_path / f"{source.name}_rounded"
        save_rounded(source, rounded)
        again, _ = load_checkpoint(rounded)
        assert (rounded / "model.safetensors").exists() == (source == folder)
        trained = again.state_dict()
        for name, tensor in loaded.state_dict().items():
            is_trained = source == folder or "lora_" in name
            expected = tensor.bfloat16().float() if is_trained else tensor
            assert torch.equal(trained[name], expected), name


def test_an_adapter_goes_on_other_weights_only_if_they_are_named(
    folder: Path, tmp_path: Path
) -> None:
    save_adapter(folder, LoraSettings(targets="square", rank=2), tmp_path / "adapter")
    save_model(make_model(seed=1), TOKENIZER_DIR, tmp_path / "other")
    model, _ = load_checkpoint(tmp_path / "adapter", base=tmp_path / "other")
    other = load_model(tmp_path / "other")
    embedding = model.model.embed_tokens.weight
    assert torch.equal(embedding, other.model.embed_tokens.weight)
    with pytest.raises(UserError, match="is no adapter"):
        load_checkpoint(folder, base=tmp_path / "other")
