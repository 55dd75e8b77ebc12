"""Masked linear layer: a product whose epilogue adds the bias, applies the mask and the activation.

Forward:   pre = x Wᵀ + b,   out = act(pre ⊙ m)
Backward:  du = dout ⊙ act'(pre ⊙ m),   dm = Σ_rows du ⊙ pre,   dpre = du ⊙ m,   db = Σ_rows dpre
The products dx = dpre W and dW = dpreᵀ x have no epilogue to fuse and stay with cuBLAS.

The column sums are kept per program in float32 and added up by one reduction: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import (
    accumulator_dtype,
    activate,
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
FORWARD_CONFIGURATIONS = {
    2: (
        dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=16, num_stages=3),
        dict(BLOCK_M=64, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
    ),
    4: (dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3),),
    8: (dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),),
}
BACKWARD_CONFIGURATIONS = (
    dict(BLOCK_M=32, BLOCK_N=64, STEPS=16, num_warps=4, num_stages=2),
    dict(BLOCK_M=32, BLOCK_N=128, STEPS=8, num_warps=4, num_stages=2),
)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, activation: str | None, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """out (M, N) and, if `save_pre`, pre (M, N), else an empty tensor; x (M, K), weight (N, K)."""
    rows, inner = x.shape
    columns = weight.shape[0]
    x, weight = unit_rows(x), unit_rows(weight)
    eighths = in_eighths(columns, inner, x.stride(0), weight.stride(0))
    out = x.new_empty(rows, columns)
    pre = x.new_empty((rows, columns) if save_pre else (0, columns))
    bias, mask = None if bias is None else bias.contiguous(), mask.contiguous()

    def launch(configuration: dict) -> None:
        tiles_m = triton.cdiv(rows, configuration["BLOCK_M"])
        tiles_n = triton.cdiv(columns, configuration["BLOCK_N"])
        _forward_kernel[(tiles_m * tiles_n,)](
            x, weight, bias, mask, out, pre,
            rows, columns, inner, x.stride(0), weight.stride(0),
            EIGHTHS=eighths, ACTIVATION=activation, SAVE_PRE=save_pre,
            ACCUMULATOR=accumulator_dtype(x), PRECISION=dot_precision(), GROUP_M=GROUP_M, **configuration,
        )  # fmt: skip

    if out.numel() > 0:
        size = x.element_size()
        kernel, candidates = f"masked_linear.forward {size} bytes", FORWARD_CONFIGURATIONS[size]
        with on_device_of(x):
            run_configured(kernel, candidates, (rows, columns, inner), x, launch, lambda c: shared_bytes(c, size))
    return out, pre


def backward(grad_out: Tensor, pre: Tensor, mask: Tensor, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """grad_pre (M, N) in pre's dtype; grad_mask (N,) and grad_bias (N,) in accumulator precision."""
    rows, columns = pre.shape
    grad_out, mask = unit_rows(grad_out), mask.contiguous()
    eighths = in_eighths(columns, grad_out.stride(0))
    grad_pre = torch.empty_like(pre)
    partial_dtype = torch.promote_types(pre.dtype, torch.float32)

    def launch(configuration: dict) -> tuple[Tensor, Tensor]:
        chunks = triton.cdiv(rows, configuration["BLOCK_M"] * configuration["STEPS"])
        partial_mask = pre.new_empty((chunks, columns), dtype=partial_dtype)
        partial_bias = torch.empty_like(partial_mask)
        _backward_kernel[(chunks * triton.cdiv(columns, configuration["BLOCK_N"]),)](
            grad_out, pre, mask, grad_pre, partial_mask, partial_bias,
            rows, columns, grad_out.stride(0),
            EIGHTHS=eighths, ACTIVATION=activation, ACCUMULATOR=accumulator_dtype(pre), **configuration,
        )  # fmt: skip
        return partial_mask.sum(0), partial_bias.sum(0)

    if pre.numel() == 0:
        return grad_pre, pre.new_zeros(columns, dtype=partial_dtype), pre.new_zeros(columns, dtype=partial_dtype)
    kernel = f"masked_linear.backward {pre.element_size()} bytes"
    with on_device_of(pre):
        return grad_pre, *run_configured(kernel, BACKWARD_CONFIGURATIONS, (rows, columns), pre, launch)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, out_ptr, pre_ptr,
    rows, columns, inner, stride_x, stride_weight,
    EIGHTHS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE_PRE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns, inner = known_eighths(columns, EIGHTHS), known_eighths(inner, EIGHTHS)
    stride_x, stride_weight = known_eighths(stride_x, EIGHTHS), known_eighths(stride_weight, EIGHTHS)
    tile_m, tile_n = grouped_tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offsets_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = product_tile(
        x_ptr, weight_ptr, offsets_m, offsets_n, rows, columns, inner, stride_x, stride_weight,
        False, ACCUMULATOR, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # (BLOCK_M, BLOCK_N)  # fmt: skip
    # pre = x Wᵀ + b, out = act(pre ⊙ m)
    mask = tl.load(mask_ptr + offsets_n, mask=offsets_n < columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + offsets_n, mask=offsets_n < columns, other=0.0).to(ACCUMULATOR)[None, :]
    offsets = offsets_m.to(tl.int64)[:, None] * columns + offsets_n[None, :]
    inside = (offsets_m < rows)[:, None] & (offsets_n < columns)[None, :]
    if SAVE_PRE:
        tl.store(pre_ptr + offsets, accumulator, mask=inside)
    tl.store(out_ptr + offsets, activate(accumulator * mask[None, :], ACTIVATION), mask=inside)


@triton.jit
def _backward_kernel(
    grad_out_ptr, pre_ptr, mask_ptr, grad_pre_ptr, partial_mask_ptr, partial_bias_ptr,
    rows, columns, stride_grad_out,
    EIGHTHS: tl.constexpr, ACTIVATION: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of BLOCK_M · STEPS rows."""
    columns, stride_grad_out = known_eighths(columns, EIGHTHS), known_eighths(stride_grad_out, EIGHTHS)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    offsets_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    mask = tl.load(mask_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    grad_mask = tl.zeros((BLOCK_N,), ACCUMULATOR)
    grad_bias = tl.zeros((BLOCK_N,), ACCUMULATOR)
    for step in range(STEPS):
        offsets_m = (chunk * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (offsets_m < rows)[:, None] & in_columns[None, :]
        rows_m = offsets_m.to(tl.int64)[:, None]
        pre = tl.load(pre_ptr + rows_m * columns + offsets_n[None, :], mask=inside, other=0.0).to(ACCUMULATOR)
        grad_out_ptrs = grad_out_ptr + rows_m * stride_grad_out + offsets_n[None, :]
        grad_out = tl.load(grad_out_ptrs, mask=inside, other=0.0).to(ACCUMULATOR)
        # du = dout ⊙ act'(pre ⊙ m), dpre = du ⊙ m
        grad_masked = activation_backward(grad_out, pre * mask[None, :], ACTIVATION)  # (BLOCK_M, BLOCK_N)
        grad_pre = grad_masked * mask[None, :]
        tl.store(grad_pre_ptr + rows_m * columns + offsets_n[None, :], grad_pre, mask=inside)
        grad_mask += tl.sum(grad_masked * pre, 0)
        grad_bias += tl.sum(grad_pre, 0)
    partial_offsets = chunk.to(tl.int64) * columns + offsets_n
    tl.store(partial_mask_ptr + partial_offsets, grad_mask, mask=in_columns)
    tl.store(partial_bias_ptr + partial_offsets, grad_bias, mask=in_columns)
