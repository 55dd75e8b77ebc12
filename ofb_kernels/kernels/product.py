"""The product that kernels with an epilogue start from: which tile a program works on, and that tile of A Bᵀ."""

import triton
import triton.language as tl

GROUP_M = 8  # consecutive programs share GROUP_M row tiles, so their weight tiles are still in L2


def shared_bytes(configuration: dict, size: int) -> int:
    """Bytes of shared memory that a block takes at most: the operands' tiles of all pipeline stages.

    `size` is that of an element in bytes.
    """
    rows = configuration["BLOCK_M"] + configuration["BLOCK_N"]
    return configuration["num_stages"] * rows * configuration["BLOCK_K"] * size


@triton.jit
def grouped_tile(program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of this program's tile, walking GROUP_M row tiles before the next column of tiles."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_rows = min(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first_m + within % group_rows, within // group_rows


@triton.jit
def product_tile(
    a_ptr, b_ptr, offsets_m, offsets_n, rows, columns, inner, stride_a, stride_b,
    B_IN_COLUMNS: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of A Bᵀ for A (rows, inner) and B (columns, inner).

    stride_a and stride_b lead from a row of A and B to the next; with B_IN_COLUMNS stride_b leads from one inner
    position of B to the next, and its columns lie side by side.
    """
    offsets_k = tl.arange(0, BLOCK_K)
    in_rows = (offsets_m < rows)[:, None]
    in_columns = (offsets_n < columns)[None, :]
    a_ptrs = a_ptr + offsets_m.to(tl.int64)[:, None] * stride_a + offsets_k[None, :]
    if B_IN_COLUMNS:
        b_ptrs = b_ptr + offsets_k.to(tl.int64)[:, None] * stride_b + offsets_n[None, :]
        b_step = tl.full((), BLOCK_K, tl.int64) * stride_b  # it may pass 2³¹
    else:
        b_ptrs = b_ptr + offsets_n.to(tl.int64)[None, :] * stride_b + offsets_k[:, None]
        b_step = tl.full((), BLOCK_K, tl.int64)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for start_k in range(0, inner, BLOCK_K):
        in_inner = offsets_k < inner - start_k
        a = tl.load(a_ptrs, mask=in_rows & in_inner[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        b = tl.load(b_ptrs, mask=in_inner[:, None] & in_columns, other=0.0)  # (BLOCK_K, BLOCK_N)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        a_ptrs += BLOCK_K
        b_ptrs += b_step
    return accumulator
