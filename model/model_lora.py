"""LoRA written by hand (Hu et al. 2021, arXiv 2106.09685), saved in PEFT's format.

    model = load_model("out/pretrain")
    apply_lora(model, LoraSettings(rank=8, alpha=32))    # the base is frozen, the update trains
    plain = merge_lora(model)                            # the same logits from plain weights

`save_lora` writes an adapter that PEFT loads; `load_lora` loads one of ours or of PEFT's.

An adapter is a module in the place of a linear, or of the tied head. It computes `forward`, and
`compute_weight` for merging, and names what trains in `adapter_parameters`, by role. Optimizer,
counts and files ask `name_roles` for these roles.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import skip_init

from model.cli import UserError
from model.files import read_json, write_bytes, write_json
from model.model_minimind import MiniMindForCausalLM, fill_model, list_weights, weights_fingerprint

# The two ends of the vocabulary's matrix, which most models tie: one parameter, two names.
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
TARGET_NAMES = ("square", "attention", "mlp", "all-linear", "embedding")
TRAINABLE_PARTS = ("square", "attention", "mlp", "embeddings", "norms", "frozen-embeddings")
WHOLE = "whole"  # the role of a parameter that trains as it is, in no adapter


@dataclass(frozen=True)
class LoraSettings:
    """What is adapted, and how.

    `targets`: some of `TARGET_NAMES` or module names, joined by commas. `square` is the placement
    of MiniMind's scripts: only q_proj and o_proj are square under grouped-query attention.
    """

    rank: int = 8  # r; 0 adapts no matrix: `train_tokens` or `modules_to_save` alone
    alpha: float = 32.0  # numerator of the scaling
    dropout: float = 0.0
    targets: str = "all-linear"
    init: str = "kaiming"  # of A: U(+-1/sqrt(in)) as in PEFT; gaussian: MiniMind's N(0, .02)
    use_rslora: bool = False
    use_dora: bool = False  # train the length of each output's weights apart: `DoRALinear`
    train_tokens: tuple[int, ...] = ()  # ids whose embedding rows train, at both ends if tied
    modules_to_save: tuple[str, ...] = ()  # trained whole: embeddings, norms, or module names

    @property
    def scaling(self) -> float:
        """alpha / r; rank-stabilized alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


# ---------------------------------------------------------------- adapters


class LoRALinear(nn.Module):
    """W x + scaling * B A x: a frozen bias-free linear W, and an update of rank r that trains.

    B is 0 at the start, so that the adapted model starts as its base.
    """

    def __init__(self, linear: nn.Module, settings: LoraSettings) -> None:
        super().__init__()
        self.weight = linear.weight  # W, (out, in)
        out_features, in_features = self.weight.shape
        options = {"bias": False, "device": self.weight.device, "dtype": torch.float32}
        self.lora_A = skip_init(nn.Linear, in_features, settings.rank, **options)  # (r, in)
        self.lora_B = skip_init(nn.Linear, settings.rank, out_features, **options)  # (out, r)
        self.dropout = nn.Dropout(settings.dropout)
        self.scaling = settings.scaling
        if settings.init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return what trains, by role."""
        return {"A": self.lora_A.weight, "B": self.lora_B.weight}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        base = F.linear(x, self.weight)
        reduced = self.lora_A(self.dropout(x))  # (..., r)
        return base + self.lora_B(reduced * self.scaling)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look rows up, if this is the head: (...) int64 -> (..., in)."""
        base = F.embedding(input_ids, self.weight)
        reduced = F.embedding(input_ids, self.lora_B.weight)  # (..., r)
        return base + (reduced * self.scaling) @ self.lora_A.weight

    def add_update(self) -> Tensor:
        """Compute W + scaling * B A in float32, (out, in)."""
        update = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return self.weight.float() + update

    def compute_weight(self) -> Tensor:
        """Compute the weight that a merge puts in W's place, (out, in), cast once."""
        return self.add_update().to(self.weight.dtype)


