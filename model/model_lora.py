"""LoRA written by hand (Hu et al. 2021, arXiv 2106.09685), saved in PEFT's format.

An adapted linear computes `W x + scaling * B A x` with W frozen, B = 0 at the start, and scaling
`alpha / r` or, rank-stabilized, `alpha / sqrt(r)` (Kalajdzievski 2023, arXiv 2312.03732).

    model = load_model("out/pretrain")                 # of model/checkpoint.py
    fingerprint = weights_fingerprint(model)
    settings = LoraSettings(rank=8, alpha=32, targets="all-linear")
    apply_lora(model, settings)    # put in; the base is frozen
    ...train...
    save_lora(model, settings, folder, "out/pretrain", fingerprint)

    model = load_model("out/pretrain")
    load_lora(model, folder)       # logits are now the adapted model's
    merge_lora(model)              # the same logits from plain weights; unmerge_lora undoes it

`square` is the placement of MiniMind's scripts, by accident of a shape test: under grouped-query
attention only q_proj and o_proj are square, so keys, values and the MLP get nothing.
"""

import json
import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from model.checkpoint import (
    check_numbers,
    is_integer,
    is_positive,
    read_pth,
    save_tensors,
    weights_fingerprint,
)
from model.files import REPO_DIR, UserError, read_json, write_text
from model.hub import fetch, is_hub_id
from model.model_minimind import MiniMindForCausalLM, RMSNorm

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
NO_TARGETS = "dummy-target-modules"  # PEFT's name for none; an empty list it refuses
ROWS_KEY = "token_adapter.trainable_tokens_delta"  # PEFT's name; it holds rows, not differences
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGET_NAMES = ("square", "attention", "mlp", "all-linear")
INITS = ("kaiming", "gaussian")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TRAINABLE_PARTS = ("square", "attention", "mlp", "embeddings", "norms", "frozen-embeddings")


class AdapterError(UserError):
    """An adapter that cannot be applied, merged or loaded; the message names the cause."""


@dataclass(frozen=True)
class LoraSettings:
    """What is adapted, and how.

    Attributes:
        rank: r; 0 adapts no linear (with `train_tokens` or `modules_to_save` alone).
        alpha: numerator of the scaling.
        targets: some of `TARGET_NAMES` or module names, joined by commas.
        init: A is `kaiming` U(+-1/sqrt(in)) as in PEFT, or `gaussian` N(0, .02) as in MiniMind.
        train_tokens: ids of tokens whose embedding rows train too (at both ends of a tied model).
        modules_to_save: parts trained whole: `embeddings`, `norms`, or names of such modules.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "all-linear"
    init: str = "kaiming"
    use_rslora: bool = False
    train_tokens: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) (rsLoRA, eq. 4)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen bias-free linear and its low-rank update.

    `weight` (out, in) keeps its name, so the base's parameters are called as before; `lora_A`
    is (r, in), `lora_B` (out, r).
    """

    def __init__(self, linear: nn.Linear, rank: int, scaling: float, dropout: float, init: str):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight = linear.weight
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(self.weight.new_zeros(out_features, rank, dtype=torch.float32))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.unmerged_weight: torch.Tensor | None = None
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        out = F.linear(x, self.weight)
        if self.unmerged_weight is not None:
            return out
        return out + F.linear(F.linear(self.dropout(x), self.lora_A) * self.scaling, self.lora_B)

    def effective_weight(self) -> torch.Tensor:
        """(out, in): what the input is multiplied by, without dropout, for the loss to train."""
        if self.unmerged_weight is not None:
            return self.weight
        return self.weight + self.scaling * (self.lora_B @ self.lora_A)

    def delta(self) -> torch.Tensor:
        """The update to `weight`, (out, in), in the factors' type: float32, if not cast."""
        return self.scaling * (self.lora_B.detach() @ self.lora_A.detach())

    def merged_weight(self) -> torch.Tensor:
        """(out, in): `weight` with its update, added in float32 and cast once; no gradient."""
        if self.unmerged_weight is not None:
            return self.weight.detach()
        merged = self.weight.detach().float() + self.delta().float()
        return merged.to(self.weight.dtype)


