"""Every op in its fastest plain PyTorch form, for any device: the mask goes into the weights where rows are many,
attention into SDPA.

Same arguments as in reference.py. These are the formulations a good engineer writes by hand; they compile, and they
are what the Triton kernels have to beat.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ofb_kernels import reference
from ofb_kernels.autocast import without_autocast
from ofb_kernels.reference import ACTIVATIONS, candidate_probabilities, unit_ranks
from ofb_kernels.rows import as_rows, few_rows

BAND = 32  # rows of the averaging matrix in a product: with fewer there are fewer zeros to multiply, and more products


def bimask(
    score: Tensor, alpha: Tensor, head_counts: Tensor, channel_counts: Tensor, lam: Tensor, alive: Tensor
) -> Tensor:
    """The sparsity of every rank is one small table, looked up at the units' ranks."""
    heads, channels = score.shape[1:]
    head_rank, channel_rank = unit_ranks(score)
    p = candidate_probabilities(alpha, alive)
    keeps_head = _staircase(head_counts, heads, p)  # (S, H, A)
    keeps_channel = _staircase(channel_counts, channels, p)  # (S, d, B)
    sparsity_of_rank = keeps_head @ p @ keeps_channel.mT  # (S, H, d)
    sparsity_in_head = sparsity_of_rank.take_along_dim(head_rank[..., None], 1)
    sparsity = sparsity_in_head.take_along_dim(channel_rank, 2)
    return torch.lerp(sparsity, score.sigmoid(), lam)


def candidate_statistics(alpha: Tensor, alive: Tensor, heads: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.candidate_statistics(alpha, alive, heads, units)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str | None
) -> Tensor:
    if mask is not None and few_rows(x):
        return reference.masked_linear(x, weight, bias, mask, activation)
    if mask is not None:
        weight, bias = _folded(weight, bias, mask)
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def masked_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    mask: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    return F.linear(masked_linear(x, fc1_weight, fc1_bias, mask, activation), fc2_weight, fc2_bias)


def masked_attention(qkv: Tensor, mask: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """(q ⊙ m)(k ⊙ m)ᵀ = (q ⊙ m²) kᵀ and softmax(·)(v ⊙ m) = (softmax(·) v) ⊙ m: two products instead of three."""
    q, k, v = qkv.unbind(2)  # each (B, N, H, d)
    attended = _attention((q * mask.square()).to(qkv.dtype), k, v, scale, bias)
    return (attended * mask).to(qkv.dtype).flatten(2)


def masked_qkv_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, scale: float, attention_bias: Tensor | None
) -> Tensor:
    """The mask goes into the projection's weights: nothing is left of it in the attention.

    Which of SDPA's backends serves is torch's choice. On compute capability 9.0 and 10.0 it prefers cuDNN where that is
    newer than 9.15, as in the wheels of torch 2.11. It is not forced elsewhere: an older cuDNN errs where the number of
    tokens is no multiple of 128 (pytorch/pytorch#169849).
    """
    shape, mask = mask.shape, mask.flatten().repeat(3)
    if few_rows(x):
        qkv = reference.masked_linear(x, weight, bias, mask, None).unflatten(-1, (3, *shape)).unbind(2)
    else:
        project = _project_qkv if _packs_gradients(x) else _ProjectQKV.apply
        qkv = project(x, *_folded(weight, bias, mask), shape)
    return _attention(*qkv, scale, attention_bias).flatten(2)


def masked_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float) -> Tensor:
    if mask is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _MaskedLayerNorm.apply(x, weight, bias, mask, eps)


def add_branch(
    x: Tensor, branch: Tensor, branch_mask: Tensor, sample_scale: Tensor | None, branch_bias: Tensor | None = None
) -> Tensor:
    """Mask and sample scale make one small factor: one pass over the branch."""
    factor = branch_mask if sample_scale is None else branch_mask * sample_scale.view(-1, *[1] * (x.dim() - 1))
    whole = branch if branch_bias is None else branch + branch_bias
    return torch.addcmul(x, whole, factor).to(torch.promote_types(x.dtype, branch.dtype))


