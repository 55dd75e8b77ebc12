"""Masked linear layer: folded weights, and a product whose epilogue adds the bias and applies the activation.

Forward:   u = x W_fᵀ + b_f,   out = act(u),   slope = act'(u), with W_f = W ⊙ m and b_f = b ⊙ m (fold.py)
Backward:  du = dout ⊙ slope and Σ_rows du here; dx = du W_f, and dW_f = duᵀ x gives the gradients of W, b and m
No pass over rows sees the mask, unless rows are few: then u = (x Wᵀ + b) ⊙ m in the epilogue, and dx = (du ⊙ m) W.
Products without an activation have no epilogue to fuse and stay with cuBLAS; nothing is kept of them, and du = dout.

The column sums of du are kept per program in float32, and `fold` adds them up: no atomics, the same bits every time.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import (
    accumulator_dtype,
    activate,
    activation_slope,
    cdiv,
    dot_precision,
    hidden_multiple,
    known_multiple,
    on_device_of,
    unit_rows,
)
from ofb_kernels.kernels.fold import fold
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
from ofb_kernels.rows import few_rows

# Tile sizes, warps and pipeline stages for each element size in bytes (8: interpreted only), the default first.
FORWARD_CONFIGURATIONS = {
    2: (
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=2),
        dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
        dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
    ),
    4: (dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3),),
    8: (dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),),
}
# PROGRAMS is how many of them share a multiprocessor.
PERSISTENT_FORWARD_CONFIGURATIONS = (
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, HALVES=2, FLATTEN=True, PROGRAMS=2, num_warps=8, num_stages=3),
)
BACKWARD_CONFIGURATIONS = (
    dict(BLOCK_M=32, BLOCK_N=128, STEPS=8, num_warps=4, num_stages=2),
    dict(BLOCK_M=64, BLOCK_N=64, STEPS=8, num_warps=4, num_stages=2),
)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what the backward needs of it if `keep`.

    Args:
        x: (M, K).
        weight: (N, K), of any dtype, as bias and mask are.
        bias: (N,) or None.
        mask: (N,), or None for a plain layer.
        activation: a name `activate` knows, or None.
        keep: whether a backward follows.

    Returns:
        out (M, N); slope (M, N), empty without an activation; what x was multiplied with (N, K), empty if it is W.
    """
    on_output = mask if few_rows(x) else None
    folded_weight, folded_bias = fold(weight, bias, mask if on_output is None else None, x.dtype)
    if activation is None:
        out, slope = F.linear(x, folded_weight, folded_bias), x.new_empty(0, len(weight))
        out = out if on_output is None else (out * on_output).to(x.dtype)
    else:
        out, slope = _with_activation(x, folded_weight, folded_bias, on_output, activation, keep)
    return out, slope, folded_weight if keep and folded_weight is not weight else x.new_empty(0)


