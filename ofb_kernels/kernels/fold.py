"""The mask folded into a linear layer's weights, which are few where rows are many, and the way back.

Forward:   W_f = W ⊙ m,   b_f = b ⊙ m, in the dtype of the product: one pass casts and folds
Backward:  dW = dW_f ⊙ m,   db = db_f ⊙ m,   dm = Σ_k dW_f ⊙ W + db_f ⊙ b, in the dtypes of W, b and m
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.casts import cast_at_once
from ofb_kernels.kernels.column_sums import FEW_ROWS, column_sums
from ofb_kernels.kernels.common import accumulator_dtype, cdiv, hidden_multiple, known_multiple, on_device_of
from ofb_kernels.rows import few_rows

BLOCKS = dict(BLOCK_N=4, BLOCK_K=256, num_warps=4)
# cuBLAS writes its float32 accumulator as it is since torch 2.8.
_WRITES_ACCUMULATOR = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None


def fold(weight: Tensor, bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """W ⊙ m (N, K) and b ⊙ m (N,) in `dtype`. Without a mask: W itself if its dtype is that, or `Casts`' copy."""
    if mask is None:
        weight, bias = cast_at_once(weight, dtype), cast_at_once(bias, dtype)
        if weight.dtype == dtype:
            return weight, None if bias is None else bias.to(dtype)
    columns, inner = weight.shape
    folded_weight = weight.new_empty((columns, inner), dtype=dtype)
    folded_bias = None if bias is None else bias.new_empty(columns, dtype=dtype)
    weight, bias, mask = (None if each is None else each.contiguous() for each in (weight, bias, mask))
    if columns > 0:
        grid = cdiv(columns, BLOCKS["BLOCK_N"]), max(1, cdiv(inner, BLOCKS["BLOCK_K"]))
        with on_device_of(weight):
            _fold_kernel[grid](
                weight, bias, mask, folded_weight, folded_bias, columns, inner,
                MULTIPLE=hidden_multiple(inner), ACCUMULATOR=accumulator_dtype(weight), **BLOCKS,
            )  # fmt: skip
    return folded_weight, folded_bias


def data_gradient(grad: Tensor, x: Tensor, weight: Tensor, folded: Tensor, mask: Tensor | None) -> Tensor:
    """dx (M, K) of u = (x Wᵀ + b) ⊙ m from du (M, N); `folded` is what the forward multiplied x with, empty for W."""
    if mask is not None and few_rows(x):
        grad = (grad * mask).to(grad.dtype)
    return grad @ (folded if folded.shape == weight.shape else weight)


