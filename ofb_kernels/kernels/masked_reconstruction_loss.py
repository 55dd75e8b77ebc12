"""Loss of masked image modelling: the target of each masked area straight from the image, its error summed at once.

A window's sum is a suffix, a core and a prefix, first down the columns, then along the rows. Nothing is ever
subtracted: no sum drifts, and a NaN stays in its own windows. An area of 16 × 16 pixels with windows of 47 reads
62 × 64 pixels: 15.5 loads and 170 instructions for each of its own. Windows overlap, so most loads come from caches: of
256 images of 3 × 224 × 224 pixels in float32 with a quarter masked, 597 MB there and 154 MB from memory, where
decoded in bfloat16 takes 19 MB.

The backward needs no more than the sign of each error. It is kept as a byte: 10 MB, written and read. Computing the
target again would read images and decoded once more, 173 MB. Keeping the gradient in decoded's dtype, to be scaled
in the backward, would take 19 MB each way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import cdiv, on_device_of
from ofb_kernels.kernels.local_norm import window_size
from ofb_kernels.kernels.tuning import run_configured

# SPAN columns lie side by side in a program: four times those of a tile for each of SPAN / (4 · COLUMNS) areas. The
# default first.
CONFIGURATIONS = (
    dict(SPAN=256, num_warps=4),
    dict(SPAN=512, num_warps=8),
)
MOST_ROWS = MOST_COLUMNS = 16  # of a tile: its sums are in registers
FINISH_BLOCK, BACKWARD_BLOCK = 1024, 2048


def forward(
    decoded: Tensor, images: Tensor, areas: Tensor, masked: Tensor, pixels: tuple[int, int], window: int, eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, the sign of each error (B, K, C·p·q) in int8, empty unless `keep`, and the share of one error in it.

    decoded (B, K, C·p·q), images (B, C, H, W), areas (B, K) and masked (K,) of any strides, decoded not empty.
    """
    decoded, images, areas, masked = (tensor.contiguous() for tensor in (decoded, images, areas, masked))
    batch, channels, height, width = images.shape
    half_h, half_w = min(window // 2, height - 1), min(window // 2, width - 1)
    rows, columns = _tile_side(pixels[0], half_h, MOST_ROWS), _tile_side(pixels[1], half_w, MOST_COLUMNS)
    tiles = cdiv(pixels[0], rows) * cdiv(pixels[1], columns)
    wide = torch.promote_types(torch.promote_types(decoded.dtype, images.dtype), torch.float32)
    accumulator = tl.float64 if wide == torch.float64 else tl.float32
    sign = decoded.new_empty(decoded.shape if keep else 0, dtype=torch.int8)
    loss, share = (decoded.new_empty((), dtype=wide) for _ in range(2))

    def launch(configuration: dict) -> None:
        groups = cdiv(areas.shape[1], configuration["SPAN"] // (4 * columns))
        error_sums = decoded.new_empty(batch * channels * tiles * groups, dtype=wide)
        _forward_kernel[(len(error_sums),)](
            decoded, images, areas, masked, sign if keep else None, error_sums, areas.shape[1], channels, height,
            IMAGE_WIDTH=width, HEIGHT=pixels[0], WIDTH=pixels[1], HALF_H=half_h, HALF_W=half_w, EPS=eps,
            ACCUMULATOR=accumulator, ROWS=rows, COLUMNS=columns, **configuration,
        )  # fmt: skip
        _finish_kernel[(1,)](
            error_sums, masked, loss, share, len(error_sums), len(masked), batch * decoded.shape[2],
            ACCUMULATOR=accumulator, BLOCK=FINISH_BLOCK, num_warps=4,
        )  # fmt: skip

    with on_device_of(decoded):
        sizes = batch * areas.shape[1], channels, *pixels, height, width, window
        run_configured("masked_reconstruction_loss", CONFIGURATIONS, sizes, decoded, launch)
    return loss, sign, share


def backward(grad_loss: Tensor, sign: Tensor, share: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of decoded in its dtype, sign · share · grad_loss."""
    grad = torch.empty_like(sign, dtype=dtype)
    with on_device_of(sign):
        _backward_kernel[(cdiv(sign.numel(), BACKWARD_BLOCK),)](
            grad_loss, share, sign, grad, sign.numel(), BLOCK=BACKWARD_BLOCK, num_warps=4
        )
    return grad


def _tile_side(size: int, half: int, most: int) -> int:
    """Pixels along a side of a tile: a power of two, at most one more than a window has."""
    return min(triton.next_power_of_2(size), most, 1 << (2 * half + 2).bit_length() - 1)


@triton.jit
def _forward_kernel(
    decoded_ptr, images_ptr, areas_ptr, masked_ptr, sign_ptr, error_sums_ptr, areas, channels, height,
    IMAGE_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    HALF_H: tl.constexpr, HALF_W: tl.constexpr, EPS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program: the same tile of ROWS × COLUMNS pixels in several areas of HEIGHT × WIDTH of one image plane."""
    AREAS: tl.constexpr = SPAN // (4 * COLUMNS)  # each takes four times its columns, for its windows reach beyond it
    TILES_W: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS * TILES_W
    ACROSS: tl.constexpr = IMAGE_WIDTH // WIDTH  # areas side by side in an image
    groups = tl.cdiv(areas, AREAS)
    number = tl.program_id(0) % groups * AREAS + tl.arange(0, AREAS)[None, :]  # (1, AREAS), of those drawn
    tile = tl.program_id(0) // groups % TILES
    plane = tl.program_id(0) // (groups * TILES)
    image = (plane // channels).to(tl.int64)
    drawn = number < areas
    masked = drawn & (tl.load(masked_ptr + number, mask=drawn, other=0) != 0)

    first_row, first_column = tile // TILES_W * ROWS, tile % TILES_W * COLUMNS  # of the tile in its area
    row = first_row + tl.arange(0, ROWS)[None, None, :]
    column = first_column + tl.arange(0, COLUMNS)[:, None, None]
    inside = drawn[:, :, None] & (row < HEIGHT) & (column < WIDTH)  # (COLUMNS, AREAS, ROWS)
    block = ((image * areas + number) * channels + plane % channels) * (HEIGHT * WIDTH)
    offsets = block[:, :, None] + (row * WIDTH + column)
    if tl.max(masked.to(tl.int32)) == 0:
        tl.store(error_sums_ptr + tl.program_id(0), 0.0)
        if sign_ptr is not None:
            tl.store(sign_ptr + offsets, tl.zeros((COLUMNS, AREAS, ROWS), tl.int8), mask=inside)
    else:
        area = tl.load(areas_ptr + image * areas + number, mask=masked, other=0).to(tl.int32)
        exists = (area >= 0) & (area < height // HEIGHT * ACROSS)
        top, left = area // ACROSS * HEIGHT + first_row, area % ACROSS * WIDTH + first_column  # (1, AREAS)
        row_ptrs = images_ptr + (plane.to(tl.int64) * height * IMAGE_WIDTH + top.to(tl.int64) * IMAGE_WIDTH)
        total, squares = _window_sums(
            row_ptrs, top, left, masked, height, IMAGE_WIDTH, HALF_H, HALF_W, ACCUMULATOR, ROWS, COLUMNS, AREAS
        )
        rows, columns = tl.arange(0, ROWS)[None, None, :], left[:, :, None] + tl.arange(0, COLUMNS)[:, None, None]
        rows_in_window = window_size(top[:, :, None] + rows, height, HALF_H).to(ACCUMULATOR)
        columns_in_window = window_size(columns, IMAGE_WIDTH, HALF_W).to(ACCUMULATOR)
        counted = inside & masked[:, :, None]
        x_ptrs = row_ptrs[:, :, None] + (rows * IMAGE_WIDTH + columns)
        x = tl.load(x_ptrs, mask=counted & exists[:, :, None], other=float("nan")).to(ACCUMULATOR)
        target = _normalize(x, total, squares, rows_in_window, columns_in_window, EPS)
        error = tl.load(decoded_ptr + offsets, mask=counted, other=0.0).to(ACCUMULATOR) - target
        error = tl.where(counted, error, 0.0)
        tl.store(error_sums_ptr + tl.program_id(0), tl.sum(tl.abs(error)))
        if sign_ptr is not None:
            sign = (error > 0).to(tl.int8) - (error < 0).to(tl.int8)  # of a NaN 0, as in torch
            tl.store(sign_ptr + offsets, sign, mask=inside)


@triton.jit
def _normalize(x, total, squares, rows_in_window, columns_in_window, EPS: tl.constexpr):
    """(x − μ) / √(σ² + eps) from Σx and Σx² over a window of n pixels: μ = Σx / n, σ² = (Σx² − n·μ²) / (n − 1)."""
    mean = total * (1.0 / rows_in_window * (1.0 / columns_in_window))
    freedom = tl.maximum(rows_in_window * columns_in_window - 1.0, 1.0)
    scatter = tl.maximum(squares - total * mean, 0.0) + EPS * freedom  # (n − 1)·(σ² + eps)
    return (x - mean) * (freedom * tl.rsqrt(freedom) * tl.rsqrt(scatter))


@triton.jit
def _window_sums(
    row_ptrs, top, left, masked, height, IMAGE_WIDTH: tl.constexpr,
    HALF_H: tl.constexpr, HALF_W: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AREAS: tl.constexpr,
):  # fmt: skip
    """Σ x and Σ x² over the window of each pixel of a tile, (COLUMNS, AREAS, ROWS) each.

    The windows of a row have COMMON columns in common. Behind `left` lie COLUMNS columns of which a window has those
    behind its own number, after the common ones COLUMNS of which it has those before its own number.
    """
    COMMON: tl.constexpr = 2 * HALF_W + 2 - COLUMNS
    GAP: tl.constexpr = 2 * COLUMNS - COMMON
    place = tl.arange(0, 4 * COLUMNS)[:, None]
    total = tl.zeros((1, AREAS, 2 * ROWS), ACCUMULATOR)
    for start in range(2 * COLUMNS, COMMON, 4 * COLUMNS):  # those that the blocks below have no place for
        further, exist = left + start + (place + (COLUMNS - HALF_W - 1)), masked & (start + place < COMMON)
        total += _sum_of_columns(
            _column_sums(row_ptrs, top, further, exist, height, IMAGE_WIDTH, HALF_H, ACCUMULATOR, ROWS)
        )
    # Four blocks of COLUMNS columns: those before the common ones, two blocks of common ones, and those after them.
    columns, wanted = left + (place - (HALF_W + 1)), masked
    if GAP != 0:
        columns = tl.where(place < 3 * COLUMNS, columns, columns - GAP)
        wanted = masked & ((place < COLUMNS + COMMON) | (place >= 3 * COLUMNS))
    sums = _column_sums(row_ptrs, top, columns, wanted, height, IMAGE_WIDTH, HALF_H, ACCUMULATOR, ROWS)
    blocks = tl.permute(tl.reshape(sums, (2, 2, COLUMNS, AREAS, 2 * ROWS)), (2, 3, 4, 1, 0))
    first_half, second_half = tl.split(blocks)
    before, common = tl.split(first_half)  # (COLUMNS, AREAS, 2 · ROWS) each
    more_common, after = tl.split(second_half)
    total = total + _sum_of_columns(common + more_common) + _sums_behind(before) + _sums_before(after)
    return tl.split(tl.permute(tl.reshape(total, (COLUMNS, AREAS, 2, ROWS)), (0, 1, 3, 2)))


@triton.jit
def _column_sums(
    row_ptrs, top, columns, wanted, height,
    IMAGE_WIDTH: tl.constexpr, HALF: tl.constexpr, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(columns, AREAS, 2 · ROWS): Σ x of each column (columns, AREAS) over the window of each row, then Σ x²."""
    COMMON: tl.constexpr = 2 * HALF + 2 - ROWS  # rows that are in the windows of all of the tile's rows
    UNROLLED: tl.constexpr = 16
    ptrs = row_ptrs + columns
    wanted = wanted & (columns >= 0) & (columns < IMAGE_WIDTH)
    total = tl.zeros(wanted.shape, ACCUMULATOR)
    squares = tl.zeros(wanted.shape, ACCUMULATOR)
    above = (total,)  # for each row of the tile, over the rows above the common ones; the last row has none
    squares_above = (squares,)
    for step in tl.static_range(ROWS - 1):
        x = _load_row(ptrs, top, ROWS - 2 - HALF - step, height, wanted, IMAGE_WIDTH, ACCUMULATOR)
        total += x
        squares += x * x
        above = (total,) + above
        squares_above = (squares,) + squares_above
    total = tl.zeros(wanted.shape, ACCUMULATOR)
    squares = tl.zeros(wanted.shape, ACCUMULATOR)
    for start in range(0, COMMON, UNROLLED):
        start_ptrs = ptrs + tl.full((), start, tl.int64) * IMAGE_WIDTH
        for step in tl.static_range(UNROLLED):
            is_common = wanted if COMMON % UNROLLED == 0 else wanted & (start + step < COMMON)
            x = _load_row(
                start_ptrs, top + start, ROWS - 1 - HALF + step, height, is_common, IMAGE_WIDTH, ACCUMULATOR
            )
            total += x
            squares += x * x
    totals = (total + above[0],)
    totals_of_squares = (squares + squares_above[0],)
    for row in tl.static_range(1, ROWS):
        x = _load_row(ptrs, top, HALF + row, height, wanted, IMAGE_WIDTH, ACCUMULATOR)
        total += x
        squares += x * x
        totals = totals + (total + above[row],)
        totals_of_squares = totals_of_squares + (squares + squares_above[row],)
    return _stacked(totals + totals_of_squares, 0, 1, 2 * ROWS)


@triton.jit
def _load_row(
    ptrs, top, SHIFT: tl.constexpr, height, wanted, IMAGE_WIDTH: tl.constexpr, ACCUMULATOR: tl.constexpr
):  # fmt: skip
    """The pixels SHIFT rows below the top ones, 0 outside the image; a distance known in advance costs no addition."""
    inside = wanted & ((top + SHIFT).to(tl.uint32, bitcast=True) < height)
    return tl.load(ptrs + SHIFT * IMAGE_WIDTH, mask=inside, other=0.0).to(ACCUMULATOR)


@triton.jit
def _stacked(parts, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """(columns, AREAS, COUNT) of COUNT tensors (columns, AREAS) of a tuple, every STEP-th from number FIRST on."""
    if COUNT == 1:
        return tl.reshape(parts[FIRST], (parts[FIRST].shape[0], parts[FIRST].shape[1], 1))
    elif COUNT == 2:
        return tl.join(parts[FIRST], parts[FIRST + STEP])
    else:
        even = _stacked(parts, FIRST, 2 * STEP, COUNT // 2)
        odd = _stacked(parts, FIRST + STEP, 2 * STEP, COUNT // 2)
        return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1], COUNT))


@triton.jit
def _sum_of_columns(x):
    """(1, AREAS, lines) of x (columns, AREAS, lines)."""
    if x.shape[0] == 1:
        return x
    else:
        even, odd = _even_and_odd(x)
        return _sum_of_columns(even + odd)


@triton.jit
def _sums_behind(x):
    """For each column of x (columns, AREAS, lines) Σ of those behind it, from the sums of pairs."""
    if x.shape[0] == 1:
        return tl.zeros_like(x)
    else:
        even, odd = _even_and_odd(x)
        pairs = _sums_behind(even + odd)
        return _interleaved(pairs + odd, pairs)


@triton.jit
def _sums_before(x):
    """For each column of x (columns, AREAS, lines) Σ of those before it."""
    if x.shape[0] == 1:
        return tl.zeros_like(x)
    else:
        even, odd = _even_and_odd(x)
        pairs = _sums_before(even + odd)
        return _interleaved(pairs, pairs + even)


@triton.jit
def _even_and_odd(x):
    """The even and the odd columns of x (columns, AREAS, lines)."""
    pairs = tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1], x.shape[2]))
    return tl.split(tl.permute(pairs, (0, 2, 3, 1)))


@triton.jit
def _interleaved(even, odd):
    """(columns, AREAS, lines) of its even and its odd columns."""
    pairs = tl.permute(tl.join(even, odd), (0, 3, 1, 2))
    return tl.reshape(pairs, (2 * even.shape[0], even.shape[1], even.shape[2]))


@triton.jit
def _finish_kernel(
    error_sums_ptr, masked_ptr, loss_ptr, share_ptr, programs, areas, elements,
    ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the loss, Σ error_sums / max(1, Σ masked · elements), and what one error counts in it."""
    total, count = tl.zeros((BLOCK,), ACCUMULATOR), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, programs, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        total += tl.load(error_sums_ptr + entries, mask=entries < programs, other=0.0)
    for start in range(0, areas, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        count += tl.load(masked_ptr + entries, mask=entries < areas, other=0).to(tl.int32)
    share = 1.0 / tl.maximum(tl.sum(count).to(ACCUMULATOR) * elements, 1.0)
    tl.store(share_ptr, share)
    tl.store(loss_ptr, tl.sum(total) * share)


@triton.jit
def _backward_kernel(grad_loss_ptr, share_ptr, sign_ptr, grad_ptr, elements, BLOCK: tl.constexpr):
    """grad = sign · share · grad_loss."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    step = tl.load(grad_loss_ptr).to(share_ptr.dtype.element_ty) * tl.load(share_ptr)
    sign = tl.load(sign_ptr + offsets, mask=offsets < elements, other=0)
    tl.store(grad_ptr + offsets, sign.to(step.dtype) * step, mask=offsets < elements)
