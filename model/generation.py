"""Generation: a model's weights laid out to be read once a token, and a loop that does no more.

transformers' `generate` works with the model too, and gives the same greedy answers in float32
(tests/test_generation.py). Here a token costs little beside reading the weights: q, k and v are one
matrix, gate and up another, a CPU gets them packed for oneDNN, an adapter is merged into its
weight, the cache grows by blocks, no key head is copied, what all prompts begin with is read once,
prompts are read with padding to the longest of some neighbors only, and answers that ended leave
the batch.

Shapes as in model_minimind.py: B batch, T new tokens, S tokens seen, D hidden size, H heads, K
key/value heads, d head dimension, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.model_lora import LoRALinear, TokenRowsEmbedding
from model.model_minimind import MiniMindForCausalLM, rope_tables

# Prompt tokens that go through the model at once: their activations stay in a CPU's cache, and the
# attention scores of a long prompt in its memory.
GROUP_TOKENS = 512
# The batch is made smaller, which copies the cache, when so many of its answers are still running.
RUNNING_SHARE = 0.75
# Tokens among which a nucleus is looked for first: finding these costs a tenth of sorting all.
LIKELY_TOKENS = 256
CACHE_BLOCK = 32  # tokens by which the cache grows
# Prompts from which plain products take a CPU less time for a token's attention than SDPA does.
# SDPA's and theirs at 1, 8 and 32 prompts, 2 key heads and 80 tokens, in microseconds: 23 and 28,
# 91 and 72, 440 and 324 in float32; 15 and 40, 50 and 55, 308 and 235 in bfloat16.
PLAIN_FROM = 8
# Rows that oneDNN lays packed matrices out for; a layout for one row is slower at all others.
PACKED_FOR = 32


@dataclass
class Decoding:
    """How the next token is chosen; the most likely one unless `do_sample`."""

    max_new_tokens: int
    eos_token_id: int | None = None  # ends an answer; None: nothing does
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0


def plain_weight(module: nn.Module) -> torch.Tensor:
    """What a linear or an embedding multiplies by, (out, in) or (V, D), its adapter merged."""
    if isinstance(module, LoRALinear):
        return module.merged_weight()
    if isinstance(module, TokenRowsEmbedding):
        return module.effective_weight().detach()
    return module.weight.detach()


class Matrix:
    """The linears side by side as one, applied to (N, in).

    On a CPU they are packed once for oneDNN, as `torch.compile` packs frozen linears whose batch
    varies. At the shapes of a 26M model 1 to 100 rows then take .43 to .69 of the time of
    `F.linear` in float32, and .55 to .87 in bfloat16.
    """

    def __init__(self, *linears: nn.Module):
        self.weight = torch.cat([plain_weight(linear) for linear in linears])
        self.is_packed = can_pack(self.weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in) -> (N, out)."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)

    def add_to(self, rest: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`rest`, (N, out), and what `times` gives of `x`."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, rest, self.weight, None, "add")
        return rest + F.linear(x, self.weight)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this CPU has fast packed products of this type.

    Where they are those of ARM's Compute Library, torch itself does not pack so.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled or torch.ops.mkldnn._is_mkldnn_acl_supported():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class Layer:
    """The weights of one block."""

    def __init__(self, block: nn.Module):
        attention, mlp = block.self_attn, block.mlp
        self.qkv = Matrix(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Matrix(attention.o_proj)
        self.gate_up = Matrix(mlp.gate_proj, mlp.up_proj)
        self.down = Matrix(mlp.down_proj)
        self.input_norm = block.input_layernorm
        self.mlp_norm = block.post_attention_layernorm
        self.head_norms = (attention.q_norm, attention.k_norm) if attention.qk_norm else None


class Decoder:
    """A copy of a model's weights that computes the next token's logits."""

    def __init__(self, model: MiniMindForCausalLM):
        self.config = config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.embedding = plain_weight(model.model.embed_tokens)
        self.layers = [Layer(block) for block in model.model.layers]
        self.norm = model.model.norm
        self.head = Matrix(model.lm_head)
        self.has_fast_products = can_pack(self.embedding)

    def attends_plainly(self, batch: int) -> bool:
        """Whether new tokens of so many prompts get their attention from plain products."""
        return self.has_fast_products and batch >= PLAIN_FROM

    def new_cache(self, batch: int, length: int) -> list[torch.Tensor]:
        """Room for the keys and values of every layer: (2, B, K, length, d) each."""
        # Zeros, not what was in memory: a masked value still gets multiplied by 0.
        shape = (2, batch, self.kv_heads, length, self.head_dim)
        return [self.embedding.new_zeros(shape) for _ in self.layers]

    def rope(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of the first positions, (length, H + 2K, d): of queries, keys and values at once.

        Queries are scaled by them, too, and values are left as they are. The sine's first half is
        negative, see `turned`.
        """
        positions = torch.arange(length, device=self.embedding.device)[None]
        theta = self.config.rope_parameters["rope_theta"]
        cos, sin = (t[0, 0, :, None] for t in rope_tables(positions, self.head_dim, theta))
        sin[..., : self.head_dim // 2].neg_()
        factors = [self.head_dim**-0.5] * self.heads + [1.0] * self.kv_heads + [0.0] * self.kv_heads
        factors = cos.new_tensor(factors)[:, None]
        cos, sin = cos * factors, sin * factors
        cos[:, -self.kv_heads :] = 1
        return cos, sin

    def bias(self, visible: torch.Tensor) -> torch.Tensor:
        """What is added to scores where keys are not `visible`: minus infinity."""
        return self.embedding.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)

    def logits(
        self,
        ids: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: list[torch.Tensor],
        seen: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The last position's logits, (B, V) float32; fills T places of `cache` up to `seen`.

        Args:
            ids: (B, T).
            rope: rows of `rope` for these tokens, (B, T, H + 2K, d).
            cache: of every layer (2, B, K, room, d).
            bias: (B, 1, T, room) or up to `seen`, see `bias`, added to the attention
                scores; minus infinity from `seen` on. None, for T = 1: all that is seen is
                visible.
        """
        batch, new = ids.shape
        shape = (batch, new, self.heads + 2 * self.kv_heads, self.head_dim)
        is_plain = new == 1 and self.attends_plainly(batch)
        attend = attend_plainly if is_plain else attend_by_sdpa
        # Bfloat16 products would copy a part of the cache, and prepare themselves anew for every
        # length; they take all of it.
        is_whole = is_plain and self.embedding.dtype == torch.bfloat16
        end = cache[0].shape[3] if is_whole else seen
        bias = None if bias is None else self.stacked_bias(bias[..., :end], is_plain)
        x = F.embedding(ids.view(-1), self.embedding)  # (B * T, D)
        for layer, seen_by in zip(self.layers, cache, strict=True):
            qkv = layer.qkv.times(layer.input_norm(x)).view(shape)
            q = self.turn_and_store(layer, qkv, rope, seen_by[..., seen - new : seen, :])
            if layer is self.layers[-1] and new > 1:
                # Nothing reads the other positions' output: their keys and values are stored.
                q, bias, x = last_positions(q, bias, x, new)
                new = 1
            keys, values = seen_by[..., :end, :].unbind()
            x = layer.out.add_to(x, unstacked(attend(q, keys, values, bias), new))
            gate, up = layer.gate_up.times(layer.mlp_norm(x)).chunk(2, dim=-1)
            x = layer.down.add_to(x, F.silu(gate) * up)
        return self.head.times(self.norm(x)).float()

    def turn_and_store(
        self,
        layer: Layer,
        qkv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
    ) -> torch.Tensor:
        """(B, T, H + 2K, d) to queries (B, K, groups * T, d); fills `places` (2, B, K, T, d).

        Queries that share a key head are stacked along T, so that no head is copied.
        """
        heads, kv_heads = self.heads, self.kv_heads
        if layer.head_norms is not None:
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
            q_norm, k_norm = layer.head_norms
            qkv = torch.cat((q_norm(q), k_norm(k), v), dim=2)
        q, kv = turned(qkv, *rope).split((heads, 2 * kv_heads), dim=2)
        batch, new, _, size = qkv.shape
        places.copy_(kv.view(batch, new, 2, kv_heads, size).permute(2, 0, 3, 1, 4))
        q = q.view(batch, new, kv_heads, -1, size).permute(0, 2, 3, 1, 4)
        return q.reshape(batch, kv_heads, -1, size)

    def stacked_bias(self, bias: torch.Tensor, is_plain: bool) -> torch.Tensor:
        """`bias` for stacked queries: (B, 1, groups * T, S), or (B * K, 1, S) of one token."""
        if is_plain:
            return bias.expand(-1, self.kv_heads, -1, -1).flatten(0, 1)
        if bias.shape[2] == 1:
            return bias
        return bias.repeat(1, 1, self.heads // self.kv_heads, 1)


def attend_by_sdpa(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Attention of scaled queries, (B, K, groups * T, d), to (B, K, S, d)."""
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=1.0)


