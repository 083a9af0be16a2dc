"""LoRA written by hand (Hu et al. 2021, arXiv 2106.09685), saved in PEFT's format.

    model = load_model("out/pretrain")
    apply_lora(model, LoraSettings(rank=8, alpha=32))    # the base is frozen, the update trains
    plain = merge_lora(model)                            # the same logits from plain weights

`save_lora` writes an adapter that PEFT loads; `load_lora` loads one of ours or of PEFT's.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import skip_init

from model.files import REPO_DIR, UserError, read_json, write_bytes, write_json
from model.model_minimind import MiniMindForCausalLM, fill_model, list_weights, weights_fingerprint

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TARGET_NAMES = ("square", "attention", "mlp", "all-linear", "embedding")
TRAINABLE_PARTS = ("square", "attention", "mlp", "embeddings", "norms", "frozen-embeddings")


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
    train_tokens: tuple[int, ...] = ()  # ids whose embedding rows train, at both ends if tied
    modules_to_save: tuple[str, ...] = ()  # trained whole: embeddings, norms, or module names

    @property
    def scaling(self) -> float:
        """alpha / r; rank-stabilized alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Module):
    """W x + scaling * B A x: a frozen bias-free linear W, and an update of rank r that trains.

    B is 0 at the start, so that the adapted model starts as its base.
    """

    def __init__(self, linear: nn.Module, settings: LoraSettings):
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

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight) + self.lora_B(self.lora_A(self.dropout(x)) * self.scaling)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look rows up, if this is the head: (...) int64 -> (..., in)."""
        update = (F.embedding(input_ids, self.lora_B.weight) * self.scaling) @ self.lora_A.weight
        return F.embedding(input_ids, self.weight) + update

    def compute_weight(self) -> Tensor:
        """Compute W with its update, (out, in), added in float32 and cast once."""
        update = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return (self.weight.float() + update).to(self.weight.dtype)


class TokenRows(nn.Module):
    """A tied head of which only the rows of chosen tokens train."""

    def __init__(self, head: nn.Module, token_ids: tuple[int, ...]):
        super().__init__()
        self.weight = head.weight  # (V, D)
        ids = torch.tensor(token_ids, device=self.weight.device)
        self.register_buffer("token_ids", ids, persistent=False)
        self.rows = nn.Parameter(self.weight.detach()[ids].float())  # (tokens, D)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        logits = F.linear(hidden, self.weight)
        own = F.linear(hidden, self.rows.to(self.weight.dtype))
        return logits.index_copy(-1, self.token_ids, own)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look rows up: (...) int64 -> (..., D)."""
        return F.embedding(input_ids, self.compute_weight())

    def compute_weight(self) -> Tensor:
        """Compute the matrix with the rows that train, (V, D)."""
        return self.weight.index_copy(0, self.token_ids, self.rows.to(self.weight.dtype))


class TiedEmbedding(nn.Module):
    """The input end of an adapted head, with its factors; PEFT starts one of them at N(0, 1)."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.weight = head.weight
        self.tied_to = (head,)  # in a tuple, not a submodule: each parameter has one name

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) int64 -> (..., D)."""
        return self.tied_to[0].embed(input_ids)


