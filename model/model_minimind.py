"""A MiniMind-style causal LM, written by hand: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Parameter names and arithmetic are those of transformers' Llama (of Qwen3 with ``qk_norm``), and a
saved folder says so in its ``config.json``: ``AutoModelForCausalLM.from_pretrained(folder)`` gives
the same logits without this file.

Shapes in the comments: B batch, T new tokens, S tokens seen (cached and new), D hidden size,
H attention heads, K key/value heads, d = D / H head dimension, V vocabulary.
"""

import hashlib
import json
import os
import pickle
import reprlib
import struct
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dataset.command_line import UserError
from model.attention import LONGEST, blockwise_attention

TOKENIZER_DIR = Path(__file__).resolve().parent  # the committed 6,400-token tokenizer
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
IGNORE_INDEX = -100
# Labeled positions whose logits exist at once: LOSS_CHUNK * V floats, which stay in a CPU's cache.
LOSS_CHUNK = 512
# A study of small models: more than this is a slip or a hostile config, refused before it is
# allocated (8 GB of float32).
MAX_PARAMETERS = 2 * 10**9
MAX_LAYERS = 512
# What torch raises for a broken pickle; code in one ends in an UnpicklingError.
PICKLE_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError)
PICKLE_ERRORS += (TypeError, AttributeError, AssertionError, ArithmeticError, struct.error)


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


def minimind_config(
    vocab_size: int = 6400,
    hidden_size: int = 512,
    num_hidden_layers: int = 8,
    num_attention_heads: int = 8,
    num_key_value_heads: int = 2,
    intermediate_size: int = 1408,
    max_position_embeddings: int = 32768,
    rope_theta: float = 1e6,
    rms_norm_eps: float = 1e-5,
    qk_norm: bool = False,
) -> LlamaConfig | Qwen3Config:
    """The model's shape; the defaults are MiniMind2-small's (25,829,888 parameters).

    Raises:
        ValueError: heads that do not divide the hidden size, or what :func:`check_shape` refuses.
    """
    if hidden_size % num_attention_heads:
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of num_attention_heads "
            f"{num_attention_heads}"
        )
    config_class = Qwen3Config if qk_norm else LlamaConfig
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_attention_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        rms_norm_eps=rms_norm_eps,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
    )
    check_shape(config)
    return config


