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

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import skip_init

from model.files import UserError, read_json, replace_file, write_json
from model.model_minimind import MiniMindForCausalLM, weights_fingerprint

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
NO_TARGETS = "dummy-target-modules"  # PEFT's name for none; an empty list it refuses
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGET_NAMES = ("square", "attention", "mlp", "all-linear", "embedding")
TRAINABLE_PARTS = ("square", "attention", "mlp", "embeddings", "norms", "frozen-embeddings")
INITS = ("kaiming", "gaussian")
# Values of PEFT's settings that this module computes; others are refused.
COMPUTED = {"peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False}
COMPUTED |= {"fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}
COMPUTED |= {"layer_replication": None, "target_parameters": None, "alora_invocation_tokens": None}
SAFE_INITS = (True, False, "gaussian", "orthogonal")  # PEFT's others change the base's weights


@dataclass(frozen=True)
class LoraSettings:
    """What is adapted, and how.

    Attributes:
        rank: r; 0 adapts no matrix (with `train_tokens` or `modules_to_save` alone).
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


# ---------------------------------------------------------------- adapted modules


class Adapted(nn.Module):
    """A module with a frozen `weight`, which keeps its name, and an update that can be merged."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.weight, self.is_merged = module.weight, False

    def merge(self) -> None:
        """Add the update in float32 and cast once; keep the weight before."""
        self.unmerged_weight, self.is_merged = self.weight.detach().clone(), True
        self.weight.data.copy_(self.unmerged_weight.float() + self.delta().float())

    def unmerge(self) -> None:
        """Put the bits of the weight before `merge` back."""
        self.weight.data.copy_(self.unmerged_weight)
        del self.unmerged_weight
        self.is_merged = False


class LoRALinear(Adapted):
    """A frozen bias-free linear with a low-rank update."""

    def __init__(self, linear: nn.Module, settings: LoraSettings):
        super().__init__(linear)
        out_features, in_features = self.weight.shape
        options = {"bias": False, "device": self.weight.device, "dtype": torch.float32}
        self.lora_A = skip_init(nn.Linear, in_features, settings.rank, **options)
        self.lora_B = skip_init(nn.Linear, settings.rank, out_features, **options)
        self.dropout, self.scaling = nn.Dropout(settings.dropout), settings.scaling
        draw_factor(self.lora_A.weight, settings.init)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        out = F.linear(x, self.weight)
        if self.is_merged:
            return out
        return out + self.lora_B(self.lora_A(self.dropout(x)) * self.scaling)

    def delta(self) -> torch.Tensor:
        """Compute the update to `weight`, (out, in)."""
        return self.scaling * (self.lora_B.weight.detach() @ self.lora_A.weight.detach())


class LoRAEmbedding(Adapted):
    """A frozen embedding with a low-rank update, which acts on the tied head too.

    As in PEFT, A is (r, V), zero at the start, and B is (D, r): the factor at the head's input. It
    is drawn as a linear's A. PEFT's N(0, 1) is too large for the linears' learning rate.
    """

    def __init__(self, embedding: nn.Module, settings: LoraSettings):
        super().__init__(embedding)
        (vocab_size, size), rank = self.weight.shape, settings.rank
        options = {"device": self.weight.device, "dtype": torch.float32}
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, vocab_size, **options))
        self.lora_embedding_B = nn.Parameter(torch.zeros(size, rank, **options))
        self.dropout, self.scaling = nn.Dropout(settings.dropout), settings.scaling
        draw_factor(self.lora_embedding_B.T, settings.init)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., D)."""
        out = F.embedding(input_ids, self.weight)
        if self.is_merged:
            return out
        rows = F.embedding(input_ids, self.lora_embedding_A.T)
        return out + F.linear(rows * self.scaling, self.lora_embedding_B)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        logits = F.linear(hidden, self.weight)
        if self.is_merged:
            return logits
        inner = F.linear(self.dropout(hidden), self.lora_embedding_B.T) * self.scaling
        return logits + F.linear(inner, self.lora_embedding_A.T)

    def delta(self) -> torch.Tensor:
        """Compute the update to `weight`, (V, D)."""
        return self.scaling * (self.lora_embedding_B.detach() @ self.lora_embedding_A.detach()).T


class TokenRows(Adapted):
    """An embedding of which only the rows of chosen tokens train, at both ends."""

    def __init__(self, embedding: nn.Module, token_ids: tuple[int, ...]):
        super().__init__(embedding)
        ids = torch.tensor(token_ids, device=self.weight.device)
        self.register_buffer("token_ids", ids, persistent=False)
        rows = nn.Parameter(self.weight.detach()[ids].float())
        # PEFT's name; the file holds rows, not differences.
        self.token_adapter = nn.ParameterDict({"trainable_tokens_delta": rows})

    def rows(self) -> torch.Tensor:
        """Return the trained rows, (tokens, D), in the embedding's type."""
        return self.token_adapter["trainable_tokens_delta"].to(self.weight.dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., D)."""
        weight = self.weight.index_copy(0, self.token_ids, self.rows())
        return F.embedding(input_ids, weight)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        logits = F.linear(hidden, self.weight)
        return logits.index_copy(-1, self.token_ids, F.linear(hidden, self.rows()))

    def delta(self) -> torch.Tensor:
        """Compute the update to `weight`, (V, D)."""
        weight = self.weight.detach()
        return weight.index_copy(0, self.token_ids, self.rows().detach()) - weight


class TiedHead(nn.Module):
    """The output end of an adapted embedding: hidden states to logits."""

    def __init__(self, embedding: LoRAEmbedding | TokenRows):
        super().__init__()
        self.embedding = embedding

    @property
    def weight(self) -> nn.Parameter:
        """The embedding's matrix."""
        return self.embedding.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        return self.embedding.compute_logits(hidden)