def parameter_gradients(
    grad: Tensor, sums: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and mask of u = (x Wᵀ + b) ⊙ m, each in its own dtype; empty of what is None.

    Args:
        grad: du (M, N).
        sums: du summed over some of its rows each, (P, N) in accumulator precision; None if it is yet to be summed.
        x: (M, K).
        weight: (N, K).
        bias: (N,) or None.
        mask: (N,) or None.
    """
    grad_weight = weight_gradient(grad, x, weight.dtype)
    sums = grad if sums is None else sums
    if mask is not None:
        return unfold(grad_weight, sums, weight, bias, mask)
    return grad_weight, weight.new_empty(0) if bias is None else column_sums(sums, bias.dtype), weight.new_empty(0)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """gradᵀ x (N, K) in `dtype`."""
    straight = _WRITES_ACCUMULATOR and grad.is_cuda and grad.element_size() == 2 and dtype == torch.float32
    if straight and grad.numel() > 0 and x.numel() > 0:
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return (grad.t() @ x).to(dtype)


def unfold(
    grad_folded: Tensor, sums: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dW (N, K) and db (N,) in W's dtype, and dm (N,) in the mask's; db is empty where there is no bias.

    grad_folded (N, K) is dW_f, and the rows of sums (P, N) add up to db_f; without a bias nobody looks at them.
    """
    grad_folded, weight, mask = grad_folded.contiguous(), weight.contiguous(), mask.contiguous()
    if bias is not None:
        bias, sums = bias.contiguous(), sums.contiguous() if len(sums) <= FEW_ROWS else column_sums(sums)[None]
    grad_weight, grad_mask = torch.empty_like(weight), torch.empty_like(mask)
    grad_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    if mask.numel() > 0:
        columns, inner = weight.shape
        with on_device_of(weight):
            _unfold_kernel[(cdiv(columns, BLOCKS["BLOCK_N"]),)](
                grad_folded, sums, weight, bias, mask,
                grad_weight, grad_bias, grad_mask, columns, inner, len(sums),
                MULTIPLE=hidden_multiple(inner), ACCUMULATOR=accumulator_dtype(weight), **BLOCKS,
            )  # fmt: skip
    return grad_weight, grad_bias, grad_mask


@triton.jit
def _fold_kernel(
    weight_ptr, bias_ptr, mask_ptr, folded_weight_ptr, folded_bias_ptr,
    columns, inner,
    MULTIPLE: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of the weight, BLOCK_K of their columns; with the first of these their biases."""
    inner = known_multiple(inner, MULTIPLE)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets = offsets_n.to(tl.int64)[:, None] * inner + offsets_k[None, :]
    in_columns = offsets_n < columns
    inside = in_columns[:, None] & (offsets_k < inner)[None, :]
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)  # (BLOCK_N, BLOCK_K)
    if mask_ptr is not None:
        weight *= tl.load(mask_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)[:, None]
    tl.store(folded_weight_ptr + offsets, weight, mask=inside)
    if bias_ptr is not None and tl.program_id(1) == 0:
        bias = tl.load(bias_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
        if mask_ptr is not None:
            bias *= tl.load(mask_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)
        tl.store(folded_bias_ptr + offsets_n, bias, mask=in_columns)


@triton.jit
def _unfold_kernel(
    grad_folded_ptr, sums_ptr, weight_ptr, bias_ptr, mask_ptr, grad_weight_ptr, grad_bias_ptr, grad_mask_ptr,
    columns, inner, parts,
    MULTIPLE: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of the weight, whole."""
    inner = known_multiple(inner, MULTIPLE)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    mask = tl.load(mask_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    products = tl.zeros((BLOCK_N, BLOCK_K), ACCUMULATOR)  # dW_f ⊙ W
    for start_k in range(0, inner, BLOCK_K):
        offsets_k = start_k + tl.arange(0, BLOCK_K)
        offsets = offsets_n.to(tl.int64)[:, None] * inner + offsets_k[None, :]
        inside = in_columns[:, None] & (offsets_k < inner)[None, :]
        grad_folded = tl.load(grad_folded_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)
        weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)
        products += grad_folded * weight
        tl.store(grad_weight_ptr + offsets, grad_folded * mask[:, None], mask=inside)
    grad_mask = tl.sum(products, 1)
    if bias_ptr is not None:
        sums = _sums_of_parts(sums_ptr, parts, columns, offsets_n, ACCUMULATOR, BLOCK_K)  # (BLOCK_N,)
        grad_mask += sums * tl.load(bias_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)
        tl.store(grad_bias_ptr + offsets_n, sums * mask, mask=in_columns)
    tl.store(grad_mask_ptr + offsets_n, grad_mask, mask=in_columns)


@triton.jit
def _sums_of_parts(sums_ptr, parts, columns, offsets_n, ACCUMULATOR: tl.constexpr, BLOCK_P: tl.constexpr):
    """The sums over the rows of (parts, columns) in some of its columns."""
    total = tl.zeros((BLOCK_P, offsets_n.shape[0]), ACCUMULATOR)
    for start_p in range(0, parts, BLOCK_P):
        offsets_p = start_p + tl.arange(0, BLOCK_P)
        inside = (offsets_p < parts)[:, None] & (offsets_n < columns)[None, :]
        offsets = offsets_p[:, None] * columns + offsets_n[None, :]
        total += tl.load(sums_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)
    return tl.sum(total, 0)