def local_norm(images: Tensor, window: int, eps: float) -> Tensor:
    """The window mean is separable: two products with banded averaging matrices instead of window² additions."""
    planes = images.flatten(0, 1)
    rows, row_counts = _averaging_bands(planes.shape[1], window, planes)
    columns, column_counts = _averaging_bands(planes.shape[2], window, planes)

    def window_mean(values: Tensor) -> Tensor:
        across = torch.cat([values[..., near] @ weights.t() for near, weights in columns], 2)
        return torch.cat([weights @ across[:, near] for near, weights in rows], 1)

    pixels = row_counts[:, None] * column_counts
    mean = window_mean(planes)
    # In place from here: fresh memory for an image batch costs more than the arithmetic on it.
    variance = window_mean(planes.square()).addcmul_(mean, mean, value=-1)
    variance = variance.mul_(pixels / (pixels - 1).clamp(min=1)).clamp_(min=0)
    return torch.sub(planes, mean, out=mean).mul_(variance.add_(eps).rsqrt_()).view(images.shape)


def masked_reconstruction_loss(
    decoded: Tensor, images: Tensor, areas: Tensor, masked: Tensor, pixels: tuple[int, int], window: int, eps: float
) -> Tensor:
    """The drawn areas are gathered from a view of the target, in the decoder's layout: no pass over the images."""
    blocks = blocks_of(local_norm(images, window, eps), pixels)
    row, column = areas // blocks.shape[4], areas % blocks.shape[4]
    image = torch.arange(len(images), device=images.device)[:, None]
    target = blocks[image, :, row, :, column].flatten(2)  # (B, K, C·p·q)
    error = torch.linalg.vector_norm(decoded - target, 1, 2).where(masked, 0)  # (B, K)
    return error.sum() / (masked.sum() * len(images)).clamp(min=1) / decoded.shape[2]


def blocks_of(images: Tensor, pixels: tuple[int, int]) -> Tensor:
    """(B, C, rows, p, columns, q) of images (B, C, H, W), without what no block of p × q pixels covers at their right
    and bottom."""
    p, q = pixels
    rows, columns = images.shape[2] // p, images.shape[3] // q
    return images[..., : rows * p, : columns * q].unflatten(3, (columns, q)).unflatten(2, (rows, p))


