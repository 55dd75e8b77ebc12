"""Backward of the masked MLP: fc2's data gradient, a product whose epilogue goes on through the activation.

Forward:   u = (x W₁ᵀ + b₁) ⊙ m,   hidden = act(u),   slope = act'(u),   out = hidden W₂ᵀ + b₂
Backward:  du = (dout W₂) ⊙ slope and Σ_rows du here; dW₂ = doutᵀ hidden, and what is left is fc1's (masked_linear.py)
The forward is masked_linear's kernel and a plain product. Products without an epilogue stay with cuBLAS.

The column sums of du are kept per row tile in float32, and `fold` adds them up: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import (
    accumulator_dtype,
    cdiv,
    dot_precision,
    hidden_multiple,
    known_multiple,
    on_device_of,
    unit_rows,
)
from ofb_kernels.kernels.product import (
    GROUP_M,
    column_parts,
    describable,
    described_tile,
    descriptor,
    grouped_tile,
    is_persistent,
    product_tile,
    programs,
    shared_bytes,
)
from ofb_kernels.kernels.tuning import run_configured

# Tile sizes, warps and pipeline stages for each element size in bytes (8: interpreted only), the default first.
BACKWARD_CONFIGURATIONS = {
    2: (
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=2),
        dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3),
    ),
    4: (dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3),),
    8: (dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),),
}
# PROGRAMS is how many of them share a multiprocessor.
PERSISTENT_BACKWARD_CONFIGURATIONS = (
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, HALVES=2, FLATTEN=False, PROGRAMS=2, num_warps=8, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, HALVES=1, FLATTEN=False, PROGRAMS=2, num_warps=8, num_stages=3),
)


def backward(
    grad_out: Tensor, fc2_weight: Tensor, slope: Tensor, activation: str | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients up to fc1's masked output.

    Args:
        grad_out: (M, E), any strides.
        fc2_weight: (E, N), any strides.
        slope: (M, N), contiguous; not looked at without an activation.
        activation: a name `activate` knows.

    Returns:
        du (M, N) in grad_out's dtype, and in accumulator precision its sums over parts of the rows (P, N), None without
        an activation.
    """
    if activation is None:
        return grad_out @ fc2_weight, None
    (rows, columns), inner = slope.shape, grad_out.shape[1]
    grad = torch.empty_like(slope)
    partial_dtype = torch.promote_types(slope.dtype, torch.float32)
    grad_out, in_columns = unit_rows(grad_out), fc2_weight.stride(1) == 1
    weight = fc2_weight if in_columns else unit_rows(fc2_weight.t())
    multiple = hidden_multiple(columns, inner, grad_out.stride(0), weight.stride(0))
    constants = dict(IN_COLUMNS=in_columns, GROUP_M=GROUP_M)

    def launch(configuration: dict) -> Tensor:
        block_m, block_n, block_k = (configuration[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        tiles_m = cdiv(rows, block_m)
        tiles = tiles_m * cdiv(columns, block_n)
        partial = slope.new_empty((tiles_m, columns), dtype=partial_dtype)
        if is_persistent(configuration):
            part = block_m, block_n // configuration["HALVES"]
            _persistent_backward_kernel[programs(configuration, tiles, slope)](
                descriptor(grad_out, (block_m, block_k)),
                descriptor(weight, (block_k, block_n) if in_columns else (block_n, block_k)),
                descriptor(slope, part), descriptor(grad, part), partial,
                rows, columns, inner, **constants, **configuration,
            )  # fmt: skip
        else:
            _backward_kernel[(tiles,)](
                grad_out, weight, slope, grad, partial,
                rows, columns, inner, grad_out.stride(0), weight.stride(0),
                MULTIPLE=multiple, ACCUMULATOR=accumulator_dtype(slope), PRECISION=dot_precision(),
                **constants, **configuration,
            )  # fmt: skip
        return partial

    if slope.numel() == 0:
        return grad, slope.new_zeros((1, columns), dtype=partial_dtype)
    size, sizes = slope.element_size(), (rows, columns, inner)
    kernel, candidates = f"masked_mlp.backward {size} bytes", BACKWARD_CONFIGURATIONS[size]
    if inner > 0 and describable(grad_out, weight, slope):
        kernel, candidates = f"{kernel}, described", PERSISTENT_BACKWARD_CONFIGURATIONS + candidates
    with on_device_of(slope):
        return grad, run_configured(kernel, candidates, sizes, slope, launch, lambda c: shared_bytes(c, size))


@triton.jit
def _backward_kernel(
    grad_out_ptr, weight_ptr, slope_ptr, grad_ptr, partial_ptr,
    rows, columns, inner, stride_grad_out, stride_weight,
    MULTIPLE: tl.constexpr, IN_COLUMNS: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns, inner = known_multiple(columns, MULTIPLE), known_multiple(inner, MULTIPLE)
    stride_grad_out, stride_weight = known_multiple(stride_grad_out, MULTIPLE), known_multiple(stride_weight, MULTIPLE)
    tile_m, tile_n = grouped_tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offsets_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    # dhidden = dout W₂
    grad_hidden = product_tile(
        grad_out_ptr, weight_ptr, offsets_m, offsets_n, rows, columns, inner, stride_grad_out, stride_weight,
        IN_COLUMNS, ACCUMULATOR, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # (BLOCK_M, BLOCK_N)  # fmt: skip
    offsets = offsets_m.to(tl.int64)[:, None] * columns + offsets_n[None, :]
    inside = (offsets_m < rows)[:, None] & in_columns[None, :]
    # du = dhidden ⊙ slope; rows outside have dout = 0
    grad = grad_hidden * tl.load(slope_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)
    tl.store(grad_ptr + offsets, grad, mask=inside)
    tl.store(partial_ptr + tile_m.to(tl.int64) * columns + offsets_n, tl.sum(grad, 0), mask=in_columns)


@triton.jit
def _persistent_backward_kernel(
    grad_out_desc, weight_desc, slope_desc, grad_desc, partial_ptr,
    rows, columns, inner,
    IN_COLUMNS: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr, FLATTEN: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    columns = known_multiple(columns, 8)  # descriptors take no others
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = grouped_tile(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        grad_hidden = described_tile(
            grad_out_desc, weight_desc, start_m, start_n, inner, IN_COLUMNS, BLOCK_M, BLOCK_N, BLOCK_K
        )
        row_ptr = partial_ptr + tile_m.to(tl.int64) * columns
        parts = column_parts(grad_hidden, BLOCK_M, BLOCK_N, HALVES)
        for part in tl.static_range(HALVES):
            _store_part(
                parts[part], slope_desc, grad_desc, row_ptr, start_m, start_n + part * (BLOCK_N // HALVES), columns,
                BLOCK_N // HALVES,
            )  # fmt: skip


@triton.jit
def _store_part(grad_hidden, slope_desc, grad_desc, row_ptr, start_m, start_n, columns, WIDTH: tl.constexpr):
    """The epilogue of WIDTH columns of a tile."""
    grad = grad_hidden * slope_desc.load([start_m, start_n]).to(tl.float32)
    grad_desc.store([start_m, start_n], grad.to(grad_desc.dtype))
    offsets_n = start_n + tl.arange(0, WIDTH)
    tl.store(row_ptr + offsets_n, tl.sum(grad, 0), mask=offsets_n < columns)
