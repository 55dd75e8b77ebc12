"""Sums over the rows of a matrix: one or two launches of the same kernel, no atomics, the same bits every time.

torch.sum is far from the memory's speed where columns are few and long (benchmarks/NOTES.md). The sums that other
kernels leave for each of their programs are some hundred or thousand rows, still in L2: narrow programs with tall tiles
are through with them in a few loads one after the other, and a second launch would take as long.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import (
    accumulator_dtype,
    cdiv,
    hidden_multiple,
    known_multiple,
    on_device_of,
    unit_rows,
)

FEW_ROWS = 4096  # in one launch
FEW = dict(BLOCK_M=512, BLOCK_N=8, num_warps=8)
CHUNKS = dict(BLOCK_M=32, BLOCK_N=128, num_warps=4)


def column_sums(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Σ over the rows of (M, N), in accumulator precision or `dtype`."""
    dtype = dtype or torch.promote_types(matrix.dtype, torch.float32)
    if matrix.numel() == 0:
        return matrix.new_zeros(matrix.shape[1], dtype=dtype)
    matrix, wide = unit_rows(matrix), torch.promote_types(matrix.dtype, torch.float32)
    with on_device_of(matrix):
        while len(matrix) > FEW_ROWS:
            steps = max(1, triton.next_power_of_2(math.isqrt(len(matrix))) // CHUNKS["BLOCK_M"])
            matrix = _launch(matrix, wide, steps, CHUNKS)
        return _launch(matrix, dtype, cdiv(len(matrix), FEW["BLOCK_M"]), FEW)[0]


def _launch(matrix: Tensor, dtype: torch.dtype, steps: int, tile: dict) -> Tensor:
    """(chunks, N): the sums of each chunk of BLOCK_M · steps rows."""
    rows, columns = matrix.shape
    chunks = cdiv(rows, tile["BLOCK_M"] * steps)
    sums = matrix.new_empty((chunks, columns), dtype=dtype)
    _column_sums_kernel[(cdiv(columns, tile["BLOCK_N"]), chunks)](
        matrix, sums, rows, columns, matrix.stride(0), steps,
        MULTIPLE=hidden_multiple(columns, matrix.stride(0)), ACCUMULATOR=accumulator_dtype(matrix), **tile,
    )  # fmt: skip
    return sums


@triton.jit
def _column_sums_kernel(
    matrix_ptr, sums_ptr,
    rows, columns, stride, steps,
    MULTIPLE: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of one chunk."""
    columns, stride = known_multiple(columns, MULTIPLE), known_multiple(stride, MULTIPLE)
    offsets_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = offsets_n < columns
    total = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for step in range(steps):
        offsets_m = (tl.program_id(1) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        pointers = matrix_ptr + offsets_m.to(tl.int64)[:, None] * stride + offsets_n[None, :]
        inside = (offsets_m < rows)[:, None] & in_columns[None, :]
        total += tl.load(pointers, mask=inside, other=0.0).to(ACCUMULATOR)
    tl.store(sums_ptr + tl.program_id(1) * columns + offsets_n, tl.sum(total, 0), mask=in_columns)