def _folded(weight: Tensor, bias: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A linear layer's parameters, in their dtypes, with the mask of its output units multiplied in."""
    return (weight * mask[:, None]).to(weight.dtype), None if bias is None else (bias * mask).to(bias.dtype)


def _project_qkv(x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """q, k and v, (B, N, H, d) each, all in the memory of one product; `shape` is (H, d)."""
    return F.linear(x, weight, bias).unflatten(-1, (3, *shape)).unbind(2)


def _packs_gradients(x: Tensor) -> bool:
    """Whether dq, dk and dv are copied into one tensor, for one product each instead of three.

    On a CPU both take as long. A compiler makes a copy of each sum of products, which costs more than packing.
    """
    return not x.is_cuda or torch.compiler.is_compiling()


class _ProjectQKV(torch.autograd.Function):
    """`_project_qkv` with a backward that takes dq, dk and dv where they lie.

    dx = dq Wq + dk Wk + dv Wv, added up in one buffer; dW by the rows of q, k and v, each written in its place. SDPA
    hands the three back as (B, N, H, d) in memory, transposed: (B·N, H·d) is a view of that.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, ...]:
        return _project_qkv(x, weight, bias, shape)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        if grads[0] is None:  # attention has gradients of all three, or of none
            return None, None, None, None
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        thirds = 3, len(weight) // 3
        grad_x = grad_weight = grad_bias = None
        with without_autocast(x):
            grads = [grad.flatten(2) for grad in grads]  # (B, N, H·d)
            rows = [as_rows(grad) for grad in grads]
            if needs_x:
                first, *others = zip(rows, weight.unflatten(0, thirds), strict=True)
                grad_x = torch.mm(*first)
                for grad, part in others:
                    grad_x.addmm_(grad, part)
                grad_x = grad_x.view(x.shape)
            if needs_weight:
                grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
                for grad, part in zip(rows, grad_weight.unflatten(0, thirds), strict=True):
                    torch.mm(grad.t(), as_rows(x), out=part)
            if needs_bias:
                grad_bias = _sums_of_rows(grads).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def _sums_of_rows(grads: Sequence[Tensor]) -> Tensor:
    """Σ over B and N of each (B, N, D), one after the other, in float32 at least.

    Over B first: torch is slow to add up few long columns, and those are N·D short ones.
    """
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    sums = grads[0].new_empty(len(grads), *grads[0].shape[1:], dtype=dtype)
    for grad, part in zip(grads, sums, strict=True):
        torch.sum(grad, 0, dtype=dtype, out=part)
    return sums.sum(1).flatten()


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """softmax(scale · q kᵀ + bias) v of (B, N, H, d) each. Transposed one by one: the backward then packs dq, dk and dv
    in one copy, where a permutation of the packed tensor takes two."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    if bias is not None:
        bias = bias.to(q.dtype)
        if len(bias) > 1:  # a copy for each sequence costs less than the copies of q, k and v that 5 dimensions take
            bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
    # torch 2.11: without heads SDPA ends the process on a CPU, and on a GPU it keeps nothing for the bias's gradient
    # where no other is asked for.
    bias_alone = bias is not None and bias.requires_grad and not any(each.requires_grad for each in (q, k, v))
    if q.shape[1] == 0 or bias_alone:
        scores = q @ k.mT * scale if bias is None else q @ k.mT * scale + bias
        return (scores.softmax(-1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)


class _MaskedLayerNorm(torch.autograd.Function):
    """LayerNorm weighted by the mask, its backward in closed form: autograd's own takes about twice as long.

    With r = 1 / standard deviation, n = r·(x − mean), s = m / Σ m, and for each row c1 = Σ dy ⊙ w ⊙ s and
    c2 = Σ dy ⊙ w ⊙ s ⊙ n:

    dx = r·m ⊙ (dy ⊙ w − c1 − c2·n),   dw = m ⊙ Σ_rows dy ⊙ n,   db = m ⊙ Σ_rows dy
    dm = w ⊙ Σ_rows dy ⊙ n + b ⊙ Σ_rows dy − Σ_rows (c1·n + ½·c2·(n² − Σ s ⊙ n²))

    Fresh memory of x's size costs a CPU several passes over memory in use: the forward takes only its output, the
    backward two buffers, and everything is written over what is no longer needed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, eps: float) -> Tensor:
        share = mask / mask.sum()
        mean = (x @ share)[..., None]
        out = torch.empty_like(x, memory_format=torch.contiguous_format)  # torch.compile takes no other out=
        torch.sub(x, mean, out=out).mul_(share.sqrt())  # its norm is the weighted standard deviation
        rstd = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().add_(eps).rsqrt_()
        torch.sub(x, mean, out=out).mul_(rstd).mul_(weight * mask)
        if bias is not None:
            out.add_(bias * mask)
        ctx.save_for_backward(x, mean, rstd, weight, bias, mask, share)
        return out.view(x.shape)  # torch.compile (2.11) loses the gradient of a result written in place

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        x, mean, rstd, weight, bias, mask, share = ctx.saved_tensors
        with without_autocast(grad_out):
            shape = x.shape
            x, grad_out, mean, rstd = (as_rows(t) for t in (x, grad_out, mean, rstd))
            weighted = weight * share
            normal = (x - mean).mul_(rstd)
            buffer = grad_out * normal
            c1, c2 = grad_out @ weighted, buffer @ weighted
            grad_scale, grad_shift = buffer.sum(0), grad_out.sum(0)
            through_variance = c2 @ torch.mul(normal, normal, out=buffer)
            through_variance -= through_variance @ share
            grad_mask = weight * grad_scale - c1 @ normal - 0.5 * through_variance
            if bias is not None:
                grad_mask += bias * grad_shift
            grad_x = normal.mul_(-c2[:, None]).sub_(c1[:, None]).addcmul_(grad_out, weight).mul_(mask).mul_(rstd)
        grad_bias = None if bias is None else mask * grad_shift
        return grad_x.view(shape), mask * grad_scale, grad_bias, grad_mask, None


def _staircase(counts: Tensor, units: int, like: Tensor) -> Tensor:
    """(S, units, K) for counts (S, K): 1 where the rank lies below the count."""
    rank = torch.arange(units, device=like.device)
    return (rank[:, None] < counts[:, None]).to(like.dtype)


def _averaging_bands(size: int, window: int, like: Tensor) -> tuple[list[tuple[slice, Tensor]], Tensor]:
    """The matrix (size, size) that averages over a window cut off at the ends, and how many entries each window has.

    The matrix comes BAND rows at a time: the columns in which these are not all zero, and the rows' entries there. A
    compiler gets it whole, as parts would make another graph for each size.
    """
    position, half = torch.arange(size, device=like.device), window // 2
    inside = ((position[:, None] - position).abs() <= half).to(like.dtype)
    counts = inside.sum(1)
    matrix = inside / counts[:, None]
    if torch.compiler.is_compiling():
        return [(slice(None), matrix)], counts
    columns = [slice(max(0, start - half), start + BAND + half) for start in range(0, size, BAND)]
    return [(near, rows[:, near]) for near, rows in zip(columns, matrix.split(BAND), strict=True)], counts