def draw_factor(factor: torch.Tensor, init: str) -> None:
    """Draw the factor (r, in) that is not zero at the start."""
    if init == "gaussian":
        nn.init.normal_(factor, std=0.02)
    else:
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


# ---------------------------------------------------------------- choosing and putting in


def select_modules(
    model: MiniMindForCausalLM, spec: str, kinds: tuple[type, ...], flag: str
) -> list[str]:
    """Name the modules of some kinds that groups or names, joined by commas, select.

    Raises:
        UserError: a part selects no module; the message names the flag.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    linears = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n != HEAD]
    norms = [n for n, m in modules.items() if isinstance(m, nn.RMSNorm)]
    groups = {
        "all": [*modules],
        "square": [n for n in linears if modules[n].in_features == modules[n].out_features],
        "attention": [n for n in linears if n.endswith(ATTENTION)],
        "mlp": [n for n in linears if n.endswith(MLP)],
        "all-linear": linears,
        "norms": norms,
        "frozen-embeddings": linears + norms,
    }
    groups["embedding"] = groups["embeddings"] = [n for n in modules if n == EMBEDDING]
    selected: set[str] = set()
    for part in map(str.strip, spec.split(",")):
        named = [n for n in modules if n == part or n.endswith("." + part)]
        found = groups.get(part, named)
        if not found:
            known = sorted({n for n in groups if groups[n]} | {n.split(".")[-1] for n in modules})
            raise UserError(f"{flag}: {part!r} selects nothing; use some of {', '.join(known)}")
        selected.update(found)
    return [name for name in modules if name in selected]


def select_trainable(model: MiniMindForCausalLM, spec: str) -> None:
    """Freeze all but the named parts: the dense counterparts of the adapter's placements.

    Args:
        spec: `all`, or some of `TRAINABLE_PARTS` or module names, joined by commas;
            `frozen-embeddings` is everything but the tied embedding.
    """
    names = select_modules(model, spec, (nn.Linear, nn.RMSNorm, nn.Embedding), "--trainable")
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)


def apply_lora(model: MiniMindForCausalLM, settings: LoraSettings) -> list[str]:
    """Freeze `model` and put the adapter in; return the names of the adapted modules.

    Nothing is changed when a setting is refused.

    Raises:
        UserError: an unknown target, a rank above a matrix's own, two ways of training the
            embedding, or nothing to train.
    """
    targets, whole = [], []
    if settings.rank:
        kinds = (nn.Linear, nn.Embedding)
        targets = select_modules(model, settings.targets, kinds, "--lora_targets")
    if settings.modules_to_save:
        parts = ",".join(settings.modules_to_save).replace(HEAD, EMBEDDING)  # the tied matrix
        whole = select_modules(model, parts, (nn.RMSNorm, nn.Embedding), "--modules_to_save")
    check_adapter(model, settings, targets, whole)
    model.requires_grad_(False)
    for name in targets:
        if name != EMBEDDING:
            model.set_submodule(name, LoRALinear(model.get_submodule(name), settings))
    embedding = model.model.embed_tokens
    if EMBEDDING in targets:  # last: the linears draw the same numbers without it
        model.model.embed_tokens = LoRAEmbedding(embedding, settings)
    elif settings.train_tokens:
        model.model.embed_tokens = TokenRows(embedding, settings.train_tokens)
    if EMBEDDING in targets or settings.train_tokens:
        model.lm_head = TiedHead(model.model.embed_tokens)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    return targets


def check_adapter(
    model: MiniMindForCausalLM, settings: LoraSettings, targets: list[str], whole: list[str]
) -> None:
    """Refuse an adapter of modules `targets`, and modules trained `whole`, that cannot work."""
    for name in targets:
        shape = tuple(model.get_submodule(name).weight.shape)
        if not 1 <= settings.rank <= min(shape):
            raise UserError(
                f"--lora_rank {settings.rank}: {name} is {shape}, so its rank is 1 to {min(shape)}"
            )
    tokens, last = settings.train_tokens, model.config.vocab_size - 1
    if len({*tokens}) != len(tokens) or not all(0 <= token <= last for token in tokens):
        raise UserError(f"--train_tokens: ids must differ and lie in 0..{last}")
    ways = ["--train_tokens"] if tokens else []
    ways += ["--modules_to_save embeddings"] if EMBEDDING in whole else []
    ways += ["--lora_targets embedding"] if EMBEDDING in targets else []
    if ways and not model.config.tie_word_embeddings:
        raise UserError(f"{ways[0]}: needs a model that ties its head to the embedding; drop it")
    ways += ["--lora_targets lm_head"] if HEAD in targets else []
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)}: train the same matrix; keep one")
    if not (targets or whole or tokens):
        raise UserError("--lora_rank 0: nothing to train; add --train_tokens or --modules_to_save")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAEmbedding]]:
    """Iterate over the modules with a low-rank update, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | LoRAEmbedding):
            yield name, module


