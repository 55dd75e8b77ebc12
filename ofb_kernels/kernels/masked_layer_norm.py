"""Masked LayerNorm, alone or of a residual stream to which a branch is added on the way: whole rows in registers, a
chunk of rows for each program.

With a branch, x stands below for the new stream x + s·((branch + a) ⊙ v), s one number for each sample and a the bias
that the branch may still lack; it is written beside the norm's output, and its gradient dsum comes in beside dout:
           dx += dsum,   dbranch = s·dx ⊙ v,   da = v ⊙ Σ_rows s·dx,   dv = Σ_rows s·dx ⊙ branch + a ⊙ Σ_rows s·dx

Forward:   mean = Σ m⊙x / M,   var = Σ m⊙(x − mean)² / M,   n = (x − mean)·rstd,   out = (n⊙w + b)⊙m,   M = Σ m
Backward:  g = dout⊙w⊙m and, for each row, c1 = Σ g / M, c2 = Σ g⊙n / M
           dx = rstd·(g − m⊙(c1 + c2·n)),   dw = m⊙Σ_rows dout⊙n,   db = m⊙Σ_rows dout
           dm = w⊙Σ_rows dout⊙n + b⊙Σ_rows dout − Σ_rows (c1·n + ½·c2·(n² − var·rstd²))

Without a mask m is 1 everywhere, and has no gradient: a plain LayerNorm.

The sums over rows are kept per program in float32 and added up by one reduction: no atomics, the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.column_sums import column_sums
from ofb_kernels.kernels.common import accumulator_dtype, cdiv, hidden_multiple, known_multiple, on_device_of
from ofb_kernels.kernels.tuning import run_configured

# For each padded width, the default first. Widths up to 512 were measured on an H200: a row in one or two warps, which
# need no barrier, beats a row in four. With two STAGES a tile is fetched while another is computed. The others are not
# measured: 8 elements of a tile for each thread, 16 rows of a program forward and 32 backward.
FORWARD_CONFIGURATIONS = {
    128: (
        dict(BLOCK_M=8, STEPS=2, STAGES=1, num_warps=4),
        dict(BLOCK_M=2, STEPS=8, STAGES=1, num_warps=1),
        dict(BLOCK_M=4, STEPS=4, STAGES=1, num_warps=1),
    ),
    256: (
        dict(BLOCK_M=2, STEPS=8, STAGES=1, num_warps=1),
        dict(BLOCK_M=4, STEPS=4, STAGES=1, num_warps=4),
    ),
    512: (
        dict(BLOCK_M=1, STEPS=8, STAGES=1, num_warps=1),
        dict(BLOCK_M=2, STEPS=4, STAGES=1, num_warps=1),
    ),
    1024: (
        dict(BLOCK_M=2, STEPS=8, STAGES=1, num_warps=8),
        dict(BLOCK_M=1, STEPS=8, STAGES=1, num_warps=2),
        dict(BLOCK_M=1, STEPS=16, STAGES=1, num_warps=4),
        dict(BLOCK_M=2, STEPS=4, STAGES=1, num_warps=4),
        dict(BLOCK_M=1, STEPS=8, STAGES=2, num_warps=2),
    ),
    2048: (
        dict(BLOCK_M=1, STEPS=16, STAGES=1, num_warps=8),
        dict(BLOCK_M=1, STEPS=8, STAGES=1, num_warps=4),
    ),
    4096: (
        dict(BLOCK_M=1, STEPS=16, STAGES=1, num_warps=16),
        dict(BLOCK_M=1, STEPS=8, STAGES=1, num_warps=8),
    ),
}
BACKWARD_CONFIGURATIONS = {
    128: (
        dict(BLOCK_M=8, STEPS=4, STAGES=1, num_warps=4),
        dict(BLOCK_M=2, STEPS=16, STAGES=1, num_warps=1),
    ),
    256: (
        dict(BLOCK_M=1, STEPS=32, STAGES=2, num_warps=1),
        dict(BLOCK_M=1, STEPS=32, STAGES=1, num_warps=1),
    ),
    512: (
        dict(BLOCK_M=1, STEPS=32, STAGES=2, num_warps=2),
        dict(BLOCK_M=1, STEPS=32, STAGES=1, num_warps=4),
    ),
    1024: (
        dict(BLOCK_M=2, STEPS=16, STAGES=1, num_warps=8),
        dict(BLOCK_M=1, STEPS=32, STAGES=1, num_warps=4),
        dict(BLOCK_M=1, STEPS=32, STAGES=2, num_warps=4),
        dict(BLOCK_M=1, STEPS=32, STAGES=1, num_warps=8),
    ),
    2048: (
        dict(BLOCK_M=1, STEPS=32, STAGES=1, num_warps=8),
        dict(BLOCK_M=1, STEPS=32, STAGES=2, num_warps=8),
    ),
    4096: (dict(BLOCK_M=1, STEPS=32, STAGES=1, num_warps=16),),
}


class Branch(NamedTuple):
    """What is added to the residual stream: values (M, N), bias (N,) or None, mask (N,), and scale, one number for each
    sample or None.

    A sample is `rows_per_sample` consecutive rows.
    """

    values: Tensor
    bias: Tensor | None
    mask: Tensor
    scale: Tensor | None
    rows_per_sample: int


_NO_BRANCH = Branch(None, None, None, None, 1)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, dtype: torch.dtype,
    branch: Branch = _NO_BRANCH,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out (M, N) in `dtype`, the new stream (x itself without a branch), and mean (M,) and rstd (M,) in accumulator
    precision; x (M, N), the vectors (N,)."""
    rows, columns = x.shape
    out = x.new_empty((rows, columns), dtype=dtype)
    stream = x if branch.values is None else _stream_like(x, branch.values)
    mean = x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))
    rstd = torch.empty_like(mean)
    weight, bias, mask = weight.contiguous(), _contiguous(bias), _contiguous(mask)
    block_n = _padded_width(columns)

    def launch(configuration: dict) -> None:
        chunks = cdiv(rows, configuration["BLOCK_M"] * configuration["STEPS"])
        _forward_kernel[(chunks,)](
            x, weight, bias, mask, *_arguments(branch), out, stream, mean, rstd,
            rows, columns, branch.rows_per_sample, x.stride(0), x.stride(1), *_strides(branch.values),
            EPS=eps, ACCUMULATOR=accumulator_dtype(x), MULTIPLE=_multiple(x, branch.values),
            BLOCK_N=block_n, **configuration,
        )  # fmt: skip

    if x.numel() > 0:
        kernel = _name("forward", x, branch)
        with on_device_of(x):
            run_configured(kernel, FORWARD_CONFIGURATIONS[block_n], (rows, columns), x, launch)
    return out, stream, mean, rstd


