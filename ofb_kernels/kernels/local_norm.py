"""Local normalization: window sums down the columns, then along the rows with the normalization behind them.

Two passes of `window` additions a pixel instead of window². Each sum is added up afresh: a running sum would drift,
and the variance is a difference of two such sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import accumulator_dtype, on_device_of

CONFIGURATION = dict(BLOCK_H=16, BLOCK_W=64, num_warps=4, num_stages=2)


def forward(images: Tensor, window: int, eps: float) -> Tensor:
    """(x − μ) / √(σ² + eps) in images' dtype; images (B, C, H, W) of any strides."""
    images = images.contiguous()
    height, width = images.shape[-2:]
    out = torch.empty_like(images)
    if images.numel() == 0:
        return out
    sums = torch.empty_like(images, dtype=torch.promote_types(images.dtype, torch.float32))
    squares = torch.empty_like(sums)
    tiles = triton.cdiv(height, CONFIGURATION["BLOCK_H"]), triton.cdiv(width, CONFIGURATION["BLOCK_W"])
    grid = (tiles[0] * tiles[1], images.shape[0] * images.shape[1])
    with on_device_of(images):
        _column_sums_kernel[grid](
            images,
            sums,
            squares,
            height,
            width,
            HALF=window // 2,
            ACCUMULATOR=accumulator_dtype(images),
            **CONFIGURATION,
        )
        _normalize_kernel[grid](
            images, sums, squares, out, height, width,
            HALF=window // 2, EPS=eps, ACCUMULATOR=accumulator_dtype(images), **CONFIGURATION,
        )  # fmt: skip
    return out


@triton.jit
def _column_sums_kernel(
    images_ptr, sums_ptr, squares_ptr,
    height, width,
    HALF: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Σ x and Σ x² over the rows within HALF of each pixel's row."""
    rows, columns, plane = _tile(height, width, BLOCK_H, BLOCK_W)
    in_columns = (columns < width)[None, :]
    total = tl.zeros((BLOCK_H, BLOCK_W), ACCUMULATOR)
    total_squares = tl.zeros((BLOCK_H, BLOCK_W), ACCUMULATOR)
    for shift in range(-HALF, HALF + 1):
        shifted = rows + shift
        inside = ((shifted >= 0) & (shifted < height))[:, None] & in_columns
        pointers = images_ptr + plane + shifted.to(tl.int64)[:, None] * width + columns[None, :]
        x = tl.load(pointers, mask=inside, other=0.0).to(ACCUMULATOR)  # (BLOCK_H, BLOCK_W)
        total += x
        total_squares += x * x
    offsets = plane + rows.to(tl.int64)[:, None] * width + columns[None, :]
    inside = (rows < height)[:, None] & in_columns
    tl.store(sums_ptr + offsets, total, mask=inside)
    tl.store(squares_ptr + offsets, total_squares, mask=inside)


@triton.jit
def _normalize_kernel(
    images_ptr, sums_ptr, squares_ptr, out_ptr,
    height, width,
    HALF: tl.constexpr, EPS: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sums along the rows, then mean, unbiased variance and the normalized pixel."""
    rows, columns, plane = _tile(height, width, BLOCK_H, BLOCK_W)
    in_rows = (rows < height)[:, None]
    total = tl.zeros((BLOCK_H, BLOCK_W), ACCUMULATOR)
    total_squares = tl.zeros((BLOCK_H, BLOCK_W), ACCUMULATOR)
    for shift in range(-HALF, HALF + 1):
        shifted = columns + shift
        inside = in_rows & ((shifted >= 0) & (shifted < width))[None, :]
        offsets = plane + rows.to(tl.int64)[:, None] * width + shifted[None, :]
        total += tl.load(sums_ptr + offsets, mask=inside, other=0.0)  # (BLOCK_H, BLOCK_W)
        total_squares += tl.load(squares_ptr + offsets, mask=inside, other=0.0)
    # n pixels of the window lie inside the image: μ = Σx / n, σ² = (Σx² − n·μ²) / (n − 1)
    pixels = (_window_size(rows, height, HALF)[:, None] * _window_size(columns, width, HALF)[None, :]).to(ACCUMULATOR)
    mean = total / pixels
    variance = (total_squares - total * mean) / tl.maximum(pixels - 1.0, 1.0)
    offsets = plane + rows.to(tl.int64)[:, None] * width + columns[None, :]
    inside = in_rows & (columns < width)[None, :]
    x = tl.load(images_ptr + offsets, mask=inside, other=0.0).to(ACCUMULATOR)
    normalized = (x - mean) / tl.sqrt(tl.maximum(variance, 0.0) + EPS)
    tl.store(out_ptr + offsets, normalized, mask=inside)


@triton.jit
def _tile(height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows (BLOCK_H,), columns (BLOCK_W,) of this program's tile, and where its image plane starts."""
    tiles_w = tl.cdiv(width, BLOCK_W)
    rows = tl.program_id(0) // tiles_w * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.program_id(0) % tiles_w * BLOCK_W + tl.arange(0, BLOCK_W)
    plane = tl.program_id(1).to(tl.int64) * height * width
    return rows, columns, plane


@triton.jit
def _window_size(position, size, HALF: tl.constexpr):
    """How many entries within HALF of the position lie in [0, size)."""
    return tl.minimum(position + HALF, size - 1) - tl.maximum(position - HALF, 0) + 1
