"""Causal attention for training on a CPU: a block of queries at a time.

torch's fused kernel keeps no attention weights and computes them anew for the gradient, which is
right on a GPU and for long sequences. On a CPU, at the few hundred tokens that are trained on here,
plain batched matrix products take under half of its time:

    S = Q K^T,  P = softmax(S),  O = P V                                          forward
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),
    dQ = dS K,  dK = dS^T Q                                                       backward

(Dao et al. 2022, arXiv 2205.14135, appendix B.2), for BLOCK queries at a time against the keys up
to the block's end, so that little of what causality hides is computed. P is kept for the backward.

Shapes: B batch, T tokens, H query heads, K key/value heads, d head dimension; G = H / K queries
share a key head and are rows of one matrix, so no head is copied. N = B K such matrices.
"""

from collections.abc import Iterator

import torch

BLOCK = 64  # queries; 48 to 128 take about the same time
# Beyond it the weights kept, about B H T^2 / 2 a layer, outweigh all other activations.
LONGEST = 1024


def blockwise_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of (B, H, T, d) queries on (B, K, T, d) keys and values: (B, H, T, d).

    Computed in the type of `v`, the softmax in float32.
    """
    batch, heads, length, size = q.shape
    group = heads // k.shape[1]
    scaled = (q * size**-0.5).to(v.dtype).unflatten(1, (-1, group))
    rows = scaled.transpose(2, 3).reshape(-1, length, group, size)
    out, _ = attend(rows, k.to(v.dtype).flatten(0, 1), v.flatten(0, 1))
    out = out.view(batch, -1, length, group, size).transpose(2, 3)
    return out.reshape(batch, heads, length, size)


def weight_blocks(weights: torch.Tensor, q: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each block of queries, and its (N, queries * G, keys) part of the flat weights."""
    count, length, group, _ = q.shape
    offset = 0
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        shape = (count, (stop - start) * group, stop)
        size = shape[0] * shape[1] * shape[2]
        yield slice(start, stop), weights[offset : offset + size].view(shape)
        offset += size


def weights_size(q: torch.Tensor) -> int:
    """Elements of all blocks' weights."""
    count, length, group, _ = q.shape
    whole, rest = length // BLOCK, length % BLOCK
    return count * group * (BLOCK**2 * whole * (whole + 1) // 2 + rest * length)


# Custom operators: the compiler takes each as it is. It would unroll their loops, and compile them
# anew for every number of blocks.
@torch.library.custom_op("minimind::attend", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, T, G, d) queries, scaled, on (N, T, d) keys and values: (N, T, G, d), and the weights."""
    out, weights = torch.empty_like(q), q.new_empty(weights_size(q))
    hidden = q.new_full((BLOCK, BLOCK), -torch.inf).triu(1)[:, None]
    for block, part in weight_blocks(weights, q):
        rows, end = block.stop - block.start, block.stop
        scores = torch.bmm(q[:, block].flatten(1, 2), k[:, :end].mT)
        scores.unflatten(1, (rows, -1))[..., block] += hidden[:rows, :, :rows]
        torch.softmax(scores, dim=-1, out=part)
        out[:, block] = torch.bmm(part, v[:, :end]).unflatten(1, (rows, -1))
    return out, weights


@attend.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(weights_size(q))


@torch.library.custom_op("minimind::attend_backward", mutates_args=())
def attend_backward(
    grad: torch.Tensor,
    row_sums: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `q`, `k` and `v`, from those of the output; `row_sums` of P * dP."""
    q_grad = torch.empty_like(q)
    k_grad = torch.zeros_like(k, dtype=torch.float32)  # summed over blocks
    v_grad = torch.zeros_like(v, dtype=torch.float32)
    for block, part in weight_blocks(weights, q):
        end = block.stop
        grad_rows, q_rows = grad[:, block].flatten(1, 2), q[:, block].flatten(1, 2)
        v_grad[:, :end] += torch.bmm(part.mT, grad_rows)
        scores_grad = gradient_of_scores(grad_rows, row_sums[:, block], v[:, :end], part)
        q_grad[:, block] = torch.bmm(scores_grad, k[:, :end]).view_as(q_grad[:, block])
        k_grad[:, :end] += torch.bmm(scores_grad.mT, q_rows)
    return q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype)


@attend_backward.register_fake
def _(grad, row_sums, q, k, v, weights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.custom_op("minimind::attend_backward_queries", mutates_args=())
def attend_backward_queries(
    grad: torch.Tensor,
    row_sums: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the queries alone, as `attend_backward`."""
    q_grad = torch.empty_like(grad)
    for block, part in weight_blocks(weights, grad):
        end = block.stop
        grad_rows = grad[:, block].flatten(1, 2)
        scores_grad = gradient_of_scores(grad_rows, row_sums[:, block], v[:, :end], part)
        q_grad[:, block] = torch.bmm(scores_grad, k[:, :end]).view_as(q_grad[:, block])
    return q_grad


@attend_backward_queries.register_fake
def _(grad, row_sums, k, v, weights) -> torch.Tensor:
    return torch.empty_like(grad)


def gradient_of_scores(
    grad_rows: torch.Tensor, row_sums: torch.Tensor, v: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """dS of a block, shaped as its `weights`, (N, queries * G, keys)."""
    return torch.bmm(grad_rows, v.mT).sub_(row_sums.flatten(1, 2)).mul_(weights)


def keep_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    """Saves what `attend_gradients` reads; the weights as an output have no gradient."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def attend_gradients(
    ctx, grad: torch.Tensor, _: None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The backward of `attend`; rowsum(P * dP) is rowsum(O * dO), which is smaller."""
    q, k, v, out, weights = ctx.saved_tensors
    grad = grad.contiguous()
    row_sums = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
    if any(ctx.needs_input_grad[1:]):
        return attend_backward(grad, row_sums, q, k, v, weights)
    # The first block's keys and values, where an adapter trains none of them.
    return attend_backward_queries(grad, row_sums, k, v, weights), None, None


attend.register_autograd(attend_gradients, setup_context=keep_for_backward)