def check_shape(config: LlamaConfig | Qwen3Config) -> None:
    """Refuses a shape that cannot be built or is absurdly large, before anything is allocated.

    Raises:
        ValueError: names the values.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.head_dim % 2:
        raise ValueError(f"head_dim {config.head_dim} (hidden_size / heads) must be even")
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}"
        )
    if config.num_hidden_layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers {config.num_hidden_layers}: at most {MAX_LAYERS}")
    attention = 2 * config.hidden_size * config.head_dim * (heads + kv_heads)
    block = attention + 3 * config.hidden_size * config.intermediate_size
    total = config.vocab_size * config.hidden_size + config.num_hidden_layers * block
    if total > MAX_PARAMETERS:
        raise ValueError(f"this shape has {total:,} parameters, of {MAX_PARAMETERS:,} allowed here")


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(
    position_ids: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary embedding (Su et al. 2021, arXiv 2104.09864, eq. 15).

    Computed in float32 from the positions, once a forward pass: no buffer that a cast of the model
    to half precision would round.

    Args:
        position_ids: (B or 1, T) int64.

    Returns:
        Two tensors (B or 1, 1, T, head_dim), float32; the two halves of the last axis are equal.
    """
    powers = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    inverse_frequency = 1.0 / theta ** (powers / head_dim)
    angles = position_ids[:, None, :, None].float() * inverse_frequency
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates (B, heads, T, d) by the tables of :func:`rope_tables`, in the layout of Llama."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def visible_positions(
    attention_mask: torch.Tensor | None, new: int, seen: int, device: torch.device
) -> torch.Tensor | None:
    """Which of ``seen`` keys each of ``new`` queries may attend to.

    Args:
        attention_mask: (B, S), 1 for real tokens and 0 for padding, or None.

    Returns:
        (B or 1, 1, new, seen) bool, or None where plain causal attention says the same.
    """
    if attention_mask is None and new in (1, seen):
        return None
    queries = torch.arange(seen - new, seen, device=device)[:, None]
    keys = torch.arange(seen, device=device)[None, :]
    visible = (keys <= queries)[None, None]
    if attention_mask is None:
        return visible
    # A padding query sees itself: a row without any key would be NaN, and poison the cache.
    return visible & (attention_mask[:, None, None, :].bool() | (keys == queries))


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig | Qwen3Config, layer_index: int):
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.layer_index = layer_index
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, size, bias=False)
        self.grouped = config.num_attention_heads != config.num_key_value_heads
        self.qk_norm = config.model_type == "qwen3"
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        visible: torch.Tensor | None,
        mode: str,
        cache: Cache | None,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D); adds this layer's keys and values to ``cache``."""
        batch, new, _ = x.shape
        q = self.q_proj(x).view(batch, new, -1, self.head_dim)
        k = self.k_proj(x).view(batch, new, -1, self.head_dim)
        v = self.v_proj(x).view(batch, new, -1, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), *rope), rotate(k.transpose(1, 2), *rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        if mode == "blockwise":
            out = blockwise_attention(q, k, v)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=mode == "causal", enable_gqa=self.grouped
            )
        return self.o_proj(out.transpose(1, 2).reshape(batch, new, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: LlamaConfig | Qwen3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig | Qwen3Config, layer_index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        visible: torch.Tensor | None = None,
        mode: str = "causal",
        cache: Cache | None = None,
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, visible, mode, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def attention_mode(
    visible: torch.Tensor | None, new: int, cache: Cache | None, device: torch.device
) -> str:
    """``masked`` where ``visible`` or a single query says it all, else the faster causal way."""
    if visible is not None or new == 1:
        return "masked"
    is_blockwise = device.type == "cpu" and cache is None and new <= LONGEST
    return "blockwise" if is_blockwise else "causal"


class MiniMindModel(nn.Module):
    """Embedding, blocks and final norm: token ids to hidden states."""

    def __init__(self, config: LlamaConfig | Qwen3Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """(B, T) int64 -> (B, T, D); ``attention_mask`` is (B, S), for padded batches."""
        new = input_ids.shape[1]
        seen = new + (cache.get_seq_length() if cache is not None else 0)
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(seen - new, seen, device=input_ids.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        x = self.embed_tokens(input_ids)
        visible = visible_positions(attention_mask, new, seen, input_ids.device)
        rope = rope_tables(
            position_ids, self.config.head_dim, self.config.rope_parameters["rope_theta"]
        )
        # Decided here, outside the block: a compiled block keeps one graph for every length.
        mode = attention_mode(visible, new, cache, x.device)
        for layer in self.layers:
            x = layer(x, rope, visible, mode, cache)
        return self.norm(x)


class LMHead(nn.Linear):
    """Hidden states to logits; adapted heads offer the same :meth:`effective_weight`."""

    def effective_weight(self) -> torch.Tensor:
        """(V, D)."""
        return self.weight


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: :class:`MiniMindModel` under a head tied to the embedding."""

    config_class = LlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LlamaConfig | Qwen3Config):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # N(0, initializer_range), norms at 1, head tied to the embedding

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits, or with ``labels`` the loss alone.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), 0 on padding; not needed for padding on the right.
            labels: (B, T) int64, as ``input_ids``, ``-100`` where no loss falls; shifted here.
                Logits are then computed for the labeled positions only and not returned.
            logits_to_keep: logits of the last so many positions; 0 keeps all.
            num_items_in_batch: divides the summed loss, in nats; by default the labels counted
                here. Pass the optimizer step's total to average over tokens across micro-batches.
        """
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden = self.model(input_ids, attention_mask, position_ids, cache)
        if labels is None:
            logits = self.lm_head(hidden[:, -logits_to_keep:])
            return CausalLMOutputWithPast(logits=logits, cache=cache)
        targets = labels[:, 1:]
        labeled = targets != IGNORE_INDEX
        loss = self.summed_loss(hidden[:, :-1][labeled], targets[labeled])
        items = labeled.sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=loss / items, cache=cache)

    def summed_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy in nats, float32, of (N, D) states and (N,) targets."""
        if torch.is_grad_enabled():
            return LinearCrossEntropy.apply(hidden, self.lm_head.effective_weight(), targets)
        total = hidden.new_zeros((), dtype=torch.float32)
        for states, ids in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            total = total + F.cross_entropy(self.lm_head(states).float(), ids, reduction="sum")
        return total


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of ``states @ weight.T``, a chunk of positions at a time.

    The gradient of the logits, softmax minus one-hot, is known as soon as the logits are; taking
    both while a chunk is at hand means that the (N, V) logits never exist and each is read once.
    A frozen weight's gradient is not computed. Matrix products run in autocast's type if it is on,
    sums and exponentials in float32.
    """

    @staticmethod
    def forward(
        ctx, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        device = states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else states.dtype
        matrix = weight.detach().to(dtype)
        states_grad = torch.empty_like(states, dtype=dtype)
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(targets), LOSS_CHUNK):
            span = slice(start, start + LOSS_CHUNK)
            chunk, ids = states[span].to(dtype), targets[span, None]
            logits = chunk @ matrix.T
            error = logits.softmax(dim=-1, dtype=torch.float32)
            # The log of summed exponentials: the highest logit less the log of its probability.
            log_sum = logits.amax(-1, keepdim=True) - error.amax(-1, keepdim=True).log()
            total += (log_sum - logits.gather(1, ids)).sum()
            error.scatter_add_(1, ids, error.new_full(ids.shape, -1.0))
            error = error.to(dtype)
            states_grad[span] = error @ matrix
            if weight_grad is not None:
                weight_grad += error.T @ chunk
        ctx.save_for_backward(states_grad, weight_grad)
        ctx.states_dtype, ctx.weight_dtype = states.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states_grad, weight_grad = ctx.saved_tensors
        if weight_grad is not None:
            weight_grad = (weight_grad * grad).to(ctx.weight_dtype)
        return (states_grad.to(ctx.states_dtype) * grad), weight_grad, None


# ---------------------------------------------------------------- checkpoints


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All and trainable parameters, the tied head counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def weights_fingerprint(model: nn.Module) -> str:
    """Hex SHA-256 of shape, names and float32 values: what an adapter's base is known by."""
    config = model.config
    facts = [config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps]
    facts += [config.rope_parameters["rope_theta"], config.model_type]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def save_model(model: MiniMindForCausalLM, tokenizer_dir: Path, folder: Path) -> None:
    """Writes weights (float32), config and tokenizer in transformers' layout.

    Each file is written aside and moved into place, so a reader never sees half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    save_tensors(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config = model.config.to_dict() | {"dtype": "float32"}
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = GenerationConfig(**{name: config[name] for name in ids})
    write_text(folder / "generation_config.json", generation.to_json_string())
    for name in (*TOKENIZER_FILES, TEMPLATE_FILE):
        if (tokenizer_dir / name).is_file():
            write_text(folder / name, (tokenizer_dir / name).read_text(encoding="utf-8"))


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file aside and moves it into place.

    Raises:
        OSError: the disk is full, for instance; what was at ``path`` is still there.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, aside, metadata=metadata)
    except SafetensorError as error:  # in place of the OSError that caused it
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error})") from error
    move_into_place(aside, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file aside and moves it into place."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
    except OSError:  # half of it may have been written
        aside.unlink(missing_ok=True)
        raise
    move_into_place(aside, path)


def move_into_place(aside: Path, path: Path) -> None:
    """Renames a written file, once its content is on the disk: else a crash may leave it empty."""
    sync(aside)
    os.replace(aside, path)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own_tokenizer(weights: Path) -> Path:
    """The folder of the tokenizer that weights were saved with.

    Raises:
        CheckpointError: they are a .pth, which holds none. MiniMind's has as many tokens as this
            repository's, so that no check of sizes would tell one from the other.
    """
    if not weights.is_dir():
        raise CheckpointError(
            f"{weights}: holds no tokenizer; name the folder of the one that it was trained with "
            "as --tokenizer_path"
        )
    return weights


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, model: MiniMindForCausalLM, weights: Path
) -> None:
    """Refuses a tokenizer with more tokens than the model, loaded from `weights`, has rows.

    Raises:
        CheckpointError: names the weights.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{weights}: {model.config.vocab_size} tokens, but the tokenizer has {len(tokenizer)}; "
            "give the model's own as --tokenizer_path"
        )


def load_tokenizer(path: str | Path = TOKENIZER_DIR) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, padding on the right.

    Built from its two files alone: neither code that a ``tokenizer_config.json`` names nor the hub
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


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointError: it is broken, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; nested without end
        raise CheckpointError(f"{path}: broken JSON ({error}); mend or copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def read_config(folder: Path) -> LlamaConfig | Qwen3Config:
    """The config of a saved folder, refused unless this file computes what it describes.

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
    """Whether ``value`` is a whole number; Python counts True and False among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: object) -> bool:
    """Whether ``value`` is a number above 0 that float32 holds; NaN is not."""
    return isinstance(value, int | float) and 0 < value < 1e38


def load_model(path: str | Path, num_attention_heads: int = 8) -> MiniMindForCausalLM:
    """A model in float32 from a saved folder or from a MiniMind ``.pth`` file, loaded strictly.

    Args:
        num_attention_heads: for a ``.pth`` only, whose tensors show every size but this one.

    Raises:
        CheckpointError: a file is missing, broken, or does not fit the config.
    """
    path = Path(path)
    if path.suffix == ".pth":
        tensors = read_pth(path)
        config = config_of_tensors(tensors, path, num_attention_heads)
    else:
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder; train it first or mend the path")
        config = read_config(path)
        tensors = read_safetensors(path / WEIGHTS_FILE)
    with torch.device("meta"):  # shapes without memory: a config that does not fit allocates none
        expected = MiniMindForCausalLM(config)
    tensors = fitting_tensors(expected, tensors, path)
    model = MiniMindForCausalLM(config)
    fill_weights(model, tensors)
    return model


def fill_weights(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copies tensors that :func:`fitting_tensors` let pass into the model, whatever their type."""
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
            raise CheckpointError(f"{path}: no matrix {name}; not a dense MiniMind checkpoint")
    vocab_size, hidden_size = tensors[needed[0]].shape
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    head_dim = hidden_size // num_attention_heads
    if hidden_size % num_attention_heads or not head_dim or tensors[needed[1]].shape[0] % head_dim:
        raise CheckpointError(
            f"{path}: hidden size {hidden_size} does not fit {num_attention_heads} heads; "
            "set --num_attention_heads"
        )
    try:
        return minimind_config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=len(layers),
            num_attention_heads=num_attention_heads,
            num_key_value_heads=tensors[needed[1]].shape[0] // head_dim,
            intermediate_size=tensors[needed[2]].shape[0],
            qk_norm="model.layers.0.self_attn.q_norm.weight" in tensors,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; set --num_attention_heads") from error


def fitting_tensors(
    model: nn.Module, tensors: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """``tensors`` without a tied head, if every name and shape is the model's.

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