class TokenRowsEmbedding(nn.Module):
    """An embedding of which only the rows of chosen tokens train."""

    def __init__(self, weight: nn.Parameter, token_ids: tuple[int, ...]):
        super().__init__()
        self.weight = weight
        self.register_buffer("token_ids", torch.tensor(token_ids, device=weight.device), False)
        self.rows = nn.Parameter(weight.detach()[self.token_ids].float().clone())

    def effective_weight(self) -> torch.Tensor:
        """(V, D): the frozen matrix with the trained rows in place."""
        return self.weight.index_copy(0, self.token_ids, self.rows.to(self.weight.dtype))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.effective_weight())


class TokenRowsHead(TokenRowsEmbedding):
    """The output end of the same tied rows: hidden states to logits."""

    def __init__(self, embedding: TokenRowsEmbedding):
        super().__init__(embedding.weight, tuple(embedding.token_ids.tolist()))
        self.rows = embedding.rows

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.effective_weight())


# ---------------------------------------------------------------- choosing and putting in


def find_targets(model: MiniMindForCausalLM, targets: str) -> list[str]:
    """Names of the linears that `targets` selects, in model order.

    Raises:
        AdapterError: a name, or `square`, matches no linear of the model.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    in_blocks = {n: m for n, m in linears.items() if n != HEAD}
    square = [n for n, m in in_blocks.items() if m.in_features == m.out_features]
    groups = {"attention": ATTENTION, "mlp": MLP, "square": square, "all-linear": in_blocks}
    parts = [part.strip() for part in targets.split(",")]
    if "square" in parts and not square:
        raise AdapterError("square: this model has no square matrix; use attention or mlp")
    wanted = [name for part in parts for name in groups.get(part, (part,))]
    for part in wanted:
        if not any(matches(name, part) for name in linears):
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise AdapterError(
                f"--lora_targets: no linear is called {part!r}; use {', '.join(TARGET_NAMES)} or "
                f"names among {', '.join(known)}, several joined by commas"
            )
    return [name for name in linears if any(matches(name, part) for part in wanted)]


def matches(name: str, part: str) -> bool:
    """Whether module `name` is `part` or ends with it at a dot, as PEFT matches names."""
    return name == part or name.endswith("." + part)


def find_saved_modules(model: MiniMindForCausalLM, parts: tuple[str, ...]) -> list[str]:
    """Names of the modules trained whole: `embeddings`, `norms`, or by name."""
    found: list[str] = []
    for part in parts:
        if part == "embeddings":
            names = [EMBEDDING]
        elif part == "norms":
            names = [n for n, m in model.named_modules() if isinstance(m, RMSNorm)]
        else:
            names = [n for n, m in model.named_modules() if matches(n, part) and is_whole(n, m)]
        if not names:
            raise AdapterError(
                f"--modules_to_save: {part!r} names no embedding or norm (of several, give each as "
                "a word); linears are adapted or, in full fine-tuning, trained with --trainable"
            )
        found += names
    if HEAD in found and EMBEDDING not in found:
        found.append(EMBEDDING)  # tied: the head is the embedding
    return [name for name in dict.fromkeys(found) if name != HEAD]


def is_whole(name: str, module: nn.Module) -> bool:
    """Whether a module may be trained and saved whole beside the adapter."""
    return isinstance(module, RMSNorm) or name in (EMBEDDING, HEAD)


def apply_lora(model: MiniMindForCausalLM, settings: LoraSettings) -> list[str]:
    """Freezes `model` and puts the adapter in; returns the names of the adapted linears.

    Nothing is changed when an argument is refused.

    Raises:
        AdapterError: an unknown target, a rank above a matrix's own, tokens together with the
            whole embedding, or nothing to train.
    """
    targets = find_targets(model, settings.targets) if settings.rank else []
    saved = find_saved_modules(model, settings.modules_to_save)
    check_adapter(model, settings, targets, saved)
    model.requires_grad_(False)
    for name in targets:
        linear = model.get_submodule(name)
        adapted = LoRALinear(
            linear, settings.rank, settings.scaling, settings.dropout, settings.init
        )
        model.set_submodule(name, adapted)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    if settings.train_tokens:
        put_in_rows(model, settings.train_tokens)
    return targets


def check_adapter(
    model: MiniMindForCausalLM, settings: LoraSettings, targets: list[str], saved: list[str]
) -> None:
    """Refuses an adapter that the model cannot have.

    Args:
        targets: linears to adapt.
        saved: modules to train whole.
    """
    for name in targets:
        check_rank(name, model.get_submodule(name), settings.rank)
    vocab_size, tokens = model.config.vocab_size, settings.train_tokens
    if len(set(tokens)) != len(tokens) or not all(0 <= token < vocab_size for token in tokens):
        raise AdapterError(f"--train_tokens: ids must differ and lie in 0..{vocab_size - 1}")
    at_ends = tokens or EMBEDDING in saved
    if at_ends and not model.config.tie_word_embeddings:
        raise AdapterError(
            "--train_tokens and --modules_to_save embeddings need a model that ties its head to "
            "the embedding; this one does not"
        )
    if at_ends and HEAD in targets:
        raise AdapterError(
            f"--lora_targets: no {HEAD} with --train_tokens or --modules_to_save embeddings, which "
            "train it already; leave it out"
        )
    if settings.dropout and HEAD in targets:
        raise AdapterError(f"--lora_dropout: not on {HEAD}; leave it out of --lora_targets")
    if settings.init not in INITS:
        raise AdapterError(f"--lora_init {settings.init!r}: known are {', '.join(INITS)}")
    if settings.train_tokens and EMBEDDING in saved:
        raise AdapterError("--train_tokens: the whole embedding trains already; drop one of both")
    if not (targets or saved or settings.train_tokens):
        raise AdapterError(
            "nothing to train: --lora_rank 0 needs --train_tokens or --modules_to_save"
        )


def check_rank(name: str, linear: nn.Linear, rank: int) -> None:
    """Refuses a rank that a matrix cannot have."""
    largest = min(linear.weight.shape)
    if not 1 <= rank <= largest:
        raise AdapterError(
            f"--lora_rank {rank}: {name} is {tuple(linear.weight.shape)}, so its rank is 1 to "
            f"{largest}"
        )


def put_in_rows(model: MiniMindForCausalLM, token_ids: tuple[int, ...]) -> None:
    """Replaces embedding and tied head by modules that train the rows of `token_ids`."""
    embedding = TokenRowsEmbedding(model.model.embed_tokens.weight, token_ids)
    model.model.embed_tokens = embedding
    model.lm_head = TokenRowsHead(embedding)


def select_trainable(model: MiniMindForCausalLM, spec: str) -> None:
    """Freezes all but the named parts: the dense counterparts of the adapter's placements.

    Args:
        spec: `all`, or some of `TRAINABLE_PARTS` joined by commas; `frozen-embeddings` is
            everything but the tied embedding.

    Raises:
        AdapterError: an unknown part, or parts that contradict each other.
    """
    parts = [part.strip() for part in spec.split(",")]
    for part in parts:
        if part != "all" and part not in TRAINABLE_PARTS:
            raise AdapterError(f"--trainable {part!r}: known are all, {', '.join(TRAINABLE_PARTS)}")
        if part == "all" and len(parts) > 1:
            raise AdapterError(f"--trainable {spec}: all holds every part; name it alone")
    if "frozen-embeddings" in parts and "embeddings" in parts:
        raise AdapterError(f"--trainable {spec}: freezes and trains the embeddings; drop one")
    if {"embeddings", "frozen-embeddings"} & set(parts) and not model.config.tie_word_embeddings:
        raise AdapterError(
            f"--trainable {spec}: needs a model that ties its head to the embedding; this one does "
            "not"
        )
    model.requires_grad_("all" in parts)
    for part in parts:
        if part == "frozen-embeddings":
            names = find_saved_modules(model, ("norms",)) + find_targets(model, "all-linear")
        elif part in ("embeddings", "norms"):
            names = find_saved_modules(model, (part,))
        elif part != "all":
            names = find_targets(model, part)
        else:
            names = []
        for name in names:
            model.get_submodule(name).requires_grad_(True)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted linears of `model`, with names."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))


# ---------------------------------------------------------------- merging


def merge_lora(model: MiniMindForCausalLM) -> None:
    """Adds every update to its weight, in float32 and cast once; `unmerge_lora` undoes it.

    The weights before are kept, so that undoing gives back the very bits.

    Raises:
        AdapterError: merged already, or an update of a tied head, which would change the
            embedding too.
    """
    layers = dict(lora_layers(model))
    if HEAD in layers and layers[HEAD].weight is model.model.embed_tokens.weight:
        raise AdapterError(
            f"{HEAD} is tied to the embedding: merging its update would change the input end too; "
            "use the adapter unmerged"
        )
    if any(layer.unmerged_weight is not None for layer in layers.values()):
        raise AdapterError("the adapter is merged already")
    for layer in layers.values():
        merged = layer.merged_weight()
        layer.unmerged_weight = layer.weight.detach().clone()
        layer.weight.data.copy_(merged)


def unmerge_lora(model: MiniMindForCausalLM) -> None:
    """Puts the bits of the weights before `merge_lora` back."""
    for name, layer in lora_layers(model):
        if layer.unmerged_weight is None:
            raise AdapterError(f"{name} is not merged")
        layer.weight.data.copy_(layer.unmerged_weight)
        layer.unmerged_weight = None


def merged_model(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """A plain model with the logits of the adapted one, ready to be saved; `model` is unchanged.

    Raises:
        AdapterError: see `merge_lora`.
    """
    merge_lora(model)
    plain = MiniMindForCausalLM(model.config)
    tensors = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    if isinstance(model.model.embed_tokens, TokenRowsEmbedding):
        effective = model.model.embed_tokens.effective_weight().detach()
        tensors |= {f"{EMBEDDING}.weight": effective, f"{HEAD}.weight": effective}
    plain.load_state_dict(tensors)
    unmerge_lora(model)
    return plain


# ---------------------------------------------------------------- files


def adapter_tensors(model: MiniMindForCausalLM) -> dict[str, torch.Tensor]:
    """The trained tensors under PEFT's names, float32."""
    tensors = {}
    for name, layer in lora_layers(model):
        tensors[f"{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{name}.lora_B.weight"] = layer.lora_B
    embedding = model.model.embed_tokens
    if isinstance(embedding, TokenRowsEmbedding):
        tensors[f"{EMBEDDING}.{ROWS_KEY}"] = embedding.rows
    elif embedding.weight.requires_grad:
        tensors[f"{EMBEDDING}.weight"] = embedding.weight
        tensors[f"{HEAD}.weight"] = embedding.weight.clone()  # PEFT keeps both ends apart
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and module.weight.requires_grad:
            tensors[f"{name}.weight"] = module.weight
    return {
        PEFT_PREFIX + name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tensors.items()
    }