class DoRALinear(LoRALinear):
    """m * (W + scaling * B A), each row over its norm: DoRA (Liu et al. 2024, arXiv 2402.09353).

    The length m of each row and its direction train apart. At the start m is the norm of W's row.
    """

    def __init__(self, linear: nn.Module, settings: LoraSettings) -> None:
        super().__init__(linear, settings)
        self.lora_magnitude_vector = nn.Parameter(self.compute_norms())  # m, (out,); PEFT's name

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return what trains, by role."""
        return super().adapter_parameters() | {"magnitude": self.lora_magnitude_vector}

    def compute_norms(self) -> Tensor:
        """Compute the norm of each row before it is scaled, (out,), in float32.

        A constant for the gradient (section 4.3 of the paper), as in PEFT.
        """
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            return self.add_update().norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        scale = self.lora_magnitude_vector / self.compute_norms()
        out = super().forward(x)
        return out * scale.to(out.dtype)

    def compute_weight(self) -> Tensor:
        """Compute the weight that a merge puts in W's place, (out, in), cast once."""
        scale = self.lora_magnitude_vector / self.compute_norms()
        return (self.add_update() * scale[:, None]).to(self.weight.dtype)


class TokenRows(nn.Module):
    """A tied head of which only the rows of chosen tokens train."""

    def __init__(self, head: nn.Module, token_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = head.weight  # (V, D)
        ids = torch.tensor(token_ids, device=self.weight.device)
        self.register_buffer("token_ids", ids, persistent=False)
        self.rows = nn.Parameter(self.weight.detach()[ids].float())  # (tokens, D)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return what trains, by role."""
        return {"rows": self.rows}

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        logits = F.linear(hidden, self.weight)
        trained = F.linear(hidden, self.rows.to(self.weight.dtype))  # (..., tokens)
        return logits.index_copy(-1, self.token_ids, trained)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look rows up: (...) int64 -> (..., D)."""
        return F.embedding(input_ids, self.compute_weight())

    def compute_weight(self) -> Tensor:
        """Compute the matrix with the rows that train, (V, D)."""
        return self.weight.index_copy(0, self.token_ids, self.rows.to(self.weight.dtype))


class TiedEmbedding(nn.Module):
    """The input end of an adapted head, with its factors; PEFT starts one of them at N(0, 1)."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight = head.weight
        self.tied_to = (head,)  # in a tuple, not a submodule: each parameter has one name

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) int64 -> (..., D)."""
        return self.tied_to[0].embed(input_ids)


ADAPTERS = (LoRALinear, TokenRows)  # and what extends them


def name_roles(model: nn.Module) -> dict[str, str]:
    """Name the parameters that train, each with its role: what its adapter says, or `WHOLE`."""
    roles = {}
    for module in model.modules():
        if isinstance(module, ADAPTERS):
            for role, parameter in module.adapter_parameters().items():
                roles[parameter] = role
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: roles.get(parameter, WHOLE) for name, parameter in trained.items()}


# ---------------------------------------------------------------- what is adapted


def group_modules(model: MiniMindForCausalLM) -> dict[str, list[str]]:
    """Name the modules of the groups that flags know."""
    modules = dict(model.named_modules())
    norms = [name for name, module in modules.items() if isinstance(module, nn.RMSNorm)]
    linears = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name != HEAD:
            linears.append(name)
    return {
        "all": [EMBEDDING, *linears, *norms, HEAD],
        # MiniMind's own choice, an accident: it adapts what has as many inputs as outputs.
        "square": [n for n in linears if modules[n].in_features == modules[n].out_features],
        "attention": [name for name in linears if ".self_attn." in name],
        "mlp": [name for name in linears if ".mlp." in name],
        "all-linear": linears,
        "embedding": [EMBEDDING],
        "embeddings": [EMBEDDING],
        "norms": norms,
        "frozen-embeddings": linears + norms,
    }


def select_modules(
    model: MiniMindForCausalLM,
    words: Iterable[str],
    groups: dict[str, list[str]],
    kinds: tuple[type, ...],
    flag: str,
) -> dict[str, str]:
    """Select modules by the words of a flag: groups, or names of modules of these kinds.

    Return the modules in the model's order, each with the word that selected it. A word that
    selects nothing is refused.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    selected = {}
    for word in words:
        named = [name for name in names if name == word or name.endswith(f".{word}")]
        chosen = groups.get(word, named)
        if not chosen:
            known = {*groups, *(name.rpartition(".")[2] for name in names)}
            choices = ", ".join(sorted(known))
            raise UserError(f"{flag}: {word!r} selects nothing; use some of {choices}")
        selected |= dict.fromkeys(chosen, word)
    return {name: selected[name] for name in names if name in selected}


