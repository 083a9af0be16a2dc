"""Checkpoints: saved in transformers' layout, and loaded strictly, with their tokenizer.

What a checkpoint holds is others' data. No code in it is run, and what the model would compute
otherwise than the config says is refused.
"""

import hashlib
import json
import os
import pickle
import reprlib
import shutil
import struct
import zipfile
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from model.files import CheckpointError, read_json, replace_file, write_text
from model.model_minimind import MiniMindForCausalLM, check_shape, minimind_config

TOKENIZER_DIR = Path(__file__).resolve().parent  # the committed 6,400-token tokenizer
MINIMIND_HEADS = 8  # of MiniMind's models
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
HEAD_WEIGHT = "lm_head.weight"
TEMPLATE_FILE = "chat_template.jinja"  # where newer transformers puts the chat template
# The values of config.json that the model reads.
CONFIG_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
CONFIG_SIZES += ("num_attention_heads", "num_key_value_heads", "head_dim")
CONFIG_SIZES += ("max_position_embeddings",)
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
CONFIG_VALUES = (*CONFIG_SIZES, "rms_norm_eps", "tie_word_embeddings")
CONFIG_VALUES += ("bos_token_id", "eos_token_id", "pad_token_id")
DEFAULT_ROPE_THETA = 1e4  # transformers' for both families, where a config names none
WEIGHTS_FILE = "model.safetensors"
# What torch raises for a broken pickle; code in one ends in an UnpicklingError.
PICKLE_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError)
PICKLE_ERRORS += (TypeError, AttributeError, AssertionError, ArithmeticError, struct.error)


def weights_fingerprint(model: nn.Module) -> str:
    """Hex SHA-256 of shape, names and float32 values: what an adapter's base is known by."""
    config = model.config
    facts = [config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps]
    facts += [config.rope_parameters["rope_theta"], config.model_type]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name == HEAD_WEIGHT and model.config.tie_word_embeddings:
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file aside and move it into place."""
    aside = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, aside, metadata=metadata)
        replace_file(aside, path)
    except SafetensorError as error:  # in place of the OSError that caused it
        raise OSError(f"{path}: not written ({error})") from error
    finally:
        aside.unlink(missing_ok=True)


def save_model(model: MiniMindForCausalLM, tokenizer_dir: str | Path, folder: Path) -> None:
    """Writes weights (float32), config and tokenizer in transformers' layout.

    Each file is written aside and moved into place, so a reader never sees half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == HEAD_WEIGHT and model.config.tie_word_embeddings)
    }
    save_tensors(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config = model.config.to_dict() | {"dtype": "float32"}
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = GenerationConfig(**{name: config[name] for name in ids})
    write_text(folder / "generation_config.json", generation.to_json_string())
    for name in (*TOKENIZER_FILES, TEMPLATE_FILE):
        if (Path(tokenizer_dir) / name).is_file():
            write_text(folder / name, (Path(tokenizer_dir) / name).read_text(encoding="utf-8"))


def save_copy(model: MiniMindForCausalLM, tokenizer_dir: Path, folder: Path, record: dict) -> None:
    """Writes a checkpoint with its `run.json` to a new folder: whole or not at all."""
    aside = folder.with_name(f"{folder.name}.tmp")
    if aside.exists():  # of a process that was killed
        shutil.rmtree(aside)
    save_model(model, tokenizer_dir, aside)
    write_text(aside / "run.json", json.dumps(record, indent=2) + "\n")
    os.replace(aside, folder)


def tokenizer_folder(weights: Path, named: Path | None) -> Path:
    """The folder of the tokenizer that is named, else that of the weights.

    Raises:
        CheckpointError: none is named for a .pth, which holds none. MiniMind's has as many tokens
            as this repository's, so that no check of sizes would tell one from the other.
    """
    if named is None and not weights.is_dir():
        raise CheckpointError(
            f"{weights}: holds no tokenizer; name the folder of the one that it was trained with "
            "as --tokenizer_path"
        )
    return named or weights


def tokenizer_of(
    model: MiniMindForCausalLM, weights: Path, named: Path | None
) -> PreTrainedTokenizerFast:
    """The tokenizer of `tokenizer_folder`, if it fits the model that has these weights.

    Raises:
        CheckpointError: there is none, or it has more tokens than the model has rows.
    """
    tokenizer = load_tokenizer(tokenizer_folder(weights, named))
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{weights}: {model.config.vocab_size} tokens, but the tokenizer has {len(tokenizer)}; "
            "give the model's own as --tokenizer_path"
        )
    return tokenizer


