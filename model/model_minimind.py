"""A MiniMind-style causal LM, written by hand: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Parameter names and arithmetic are those of transformers' Llama (of Qwen3 with `qk_norm`), and a
saved folder says so in its `config.json`: `AutoModelForCausalLM.from_pretrained(folder)` gives
the same logits without this file.

Shapes in the comments: B batch, T new tokens, S tokens seen (cached and new), D hidden size,
d head dimension (D / attention heads, if the config names none), V vocabulary.
"""

import hashlib
import json
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.cli import UserError

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"
IGNORE_INDEX = -100  # the label of a position without a loss
DEFAULT_SHAPE = {  # MiniMind2-small's: 25,829,888 parameters (24,634,880 with 4,066 tokens)
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1408,
    "qk_norm": False,
}

Config = LlamaConfig | Qwen3Config
Rope = tuple[Tensor, Tensor]  # cos and sin, see `rope_tables`


def minimind_config(**values: float) -> Config:
    """Describe a model by transformers' config; `DEFAULT_SHAPE` holds where `values` say nothing.

    Heads that do not divide the hidden size or each other are refused.
    """
    shape = DEFAULT_SHAPE | values
    qk_norm = shape.pop("qk_norm")
    size = shape["hidden_size"]
    heads = shape["num_attention_heads"]
    key_heads = shape["num_key_value_heads"]
    if size % (2 * heads) != 0 or heads % key_heads != 0:
        rule = f"2 * num_attention_heads ({heads}), and these of num_key_value_heads ({key_heads})"
        raise UserError(f"hidden_size {size}: must be a multiple of {rule}")
    defaults = {"vocab_size": 6400, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
    config_class = Qwen3Config if qk_norm else LlamaConfig
    return config_class(
        head_dim=size // heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
        **(defaults | shape),
    )


def rope_tables(position_ids: Tensor, head_dim: int, theta: float) -> Rope:
    """Compute cos and sin of the rotary embedding (Su et al. 2021, arXiv 2104.09864, eq. 15).

    (B or 1, T) int64 -> two (B or 1, 1, T, d) float32; the two halves of the last axis are equal.
    Computed at each forward pass: a buffer would be rounded when the model is cast to half.
    """
    powers = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    inverse_frequency = 1.0 / theta ** (powers / head_dim)
    angles = position_ids[:, None, :, None].float() * inverse_frequency
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate (B, heads, T, d) by the tables of `rope_tables`, in the layout of Llama."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def make_mask(attention_mask: Tensor, new: int) -> Tensor:
    """Say which keys each of the last `new` tokens sees: (B or 1, S) -> (B or 1, 1, T, S).

    A query sees the real tokens up to its own, and itself even if it is padding. A row without any
    key is undefined: some kernels return 0 there, a plain softmax gives NaN.
    """
    keys = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    queries = keys[-new:, None]
    is_real = attention_mask[:, None, None, :].bool()
    is_itself = keys == queries
    return (keys <= queries) & (is_real | is_itself)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: Config, layer_index: int) -> None:
        super().__init__()
        size = config.hidden_size
        heads = config.num_attention_heads
        key_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.layer_index = layer_index
        self.grouped = heads != key_heads
        self.q_proj = nn.Linear(size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, key_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, key_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, size, bias=False)
        make_norm = nn.RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm = make_norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = make_norm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """(B, T, D) -> (B, T, D); adds this layer's keys and values to `cache`.

        `mask` is (B or 1, 1, T, S), or None where every query sees all keys up to its own.
        """
        batch, new, _ = x.shape
        q = self.q_proj(x).view(batch, new, -1, self.head_dim)
        k = self.k_proj(x).view(batch, new, -1, self.head_dim)
        v = self.v_proj(x).view(batch, new, -1, self.head_dim).transpose(1, 2)
        q = rotate(self.q_norm(q).transpose(1, 2), rope)
        k = rotate(self.k_norm(k).transpose(1, 2), rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        out = self.attend(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, new, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Mix values by queries and keys: (B, heads, T, d), in the type of `q`.

        On a CPU in float32, also under autocast: its kernel is slower in bfloat16.
        """
        with torch.autocast("cpu", enabled=False):
            parts = [part.float() if part.is_cpu else part for part in (q, k, v)]
            is_causal = mask is None
            out = F.scaled_dot_product_attention(
                *parts, attn_mask=mask, is_causal=is_causal, enable_gqa=self.grouped
            )
        return out.to(q.dtype)


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One transformer layer; RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) before each part."""

    def __init__(self, config: Config, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """(B, T, D) -> (B, T, D), as `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class MiniMindModel(nn.Module):
    """Embedding and blocks, token ids to hidden states, and the weights of the final norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, T) int64 -> (B, T, D); `attention_mask` is (B, S), for batches padded on the left.

        The final norm is left to `compute_logits`, which needs few of the positions.
        """
        device = input_ids.device
        new = input_ids.shape[1]
        cached = cache.get_seq_length() if cache is not None else 0
        seen = cached + new
        # Without one, a faster kernel computes the plain causal case.
        needs_mask = attention_mask is not None or seen > new
        if attention_mask is None:
            attention_mask = torch.ones(1, seen, dtype=torch.bool, device=device)
        if position_ids is None:
            # Padding on the left does not count: a prompt's first token is at 0.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        mask = make_mask(attention_mask, new) if needs_mask else None
        theta = self.config.rope_parameters["rope_theta"]
        rope = rope_tables(position_ids, self.config.head_dim, theta)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, rope, mask, cache)
        return x


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: `MiniMindModel` under a head tied to the embedding."""

    config_class = LlamaConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    # transformers then makes both names one parameter, and saves it once.
    _tied_weights_keys = {HEAD_WEIGHT: EMBEDDING_WEIGHT}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # N(0, initializer_range), norms at 1, head tied to the embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Compute logits, or with `labels` the loss alone.

        Args:
            attention_mask: (B, S), 0 on padding; not needed for padding on the right.
            labels: (B, T) int64, as `input_ids`, `IGNORE_INDEX` where no loss falls; shifted here.
            label_positions: (N,) positions in the flattened `input_ids` that predict a label, so
                that only their logits are computed; by default all positions.
            logits_to_keep: logits of the last so many positions; 0 keeps all.
            num_items_in_batch: divides the summed loss, in nats; by default the labels counted
                here. Pass the optimizer step's total to average over tokens across micro-batches.
        """
        if labels is not None:
            nats = self.sum_nats(input_ids, labels, label_positions, attention_mask, position_ids)
            items = num_items_in_batch
            if items is None:
                items = (labels[:, 1:] != IGNORE_INDEX).sum()
            return CausalLMOutputWithPast(loss=nats / items)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden = self.model(input_ids, attention_mask, position_ids, cache)
        logits = self.compute_logits(hidden[:, -logits_to_keep:])  # -0 is 0: all of them
        return CausalLMOutputWithPast(logits=logits, cache=cache)

    def sum_nats(
        self,
        input_ids: Tensor,
        labels: Tensor,
        label_positions: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Sum the loss over labels, without a wait for the device; see `forward`."""
        states = self.model(input_ids, attention_mask, position_ids).flatten(0, 1)
        # Each position predicts the next token; a row's last one predicts nothing.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        if label_positions is not None:
            states = states.index_select(0, label_positions)
            targets = targets.index_select(0, label_positions)
        return self.sum_target_nats(states, targets)

    def compute_logits(self, states: Tensor) -> Tensor:
        """(..., D) states of the last block -> (..., V) logits of the next tokens."""
        return self.lm_head(self.model.norm(states))

    def sum_target_nats(self, states: Tensor, targets: Tensor) -> Tensor:
        """Sum the loss of (N, D) states of the last block and (N,) int64 tokens that follow."""
        # Exponentials of half precision would lose digits; autocast knows, other callers do not.
        logits = self.compute_logits(states).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def list_weights(model: MiniMindForCausalLM) -> dict[str, Tensor]:
    """List the tensors of a weights file by name: the whole state, a tied head once."""
    tensors = model.state_dict()  # has both names of a tied matrix
    if model.config.tie_word_embeddings:
        del tensors[HEAD_WEIGHT]
    return tensors


def is_equal(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors by value; the NaN of a diverged model count as equal."""
    if a.shape != b.shape:
        return False
    return torch.allclose(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def fill_model(model: MiniMindForCausalLM, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors of a file into the model, all of them and no others, or refuse the file."""
    if model.config.tie_word_embeddings and EMBEDDING_WEIGHT in tensors:
        embedding = tensors[EMBEDDING_WEIGHT]
        if HEAD_WEIGHT in tensors and not is_equal(tensors[HEAD_WEIGHT], embedding):
            remedy = "set tie_word_embeddings to false in config.json"
            raise UserError(f"{path}: {HEAD_WEIGHT} differs from the embedding; {remedy}")
        # A strict load asks for both names.
        tensors = tensors | {HEAD_WEIGHT: embedding}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # names all of them
        problem = shorten(str(error), width=300, placeholder=" ...")
        raise UserError(f"{path}: weights do not fit: {problem}") from error


def weights_fingerprint(model: MiniMindForCausalLM) -> str:
    """Hash a plain model's shape, names and float32 values: an adapter's base is known by it."""
    config = model.config
    facts = [
        config.num_attention_heads,
        config.num_key_value_heads,
        config.rms_norm_eps,
        config.rope_parameters["rope_theta"],
        config.model_type,
    ]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(list_weights(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()