def split_words(spec: str) -> list[str]:
    """Split a flag's value at its commas."""
    return [word.strip() for word in spec.split(",")]


def select_trainable(model: MiniMindForCausalLM, spec: str) -> None:
    """Freeze all but `spec`: `all`, or some of `TRAINABLE_PARTS` or module names, by commas."""
    groups = group_modules(model)
    known = {name: groups[name] for name in ("all", *TRAINABLE_PARTS)}
    kinds = (nn.Linear, nn.RMSNorm, nn.Embedding)
    names = select_modules(model, split_words(spec), known, kinds, "--trainable")
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)


def find_targets(model: MiniMindForCausalLM, settings: LoraSettings) -> dict[str, str]:
    """Find the modules to adapt, each with the word that names it; refuse too high a rank."""
    if settings.rank == 0:
        return {}
    groups = group_modules(model)
    known = {name: groups[name] for name in TARGET_NAMES}
    kinds = (nn.Linear, nn.Embedding)
    words = split_words(settings.targets)
    targets = select_modules(model, words, known, kinds, "--lora_targets")
    for name in targets:
        limit = min(model.get_submodule(name).weight.shape)
        if settings.rank > limit:
            rank = f"--lora_rank {settings.rank}"
            raise UserError(f"{rank}: the rank of {name} is {limit} at most")
    return targets


def find_whole(model: MiniMindForCausalLM, settings: LoraSettings) -> dict[str, str]:
    """Find the modules to train whole beside the adapter, each with the word that names it."""
    norms = group_modules(model)["norms"]
    known = {"embeddings": [EMBEDDING], HEAD: [EMBEDDING], "norms": norms}  # the head is tied
    kinds = (nn.RMSNorm, nn.Embedding)
    return select_modules(model, settings.modules_to_save, known, kinds, "--modules_to_save")


def check_settings(
    model: MiniMindForCausalLM,
    settings: LoraSettings,
    targets: dict[str, str],
    whole: dict[str, str],
) -> None:
    """Refuse settings that cannot work: token ids, and two ways to train one matrix."""
    tokens = settings.train_tokens
    last = model.config.vocab_size - 1
    if len(set(tokens)) < len(tokens) or not all(0 <= token <= last for token in tokens):
        raise UserError(f"--train_tokens: ids must differ and lie in 0..{last}")
    ways = []  # to train the matrix of both ends
    if tokens:
        ways.append("--train_tokens")
    if EMBEDDING in whole:
        ways.append(f"--modules_to_save {whole[EMBEDDING]}")
    if EMBEDDING in targets:
        ways.append(f"--lora_targets {targets[EMBEDDING]}")
    if ways and not model.config.tie_word_embeddings:
        raise UserError(f"{ways[0]}: needs a model that ties its head to the embedding; drop it")
    if HEAD in targets:
        ways.append(f"--lora_targets {HEAD}")
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)}: train the same matrix; keep one")
    if settings.use_dora and EMBEDDING in targets:
        raise UserError(f"--use_dora: is for linear layers; drop {targets[EMBEDDING]}")
    if not (targets or whole or tokens):
        raise UserError("--lora_rank 0: nothing to train; add --train_tokens or --modules_to_save")


