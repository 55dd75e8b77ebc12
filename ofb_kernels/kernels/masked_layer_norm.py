"""Masked LayerNorm: whole rows in registers, a chunk of rows for each program.

Forward:   mean = Σ m⊙x / M,   var = Σ m⊙(x − mean)² / M,   n = (x − mean)·rstd,   out = (n⊙w + b)⊙m,   M = Σ m
Backward:  g = dout⊙w⊙m and, for each row, c1 = Σ g / M, c2 = Σ g⊙n / M
           dx = rstd·(g − m⊙(c1 + c2·n)),   dw = m⊙Σ_rows dout⊙n,   db = m⊙Σ_rows dout
           dm = w⊙Σ_rows dout⊙n + b⊙Σ_rows dout − Σ_rows (c1·n + ½·c2·(n² − var·rstd²))

The sums over rows are kept per program in float32 and added up by one reduction: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import accumulator_dtype, on_device_of

# For each padded width: 8 elements of a tile for each thread, 16 rows for each program forward and 32 backward.
FORWARD_CONFIGURATIONS = {
    128: dict(BLOCK_M=8, STEPS=2, num_warps=4),
    256: dict(BLOCK_M=4, STEPS=4, num_warps=4),
    512: dict(BLOCK_M=2, STEPS=8, num_warps=4),
    1024: dict(BLOCK_M=2, STEPS=8, num_warps=8),
    2048: dict(BLOCK_M=1, STEPS=16, num_warps=8),
    4096: dict(BLOCK_M=1, STEPS=16, num_warps=16),
}
BACKWARD_CONFIGURATIONS = {
    width: forward | dict(STEPS=2 * forward["STEPS"]) for width, forward in FORWARD_CONFIGURATIONS.items()
}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """out (M, N) in `dtype`; mean (M,) and rstd (M,) in accumulator precision; x (M, N), the vectors (N,)."""
    rows, columns = x.shape
    out = x.new_empty((rows, columns), dtype=dtype)
    mean = x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))
    rstd = torch.empty_like(mean)
    block_n, configuration = _configuration(FORWARD_CONFIGURATIONS, columns)
    chunks = triton.cdiv(rows, configuration["BLOCK_M"] * configuration["STEPS"])
    if x.numel() > 0:
        with on_device_of(x):
            _forward_kernel[(chunks,)](
                x, weight.contiguous(), None if bias is None else bias.contiguous(), mask.contiguous(),
                out, mean, rstd,
                rows, columns, x.stride(0), x.stride(1),
                EPS=eps, ACCUMULATOR=accumulator_dtype(x), BLOCK_N=block_n, **configuration,
            )  # fmt: skip
    return out, mean, rstd


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor,
    mean: Tensor, rstd: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad_x (M, N) in x's dtype; grad_weight, grad_bias and grad_mask stacked (3, N), in accumulator precision."""
    rows, columns = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_n, configuration = _configuration(BACKWARD_CONFIGURATIONS, columns)
    chunks = triton.cdiv(rows, configuration["BLOCK_M"] * configuration["STEPS"])
    partial = mean.new_empty(chunks, 3, columns)
    if x.numel() > 0:
        with on_device_of(x):
            _backward_kernel[(chunks,)](
                grad_out, x, weight.contiguous(), None if bias is None else bias.contiguous(), mask.contiguous(),
                mean, rstd, grad_x, partial,
                rows, columns, grad_out.stride(0), grad_out.stride(1), x.stride(0), x.stride(1),
                EPS=eps, ACCUMULATOR=accumulator_dtype(x), BLOCK_N=block_n, **configuration,
            )  # fmt: skip
    return grad_x, partial.sum(0)