def load_tokenizer(
    path: str | Path = TOKENIZER_DIR, vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, which pads on the right; its `name_or_path` is that folder.

    Built from its two files alone: neither code that a `tokenizer_config.json` names nor the hub
    is asked for anything.

    Raises:
        CheckpointError: a file is missing or broken, there is no chat template, or a special token
            is not in the vocabulary.
    """
    folder = Path(path)
    for name in TOKENIZER_FILES:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; name a tokenizer's folder")
    backend = read_tokenizer_json(folder / TOKENIZER_FILES[0])
    if vocab_size is not None and backend.get_vocab_size() > vocab_size:
        raise CheckpointError(f"{folder}: more tokens than the model's {vocab_size}")
    config_path = folder / TOKENIZER_FILES[1]
    config = read_json(config_path)
    vocabulary = backend.get_vocab()
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        tokens[name] = token.get("content") if isinstance(token, dict) else token
        if tokens[name] is None and name in ("bos_token", "unk_token"):
            continue
        if not isinstance(tokens[name], str) or tokens[name] not in vocabulary:
            raise CheckpointError(
                f"{config_path}: {name} {reprlib.repr(token)} is no token of the vocabulary"
            )
    template_file = folder / TEMPLATE_FILE
    template = config.get("chat_template")
    if template_file.is_file():
        template = template_file.read_text(encoding="utf-8")
    if not isinstance(template, str) or not template:
        raise CheckpointError(f"{config_path}: holds no chat_template; use another tokenizer")
    longest = config.get("model_max_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=str(folder),
        **tokens,
        chat_template=template,
        model_max_length=longest if isinstance(longest, int) else None,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def read_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer proper, which neither cuts nor pads, with ids from 0 on without a gap."""
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error.reason})") from error
    except Exception as error:  # tokenizers has no class of its own for errors
        raise CheckpointError(f"{path}: no tokenizer ({error}); copy or train it again") from error
    backend.no_truncation()  # or long texts would lose their ends in silence
    backend.no_padding()
    ids = sorted(backend.get_vocab().values())
    if ids != list(range(len(ids))):
        raise CheckpointError(f"{path}: token ids must run from 0 on without a gap")
    return backend


def read_config(folder: Path) -> LlamaConfig | Qwen3Config:
    """The config of a saved folder, refused unless model_minimind.py computes what it describes.

    Only the values that the model reads are taken over, so nothing else in the file has an effect.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a checkpoint folder holds config.json")
    content = read_json(path)
    kinds = {"llama": LlamaConfig, "qwen3": Qwen3Config}
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(
            f"{path}: model_type {reprlib.repr(kind)}; this model reads llama and qwen3"
        )
    values = {name: content[name] for name in CONFIG_VALUES if content.get(name) is not None}
    check_config_values(values, path)
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_parameters must be an object")
    theta = rope.get("rope_theta", content.get("rope_theta", DEFAULT_ROPE_THETA))
    unsupported = {
        "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
        "rope_theta": not is_positive(theta),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
        "rms_norm_eps": not is_positive(values.get("rms_norm_eps", 1e-6)),
        "attention_bias": content.get("attention_bias"),
        "attention_dropout": content.get("attention_dropout"),
        "mlp_bias": content.get("mlp_bias"),
        "hidden_act": content.get("hidden_act", "silu") != "silu",
        "sliding_window": content.get("use_sliding_window"),
        "quantization_config": content.get("quantization_config"),
    }
    for name, found in unsupported.items():
        if found:
            raise CheckpointError(f"{path}: {name} has a value that this model does not compute")
    try:
        config = kinds[kind](
            **values,
            rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
            architectures=[kinds[kind].__name__.replace("Config", "ForCausalLM")],
        )
        check_shape(config)
    except (StrictDataclassError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: {reason}; mend or copy it again") from error
    return config


def check_config_values(values: dict, path: Path) -> None:
    """Refuses sizes that are missing or no whole numbers, and token ids out of the vocabulary."""
    for name in CONFIG_SIZES:
        size = values.get(name, 1 if name in OPTIONAL_SIZES else None)
        if not is_integer(size) or size < 1:
            raise CheckpointError(
                f"{path}: {name} is {reprlib.repr(size)}; must be a whole number above 0"
            )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = values.get(name, 0)
        for token in ids if isinstance(ids, list) else [ids]:
            if not is_integer(token) or not 0 <= token < values["vocab_size"]:
                raise CheckpointError(
                    f"{path}: {name} {reprlib.repr(token)} is no token of the vocabulary"
                )
    if not isinstance(values.get("tie_word_embeddings", False), bool):
        raise CheckpointError(f"{path}: tie_word_embeddings must be true or false")


def is_integer(value: object) -> bool:
    """Whether `value` is a whole number; Python counts True and False among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: object) -> bool:
    """Whether `value` is a number above 0 that float32 holds; NaN is not."""
    return isinstance(value, int | float) and 0 < value < 1e38