def select_modules(
    model: MiniMindForCausalLM, spec: str, kinds: tuple[type, ...], flag: str
) -> list[str]:
    """Name the modules of `kinds` that groups or names select; refuse a part that selects none."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    linears = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n != HEAD]
    norms = [n for n, m in modules.items() if isinstance(m, nn.RMSNorm)]
    groups = {
        "all": [*modules] if flag == "--trainable" else [],
        "square": [n for n in linears if modules[n].in_features == modules[n].out_features],
        "attention": [n for n in linears if ".self_attn." in n],
        "mlp": [n for n in linears if ".mlp." in n],
        "all-linear": linears,
        "embedding": [EMBEDDING],
        "embeddings": [EMBEDDING],
        "norms": norms,
        "frozen-embeddings": linears + norms if flag == "--trainable" else [],
    }
    selected: set[str] = set()
    for part in map(str.strip, spec.split(",")):
        named = [n for n in modules if n == part or n.endswith("." + part)]
        if not (found := groups.get(part, named)):
            known = sorted({n for n in groups if groups[n]} | {n.split(".")[-1] for n in modules})
            raise UserError(f"{flag}: {part!r} selects nothing; use some of {', '.join(known)}")
        selected.update(found)
    return [name for name in modules if name in selected]


def select_trainable(model: MiniMindForCausalLM, spec: str) -> None:
    """Freeze all but `spec`: `all`, or some of `TRAINABLE_PARTS` or module names, by commas."""
    names = select_modules(model, spec, (nn.Linear, nn.RMSNorm, nn.Embedding), "--trainable")
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)


def choose_modules(
    model: MiniMindForCausalLM, settings: LoraSettings
) -> tuple[list[str], list[str]]:
    """Name the modules to adapt, and those to train whole; refuse settings that cannot work."""
    rank, tokens, kinds = settings.rank, settings.train_tokens, (nn.Linear, nn.Embedding)
    targets = select_modules(model, settings.targets, kinds, "--lora_targets") if rank else []
    parts, kinds = ",".join(settings.modules_to_save), (nn.RMSNorm, nn.Embedding)
    parts = parts.replace(HEAD, EMBEDDING)  # the tied matrix
    whole = select_modules(model, parts, kinds, "--modules_to_save") if parts else []
    for name in targets:
        if rank > (limit := min(model.get_submodule(name).weight.shape)):
            raise UserError(f"--lora_rank {rank}: the rank of {name} is {limit} at most")
    ids = range(model.config.vocab_size)
    if len({*tokens} & {*ids}) < len(tokens):
        raise UserError(f"--train_tokens: ids must differ and lie in 0..{ids[-1]}")
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
    return targets, whole


def apply_lora(model: MiniMindForCausalLM, settings: LoraSettings) -> list[str]:
    """Freeze `model` and put the adapter in, unless refused; return the adapted modules' names."""
    targets, whole = choose_modules(model, settings)
    model.requires_grad_(False)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    is_tied = EMBEDDING in targets
    # Both ends last: the linears draw the same numbers without them.
    for name in [name for name in targets if name != EMBEDDING] + [HEAD] * is_tied:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), settings))
    if settings.train_tokens:
        model.lm_head = TokenRows(model.lm_head, settings.train_tokens)
    if is_tied or settings.train_tokens:
        model.model.embed_tokens = TiedEmbedding(model.lm_head)
    return targets


@torch.no_grad()
def merge_lora(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """Build a plain model with the adapted one's logits; refuse an update of a tied head alone."""
    plain, tensors = MiniMindForCausalLM(model.config), model.state_dict()
    is_tied, embedding = model.config.tie_word_embeddings, model.model.embed_tokens
    if isinstance(model.lm_head, LoRALinear) and isinstance(embedding, nn.Embedding) and is_tied:
        raise UserError(f"{HEAD} is tied to the embedding, which would change; do not merge it")
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | TokenRows):
            tensors[f"{name}.weight"] = module.compute_weight()
    if is_tied:
        tensors[f"{EMBEDDING}.weight"] = tensors[f"{HEAD}.weight"]
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()})
    return plain


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
# The trained rows here and in PEFT, whose file holds rows, too, in spite of the name.
ROWS, PEFT_ROWS = f"{HEAD}.rows", f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
BASE_COPY = ".base_layer.weight"  # PEFT saves the base's matrix beside an adapted embedding
# Values of PEFT's settings that are computed here. Settings not listed change nothing, or show in
# the tensors' names and shapes. PiSSA and other initializations change the base's weights.
PEFT_VALUES = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "alpha_pattern": ({},),
    "alora_invocation_tokens": (),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


