"""The mask folded into a linear layer's weights, which are few where rows are many, and the way back.

Forward:   W_f = W ⊙ m,   b_f = b ⊙ m
Backward:  dW = dW_f ⊙ m,   db = db_f ⊙ m,   dm = Σ_k dW_f ⊙ W + db_f ⊙ b
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import accumulator_dtype, on_device_of

BLOCKS = dict(BLOCK_N=4, BLOCK_K=256, num_warps=4)


def linear_gradients(
    grad: Tensor, sums: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and mask of u = (x Wᵀ + b) ⊙ m; those that nobody needs are empty.

    Args:
        grad: du (M, N).
        sums: Σ_rows du (N,) in accumulator precision.
        x: (M, K).
        weight: (N, K).
        bias: (N,) or None.
        mask: (N,).
        needs: whether x's gradient is needed, and whether any of the others is.
    """
    grad_x = grad @ fold(weight, mask) if needs[0] else x.new_empty(0)
    if needs[1]:
        return grad_x, *unfold(grad.t() @ x, sums, weight, bias, mask)
    return grad_x, *(each.new_empty(0) for each in (weight, weight, mask))


def fold(weight: Tensor, mask: Tensor) -> Tensor:
    """W ⊙ m (N, K) in W's dtype, contiguous."""
    weight, mask = weight.contiguous(), mask.contiguous()
    folded = torch.empty_like(weight)
    columns, inner = weight.shape
    if weight.numel() > 0:
        with on_device_of(weight):
            _fold_kernel[(triton.cdiv(columns, BLOCKS["BLOCK_N"]), triton.cdiv(inner, BLOCKS["BLOCK_K"]))](
                weight, mask, folded, columns, inner, ACCUMULATOR=accumulator_dtype(weight), **BLOCKS
            )
    return folded


def unfold(
    grad_folded: Tensor, sums: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dW (N, K) and db (N,) in W's dtype, and dm (N,) in the mask's; db is empty where there is no bias.

    grad_folded (N, K) is dW_f and sums (N,) is db_f.
    """
    grad_folded, weight, mask = grad_folded.contiguous(), weight.contiguous(), mask.contiguous()
    grad_weight, grad_mask = torch.empty_like(weight), torch.empty_like(mask)
    grad_bias = weight.new_empty(0 if bias is None else len(bias))
    if mask.numel() > 0:
        columns, inner = weight.shape
        with on_device_of(weight):
            _unfold_kernel[(triton.cdiv(columns, BLOCKS["BLOCK_N"]),)](
                grad_folded, sums.contiguous(), weight, None if bias is None else bias.contiguous(), mask,
                grad_weight, grad_bias, grad_mask, columns, inner,
                ACCUMULATOR=accumulator_dtype(weight), **BLOCKS,
            )  # fmt: skip
    return grad_weight, grad_bias, grad_mask


@triton.jit
def _fold_kernel(
    weight_ptr, mask_ptr, folded_ptr,
    columns, inner,
    ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offsets = offsets_n.to(tl.int64)[:, None] * inner + offsets_k[None, :]
    inside = (offsets_n < columns)[:, None] & (offsets_k < inner)[None, :]
    mask = tl.load(mask_ptr + offsets_n, mask=offsets_n < columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)  # (BLOCK_N, BLOCK_K)
    tl.store(folded_ptr + offsets, weight * mask[:, None], mask=inside)


@triton.jit
def _unfold_kernel(
    grad_folded_ptr, sums_ptr, weight_ptr, bias_ptr, mask_ptr, grad_weight_ptr, grad_bias_ptr, grad_mask_ptr,
    columns, inner,
    ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of the weight, whole."""
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
    sums = tl.load(sums_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    if bias_ptr is not None:
        grad_mask += sums * tl.load(bias_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)
        tl.store(grad_bias_ptr + offsets_n, sums * mask, mask=in_columns)
    tl.store(grad_mask_ptr + offsets_n, grad_mask, mask=in_columns)