def save_lora(
    model: MiniMindForCausalLM,
    settings: LoraSettings,
    folder: Path,
    base: str,
    fingerprint: str,
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` as PEFT does.

    Args:
        base: folder or hub id of the base, for `base_model_name_or_path`.
        fingerprint: `weights_fingerprint` of the base before the adapter was put in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = [name for name, _ in lora_layers(model)]
    saved = find_saved_modules(model, settings.modules_to_save)
    if EMBEDDING in saved:
        saved.append(HEAD)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": max(settings.rank, 1),  # PEFT refuses 0; without targets it is not used
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        # Of trained factors it changes nothing; PEFT's gaussian has another spread, 1 / r.
        "init_lora_weights": True if settings.init == "kaiming" else settings.init,
        "target_modules": layers or NO_TARGETS,
        "modules_to_save": saved or None,
        "trainable_token_indices": (
            {"embed_tokens": list(settings.train_tokens)} if settings.train_tokens else None
        ),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    metadata = {"format": "pt", "base_fingerprint": fingerprint}
    save_tensors(adapter_tensors(model), folder / ADAPTER_WEIGHTS, metadata)
    write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_adapter_config(folder: Path) -> dict:
    """`adapter_config.json`, refused when it asks for what this module does not compute."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise AdapterError(f"{path}: missing; an adapter folder holds {ADAPTER_CONFIG}")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        found = reprlib.repr(config.get("peft_type"))
        raise AdapterError(f"{path}: peft_type {found}; only LORA is read")
    if not is_integer(config.get("r")) or config["r"] < 1:
        raise AdapterError(f"{path}: r is missing or no whole number above 0")
    if not is_positive(config.get("lora_alpha")):
        raise AdapterError(f"{path}: lora_alpha is missing or no number above 0")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise AdapterError(f"{path}: lora_dropout must lie in [0, 1)")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise AdapterError(
            f"{path}: init_lora_weights {reprlib.repr(config['init_lora_weights'])} may change the "
            "base; convert the adapter with PEFT (path_initial_model_for_weight_conversion) first"
        )
    neutral = {"bias": "none"}
    unread = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias")
    unread += ("alora_invocation_tokens", "layer_replication", "target_parameters")
    for name in unread:
        if config.get(name, neutral.get(name)) not in (neutral.get(name), None, False, {}):
            found = reprlib.repr(config[name])
            raise AdapterError(f"{path}: {name} = {found} is not supported here")
    return config


def find_base(folder: Path) -> Path:
    """The base that an adapter's config names.

    A path from here, the repository, or its own folder; or an id of the hub, which is fetched. The
    fingerprint then tells whether it is the right one.

    Raises:
        AdapterError: the config names none, or none is there.
        CheckpointError: it names an id that is not to be had from the hub.
    """
    named = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise AdapterError(f"{folder / ADAPTER_CONFIG}: names no base_model_name_or_path")
    for base in (Path(named), REPO_DIR / named, folder.parent / named):
        if base.exists():
            return base
    if is_hub_id(named):
        return fetch(named, f"{folder / ADAPTER_CONFIG}: the base")
    raise AdapterError(f"{folder / ADAPTER_CONFIG}: the base {named} is not there; put it back")


def load_lora(model: MiniMindForCausalLM, folder: str | Path) -> LoraSettings:
    """Puts a saved adapter (ours or PEFT's) on its base, strictly; returns its settings.

    Raises:
        AdapterError: a file is missing or broken, tensors do not fit, or the base's weights are
            not those that the adapter was trained on.
        CheckpointError: a tensor holds anything but finite numbers.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    tensors, metadata = read_adapter_tensors(folder / ADAPTER_WEIGHTS)
    trained_on = metadata.get("base_fingerprint")
    if trained_on is not None and trained_on != weights_fingerprint(model):
        raise AdapterError(
            f"{folder}: was trained on another base than the one loaded; its base was "
            f"{config.get('base_model_name_or_path')}: give that, or put it back (a .pth with its "
            "--num_attention_heads)"
        )
    rows = config.get("trainable_token_indices") or []
    rows = rows.get("embed_tokens", rows.get(EMBEDDING, [])) if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(map(is_integer, rows)):
        raise AdapterError(f"{folder / ADAPTER_CONFIG}: trainable_token_indices are no list of ids")
    settings = LoraSettings(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=",".join(layers_of(tensors, ".lora_A.weight")),
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        use_rslora=bool(config.get("use_rslora")),
        train_tokens=tuple(rows),
        modules_to_save=tuple(whole_modules(tensors)),
    )
    if not settings.targets:
        settings = LoraSettings(
            rank=0, train_tokens=settings.train_tokens, modules_to_save=settings.modules_to_save
        )
    put_on(model, settings, tensors, folder)
    return settings


def put_on(
    model: MiniMindForCausalLM, settings: LoraSettings, tensors: dict[str, torch.Tensor], path: Path
) -> None:
    """Puts in an adapter with the tensors that `path` holds for it.

    Raises:
        AdapterError: tensors are missing, unknown or of another shape.
        CheckpointError: a tensor holds anything but finite numbers.
    """
    for name, tensor in tensors.items():
        check_numbers(name, tensor, path)
    try:
        apply_lora(model, settings)
    except AdapterError as error:  # which names a flag, not the file that asks for it
        raise AdapterError(f"{path}: does not fit this model: {error}") from error
    fill_adapter(model, tensors, path)


def read_adapter_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors without PEFT's prefix, and the file's metadata."""
    if not path.is_file():
        raise AdapterError(f"{path}: missing; the run may not have finished")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise AdapterError(f"{path}: corrupt ({error})") from error
    foreign = [name for name in tensors if not name.startswith(PEFT_PREFIX)]
    if foreign:
        raise AdapterError(f"{path}: {foreign[0]} is not named as PEFT names tensors")
    return {name.removeprefix(PEFT_PREFIX): t for name, t in tensors.items()}, metadata


def layers_of(tensors: dict[str, torch.Tensor], ending: str) -> list[str]:
    """Modules that have a tensor with this ending."""
    return [name.removesuffix(ending) for name in tensors if name.endswith(ending)]


def whole_modules(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Modules saved whole in an adapter file."""
    plain = [name for name in tensors if ".lora_" not in name and not name.endswith(ROWS_KEY)]
    return [name.removesuffix(".weight") for name in plain]


def fill_adapter(model: MiniMindForCausalLM, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copies an adapter file's tensors into the modules that were put in for them."""
    wanted = {
        name.removeprefix(PEFT_PREFIX): tensor.shape
        for name, tensor in adapter_tensors(model).items()
    }
    head = tensors.get(f"{HEAD}.weight")
    embedding = tensors.get(f"{EMBEDDING}.weight")
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise AdapterError(f"{path}: {HEAD} differs from the embedding, but this model ties them")
    for name, tensor in tensors.items():
        if name not in wanted or wanted[name] != tensor.shape:
            raise AdapterError(
                f"{path}: {name} is {tuple(tensor.shape)}, the model has "
                f"{tuple(wanted[name]) if name in wanted else 'no place for it'}"
            )
    missing = sorted(wanted.keys() - tensors.keys() - {f"{HEAD}.weight"})
    if missing:
        raise AdapterError(f"{path}: lacks {missing[0]}; copy or train it again")
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora_A.copy_(tensors[f"{name}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"{name}.lora_B.weight"])
        if f"{EMBEDDING}.{ROWS_KEY}" in tensors:
            model.model.embed_tokens.rows.copy_(tensors[f"{EMBEDDING}.{ROWS_KEY}"])
        for name in whole_modules(tensors):
            model.get_submodule(name).weight.copy_(tensors[f"{name}.weight"])


def load_minimind_lora(model: MiniMindForCausalLM, path: str | Path) -> LoraSettings:
    """Puts a classic MiniMind adapter `.pth` on `model`: square targets, scaling 1.

    Raises:
        AdapterError: tensors are missing, unknown, or of the wrong shape.
        CheckpointError: the file is missing or holds more than tensors.
    """
    path = Path(path)
    tensors = {
        name.removeprefix("module.")
        .replace(".lora.A.", ".lora_A.")
        .replace(".lora.B.", ".lora_B."): tensor.float()
        for name, tensor in read_pth(path).items()
    }
    layers = layers_of(tensors, ".lora_A.weight")
    if not layers or tensors[f"{layers[0]}.lora_A.weight"].ndim != 2:
        raise AdapterError(f"{path}: holds no matrix named ...lora.A.weight; no MiniMind adapter")
    rank = tensors[f"{layers[0]}.lora_A.weight"].shape[0]
    settings = LoraSettings(rank=rank, alpha=rank, targets=",".join(layers), init="gaussian")
    put_on(model, settings, tensors, path)
    return settings