def backward(
    grad_out: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    mean: Tensor, rstd: Tensor, eps: float,
    grad_stream: Tensor | None = None, branch: Branch = _NO_BRANCH,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """grad_x (M, N) in x's dtype; grad_branch (M, N) in the branch's, None without one; and grad_weight, grad_bias,
    grad_mask, with a branch its mask's gradient, with its bias that one's too, stacked (3 to 5, N), in accumulator
    precision.

    With a branch x is the new stream, and grad_stream (M, N) what comes back along it. One of grad_out and grad_stream
    may be None: nobody used that output.
    """
    rows, columns = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_branch, vectors = None, 3
    if branch.values is not None:
        grad_branch = torch.empty_like(branch.values, memory_format=torch.contiguous_format)
        vectors = 4 if branch.bias is None else 5
    weight, bias, mask = weight.contiguous(), _contiguous(bias), _contiguous(mask)
    block_n = _padded_width(columns)

    def launch(configuration: dict) -> Tensor:
        chunks = cdiv(rows, configuration["BLOCK_M"] * configuration["STEPS"])
        partial = mean.new_empty(chunks, vectors, columns)
        _backward_kernel[(chunks,)](
            grad_out, grad_stream, x, weight, bias, mask, *_arguments(branch),
            mean, rstd, grad_x, grad_branch, partial,
            rows, columns, branch.rows_per_sample,
            *_strides(grad_out), *_strides(grad_stream), *_strides(x), *_strides(branch.values),
            EPS=eps, ACCUMULATOR=accumulator_dtype(x),
            MULTIPLE=_multiple(grad_out, grad_stream, x, branch.values),
            BLOCK_N=block_n, **configuration,
        )  # fmt: skip
        return column_sums(partial.flatten(1)).view(vectors, columns)

    if x.numel() == 0:
        return grad_x, grad_branch, mean.new_zeros(vectors, columns)
    kernel = _name("backward", x, branch)
    with on_device_of(x):
        grad_vectors = run_configured(kernel, BACKWARD_CONFIGURATIONS[block_n], (rows, columns), x, launch)
    return grad_x, grad_branch, grad_vectors


def _stream_like(x: Tensor, branch: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))