# ---------------------------------------------------------------- merging


def merge_lora(model: MiniMindForCausalLM) -> None:
    """Add every update to its weight, in float32 and cast once; `unmerge_lora` undoes it.

    Raises:
        UserError: merged already, or an update of a tied head alone, which would change the
            embedding too.
    """
    if isinstance(model.lm_head, LoRALinear) and model.config.tie_word_embeddings:
        raise UserError(
            f"{HEAD} is tied to the embedding: merging its update would change the input end too; "
            "use the adapter unmerged"
        )
    adapted = [module for module in model.modules() if isinstance(module, Adapted)]
    if any(module.is_merged for module in adapted):
        raise UserError("the adapter is merged already")
    for module in adapted:
        module.merge()


def unmerge_lora(model: MiniMindForCausalLM) -> None:
    """Put the bits of the weights before `merge_lora` back."""
    for module in model.modules():
        if isinstance(module, Adapted):
            module.unmerge()


def build_merged(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """Build a plain model with the logits of the adapted one; `model` is unchanged.

    Raises:
        UserError: see `merge_lora`.
    """
    merge_lora(model)
    plain = MiniMindForCausalLM(model.config)
    tensors = model.state_dict() | {f"{HEAD}.weight": model.lm_head.weight}
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()})
    unmerge_lora(model)
    return plain


# ---------------------------------------------------------------- files


def collect_tensors(model: MiniMindForCausalLM) -> dict[str, torch.Tensor]:
    """Collect the trained tensors under PEFT's names, float32; PEFT keeps both tied ends."""
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    embedding = model.model.embed_tokens
    if isinstance(embedding, LoRAEmbedding):
        tensors[f"{HEAD}.lora_A.weight"] = embedding.lora_embedding_B.T
        tensors[f"{HEAD}.lora_B.weight"] = embedding.lora_embedding_A.T
    elif embedding.weight.requires_grad:
        tensors[f"{HEAD}.weight"] = embedding.weight.clone()
    return {
        PEFT_PREFIX + name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tensors.items()
    }


def find_whole_modules(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Name the modules that an adapter's tensors hold whole."""
    names = [name for name in tensors if ".lora_" not in name and ".token_adapter." not in name]
    return [name.removeprefix(PEFT_PREFIX).removesuffix(".weight") for name in names]


def save_lora(
    model: MiniMindForCausalLM, settings: LoraSettings, folder: Path, base: str, fingerprint: str
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT does.

    Args:
        base: folder or hub id of the base, for `base_model_name_or_path`.
        fingerprint: `weights_fingerprint` of the base before the adapter was put in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, tensors = folder / ADAPTER_WEIGHTS, collect_tensors(model)
    tokens = settings.train_tokens
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Of trained factors it changes nothing; PEFT's gaussian has another spread, 1 / r.
        "init_lora_weights": True if settings.init == "kaiming" else settings.init,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": find_whole_modules(tensors) or None,
        "peft_type": "LORA",
        "r": max(settings.rank, 1),  # PEFT refuses 0; without targets it is not used
        "target_modules": [name for name, _ in lora_layers(model)] or NO_TARGETS,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": {"embed_tokens": list(tokens)} if tokens else None,
        "use_rslora": settings.use_rslora,
    }
    if isinstance(model.model.embed_tokens, LoRAEmbedding):
        config["ensure_weight_tying"] = True
    save_tensors(tensors, path, {"base_fingerprint": fingerprint})
    write_json(folder / ADAPTER_CONFIG, config)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file aside and move it into place.

    Raises:
        OSError: the disk is full, for instance; the file before is still there.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, aside, metadata={"format": "pt"} | metadata)
    except SafetensorError as error:  # in place of the OSError that caused it
        raise OSError(f"{path}: not written ({error})") from error
    replace_file(aside, path)