def apply_lora(model: MiniMindForCausalLM, settings: LoraSettings) -> list[str]:
    """Freeze `model` and put the adapter in, unless refused; return the adapted modules' names."""
    targets = find_targets(model, settings)
    whole = find_whole(model, settings)
    check_settings(model, settings, targets, whole)
    model.requires_grad_(False)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    # Both ends share one update, at the head. It comes last: the linears draw the same numbers
    # without it.
    replaced = [name for name in targets if name != EMBEDDING]
    if EMBEDDING in targets:
        replaced.append(HEAD)
    adapter_class = DoRALinear if settings.use_dora else LoRALinear
    for name in replaced:
        model.set_submodule(name, adapter_class(model.get_submodule(name), settings))
    if settings.train_tokens:
        model.lm_head = TokenRows(model.lm_head, settings.train_tokens)
    if EMBEDDING in targets or settings.train_tokens:
        model.model.embed_tokens = TiedEmbedding(model.lm_head)
    return list(targets)


@torch.no_grad()
def merge_lora(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """Build a plain model with the adapted one's logits; refuse an update of a tied head alone."""
    is_tied = model.config.tie_word_embeddings
    is_head_adapted = isinstance(model.lm_head, LoRALinear)
    is_embedding_plain = isinstance(model.model.embed_tokens, nn.Embedding)
    if is_tied and is_head_adapted and is_embedding_plain:
        raise UserError(f"{HEAD} is tied to the embedding, which would change; do not merge it")
    tensors = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, ADAPTERS):
            tensors[f"{name}.weight"] = module.compute_weight()
    if is_tied:
        tensors[f"{EMBEDDING}.weight"] = tensors[f"{HEAD}.weight"]
    plain = MiniMindForCausalLM(model.config)
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()})
    return plain


