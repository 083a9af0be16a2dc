"""Generation: a model's weights laid out to be read once a token, and a loop that does no more.

transformers' ``generate`` works with the model too, and gives the same greedy answers in float32
(tests/test_generation.py). Here a token costs little beside reading the weights: q, k and v are one
matrix, gate and up another, a CPU gets them packed for oneDNN, an adapter is merged into its
weight, the cache is allocated once, no key head is copied, what all prompts begin with is read
once, prompts are padded to the longest of some neighbors only, and answers that ended leave the
batch.

Shapes as in model_minimind.py: B batch, T new tokens, S tokens seen, D hidden size, H heads, K
key/value heads, d head dimension, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from model.model_lora import LoRALinear, TokenRowsEmbedding
from model.model_minimind import MiniMindForCausalLM, rope_tables

# Prompt tokens that go through the model at once: their activations stay in a CPU's cache.
GROUP_TOKENS = 512
# The batch is made smaller, which copies the cache, when so many of its answers are still running.
RUNNING_SHARE = 0.75
# Tokens among which a nucleus is looked for first: finding these costs a tenth of sorting all.
LIKELY_TOKENS = 256
# Rows that oneDNN lays packed matrices out for; a layout for one row is slower at all others.
PACKED_FOR = 32


@dataclass
class Decoding:
    """How the next token is chosen; the most likely one unless ``do_sample``."""

    max_new_tokens: int
    eos_token_id: int | None = None  # ends an answer; None: nothing does
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0


def effective_weight(module: nn.Module) -> torch.Tensor:
    """What a linear or an embedding multiplies by, (out, in) or (V, D), its adapter merged.

    Added in float32 and cast once, as :func:`model.model_lora.merge_lora` does it.
    """
    if isinstance(module, LoRALinear) and module.unmerged_weight is None:
        merged = module.weight.detach().float() + module.delta().float()
        return merged.to(module.weight.dtype)
    if isinstance(module, TokenRowsEmbedding):
        return module.effective_weight().detach()
    return module.weight.detach()


class Matrix:
    """The linears side by side as one, applied to (N, in).

    On a CPU they are packed once for oneDNN, as ``torch.compile`` packs frozen linears whose batch
    varies. At the shapes of a 26M model 1 to 100 rows then take .43 to .69 of the time of
    ``F.linear`` in float32, and .55 to .87 in bfloat16.
    """

    def __init__(self, *linears: nn.Module):
        self.weight = torch.cat([effective_weight(linear) for linear in linears])
        self.is_packed = can_pack(self.weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in) -> (N, out)."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)

    def add_to(self, rest: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``rest``, (N, out), and what :meth:`times` gives of ``x``."""
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
        self.embedding = effective_weight(model.model.embed_tokens)
        self.layers = [Layer(block) for block in model.model.layers]
        self.norm = model.model.norm
        self.head = Matrix(model.lm_head)

    def new_cache(self, batch: int, length: int) -> torch.Tensor:
        """Room for the keys and values of every layer: (layers, 2, B, K, length, d)."""
        # Zeros, not what was in memory: a masked value still gets multiplied by 0.
        shape = (len(self.layers), 2, batch, self.kv_heads, length, self.head_dim)
        return self.embedding.new_zeros(shape)

    def rope(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Tables of the first positions, (length, H + 2K, d): of queries, keys and values at once.

        Queries are scaled by them, too, and values are left as they are. The sine's first half is
        negative, see :func:`turned`.
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
        """What is added to scores where keys are not ``visible``: minus infinity."""
        return self.embedding.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)

    def logits(
        self,
        ids: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        groups: list["Group"],
        seen: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        The last position's logits, (B, V) float32; fills T places of ``cache`` up to ``seen``.

        Args:
            ids: (B, T).
            rope: rows of :meth:`rope` for these tokens, (B, T, H + 2K, d).
            cache: (layers, 2, B, K, S, d).
            groups: rows that attend to the same places, those from their group's start on.
            bias: (B, 1, T, S), added to the attention scores; None: all is visible.
        """
        batch, new = ids.shape
        shape = (batch, new, self.heads + 2 * self.kv_heads, self.head_dim)
        # All views of the cache at once: a view costs as much as a small product.
        places = cache[..., seen - new : seen, :].unbind()
        # Of one float32 token plain products take a CPU two thirds of SDPA's time. In bfloat16 they
        # would copy keys and values, and the scores of many tokens would take much memory.
        is_plain = new == 1 and cache.dtype == torch.float32
        attend = attend_plainly if is_plain else attend_by_sdpa
        seen_by = [self.seen_by(cache, group, seen, is_plain) for group in groups]
        biases = [self.stacked_bias(bias, group, seen, is_plain) for group in groups]
        x = F.embedding(ids.view(-1), self.embedding)  # (B * T, D)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv.times(layer.input_norm(x)).view(shape)
            q = self.turn_and_store(layer, qkv, rope, places[index])
            out = [
                attend(q[group.rows], *views[2 * index : 2 * index + 2], added)
                for group, views, added in zip(groups, seen_by, biases, strict=True)
            ]
            mixed = out[0] if len(out) == 1 else torch.cat(out)
            x = layer.out.add_to(x, unstacked(mixed, new))
            gate, up = layer.gate_up.times(layer.mlp_norm(x)).chunk(2, dim=-1)
            x = layer.down.add_to(x, F.silu(gate) * up)
        return self.head.times(self.norm(x.view(batch, new, -1)[:, -1])).float()

    def seen_by(
        self, cache: torch.Tensor, group: "Group", seen: int, is_plain: bool
    ) -> tuple[torch.Tensor, ...]:
        """
        A group's keys and values of all layers, by turns: (B, K, S, d) each, or (B * K, S, d).

        They are views, since the new places are written after they are taken.
        """
        part = cache[:, :, group.rows, :, group.start : seen]
        layers, pair, batch, kv_heads, length, size = part.shape
        rows = (batch * kv_heads,) if is_plain else (batch, kv_heads)
        return part.view(layers * pair, *rows, length, size).unbind()

    def turn_and_store(
        self,
        layer: Layer,
        qkv: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
    ) -> torch.Tensor:
        """
        (B, T, H + 2K, d) to queries (B, K, groups * T, d); fills ``places`` (2, B, K, T, d).

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

    def stacked_bias(
        self, bias: torch.Tensor | None, group: "Group", seen: int, is_plain: bool
    ) -> torch.Tensor | None:
        """A group's part of ``bias`` for stacked queries: (B, 1, groups * T, S) or (B * K, ...)."""
        if bias is None:
            return None
        heads = self.kv_heads if is_plain else 1
        part = bias[group.rows, ..., group.start : seen]
        part = part.repeat(1, heads, self.heads // self.kv_heads, 1)
        return part.flatten(0, 1) if is_plain else part


def attend_by_sdpa(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Attention of scaled queries, (B, K, groups * T, d), to (B, K, S, d)."""
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=1.0)


def attend_plainly(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same with keys and values (B * K, S, d) and a bias (B * K, groups, S), of one token."""
    rows = q.flatten(0, 1)
    scores = torch.bmm(rows, keys.mT) if bias is None else torch.baddbmm(bias, rows, keys.mT)
    return torch.bmm(scores.softmax(dim=-1), values).view_as(q)


def unstacked(out: torch.Tensor, new: int) -> torch.Tensor:
    """Attention's (B, K, groups * T, d), ``new`` being T, as (B * T, H * d)."""
    batch, kv_heads, stacked, size = out.shape
    out = out.view(batch, kv_heads, -1, new, size).permute(0, 3, 1, 2, 4)
    return out.reshape(batch * new, kv_heads * (stacked // new) * size)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """:func:`model.model_minimind.rotate` with the sign in the sine: three operations a layer."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Group:
    """Neighbors in a batch whose prompts are padded to the longest among them.

    In the cache their places begin at ``start``: first what all prompts begin with, then padding,
    then the rest of each prompt, so that all end at the same place.
    """

    rows: slice
    start: int


def shared_length(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left to be read."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def group_prompts(prompts: list[list[int]], shared: int) -> list[Group]:
    """Groups of at most ``GROUP_TOKENS`` tokens to be read, padding included, or of one prompt."""
    width = max(map(len, prompts))
    groups, first, longest = [], 0, len(prompts[0])
    for row, ids in enumerate(prompts):
        wider = max(longest, len(ids))
        if row > first and (row + 1 - first) * (wider - shared) > GROUP_TOKENS:
            groups.append(Group(slice(first, row), width - longest))
            first, wider = row, len(ids)
        longest = wider
    return [*groups, Group(slice(first, len(prompts)), width - longest)]


def kept_groups(groups: list[Group], kept: torch.Tensor) -> list[Group]:
    """The groups of what is left of a batch; ``kept`` is (B,) bool."""
    counts = [int(kept[group.rows].sum()) for group in groups]
    ends = list(accumulate(counts))
    return [
        Group(slice(end - count, end), group.start)
        for group, count, end in zip(groups, counts, ends, strict=True)
        if count
    ]


def read_prompts(
    decoder: Decoder,
    prompts: list[list[int]],
    groups: list[Group],
    shared: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    cache: torch.Tensor,
) -> torch.Tensor:
    """Logits (B, V) after each prompt; ``cache`` (layers, 2, B, K, S, d) is filled up to S."""
    common = decoder.new_cache(1, shared)
    if shared:
        read_group(decoder, [prompts[0][:shared]], 0, rope, common)
    found = []
    for group in groups:
        view = cache[:, :, group.rows, :, group.start :]
        view[..., :shared, :] = common
        found.append(read_group(decoder, prompts[group.rows], shared, rope, view))
    return torch.cat(found)


def read_group(
    decoder: Decoder,
    prompts: list[list[int]],
    shared: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    cache: torch.Tensor,
) -> torch.Tensor:
    """Logits (B, V) after each prompt, whose first ``shared`` tokens are in ``cache`` already."""
    width, device = cache.shape[4], cache.device
    rest = [ids[shared:] for ids in prompts]
    padding = torch.tensor([width - len(ids) for ids in prompts], device=device)[:, None]
    ids = torch.tensor([[0] * (width - shared - len(ids)) + ids for ids in rest], device=device)
    places = torch.arange(width, device=device)
    queries = places[shared:, None]
    # A padding query sees itself: a row without any key would be NaN.
    real = is_real(places, padding, shared)[:, None] | (places == queries)
    visible = (real & (places <= queries))[:, None]
    positions = (places[shared:] - padding).clamp(min=0)
    groups = [Group(slice(0, len(prompts)), 0)]
    turning = (rope[0][positions], rope[1][positions])
    return decoder.logits(ids, turning, cache, groups, width, decoder.bias(visible))


def is_real(places: torch.Tensor, padding: torch.Tensor, shared: int) -> torch.Tensor:
    """Which of (S,) places hold no padding, (B, S); ``padding`` is (B, 1)."""
    return (places < shared) | (places >= shared + padding)


# ---------------------------------------------------------------- choosing a token


def choose(logits: torch.Tensor, decoding: Decoding, draws: torch.Tensor) -> torch.Tensor:
    """
    The next tokens, (B,) int64, of (B, V) logits.

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
    """The most likely tokens that together reach ``top_p``; 0 elsewhere, not renormalized.

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
    """
    Yields, step by step, (row, token) for each prompt whose answer has not ended.

    Args:
        prompts: token ids; those of similar length are best neighbors.
        draws: (B, max_new_tokens) uniform numbers, see :func:`choose`.
    """
    width, shared = max(map(len, prompts)), shared_length(prompts)
    groups = group_prompts(prompts, shared)
    cache = decoder.new_cache(len(prompts), width + decoding.max_new_tokens)
    rope = decoder.rope(cache.shape[4])
    logits = read_prompts(decoder, prompts, groups, shared, rope, cache[..., :width, :])
    device = cache.device
    draws, rows = draws.to(device), torch.arange(len(prompts), device=device)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    bias = padding_bias(decoder, groups, lengths, shared, cache.shape[4])
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
            groups, cache = kept_groups(groups, running), cache[:, :, running]
            bias = bias if bias is None else bias[running]
            rows, lengths, tokens = rows[running], lengths[running], tokens[running]
            running = running[running]
        positions, seen = (lengths + step)[:, None], width + step + 1
        turning = (rope[0][positions], rope[1][positions])
        logits = decoder.logits(tokens[:, None], turning, cache, groups, seen, bias)


def padding_bias(
    decoder: Decoder, groups: list[Group], lengths: torch.Tensor, shared: int, size: int
) -> torch.Tensor | None:
    """The bias (B, 1, 1, size) that hides padding from new tokens; None where there is none."""
    width = int(lengths.max())
    starts = torch.cat([torch.full_like(lengths[group.rows], group.start) for group in groups])
    padding = (width - lengths - starts)[:, None]
    if not padding.any():
        return None
    places = torch.arange(size, device=lengths.device) - starts[:, None]
    return decoder.bias(is_real(places, padding, shared)[:, None, None])


def generate(
    decoder: Decoder, prompts: list[list[int]], decoding: Decoding, draws: torch.Tensor
) -> list[list[int]]:
    """New token ids for each prompt; an end token that was produced is last."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in continue_prompts(decoder, prompts, decoding, draws):
        for row, token in step:
            answers[row].append(token)
    return answers
