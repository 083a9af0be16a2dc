"""A MiniMind-style causal LM, written by hand: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Parameter names and arithmetic are those of transformers' Llama (of Qwen3 with `qk_norm`), and a
saved folder says so in its `config.json`: `AutoModelForCausalLM.from_pretrained(folder)` gives
the same logits without this file.

Shapes in the comments: B batch, T new tokens, S tokens seen (cached and new), D hidden size,
H attention heads, K key/value heads, d head dimension (D / H if the config names none), V
vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.attention import LONGEST, blockwise_attention

IGNORE_INDEX = -100  # a label on which no loss falls, as in torch's cross_entropy
# Labeled positions whose logits exist at once: LOSS_CHUNK * V floats, which stay in a CPU's cache.
LOSS_CHUNK = 512
# A study of small models: more than this is a slip or a hostile config, refused before it is
# allocated (8 GB of float32).
MAX_PARAMETERS = 2 * 10**9
MAX_LAYERS = 512


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
        ValueError: heads that do not divide the hidden size, or what `check_shape` refuses.
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
    """Rotates (B, heads, T, d) by the tables of `rope_tables`, in the layout of Llama."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def visible_positions(
    attention_mask: torch.Tensor | None, new: int, seen: int, device: torch.device
) -> torch.Tensor | None:
    """Which of `seen` keys each of `new` queries may attend to.

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
        """(B, T, D) -> (B, T, D); adds this layer's keys and values to `cache`."""
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
    """`masked` where `visible` or a single query says it all, else the faster causal way."""
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
        """(B, T) int64 -> (B, T, D); `attention_mask` is (B, S), for padded batches."""
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
    """Hidden states to logits; adapted heads offer the same `effective_weight`."""

    def effective_weight(self) -> torch.Tensor:
        """(V, D)."""
        return self.weight


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: `MiniMindModel` under a head tied to the embedding."""

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
        """Logits, or with `labels` the loss alone.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), 0 on padding; not needed for padding on the right.
            labels: (B, T) int64, as `input_ids`, `-100` where no loss falls; shifted here.
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
    """Summed cross-entropy of `states @ weight.T`, a chunk of positions at a time.

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


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All and trainable parameters, the tied head counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