def attend_plainly(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The same with plain products; the bias is (B * K, 1, S)."""
    scores = torch.baddbmm(bias, q.flatten(0, 1), keys.flatten(0, 1).mT)
    return torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)).view_as(q)


def last_positions(
    q: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, new: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of T = `new` positions the last one's: (B, K, groups, d), (B, 1, 1, S) and (B, D).

    Args:
        q: (B, K, groups * T, d).
        bias: (B, 1, groups * T, S).
        x: (B * T, D).
    """
    return q[:, :, new - 1 :: new], bias[:, :, -1:], x[new - 1 :: new]


def unstacked(out: torch.Tensor, new: int) -> torch.Tensor:
    """Attention's (B, K, groups * T, d), `new` being T, as (B * T, H * d)."""
    batch, kv_heads, stacked, size = out.shape
    out = out.view(batch, kv_heads, -1, new, size).permute(0, 3, 1, 2, 4)
    return out.reshape(batch * new, kv_heads * (stacked // new) * size)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`model.model_minimind.rotate` with the sign in the sine: three operations a layer."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


# ---------------------------------------------------------------- batches


def shared_length(prompts: list[list[int]]) -> int:
    """How many tokens several prompts begin with; at least one of each is left to be read."""
    if len(prompts) == 1:
        return 0
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def groups_of(prompts: list[list[int]], shared: int) -> list[slice]:
    """Neighbors of at most `GROUP_TOKENS` tokens to be read, padding included, or one prompt."""
    groups, first, longest = [], 0, len(prompts[0])
    for row, ids in enumerate(prompts):
        longest = max(longest, len(ids))
        if row > first and (row + 1 - first) * (longest - shared) > GROUP_TOKENS:
            groups.append(slice(first, row))
            first, longest = row, len(ids)
    return [*groups, slice(first, len(prompts))]


def read_prompts(
    decoder: Decoder,
    prompts: list[list[int]],
    shared: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    cache: list[torch.Tensor],
) -> torch.Tensor:
    """Logits (B, V) after each prompt; fills `cache`, of every layer (2, B, K, S, d).

    First what all prompts begin with, `shared` tokens, then padding, then the rest of each, so
    that all end at the same place.
    """
    if shared:
        common = decoder.new_cache(1, shared)
        read_group(decoder, [prompts[0][:shared]], 0, rope, common)
        for layer, places in zip(cache, common, strict=True):
            layer[..., :shared, :] = places
    found = [
        read_group(decoder, prompts[rows], shared, rope, [layer[:, rows] for layer in cache])
        for rows in groups_of(prompts, shared)
    ]
    return torch.cat(found)


def read_group(
    decoder: Decoder,
    prompts: list[list[int]],
    shared: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    cache: list[torch.Tensor],
) -> torch.Tensor:
    """Logits (B, V) after each prompt, whose first `shared` tokens are in `cache` already."""
    width, device = cache[0].shape[3], cache[0].device
    new = max(map(len, prompts)) - shared
    padding = torch.tensor([width - len(ids) for ids in prompts], device=device)[:, None]
    rest = [[0] * (new + shared - len(ids)) + ids[shared:] for ids in prompts]
    rest = torch.tensor(rest, device=device)
    for piece in rest.split(GROUP_TOKENS, dim=1):  # several of one long prompt only
        new -= piece.shape[1]
        places = torch.arange(width - new, device=device)
        queries = places[-piece.shape[1] :]
        # A padding query sees itself: a row without any key would be NaN.
        own = places == queries[:, None]
        visible = is_real(places, padding, shared)[:, None] & (places <= queries[:, None]) | own
        positions = (queries - padding).clamp(min=0)
        turning = (rope[0][positions], rope[1][positions])
        bias = decoder.bias(visible[:, None])
        logits = decoder.logits(piece, turning, cache, len(places), bias)
    return logits


def is_real(places: torch.Tensor, padding: torch.Tensor, shared: int) -> torch.Tensor:
    """Which of (S,) places hold no padding, (B, S); `padding` is (B, 1)."""
    return (places < shared) | (places >= shared + padding)


# ---------------------------------------------------------------- choosing a token


def choose(logits: torch.Tensor, decoding: Decoding, draws: torch.Tensor) -> torch.Tensor:
    """The next tokens, (B,) int64, of (B, V) logits.

    Args:
        draws: (B,) uniform numbers in [0, 1). A token is the place where the cumulated
            probabilities reach its row's draw, so an answer depends on its own draws only.
    """
    if not decoding.do_sample:
        return logits.argmax(dim=-1)
    probabilities = (logits / decoding.temperature).softmax(dim=-1)
    if decoding.top_p < 1:
        probabilities = nucleus(probabilities, decoding.top_p)
    cumulated = probabilities.cumsum(dim=-1)
    reached = (draws[:, None] * cumulated[:, -1:]).contiguous()
    # To the right of equal values: a token of probability 0 is never chosen.
    tokens = torch.searchsorted(cumulated, reached, right=True)[:, 0]
    # Rounding may bring the product up to the sum itself; then the last possible token is meant.
    last = (cumulated < cumulated[:, -1:]).sum(dim=-1)
    return tokens.minimum(last)


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The most likely tokens that together reach `top_p`; 0 elsewhere, not renormalized.

    Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751, eq. 3).
    """
    likely = probabilities.topk(min(LIKELY_TOKENS, probabilities.shape[-1])).values
    floor = smallest_kept(likely, top_p)
    wide = likely.sum(dim=-1) < top_p
    if wide.any():
        floor[wide] = smallest_kept(probabilities[wide].sort(descending=True).values, top_p)
    return probabilities.where(probabilities >= floor, 0.0)


def smallest_kept(descending: torch.Tensor, top_p: float) -> torch.Tensor:
    """The least probability of each row's nucleus, (B, 1): where those before fall short of it."""
    before = descending.cumsum(dim=-1) - descending
    kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return descending.gather(-1, kept - 1)


@torch.inference_mode()
def continue_prompts(
    decoder: Decoder, prompts: list[list[int]], decoding: Decoding, draws: torch.Tensor
) -> Iterator[list[tuple[int, int]]]:
    """Yields, step by step, (row, token) for each prompt whose answer has not ended.

    Args:
        prompts: token ids; those of similar length are best neighbors.
        draws: (B, max_new_tokens) uniform numbers, see `choose`.
    """
    width, shared = max(map(len, prompts)), shared_length(prompts)
    device = decoder.embedding.device
    draws, rows = draws.to(device), torch.arange(len(prompts), device=device)
    size = width + CACHE_BLOCK
    cache = decoder.new_cache(len(prompts), size)
    rope = decoder.rope(width + decoding.max_new_tokens)
    read = [layer[..., :width, :] for layer in cache]
    logits = read_prompts(decoder, prompts, shared, rope, read)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    padding = (width - lengths)[:, None]
    places = torch.arange(size, device=device)
    visible = is_real(places, padding, shared) & (places < width)
    bias = decoder.bias(visible[:, None, None])  # (B, 1, 1, size)
    is_masked = bool(padding.any()) or decoder.attends_plainly(len(prompts))
    running = torch.ones_like(rows, dtype=torch.bool)
    for step in range(decoding.max_new_tokens):
        tokens = choose(logits, decoding, draws[rows, step])
        yield list(zip(rows[running].tolist(), tokens[running].tolist(), strict=True))
        if decoding.eos_token_id is not None:
            running = running & (tokens != decoding.eos_token_id)
        left = int(running.sum())
        if left == 0 or step + 1 == decoding.max_new_tokens:
            return
        if left <= RUNNING_SHARE * len(rows):
            cache, bias = [layer[:, running] for layer in cache], bias[running]
            rows, lengths, tokens = rows[running], lengths[running], tokens[running]
            running = running[running]
        positions, seen = (lengths + step)[:, None], width + step + 1
        if seen > size:
            size += CACHE_BLOCK
            for index, layer in enumerate(cache):  # not all at once, which would take twice as much
                cache[index] = F.pad(layer, (0, 0, 0, CACHE_BLOCK))
            bias = F.pad(bias, (0, CACHE_BLOCK), value=-torch.inf)
        bias[..., seen - 1] = 0
        turning = (rope[0][positions], rope[1][positions])
        logits = decoder.logits(tokens[:, None], turning, cache, seen, bias if is_masked else None)


def generate(
    decoder: Decoder, prompts: list[list[int]], decoding: Decoding, draws: torch.Tensor
) -> list[list[int]]:
    """New token ids for each prompt; an end token that was produced is last."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in continue_prompts(decoder, prompts, decoding, draws):
        for row, token in step:
            answers[row].append(token)
    return answers