def collect_tensors(model: MiniMindForCausalLM) -> dict[str, Tensor]:
    """Collect the trained tensors under PEFT's names, float32; PEFT keeps both tied ends."""
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head, embedding = model.lm_head, model.model.embed_tokens
    if isinstance(head, LoRALinear) and isinstance(embedding, TiedEmbedding):
        tensors[f"{EMBEDDING}.lora_embedding_A"] = head.lora_B.weight.T
        tensors[f"{EMBEDDING}.lora_embedding_B"] = head.lora_A.weight.T
    elif embedding.weight.requires_grad:
        tensors[f"{HEAD}.weight"] = head.weight.clone()
    return {
        PEFT_PREFIX + n.replace(ROWS, PEFT_ROWS): t.detach().to("cpu", torch.float32).contiguous()
        for n, t in tensors.items()
    }


def find_modules(tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Name the modules that an adapter's tensors adapt, and those that they hold whole."""
    names = [name.removeprefix(PEFT_PREFIX) for name in tensors]
    targets = dict.fromkeys(name.partition(".lora_")[0] for name in names if ".lora_" in name)
    whole = [n.removesuffix(".weight") for n in names if ".lora_" not in n and n != PEFT_ROWS]
    if EMBEDDING in targets:  # one update, which PEFT saves for both ends
        targets.pop(HEAD, None)
    return list(targets), whole


def save_lora(
    model: MiniMindForCausalLM, settings: LoraSettings, base: str, fingerprint: str, folder: Path
) -> None:
    """Write an adapter's 2 files as PEFT does.

    `base` is the base's folder, named so that `find_base` finds it from any folder, or hub id;
    `fingerprint` is its `weights_fingerprint`.
    """
    if (path := Path(base).resolve()).is_dir():
        base = str(path.relative_to(REPO_DIR) if path.is_relative_to(REPO_DIR) else path)
    tensors, tokens = collect_tensors(model), settings.train_tokens
    targets, whole = find_modules(tensors)
    config = {
        "base_model_name_or_path": base,
        # Of trained factors it changes nothing; PEFT's gaussian has another spread, 1 / r.
        "init_lora_weights": True if settings.init == "kaiming" else settings.init,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": whole or None,
        "peft_type": "LORA",
        "r": max(settings.rank, 1),  # PEFT refuses 0; without targets it is not used
        "target_modules": targets or "dummy-target-modules",  # PEFT's name for none
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": {"embed_tokens": list(tokens)} if tokens else None,
        "use_rslora": settings.use_rslora,
    } | ({"ensure_weight_tying": True} if EMBEDDING in targets else {})
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "base_fingerprint": fingerprint}
    write_bytes(folder / ADAPTER_WEIGHTS, save(tensors, metadata))
    write_json(folder / ADAPTER_CONFIG, config)


def load_lora(
    model: MiniMindForCausalLM, folder: str | Path, any_base: bool = False
) -> LoraSettings:
    """Put a saved adapter (ours or PEFT's) on its own base, strictly; return its settings.

    With `any_base` other weights of the same shape are taken as well. An adapter was not trained
    for them; this shows what a script does that does not look.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in list(file.keys()) if not name.endswith(BASE_COPY)]
            tensors = {name: file.get_tensor(name).float() for name in names}
            trained_on = (file.metadata() or {}).get("base_fingerprint")
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path}: missing or corrupt ({error}); copy or train it again") from error
    if not any_base and trained_on not in (None, weights_fingerprint(model)):
        raise UserError(f"{folder}: was trained on another base, or its base has changed")
    settings = find_settings(path.with_name(ADAPTER_CONFIG), tensors)
    weights = list_weights(model)
    try:
        apply_lora(model, settings)
    except UserError as error:  # the message names a flag, not the file
        raise UserError(f"{path}: does not fit this model: {error}") from error
    for name, tensor in tensors.items():
        if ".lora_embedding_" not in name:  # the head's update, compared below
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
    rows, (targets, whole) = config.get("trainable_token_indices") or (), find_modules(tensors)
    return LoraSettings(
        rank=config["r"] if targets else 0,
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=",".join(targets),
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        use_rslora=bool(config.get("use_rslora")),
        train_tokens=tuple(next(iter(rows.values())) if isinstance(rows, dict) else rows),
        modules_to_save=tuple(whole),
    )
