"""MiniMind's files to folders, and adapters merged into plain checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from model import model_lora
from model.checkpoint import TOKENIZER_DIR, load_checkpoint, load_model, save_model, save_tokenizer
from model.cli import UserError
from model.files import file_sha256
from model.model_lora import LoraSettings
from model.model_minimind import weights_fingerprint
from tests.model.small import SMALL, compute_logits, make_model, save_adapter
from trainer import convert_minimind, merge_lora


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(make_model(noise=0.1), TOKENIZER_DIR, tmp_path / "base")
    return tmp_path / "base"


def convert(pth: Path, *words: object) -> Path:
    """Run the converter; return the folder that it makes."""
    folder = pth.with_suffix("")
    convert_minimind.main([str(pth), "--output_dir", str(folder), *map(str, words)])
    return folder


@pytest.mark.parametrize("qk_norm", [False, True])
def test_minimind_models_convert(tmp_path: Path, qk_norm: bool) -> None:
    # MiniMind saves half precision, the tied head, and rotary tables.
    model = make_model(qk_norm=qk_norm, rms_norm_eps=1e-6 if qk_norm else 1e-5)
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    tables = {"model.freqs_cos": torch.ones(8, 4), "model.freqs_sin": torch.ones(8, 4)}
    torch.save(tensors | tables, tmp_path / "sft_64.pth")
    words = ("--num_attention_heads", 4, "--tokenizer_path", TOKENIZER_DIR)
    converted, tokenizer = load_checkpoint(convert(tmp_path / "sft_64.pth", *words))
    assert len(tokenizer) == 6400
    # MiniMind's code fixes both; a .pth does not hold them.
    assert converted.config.rms_norm_eps == (1e-6 if qk_norm else 1e-5)
    assert converted.config.rope_parameters["rope_theta"] == 1e6
    assert torch.equal(compute_logits(converted), compute_logits(model.half().float()))


def test_minimind_adapters_convert(base: Path) -> None:
    torch.manual_seed(3)
    a, b = 0.1 * torch.randn(8, 64), 0.1 * torch.randn(64, 8)
    name = "model.layers.1.self_attn.o_proj"
    tensors = {f"{name}.lora.A.weight": a.half(), f"{name}.lora.B.weight": b.half()}
    torch.save(tensors, base.parent / "lora_medical_64.pth")
    folder = convert(base.parent / "lora_medical_64.pth", "--base", base)
    model, _ = load_checkpoint(folder)
    dense = load_model(base)
    dense.get_submodule(name).weight.data += b.half().float() @ a.half().float()
    assert torch.allclose(compute_logits(model), compute_logits(dense), rtol=0, atol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)


def test_files_that_are_not_minimind_s_are_refused(base: Path) -> None:
    path, tensors = base.parent / "x.pth", load_model(base).state_dict()
    tokenizer = ("--tokenizer_path", base)
    for content, words, message in [
        ({"model.norm.weight": print}, tokenizer, "not a plain file of tensors"),  # code
        ({"model.norm.weight": torch.ones(4)}, tokenizer, "no model.embed_tokens.weight"),
        ([torch.ones(4)], tokenizer, "not a plain file of tensors"),
        (tensors, (*tokenizer, "--num_attention_heads", 1), "do not fit: .*size mismatch"),
        (tensors, ("--base", base), "no matrix named ...lora.A.weight"),
        (tensors | {"model.extra": torch.ones(1)}, tokenizer, "Unexpected key.*model.extra"),
    ]:
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            convert(path, *words)
    assert {file.name for file in base.parent.iterdir()} == {"base", "x.pth"}


def test_an_untied_head_is_adapted_saved_and_merged(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL, vocab_size=6400, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    settings = LoraSettings(rank=2, targets="lm_head,q_proj")
    model = save_adapter(tmp_path / "base", settings, tmp_path / "adapter")
    save_model(model_lora.merge_lora(model), TOKENIZER_DIR, tmp_path / "merged")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(compute_logits(reference), compute_logits(model), rtol=0, atol=1e-5)


def test_adapter_is_merged_into_a_plain_checkpoint(base: Path) -> None:
    adapter, out = base.parent / "adapter", base.parent / "merged"
    model = save_adapter(base, LoraSettings(rank=8, alpha=8, targets="q_proj"), adapter)
    # A base of the hub often has no chat template: the tokenizer is copied as it is.
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    words = ["--adapter", str(adapter), "--output_dir", str(out)]
    merge_lora.main(words)
    reference = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(compute_logits(reference), compute_logits(model), rtol=0, atol=1e-5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    record = json.loads((out / "run.json").read_text())
    assert (record["status"], record["stage"]) == ("completed", "merge_lora")
    assert record["base_fingerprint"] == weights_fingerprint(load_model(base))
    assert record["adapter_sha256"] == file_sha256(adapter / "adapter_model.safetensors")
    assert record["settings"]["adapter"]["alpha"] == 8
    with pytest.raises(UserError, match="merged: exists; name another folder"):
        merge_lora.main(words)
    save_tokenizer(TOKENIZER_DIR, adapter)  # as train_lora.py does; it goes before the base's
    own = base.parent / "own"
    merge_lora.main(["--adapter", str(adapter), "--output_dir", str(own)])
    assert (own / name).read_bytes() == (adapter / name).read_bytes() != (base / name).read_bytes()