# ---------------------------------------------------------------- files, in PEFT's format

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
# The trained rows here and in PEFT. The file holds the rows themselves, not what the name says,
# their difference from the base's.
ROWS = f"{HEAD}.rows"
PEFT_ROWS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
ADAPTER_INFIX = ".lora_"  # between the name of an adapted module and that of its tensor
# The same for an adapted embedding, whose matrices are transposed: (r, in) and (out, r).
EMBEDDING_INFIX = ".lora_embedding_"
BASE_COPY = ".base_layer.weight"  # PEFT saves the base's matrix beside an adapted embedding
# Values of PEFT's settings that are computed here. Settings not listed change nothing, or show in
# the tensors' names and shapes. PiSSA and other initializations change the base's weights.
PEFT_VALUES = {
    "peft_type": ("LORA",),
    "alpha_pattern": ({},),
    "alora_invocation_tokens": (),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


def collect_tensors(
    model: MiniMindForCausalLM, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Collect the trained tensors under PEFT's names, which has them at both tied ends."""
    tensors = {}
    for name, role in name_roles(model).items():
        peft_name = PEFT_ROWS if role == "rows" else name
        tensors[peft_name] = model.get_parameter(name)
    head = model.lm_head
    embedding = model.model.embed_tokens
    if isinstance(head, LoRALinear) and isinstance(embedding, TiedEmbedding):
        tensors[f"{EMBEDDING}.lora_embedding_A"] = head.lora_B.weight.T
        tensors[f"{EMBEDDING}.lora_embedding_B"] = head.lora_A.weight.T
    elif embedding.weight.requires_grad:
        # The tied head is the embedding's own tensor; safetensors refuses 2 names of one memory.
        tensors[f"{HEAD}.weight"] = head.weight.clone()
    collected = {}
    for name, tensor in tensors.items():
        collected[PEFT_PREFIX + name] = tensor.detach().to("cpu", dtype).contiguous()
    return collected


def find_modules(tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Name the modules that an adapter's tensors adapt, and those that they hold whole."""
    targets: dict[str, None] = {}  # each once, in order
    whole = []
    for peft_name in tensors:
        name = peft_name.removeprefix(PEFT_PREFIX)
        if ADAPTER_INFIX in name:
            targets[name.partition(ADAPTER_INFIX)[0]] = None
        elif name != PEFT_ROWS:
            whole.append(name.removesuffix(".weight"))
    if EMBEDDING in targets:  # one update, which PEFT saves for both ends
        targets.pop(HEAD, None)
    return list(targets), whole


def name_base(base: str) -> str:
    """Name a base's folder by its whole path; a hub id stays.

    PEFT looks for any other name in the current folder and on the hub.
    """
    path = Path(base).resolve()
    return str(path) if path.is_dir() else base


def save_lora(
    model: MiniMindForCausalLM,
    settings: LoraSettings,
    base: str,
    fingerprint: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter's 2 files as PEFT does.

    `base` is the base's folder or hub id, `fingerprint` its `weights_fingerprint`.
    """
    tensors = collect_tensors(model, dtype)
    targets, whole = find_modules(tensors)
    tokens = list(settings.train_tokens)
    config = {
        "base_model_name_or_path": name_base(base),
        # PEFT would not draw A so: its gaussian has another spread, 1 / r. It reads factors that
        # were trained, so the name is a record alone.
        "init_lora_weights": True if settings.init == "kaiming" else settings.init,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": whole or None,
        "peft_type": "LORA",
        "r": max(settings.rank, 1),  # PEFT refuses 0; without targets it is not used
        "target_modules": targets or "dummy-target-modules",  # PEFT's name for none
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": {"embed_tokens": tokens} if tokens else None,
        "use_dora": settings.use_dora,
        "use_rslora": settings.use_rslora,
    }
    if EMBEDDING in targets:
        config["ensure_weight_tying"] = True
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "base_fingerprint": fingerprint}
    write_bytes(folder / ADAPTER_WEIGHTS, save(tensors, metadata))
    write_json(folder / ADAPTER_CONFIG, config)


def read_adapter(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Read an adapter's tensors in float32, and the fingerprint of its base, if it has one."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in list(file.keys()) if not name.endswith(BASE_COPY)]
            tensors = {name: file.get_tensor(name).float() for name in names}
            metadata = file.metadata() or {}
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path}: missing or corrupt ({error}); copy or train it again") from error
    return tensors, metadata.get("base_fingerprint")


def load_lora(
    model: MiniMindForCausalLM, folder: str | Path, any_base: bool = False
) -> LoraSettings:
    """Put a saved adapter (ours or PEFT's) on its own base, strictly; return its settings.

    With `any_base` other weights of the same shape are taken as well. An adapter was not trained
    for them; this shows what a script does that does not look.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    tensors, trained_on = read_adapter(path)
    if not any_base and trained_on not in (None, weights_fingerprint(model)):
        raise UserError(f"{folder}: was trained on another base, or its base has changed")
    settings = find_settings(path.with_name(ADAPTER_CONFIG), tensors)
    weights = list_weights(model)
    try:
        apply_lora(model, settings)
    except UserError as error:  # the message names a flag, not the file
        raise UserError(f"{path}: does not fit this model: {error}") from error
    for name, tensor in tensors.items():
        if EMBEDDING_INFIX not in name:  # the head's update, compared below
            weights[name.removeprefix(PEFT_PREFIX).replace(PEFT_ROWS, ROWS)] = tensor
    fill_model(model, weights, path)
    for name, tensor in collect_tensors(model).items():
        if not torch.equal(tensor, tensors.get(name, tensor)):
            raise UserError(f"{path}: {name} differs from the other end, but this model ties both")
    return settings


def find_settings(path: Path, tensors: dict[str, Tensor]) -> LoraSettings:
    """Find an adapter's settings, all computed here, in its config and its tensors' names."""
    config = read_json(path)
    for name, values in PEFT_VALUES.items():
        if config.get(name) not in (None, *values):
            raise UserError(f"{path}: {name} {config[name]!r} is not computed here; merge in PEFT")
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        given = f"r {rank!r}, lora_alpha {alpha!r}"
        raise UserError(f"{path}: {given}: expected numbers; mend or copy it again")
    # PEFT writes the tokens as a list, or by the name of the embedding.
    tokens = config.get("trainable_token_indices") or ()
    if isinstance(tokens, dict):
        tokens = next(iter(tokens.values()))
    targets, whole = find_modules(tensors)
    return LoraSettings(
        rank=rank if targets else 0,
        alpha=alpha,
        dropout=config.get("lora_dropout") or 0.0,
        targets=",".join(targets),
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        train_tokens=tuple(tokens),
        modules_to_save=tuple(whole),
    )
