"""Checkpoints: saved in transformers' layout, and loaded strictly, with their tokenizer.

No code in a checkpoint is run. A config that the model does not compute is refused.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import GenerationConfig, LlamaConfig, Qwen3Config
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.utils import cached_file

from model.cli import UserError
from model.files import REPO_DIR, read_json, write_bytes, write_json, write_text
from model.model_lora import ADAPTER_CONFIG, load_lora, save_lora
from model.model_minimind import (
    Config,
    MiniMindForCausalLM,
    fill_model,
    list_weights,
    weights_fingerprint,
)

Checkpoint = tuple[MiniMindForCausalLM, Tokenizer]
TOKENIZER_DIR = Path(__file__).resolve().parent  # the committed 6,400-token tokenizer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WEIGHTS_FILE = "model.safetensors"
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
# Values of config.json that the model computes. Others are refused, or show in the weights.
COMPUTED = {"hidden_act": "silu", "rope_type": "default", "use_sliding_window": False}


def save_model(model: MiniMindForCausalLM, tokenizer_dir: str | Path, folder: Path) -> None:
    """Write weights, config and the tokenizer of a folder or hub id, in transformers' layout."""
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu() for name, tensor in list_weights(model).items()}
    write_bytes(folder / WEIGHTS_FILE, save(tensors, {"format": "pt"}))
    ids = {}  # the tokenizer's, as far as it has them
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is not None:
            ids[name] = getattr(tokenizer, name)
    dtype = str(model.dtype).removeprefix("torch.")
    config = model.config.to_dict() | ids | {"dtype": dtype}
    write_json(folder / "config.json", dict(sorted(config.items())))
    write_text(folder / "generation_config.json", GenerationConfig(**ids).to_json_string())
    save_tokenizer(tokenizer_dir, folder)


def save_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy the tokenizer of a folder or hub id as it is."""
    if is_hub_id(source):
        Tokenizer.from_pretrained(source).save_pretrained(folder)
    for name in (*TOKENIZER_FILES, "special_tokens_map.json"):  # older ones have the last
        path = Path(source) / name
        if path.is_file():
            write_text(folder / name, path.read_text(encoding="utf-8"))


def save_rounded(source: Path, folder: Path) -> None:
    """Copy a saved model or adapter with its weights rounded to bfloat16, without its run files."""
    if not (source / ADAPTER_CONFIG).is_file():
        save_model(load_model(source).bfloat16(), source, folder)
        return
    base = find_base(source)
    model = load_model(base)
    fingerprint = weights_fingerprint(model)
    settings = load_lora(model, source)
    save_lora(model, settings, str(base), fingerprint, folder, dtype=torch.bfloat16)
    save_tokenizer(source, folder)


def is_hub_id(source: str | Path) -> bool:
    """Decide whether a name is a hub id, `owner/name`, and no path here."""
    is_local = Path(source).parent.exists() or str(source).startswith(".")
    return str(source).count("/") == 1 and not is_local


def find_file(source: str | Path, name: str) -> Path:
    """Find a file of a saved folder, or of a hub id: a hub's file is downloaded once."""
    if is_hub_id(source):
        try:
            return Path(cached_file(source, name))
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{source}: neither a folder nor on the hub ({reason})") from error
    path = Path(source) / name
    if not path.is_file():
        raise UserError(f"{path}: missing; mend the path, or finish the run")
    return path


def read_config(source: str | Path) -> Config:
    """Read a config, refused unless model_minimind.py computes what it describes."""
    if (Path(source) / ADAPTER_CONFIG).is_file():
        raise UserError(f"{source}: is an adapter; merge it by trainer/merge_lora.py first")
    path = find_file(source, "config.json")
    content = read_json(path)
    model_type = content.get("model_type")
    if model_type not in CONFIGS:
        raise UserError(f"{path}: model_type {model_type!r}; llama or qwen3 is read")
    config = CONFIGS[model_type].from_dict(content)
    described = content | config.rope_parameters
    for name, computed in COMPUTED.items():
        value = described.get(name)
        if value not in (computed, None):
            raise UserError(f"{path}: {name} {value!r} is not computed by this model")
    return config


def load_model(source: str | Path) -> MiniMindForCausalLM:
    """Load a model in float32 from a saved folder or a hub id, strictly.

    `from_pretrained` would report missing, broken or unfitting weights, and go on.
    """
    config = read_config(source)
    path = find_file(source, WEIGHTS_FILE)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: corrupt ({error}); copy or train it again") from error
    model = MiniMindForCausalLM(config)
    fill_model(model, tensors, path)
    return model


def load_tokenizer(source: str | Path | None = None, vocab_size: int | None = None) -> Tokenizer:
    """Load a tokenizer that cuts and pads nothing; refuse one that lacks a part or is too large."""
    source = source or TOKENIZER_DIR
    for name in TOKENIZER_FILES[:2]:
        read_json(find_file(source, name))  # transformers does not name a broken file
    tokenizer = Tokenizer.from_pretrained(source, padding_side="right")
    tokenizer.backend_tokenizer.no_truncation()  # long texts would lose their ends in silence
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.chat_template is None:
        remedy = f"write one into {source}/chat_template.jinja"
        if is_hub_id(source):
            remedy = "download it and write one into its folder, as chat_template.jinja"
        raise UserError(f"{source}: the tokenizer has no chat_template; {remedy}")
    parts = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    for name, part in parts.items():
        if part is None:
            raise UserError(f"{source}: the tokenizer has no {name}; add it to its config")
    if vocab_size is not None and len(tokenizer) > vocab_size:
        sizes = f"{len(tokenizer)} tokens, the model {vocab_size}"
        raise UserError(f"{source}: the tokenizer has {sizes}; give the model's own")
    return tokenizer


def find_base(folder: str | Path) -> str | Path:
    """Find an adapter's base: a hub id, or a folder from here, from the repository or beside it.

    If the repository has moved, the end of a whole path still names a folder in it. `load_lora`
    refuses that folder if it has other weights than the base had.
    """
    path = Path(folder) / ADAPTER_CONFIG
    name = read_json(path).get("base_model_name_or_path") or ""
    places = [Path(name), REPO_DIR / name, Path(folder).parent / name] if name else []
    if Path(name).is_absolute():
        parts = Path(name).parts
        places += [REPO_DIR.joinpath(*parts[start:]) for start in range(1, len(parts))]
    for place in places:
        if place.is_dir():
            return place
    if is_hub_id(name):
        return name
    raise UserError(f"{path}: the base {name!r} is not there; put it back")


def find_tokenizer(folder: str | Path, base: str | Path) -> str | Path:
    """Find where a checkpoint's tokenizer lies: in its own folder, else its base's."""
    has_tokenizer = (Path(folder) / TOKENIZER_FILES[0]).is_file()
    return folder if has_tokenizer else base


def load_checkpoint(
    path: str | Path,
    tokenizer_path: str | Path | None = None,
    base: str | Path | None = None,
) -> Checkpoint:
    """Load a model, or an adapter on its base, and the tokenizer named, its own or its base's.

    `base` puts an adapter on other weights than those that it was trained on.
    """
    is_adapter = (Path(path) / ADAPTER_CONFIG).is_file()
    if base and not is_adapter:
        raise UserError(f"{path}: is no adapter, so it cannot be put on {base}")
    weights = path
    if is_adapter:
        weights = base or find_base(path)
    model = load_model(weights)
    if is_adapter:
        load_lora(model, path, any_base=base is not None)
    tokenizer_path = tokenizer_path or find_tokenizer(path, weights)
    return model.eval(), load_tokenizer(tokenizer_path, model.config.vocab_size)