def _configuration(configurations: dict[int, dict], columns: int) -> tuple[int, dict]:
    """The smallest padded width that holds a row, and its configuration."""
    return next((width, configuration) for width, configuration in configurations.items() if columns <= width)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, out_ptr, mean_ptr, rstd_ptr,
    rows, columns, stride_xm, stride_xn,
    EPS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M · STEPS rows."""
    offsets_n = tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    mask = tl.load(mask_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    share = mask / tl.sum(mask, 0)
    scale = tl.load(weight_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR) * mask  # (BLOCK_N,)
    for step in range(STEPS):
        offsets_m = (tl.program_id(0) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = offsets_m < rows
        inside = in_rows[:, None] & in_columns[None, :]
        rows_m = offsets_m.to(tl.int64)[:, None]
        x_offsets = rows_m * stride_xm + offsets_n.to(tl.int64)[None, :] * stride_xn
        x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0).to(ACCUMULATOR)  # (BLOCK_M, BLOCK_N)
        # mean = Σ m⊙x / M, var = Σ m⊙(x − mean)² / M
        mean = tl.sum(x * share[None, :], 1)  # (BLOCK_M,)
        centered = x - mean[:, None]
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered * share[None, :], 1) + EPS)
        # out = (n⊙w + b)⊙m
        out = centered * rstd[:, None] * scale[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)
            out += (bias * mask)[None, :]
        tl.store(out_ptr + rows_m * columns + offsets_n[None, :], out, mask=inside)
        tl.store(mean_ptr + offsets_m, mean, mask=in_rows)
        tl.store(rstd_ptr + offsets_m, rstd, mask=in_rows)


@triton.jit
def _backward_kernel(
    grad_out_ptr, x_ptr, weight_ptr, bias_ptr, mask_ptr, mean_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    rows, columns, stride_gm, stride_gn, stride_xm, stride_xn,
    EPS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M · STEPS rows. The sums over rows stay (BLOCK_M, BLOCK_N) until the end: no exchange."""
    offsets_n = tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    mask = tl.load(mask_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    total = tl.sum(mask, 0)
    weight = tl.load(weight_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    scale = weight * mask
    sum_product = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)  # dout⊙n
    sum_grad_out = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)  # dout
    sum_statistics = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)  # c1·n + ½·c2·(n² − var·rstd²)
    for step in range(STEPS):
        offsets_m = (tl.program_id(0) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = offsets_m < rows
        inside = in_rows[:, None] & in_columns[None, :]
        rows_m = offsets_m.to(tl.int64)[:, None]
        columns_n = offsets_n.to(tl.int64)[None, :]
        x = tl.load(x_ptr + rows_m * stride_xm + columns_n * stride_xn, mask=inside, other=0.0).to(ACCUMULATOR)
        grad_out_ptrs = grad_out_ptr + rows_m * stride_gm + columns_n * stride_gn
        grad_out = tl.load(grad_out_ptrs, mask=inside, other=0.0).to(ACCUMULATOR)  # (BLOCK_M, BLOCK_N)
        mean = tl.load(mean_ptr + offsets_m, mask=in_rows, other=0.0)  # (BLOCK_M,)
        rstd = tl.load(rstd_ptr + offsets_m, mask=in_rows, other=0.0)  # (BLOCK_M,)
        # g = dout⊙w⊙m, c1 = Σ g / M, c2 = Σ g⊙n / M, dx = rstd·(g − m⊙(c1 + c2·n))
        normalized = (x - mean[:, None]) * rstd[:, None]  # (BLOCK_M, BLOCK_N)
        grad_normalized = grad_out * scale[None, :]
        c1 = tl.sum(grad_normalized, 1)[:, None] / total  # (BLOCK_M, 1)
        c2 = tl.sum(grad_normalized * normalized, 1)[:, None] / total
        grad_x = rstd[:, None] * (grad_normalized - mask[None, :] * (c1 + c2 * normalized))
        tl.store(grad_x_ptr + rows_m * columns + offsets_n[None, :], grad_x, mask=inside)
        sum_product += grad_out * normalized
        sum_grad_out += grad_out
        # var·rstd² = 1 − eps·rstd²
        relative_variance = 1.0 - EPS * rstd * rstd
        sum_statistics += c1 * normalized + 0.5 * c2 * (normalized * normalized - relative_variance[:, None])
    product = tl.sum(sum_product, 0)  # (BLOCK_N,)
    grad_out = tl.sum(sum_grad_out, 0)
    grad_mask = weight * product - tl.sum(sum_statistics, 0)
    if bias_ptr is not None:
        grad_mask += tl.load(bias_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR) * grad_out
    partial_ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * 3 * columns + offsets_n
    tl.store(partial_ptrs, mask * product, mask=in_columns)
    tl.store(partial_ptrs + columns, mask * grad_out, mask=in_columns)
    tl.store(partial_ptrs + 2 * columns, grad_mask, mask=in_columns)