def load_model(path: str | Path, num_attention_heads: int | None = None) -> MiniMindForCausalLM:
    """A model in float32 from a saved folder or from a MiniMind `.pth` file, loaded strictly.

    Args:
        num_attention_heads: of a `.pth`, whose tensors show every size but this one (8, if not
            given); a folder's config names it.

    Raises:
        CheckpointError: a file is missing, broken, or does not fit the config, or this has another
            number of heads.
    """
    path = Path(path)
    if path.suffix == ".pth":
        tensors = read_pth(path)
        config = config_of_tensors(tensors, path, num_attention_heads or MINIMIND_HEADS)
    else:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; train it first or mend the path")
        config = read_config(path)
        if num_attention_heads not in (None, config.num_attention_heads):
            raise CheckpointError(
                f"--num_attention_heads {num_attention_heads}: {path} has "
                f"{config.num_attention_heads}; drop the flag"
            )
        tensors = read_safetensors(path / WEIGHTS_FILE)
    with torch.device("meta"):  # shapes without memory: a config that does not fit allocates none
        expected = MiniMindForCausalLM(config)
    tensors = fitting_tensors(expected, tensors, path)
    model = MiniMindForCausalLM(config)
    fill_weights(model, tensors)
    return model


def fill_weights(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copies tensors that `fitting_tensors` let pass into the model, whatever their type."""
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name in tensors:  # a tied head is not: it is the embedding
                parameter.copy_(tensors[name])


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the run may not have finished")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: corrupt ({error}); copy or train it again") from error


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a classic MiniMind checkpoint; code inside a pickle is refused, not run."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; train it first or mend the path")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not a file of torch.save, or cut off; copy it again")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except PICKLE_ERRORS as error:  # whose text tells how to run the code all the same
        raise CheckpointError(
            f"{path}: not a plain file of tensors, or damaged ({type(error).__name__}); nothing in "
            "it was run; save it again as a state dict"
        ) from error
    is_dict = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not is_dict or not all(map(torch.is_tensor, tensors.values())):
        raise CheckpointError(f"{path}: expected a state dict, names to tensors; save it as one")
    # MiniMind stores its rotary tables with the weights; they are computed here.
    return {k: v for k, v in tensors.items() if not k.startswith("model.freqs_")}


def config_of_tensors(
    tensors: dict[str, torch.Tensor], path: Path, num_attention_heads: int
) -> LlamaConfig | Qwen3Config:
    """The shape that a MiniMind state dict implies."""
    needed = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ]
    for name in needed:
        if name not in tensors or tensors[name].ndim != 2:
            raise CheckpointError(
                f"{path}: no matrix {name}; not a dense MiniMind checkpoint "
                "(an adapter .pth is merged first: trainer/merge_lora.py)"
            )
    vocab_size, hidden_size = tensors[needed[0]].shape
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    head_dim = hidden_size // num_attention_heads
    if hidden_size % num_attention_heads or not head_dim or tensors[needed[1]].shape[0] % head_dim:
        raise CheckpointError(
            f"{path}: hidden size {hidden_size} does not fit {num_attention_heads} heads; "
            "set --num_attention_heads"
        )
    qk_norm = "model.layers.0.self_attn.q_norm.weight" in tensors
    try:
        return minimind_config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=len(layers),
            num_attention_heads=num_attention_heads,
            num_key_value_heads=tensors[needed[1]].shape[0] // head_dim,
            intermediate_size=tensors[needed[2]].shape[0],
            qk_norm=qk_norm,
            # The file does not tell: MiniMind changed it with the version that brought q_norm.
            rms_norm_eps=1e-6 if qk_norm else 1e-5,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; set --num_attention_heads") from error


def fitting_tensors(
    model: nn.Module, tensors: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """`tensors` without a tied head, if every name and shape is the model's.

    Raises:
        CheckpointError: names the first tensors that are missing, unknown, of another shape, or
            hold anything but finite numbers; or a tied head that differs from the embedding.
    """
    tied = model.config.tie_word_embeddings
    expected = {k: v for k, v in model.state_dict().items() if not (tied and k == HEAD_WEIGHT)}
    found = {k: v for k, v in tensors.items() if not (tied and k == HEAD_WEIGHT)}
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unknown {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(found[name].shape)}, the config asks {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: weights do not fit: {'; '.join(problems[:3])}{more}")
    for name, tensor in found.items():
        check_numbers(name, tensor, path)
    if tied and HEAD_WEIGHT in tensors:
        embedding = tensors["model.embed_tokens.weight"]
        if not torch.equal(tensors[HEAD_WEIGHT], embedding):
            raise CheckpointError(
                f"{path}: {HEAD_WEIGHT} differs from the embedding that it is tied to; untie it in "
                "config.json (tie_word_embeddings: false)"
            )
    return found


def check_numbers(name: str, tensor: torch.Tensor, path: Path) -> None:
    """Refuses a tensor of another kind than floating point, or with a NaN or an infinity."""
    if not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}; only floating point is read")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{path}: {name} holds values that are no numbers: the run diverged")