def _arguments(branch: Branch) -> tuple[Tensor | None, ...]:
    return branch.values, *(_contiguous(each) for each in (branch.bias, branch.mask, branch.scale))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else matrix.stride()


def _name(direction: str, x: Tensor, branch: Branch) -> str:
    """What the choice of a configuration depends on beside the sizes."""
    added = "" if branch.values is None else "add_"
    return f"masked_{added}layer_norm.{direction} {x.element_size()} bytes"


def _padded_width(columns: int) -> int:
    return next(width for width in FORWARD_CONFIGURATIONS if columns <= width)


def _multiple(*matrices: Tensor | None) -> int:
    present = [each for each in matrices if each is not None]
    return hidden_multiple(*(length for each in present for length in (each.shape[1], each.stride(0))))


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, branch_ptr, branch_bias_ptr, branch_mask_ptr, sample_scale_ptr,
    out_ptr, stream_ptr, mean_ptr, rstd_ptr,
    rows, columns, rows_per_sample, stride_xm, stride_xn, stride_bm, stride_bn,
    EPS: tl.constexpr, ACCUMULATOR: tl.constexpr, MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M · STEPS rows."""
    columns = known_multiple(columns, MULTIPLE)
    stride_xm, stride_bm = known_multiple(stride_xm, MULTIPLE), known_multiple(stride_bm, MULTIPLE)
    offsets_n = tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    mask, total = _mask(mask_ptr, offsets_n, columns, ACCUMULATOR)  # (BLOCK_N,), M
    share = mask / total
    scale = tl.load(weight_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR) * mask  # (BLOCK_N,)
    for step in tl.range(STEPS, num_stages=STAGES):
        offsets_m = (tl.program_id(0) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = offsets_m < rows
        inside = in_rows[:, None] & in_columns[None, :]
        rows_m = offsets_m.to(tl.int64)[:, None]
        columns_n = offsets_n.to(tl.int64)[None, :]
        x_ptrs = x_ptr + rows_m * stride_xm + columns_n * stride_xn
        x = tl.load(x_ptrs, mask=inside, other=0.0).to(ACCUMULATOR)  # (BLOCK_M, BLOCK_N)
        if branch_ptr is not None:
            # x + s·((branch + a) ⊙ v), normalized as it is stored
            branch_ptrs = branch_ptr + rows_m * stride_bm + columns_n * stride_bn
            branch = tl.load(branch_ptrs, mask=inside, other=0.0).to(ACCUMULATOR)
            if branch_bias_ptr is not None:
                branch += tl.load(branch_bias_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)[None, :]
            scale_m = _sample_scale(sample_scale_ptr, offsets_m, in_rows, rows_per_sample, ACCUMULATOR)
            branch_mask = tl.load(branch_mask_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)
            stream = (x + branch * branch_mask[None, :] * scale_m[:, None]).to(stream_ptr.dtype.element_ty)
            tl.store(stream_ptr + rows_m * columns + offsets_n[None, :], stream, mask=inside)
            x = stream.to(ACCUMULATOR)
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
    grad_out_ptr, grad_stream_ptr, x_ptr, weight_ptr, bias_ptr, mask_ptr,
    branch_ptr, branch_bias_ptr, branch_mask_ptr, sample_scale_ptr,
    mean_ptr, rstd_ptr, grad_x_ptr, grad_branch_ptr, partial_ptr,
    rows, columns, rows_per_sample,
    stride_gm, stride_gn, stride_sm, stride_sn, stride_xm, stride_xn, stride_bm, stride_bn,
    EPS: tl.constexpr, ACCUMULATOR: tl.constexpr, MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M · STEPS rows. The sums over rows stay (BLOCK_M, BLOCK_N) until the end: no exchange."""
    columns = known_multiple(columns, MULTIPLE)
    stride_gm, stride_sm = known_multiple(stride_gm, MULTIPLE), known_multiple(stride_sm, MULTIPLE)
    stride_xm, stride_bm = known_multiple(stride_xm, MULTIPLE), known_multiple(stride_bm, MULTIPLE)
    offsets_n = tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    mask, total = _mask(mask_ptr, offsets_n, columns, ACCUMULATOR)  # (BLOCK_N,), M
    weight = tl.load(weight_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
    scale = weight * mask
    sum_product = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)  # dout⊙n
    sum_grad_out = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)  # dout
    sum_statistics = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)  # c1·n + ½·c2·(n² − var·rstd²)
    VECTORS: tl.constexpr = 3 if branch_ptr is None else 4 if branch_bias_ptr is None else 5
    if branch_ptr is not None:
        branch_mask = tl.load(branch_mask_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)  # (BLOCK_N,)
        sum_branch = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)  # s·dx ⊙ branch
        sum_scaled = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)  # s·dx
    for step in tl.range(STEPS, num_stages=STAGES):
        offsets_m = (tl.program_id(0) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = offsets_m < rows
        inside = in_rows[:, None] & in_columns[None, :]
        rows_m = offsets_m.to(tl.int64)[:, None]
        columns_n = offsets_n.to(tl.int64)[None, :]
        x = tl.load(x_ptr + rows_m * stride_xm + columns_n * stride_xn, mask=inside, other=0.0).to(ACCUMULATOR)
        grad_out = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        if grad_out_ptr is not None:
            grad_out_ptrs = grad_out_ptr + rows_m * stride_gm + columns_n * stride_gn
            grad_out = tl.load(grad_out_ptrs, mask=inside, other=0.0).to(ACCUMULATOR)
        mean = tl.load(mean_ptr + offsets_m, mask=in_rows, other=0.0)  # (BLOCK_M,)
        rstd = tl.load(rstd_ptr + offsets_m, mask=in_rows, other=0.0)  # (BLOCK_M,)
        # g = dout⊙w⊙m, c1 = Σ g / M, c2 = Σ g⊙n / M, dx = rstd·(g − m⊙(c1 + c2·n))
        normalized = (x - mean[:, None]) * rstd[:, None]  # (BLOCK_M, BLOCK_N)
        grad_normalized = grad_out * scale[None, :]
        c1 = tl.sum(grad_normalized, 1)[:, None] / total  # (BLOCK_M, 1)
        c2 = tl.sum(grad_normalized * normalized, 1)[:, None] / total
        grad_x = rstd[:, None] * (grad_normalized - mask[None, :] * (c1 + c2 * normalized))
        if branch_ptr is not None:
            # dx += dsum, dbranch = s·dx ⊙ v
            if grad_stream_ptr is not None:
                grad_stream_ptrs = grad_stream_ptr + rows_m * stride_sm + columns_n * stride_sn
                grad_x += tl.load(grad_stream_ptrs, mask=inside, other=0.0).to(ACCUMULATOR)
            branch_ptrs = branch_ptr + rows_m * stride_bm + columns_n * stride_bn
            branch = tl.load(branch_ptrs, mask=inside, other=0.0).to(ACCUMULATOR)
            scale_m = _sample_scale(sample_scale_ptr, offsets_m, in_rows, rows_per_sample, ACCUMULATOR)
            grad_scaled = grad_x * scale_m[:, None]  # (BLOCK_M, BLOCK_N)
            grad_branch = grad_scaled * branch_mask[None, :]
            tl.store(grad_branch_ptr + rows_m * columns + offsets_n[None, :], grad_branch, mask=inside)
            sum_branch += grad_scaled * branch
            if branch_bias_ptr is not None:
                sum_scaled += grad_scaled
        tl.store(grad_x_ptr + rows_m * columns + offsets_n[None, :], grad_x, mask=inside)
        sum_product += grad_out * normalized
        sum_grad_out += grad_out
        if mask_ptr is not None:
            # var·rstd² = 1 − eps·rstd²
            relative_variance = 1.0 - EPS * rstd * rstd
            sum_statistics += c1 * normalized + 0.5 * c2 * (normalized * normalized - relative_variance[:, None])
    product = tl.sum(sum_product, 0)  # (BLOCK_N,)
    grad_out = tl.sum(sum_grad_out, 0)
    grad_mask = weight * product - tl.sum(sum_statistics, 0)
    if bias_ptr is not None:
        grad_mask += tl.load(bias_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR) * grad_out
    partial_ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * VECTORS * columns + offsets_n
    tl.store(partial_ptrs, mask * product, mask=in_columns)
    tl.store(partial_ptrs + columns, mask * grad_out, mask=in_columns)
    tl.store(partial_ptrs + 2 * columns, grad_mask, mask=in_columns)
    if branch_ptr is not None:
        # da = v ⊙ Σ_rows s·dx, dv = Σ_rows s·dx ⊙ branch + a ⊙ Σ_rows s·dx
        grad_branch_mask = tl.sum(sum_branch, 0)
        if branch_bias_ptr is not None:
            grad_scaled = tl.sum(sum_scaled, 0)
            branch_bias = tl.load(branch_bias_ptr + offsets_n, mask=in_columns, other=0.0).to(ACCUMULATOR)
            grad_branch_mask += branch_bias * grad_scaled
            tl.store(partial_ptrs + 4 * columns, branch_mask * grad_scaled, mask=in_columns)
        tl.store(partial_ptrs + 3 * columns, grad_branch_mask, mask=in_columns)


@triton.jit
def _mask(mask_ptr, offsets_n, columns, ACCUMULATOR: tl.constexpr):
    """(BLOCK_N,), 0 beyond the last column, and its sum; ones where none is given."""
    if mask_ptr is None:
        return (offsets_n < columns).to(ACCUMULATOR), columns.to(ACCUMULATOR)
    else:
        mask = tl.load(mask_ptr + offsets_n, mask=offsets_n < columns, other=0.0).to(ACCUMULATOR)
        return mask, tl.sum(mask, 0)


@triton.jit
def _sample_scale(sample_scale_ptr, offsets_m, in_rows, rows_per_sample, ACCUMULATOR: tl.constexpr):
    """The factor of each row's sample (BLOCK_M,), 1 where none is given."""
    if sample_scale_ptr is None:
        return tl.full(offsets_m.shape, 1.0, ACCUMULATOR)
    else:
        return tl.load(sample_scale_ptr + offsets_m // rows_per_sample, mask=in_rows, other=0.0).to(ACCUMULATOR)
