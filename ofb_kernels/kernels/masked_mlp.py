"""Backward of the masked MLP: fc2's data gradient, a product whose epilogue goes on through the activation and mask.

Forward:   pre = x W₁ᵀ + b₁,   hidden = act(pre ⊙ m),   out = hidden W₂ᵀ + b₂
Backward:  dhidden = dout W₂,   du = dhidden ⊙ act'(pre ⊙ m),   dm = Σ_rows du ⊙ pre,
           dpre = du ⊙ m,   db₁ = Σ_rows dpre
The forward is masked_linear's kernel and a plain product. The products dx = dpre W₁, dW₁ = dpreᵀ x and
dW₂ = doutᵀ hidden have no epilogue to fuse and stay with cuBLAS.

The column sums are kept per row tile in float32 and added up by one reduction: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import (
    accumulator_dtype,
    activation_backward,
    dot_precision,
    in_eighths,
    known_eighths,
    on_device_of,
    unit_rows,
)
from ofb_kernels.kernels.product import GROUP_M, grouped_tile, product_tile, shared_bytes
from ofb_kernels.kernels.tuning import run_configured

# Tile sizes, warps and pipeline stages for each element size in bytes (8: interpreted only), the default first.
BACKWARD_CONFIGURATIONS = {
    2: (
        dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
        dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=16, num_stages=3),
    ),
    4: (dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3),),
    8: (dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),),
}


def backward(
    grad_out: Tensor, fc2_weight: Tensor, pre: Tensor, mask: Tensor, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients up to fc1's output.

    Args:
        grad_out: (M, E), any strides.
        fc2_weight: (E, N), any strides.
        pre: (M, N), contiguous.
        mask: (N,).
        activation: a name `activate` knows.

    Returns:
        grad_pre (M, N) in pre's dtype; grad_mask (N,) and grad_bias (N,) in accumulator precision.
    """
    (rows, columns), inner = pre.shape, grad_out.shape[1]
    grad_pre = torch.empty_like(pre)
    grad_out, mask, in_columns = unit_rows(grad_out), mask.contiguous(), fc2_weight.stride(1) == 1
    fc2_weight = fc2_weight if in_columns else unit_rows(fc2_weight.t())
    eighths = in_eighths(columns, inner, grad_out.stride(0), fc2_weight.stride(0))
    partial_dtype = torch.promote_types(pre.dtype, torch.float32)

    def launch(configuration: dict) -> tuple[Tensor, Tensor]:
        tiles_m = triton.cdiv(rows, configuration["BLOCK_M"])
        tiles_n = triton.cdiv(columns, configuration["BLOCK_N"])
        partial_mask = pre.new_empty((tiles_m, columns), dtype=partial_dtype)
        partial_bias = torch.empty_like(partial_mask)
        _backward_kernel[(tiles_m * tiles_n,)](
            grad_out, fc2_weight, pre, mask, grad_pre, partial_mask, partial_bias,
            rows, columns, inner, grad_out.stride(0), fc2_weight.stride(0),
            EIGHTHS=eighths, IN_COLUMNS=in_columns, ACTIVATION=activation,
            ACCUMULATOR=accumulator_dtype(pre), PRECISION=dot_precision(), GROUP_M=GROUP_M, **configuration,
        )  # fmt: skip
        return partial_mask.sum(0), partial_bias.sum(0)

    if pre.numel() == 0:
        zeros = pre.new_zeros(columns, dtype=partial_dtype)
        return grad_pre, zeros, zeros.clone()
    size, sizes = pre.element_size(), (rows, columns, inner)
    kernel, candidates = f"masked_mlp.backward {size} bytes", BACKWARD_CONFIGURATIONS[size]
    with on_device_of(pre):
        return grad_pre, *run_configured(kernel, candidates, sizes, pre, launch, lambda c: shared_bytes(c, size))


@triton.jit
def _backward_kernel(
    grad_out_ptr, fc2_weight_ptr, pre_ptr, mask_ptr, grad_pre_ptr, partial_mask_ptr, partial_bias_ptr,
    rows, columns, inner, stride_grad_out, stride_weight,
    EIGHTHS: tl.constexpr, IN_COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns, inner = known_eighths(columns, EIGHTHS), known_eighths(inner, EIGHTHS)
    stride_grad_out, stride_weight = known_eighths(stride_grad_out, EIGHTHS), known_eighths(stride_weight, EIGHTHS)
    tile_m, tile_n = grouped_tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offsets_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    # dhidden = dout W₂
    grad_hidden = product_tile(
        grad_out_ptr, fc2_weight_ptr, offsets_m, offsets_n, rows, columns, inner, stride_grad_out, stride_weight,
        IN_COLUMNS, ACCUMULATOR, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # (BLOCK_M, BLOCK_N)  # fmt: skip
    offsets = offsets_m.to(tl.int64)[:, None] * columns + offsets_n[None, :]
    inside = (offsets_m < rows)[:, None] & in_columns[None, :]
    mask = tl.load(mask_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)  # (BLOCK_M, BLOCK_N)
    # du = dhidden ⊙ act'(pre ⊙ m), dpre = du ⊙ m
    grad_masked = activation_backward(grad_hidden, pre * mask[None, :], ACTIVATION)  # (BLOCK_M, BLOCK_N)
    grad_pre = grad_masked * mask[None, :]
    tl.store(grad_pre_ptr + offsets, grad_pre, mask=inside)
    # dm = Σ_rows du ⊙ pre, db = Σ_rows dpre; rows outside have dout = 0
    partial_offsets = tile_m.to(tl.int64) * columns + offsets_n
    tl.store(partial_mask_ptr + partial_offsets, tl.sum(grad_masked * pre, 0), mask=in_columns)
    tl.store(partial_bias_ptr + partial_offsets, tl.sum(grad_pre, 0), mask=in_columns)