def load_lora(model: MiniMindForCausalLM, folder: str | Path) -> LoraSettings:
    """Put a saved adapter (ours or PEFT's) on its base, strictly; return its settings.

    Raises:
        UserError: a file is missing or broken, tensors do not fit, or the base's weights are not
            those that the adapter was trained on.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in list(file.keys())}
            trained_on = (file.metadata() or {}).get("base_fingerprint")
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path}: missing or corrupt ({error}); copy or train it again") from error
    if trained_on not in (None, weights_fingerprint(model)):
        raise UserError(
            f"{folder}: was trained on another base than the one loaded; give the one that its "
            f"{ADAPTER_CONFIG} names"
        )
    # PEFT saves the base's matrix beside an adapted embedding.
    for name in [name for name in tensors if name.endswith(".base_layer.weight")]:
        own = model.get_parameter(name.removeprefix(PEFT_PREFIX).replace(".base_layer", ""))
        if not torch.equal(tensors.pop(name), own.detach().cpu().float()):
            raise UserError(f"{path}: {name} is not the base's; load the base that it belongs to")
    settings = find_settings(Path(folder), tensors)
    try:
        apply_lora(model, settings)
    except UserError as error:  # which names a flag, not the file that asks for it
        raise UserError(f"{path}: does not fit this model: {error}") from error
    fill_adapter(model, tensors, path)
    return settings


def find_settings(folder: Path, tensors: dict[str, torch.Tensor]) -> LoraSettings:
    """Find an adapter's settings in its config and the names of its tensors.

    Raises:
        UserError: the config is missing or broken, or asks for what this module does not compute.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    for name, computed in COMPUTED.items():
        if config.get(name, computed) not in (computed, None, [], {}):
            raise UserError(f"{path}: {name} = {config[name]!r} is not supported here")
    init = config.get("init_lora_weights", True)
    if init not in SAFE_INITS:
        raise UserError(
            f"{path}: init_lora_weights {init!r} may change the base; convert the adapter with "
            "PEFT (path_initial_model_for_weight_conversion) first"
        )
    if not config.get("r") or not config.get("lora_alpha"):
        raise UserError(f"{path}: r or lora_alpha is missing; copy it again")
    rows = config.get("trainable_token_indices") or ()
    names = [name.removeprefix(PEFT_PREFIX).partition(".lora_") for name in tensors]
    targets = list(dict.fromkeys(module for module, lora, _ in names if lora))
    if EMBEDDING in targets and HEAD in targets:  # one update, which PEFT saves for both ends
        targets.remove(HEAD)
    return LoraSettings(
        rank=config["r"] if targets else 0,
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=",".join(targets),
        init="gaussian" if init == "gaussian" else "kaiming",
        use_rslora=bool(config.get("use_rslora")),
        train_tokens=tuple(next(iter(rows.values())) if isinstance(rows, dict) else rows),
        modules_to_save=tuple(find_whole_modules(tensors)),
    )


def fill_adapter(model: MiniMindForCausalLM, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy an adapter file's tensors into the modules that were put in for them.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or the tied ends differ.
    """
    whole = tensors.get(f"{PEFT_PREFIX}{EMBEDDING}.weight")
    if whole is not None:  # PEFT may save the tied matrix once
        tensors.setdefault(f"{PEFT_PREFIX}{HEAD}.weight", whole)
    own = collect_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        found, needed = (side[name].shape if name in side else None for side in (tensors, own))
        if found != needed:
            found, needed = (shape and tuple(shape) for shape in (found, needed))
            raise UserError(f"{path}: {name} is {found}, the model has {needed}; copy it again")
    names = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    model.load_state_dict(names, strict=False)  # checked above; a tied head has no tensors
    for name, tensor in collect_tensors(model).items():
        if not torch.equal(tensor, tensors[name]):
            raise UserError(f"{path}: {name} differs from the embedding, but this model ties them")