def _with_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str, save_slope: bool
) -> tuple[Tensor, Tensor]:
    """act((x Wᵀ + b) ⊙ mask) and its slope, (M, N) each, the latter empty if it is not to be saved."""
    rows, inner = x.shape
    columns = weight.shape[0]
    x, weight = unit_rows(x), unit_rows(weight)
    bias, mask = (None if each is None else each.contiguous() for each in (bias, mask))
    out = x.new_empty(rows, columns)
    slope = x.new_empty((rows, columns) if save_slope else (0, columns))
    multiple = hidden_multiple(columns, inner, x.stride(0), weight.stride(0))
    constants = dict(ACTIVATION=activation, SAVE_SLOPE=save_slope, GROUP_M=GROUP_M)

    def launch(configuration: dict) -> None:
        block_m, block_n, block_k = (configuration[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        tiles = cdiv(rows, block_m) * cdiv(columns, block_n)
        if is_persistent(configuration):
            written = block_m, block_n // configuration["HALVES"]
            _persistent_forward_kernel[programs(configuration, tiles, x)](
                descriptor(x, (block_m, block_k)), descriptor(weight, (block_n, block_k)), bias, mask,
                descriptor(out, written), descriptor(slope if save_slope else out, written),
                rows, columns, inner, **constants, **configuration,
            )  # fmt: skip
            return
        _forward_kernel[(tiles,)](
            x, weight, bias, mask, out, slope,
            rows, columns, inner, x.stride(0), weight.stride(0),
            MULTIPLE=multiple, ACCUMULATOR=accumulator_dtype(x), PRECISION=dot_precision(),
            **constants, **configuration,
        )  # fmt: skip

    if out.numel() > 0:
        size = x.element_size()
        kernel, candidates = f"masked_linear.forward {size} bytes", FORWARD_CONFIGURATIONS[size]
        if inner > 0 and describable(x, weight, out):
            kernel, candidates = f"{kernel}, described", PERSISTENT_FORWARD_CONFIGURATIONS + candidates
        with on_device_of(x):
            run_configured(kernel, candidates, (rows, columns, inner), x, launch, lambda c: shared_bytes(c, size))
    return out, slope


def backward(grad_out: Tensor, slope: Tensor, activation: str | None) -> tuple[Tensor, Tensor | None]:
    """du (M, N) in grad_out's dtype, and in accumulator precision its sums over parts of the rows (P, N); grad_out and
    slope (M, N).

    Without an activation grad_out itself, and no sums yet.
    """
    if activation is None:
        return grad_out, None
    rows, columns = slope.shape
    partial_dtype = torch.promote_types(slope.dtype, torch.float32)
    grad_out, grad = unit_rows(grad_out), torch.empty_like(slope)
    multiple = hidden_multiple(columns, grad_out.stride(0))

    def launch(configuration: dict) -> Tensor:
        chunks = cdiv(rows, configuration["BLOCK_M"] * configuration["STEPS"])
        partial = slope.new_empty((chunks, columns), dtype=partial_dtype)
        _backward_kernel[(chunks * cdiv(columns, configuration["BLOCK_N"]),)](
            grad_out, slope, grad, partial, rows, columns, grad_out.stride(0),
            MULTIPLE=multiple, ACCUMULATOR=accumulator_dtype(slope), **configuration,
        )  # fmt: skip
        return partial

    if slope.numel() == 0:
        return grad, slope.new_zeros((1, columns), dtype=partial_dtype)
    kernel = f"masked_linear.backward {slope.element_size()} bytes"
    with on_device_of(slope):
        return grad, run_configured(kernel, BACKWARD_CONFIGURATIONS, (rows, columns), slope, launch)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, out_ptr, slope_ptr,
    rows, columns, inner, stride_x, stride_weight,
    MULTIPLE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE_SLOPE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns, inner = known_multiple(columns, MULTIPLE), known_multiple(inner, MULTIPLE)
    stride_x, stride_weight = known_multiple(stride_x, MULTIPLE), known_multiple(stride_weight, MULTIPLE)
    tile_m, tile_n = grouped_tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offsets_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    product = product_tile(
        x_ptr, weight_ptr, offsets_m, offsets_n, rows, columns, inner, stride_x, stride_weight,
        False, ACCUMULATOR, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # (BLOCK_M, BLOCK_N)  # fmt: skip
    masked = _masked(product, bias_ptr, mask_ptr, offsets_n, columns)
    offsets = offsets_m.to(tl.int64)[:, None] * columns + offsets_n[None, :]
    inside = (offsets_m < rows)[:, None] & (offsets_n < columns)[None, :]
    tl.store(out_ptr + offsets, activate(masked, ACTIVATION), mask=inside)
    if SAVE_SLOPE:
        tl.store(slope_ptr + offsets, activation_slope(masked, ACTIVATION), mask=inside)


@triton.jit
def _persistent_forward_kernel(
    x_desc, weight_desc, bias_ptr, mask_ptr, out_desc, slope_desc,
    rows, columns, inner,
    ACTIVATION: tl.constexpr, SAVE_SLOPE: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr, FLATTEN: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    columns = known_multiple(columns, 8)  # descriptors take no others
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = grouped_tile(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        product = described_tile(x_desc, weight_desc, start_m, start_n, inner, False, BLOCK_M, BLOCK_N, BLOCK_K)
        parts = column_parts(product, BLOCK_M, BLOCK_N, HALVES)
        for part in tl.static_range(HALVES):
            _store_part(
                parts[part], bias_ptr, mask_ptr, out_desc, slope_desc, start_m, start_n + part * (BLOCK_N // HALVES),
                columns, ACTIVATION, SAVE_SLOPE, BLOCK_N // HALVES,
            )  # fmt: skip


@triton.jit
def _store_part(
    product, bias_ptr, mask_ptr, out_desc, slope_desc, start_m, start_n, columns,
    ACTIVATION: tl.constexpr, SAVE_SLOPE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The epilogue of WIDTH columns of a tile."""
    masked = _masked(product, bias_ptr, mask_ptr, start_n + tl.arange(0, WIDTH), columns)
    out_desc.store([start_m, start_n], activate(masked, ACTIVATION).to(out_desc.dtype))
    if SAVE_SLOPE:
        slope_desc.store([start_m, start_n], activation_slope(masked, ACTIVATION).to(slope_desc.dtype))


@triton.jit
def _masked(product, bias_ptr, mask_ptr, offsets_n, columns):
    """u = (x Wᵀ + b) ⊙ m, bias and mask where they are given."""
    in_columns = offsets_n < columns
    if bias_ptr is not None:
        product += tl.load(bias_ptr + offsets_n, mask=in_columns, other=0.0).to(product.dtype)[None, :]
    if mask_ptr is not None:
        product *= tl.load(mask_ptr + offsets_n, mask=in_columns, other=0.0).to(product.dtype)[None, :]
    return product


@triton.jit
def _backward_kernel(
    grad_out_ptr, slope_ptr, grad_ptr, partial_ptr,
    rows, columns, stride_grad_out,
    MULTIPLE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of BLOCK_M · STEPS rows."""
    columns, stride_grad_out = known_multiple(columns, MULTIPLE), known_multiple(stride_grad_out, MULTIPLE)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    offsets_n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    sums = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for step in range(STEPS):
        offsets_m = (chunk * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (offsets_m < rows)[:, None] & in_columns[None, :]
        rows_m = offsets_m.to(tl.int64)[:, None]
        offsets = rows_m * columns + offsets_n[None, :]
        slope = tl.load(slope_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)  # (BLOCK_M, BLOCK_N)
        grad_out_ptrs = grad_out_ptr + rows_m * stride_grad_out + offsets_n[None, :]
        grad = tl.load(grad_out_ptrs, mask=inside, other=0.0).to(ACCUMULATOR) * slope
        tl.store(grad_ptr + offsets, grad, mask=inside)
        sums += grad
    tl.store(partial_ptr + chunk.to(tl.int64) * columns + offsets_n, tl.sum(sums, 0), mask=in_columns)
