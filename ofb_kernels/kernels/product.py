"""The product that kernels with an epilogue start from: which tile a program works on, and that tile of A Bᵀ.

Two forms. The plain one takes one tile a program and pointers, on any GPU and with any sizes. The persistent one is for
Hopper and newer: a few programs on each multiprocessor walk over all tiles, and the tensor memory accelerator brings
the operands and takes the results, so that one tile's epilogue hides behind the next one's product.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ofb_kernels.dispatch import INTERPRETED

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

GROUP_M = 8  # consecutive programs share GROUP_M row tiles, so their weight tiles are still in L2
HOPPER = 90


def shared_bytes(configuration: dict, size: int) -> int:
    """Bytes of shared memory that a block takes at most: the operands' tiles of all pipeline stages, and in the
    persistent form two tiles of the epilogue and a barrier for each copy.

    `size` is that of an element in bytes.
    """
    block_m, block_n, stages = (configuration[name] for name in ("BLOCK_M", "BLOCK_N", "num_stages"))
    operands = stages * (block_m + block_n) * configuration["BLOCK_K"] * size
    if not is_persistent(configuration):
        return operands
    return operands + 2 * block_m * block_n // configuration["HALVES"] * size + 16 * (stages + 1)


def is_persistent(configuration: dict) -> bool:
    return "PROGRAMS" in configuration


def describable(*matrices: Tensor) -> bool:
    """Whether the persistent form can take these: Hopper, half precision, every row at a multiple of 16 bytes."""
    return all(
        each.element_size() == 2 and each.stride(1) == 1 and each.stride(0) % 8 == 0 and each.data_ptr() % 16 == 0
        for each in matrices
    ) and _has_tensor_memory_accelerator(matrices[0])


def _has_tensor_memory_accelerator(like: Tensor) -> bool:
    if TensorDescriptor is None or INTERPRETED:
        return TensorDescriptor is not None
    return _capability(like.device.index) >= HOPPER if like.is_cuda else _target_capability() >= HOPPER


@functools.cache
def _capability(device_index: int) -> int:
    return _target_capability()


def _target_capability() -> int:
    """Of what Triton compiles for: 90 for Hopper, 0 for another vendor's GPU."""
    target = driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def descriptor(matrix: Tensor, block: tuple[int, int]) -> "TensorDescriptor":
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def programs(configuration: dict, tiles: int, like: Tensor) -> tuple[int]:
    """The persistent form's grid."""
    multiprocessors = torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 1
    return (min(tiles, configuration["PROGRAMS"] * multiprocessors),)


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


@triton.jit
def described_tile(
    a_desc, b_desc, start_m, start_n, inner,
    B_IN_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors; what lies outside is zero."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, inner, BLOCK_K):
        a = a_desc.load([start_m, start_k])  # (BLOCK_M, BLOCK_K)
        if B_IN_COLUMNS:
            b = b_desc.load([start_k, start_n])  # (BLOCK_K, BLOCK_N)
        else:
            b = b_desc.load([start_n, start_k]).T
        accumulator = tl.dot(a, b, accumulator)
    return accumulator


@triton.jit
def column_parts(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """The tile, or its left and right half: an epilogue takes fewer registers for each."""
    if HALVES == 2:
        return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    else:
        return (tile,)
