"""Local normalization in one pass over memory: window sums down the columns, then along the rows, in registers.

A window's sum is a suffix, a core and a prefix. Neighbors share the core, and nothing is ever subtracted: no sum
drifts, and a NaN stays in its own windows. 256 × 3 × 224 × 224 pixels in float32, window 47: 308 MB through memory, and
4.3 loads and 58 instructions for each pixel of a tile, 1.7 times, as 3 tiles of 128 columns hold 224 and their halos.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import accumulator_dtype, cdiv, on_device_of
from ofb_kernels.kernels.tuning import run_configured

# Each of STRIPS warps slides down STRIP rows; the default first.
CONFIGURATIONS = (
    dict(STRIP=10, STRIPS=4, num_warps=4),
    dict(STRIP=14, STRIPS=4, num_warps=4),
)
LANES = 32  # a row's groups of four columns in one warp
GROUP = 4
MOST_ROWS_BY_PIXEL = 6


def forward(images: Tensor, window: int, eps: float) -> Tensor:
    """(x − μ) / √(σ² + eps) in images' dtype; images (B, C, H, W) of any strides."""
    images = images.contiguous()
    height, width = images.shape[-2:]
    half_h, half_w = min(window // 2, height - 1), min(window // 2, width - 1)
    groups, halo = _row_tile(width, half_w)
    planes = images.shape[0] * images.shape[1]
    out = torch.empty_like(images)

    def launch(configuration: dict) -> None:
        configuration = _fitted(configuration, height, width, half_h, groups)
        tiles_h = cdiv(height, configuration["STRIP"] * configuration["STRIPS"])
        tiles_w = cdiv(width, GROUP * groups - 2 * halo)
        _normalize_kernel[(tiles_h * tiles_w, planes)](
            images, out, height, width,
            HALF_H=half_h, HALF_W=half_w, HALO=halo, EPS=eps, ACCUMULATOR=accumulator_dtype(images), GROUPS=groups,
            **configuration,
        )  # fmt: skip

    if images.numel() > 0:
        with on_device_of(images):
            run_configured("local_norm", CONFIGURATIONS, (planes, height, width, half_h, half_w), images, launch)
    return out


def _row_tile(width: int, half: int) -> tuple[int, int]:
    """Groups of columns in a tile, and the columns at either end that only lend their pixels to windows.

    A tile that holds whole rows has none: its windows go on at its other end, which is padded by as many zeros.
    """
    halo = cdiv(half, GROUP) * GROUP
    whole = max(LANES, triton.next_power_of_2(cdiv(width + halo, GROUP)))
    part = max(LANES, triton.next_power_of_2(halo))
    return (whole, 0) if whole <= part else (part, halo)


def _fitted(configuration: dict, height: int, width: int, half: int, groups: int) -> dict:
    """No more rows than have a row of their windows in common; fewer where they take more registers.

    They do where a row takes several warps, and where it is read pixel by pixel: its length is no multiple of 16.
    """
    strips = max(1, configuration["STRIPS"] * LANES // groups)
    strip = configuration["STRIP"] * configuration["STRIPS"] * LANES // (strips * groups)
    strip = min(strip, 2 * half, height, MOST_ROWS_BY_PIXEL if width % 16 else height)
    return configuration | dict(STRIP=max(1, strip), STRIPS=strips)


@triton.jit
def _normalize_kernel(
    images_ptr, out_ptr,
    height, width,
    HALF_H: tl.constexpr, HALF_W: tl.constexpr, HALO: tl.constexpr, EPS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    GROUPS: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """One program: STRIPS · STRIP rows of a plane and 4 · GROUPS columns, its halos included."""
    OUTPUTS: tl.constexpr = 4 * GROUPS - 2 * HALO
    tiles_w = tl.cdiv(width, OUTPUTS)
    first_column = tl.program_id(0) % tiles_w * OUTPUTS
    first_row = tl.program_id(0) // tiles_w * STRIPS * STRIP
    columns = first_column - HALO + 4 * tl.arange(0, GROUPS)[:, None, None] + tl.arange(0, 4)[None, None, :]
    rows = first_row + STRIP * tl.arange(0, STRIPS)[None, :, None]  # the first row of each strip
    in_columns = (columns >= 0) & (columns < width)
    own = in_columns & (columns >= first_column) & (columns < first_column + OUTPUTS)
    plane = tl.program_id(1).to(tl.int64) * height * width
    offsets = plane + rows.to(tl.int64) * width + columns  # (GROUPS, STRIPS, 4)
    images_ptrs = images_ptr + offsets

    top = _top_sums(images_ptrs, rows, height, width, in_columns, HALF_H, ACCUMULATOR, GROUPS, STRIP, STRIPS)
    total, squares = _common_sums(
        images_ptrs, rows, height, width, in_columns, HALF_H, ACCUMULATOR, GROUPS, STRIP, STRIPS
    )
    columns_in_window = window_size(columns, width, HALF_W).to(ACCUMULATOR)
    column_share = 1.0 / columns_in_window
    for row in tl.static_range(STRIP):
        x = _load_row(images_ptrs, rows, row + HALF_H, height, width, in_columns, ACCUMULATOR)
        total += x
        squares += x * x
        window_total, window_squares = total, squares
        if HALF_H > 0:
            window_total += top[row][0]
            window_squares += top[row][1]
        window_total = _along_rows(window_total, HALF_W, GROUPS, STRIPS)
        window_squares = _along_rows(window_squares, HALF_W, GROUPS, STRIPS)
        # n pixels of the window lie inside the image: μ = Σx / n, σ² = (Σx² − n·μ²) / (n − 1)
        rows_in_window = window_size(rows + row, height, HALF_H).to(ACCUMULATOR)
        mean = window_total * (1.0 / rows_in_window * column_share)
        freedom = tl.maximum(rows_in_window * columns_in_window - 1.0, 1.0)
        scatter = tl.maximum(window_squares - window_total * mean, 0.0) + EPS * freedom  # (n − 1)·(σ² + eps)
        x = _load_row(images_ptrs, rows, row, height, width, own, ACCUMULATOR)
        normalized = (x - mean) * (freedom * tl.rsqrt(freedom) * tl.rsqrt(scatter))
        out_ptrs = out_ptr + (offsets + tl.full((), row, tl.int64) * width)
        tl.store(out_ptrs, normalized, mask=own & (rows + row < height))


@triton.jit
def _top_sums(
    images_ptrs, rows, height, width, in_columns,
    HALF: tl.constexpr, ACCUMULATOR: tl.constexpr, GROUPS: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """For each row of a strip Σ x and Σ x² over the rows of its window that precede the last row's window."""
    total = tl.zeros((GROUPS, STRIPS, 4), ACCUMULATOR)
    squares = tl.zeros((GROUPS, STRIPS, 4), ACCUMULATOR)
    sums = ()
    for row in tl.static_range(STRIP if HALF > 0 else 0):
        x = _load_row(images_ptrs, rows, STRIP - 1 - row - HALF, height, width, in_columns, ACCUMULATOR)
        total += x
        squares += x * x
        sums = ((total, squares),) + sums
    return sums


@triton.jit
def _common_sums(
    images_ptrs, rows, height, width, in_columns,
    HALF: tl.constexpr, ACCUMULATOR: tl.constexpr, GROUPS: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Σ x and Σ x² over the rows that are in the windows of all rows of a strip, but the first row's last one."""
    UNROLLED: tl.constexpr = 8
    total = tl.zeros((GROUPS, STRIPS, 4), ACCUMULATOR)
    squares = tl.zeros((GROUPS, STRIPS, 4), ACCUMULATOR)
    if 2 * HALF > STRIP:
        for start in range(STRIP - HALF, HALF, UNROLLED):
            for row in tl.static_range(UNROLLED):
                wanted = in_columns & (start + row < HALF)
                x = _load_row(images_ptrs, rows, start + row, height, width, wanted, ACCUMULATOR)
                total += x
                squares += x * x
    return total, squares


@triton.jit
def _load_row(images_ptrs, rows, shift, height, width, wanted, ACCUMULATOR: tl.constexpr):
    """The pixels `shift` rows below the strips' first ones, 0 outside the image."""
    inside = wanted & (rows + shift >= 0) & (rows + shift < height)
    offset = tl.full((), 1, tl.int64) * shift * width  # of a large image it may pass 2³¹
    return tl.load(images_ptrs + offset, mask=inside, other=0.0).to(ACCUMULATOR)


@triton.jit
def _along_rows(x, HALF: tl.constexpr, GROUPS: tl.constexpr, STRIPS: tl.constexpr):
    """Σ over the columns within HALF of each column of x (GROUPS, STRIPS, 4)."""
    even, odd = tl.split(tl.reshape(x, (GROUPS, STRIPS, 2, 2)))
    x0, x2 = tl.split(even)  # (GROUPS, STRIPS): the first and third column of each group
    x1, x3 = tl.split(odd)
    sum01, sum23 = x0 + x1, x2 + x3
    group = sum01 + sum23
    prefix = (x0, sum01, sum01 + x2, group)
    suffix = (group, x1 + sum23, sum23, x3)
    sum0 = _window_sum((x0, x1, x2, x3), prefix, suffix, 0, HALF)
    sum1 = _window_sum((x0, x1, x2, x3), prefix, suffix, 1, HALF)
    sum2 = _window_sum((x0, x1, x2, x3), prefix, suffix, 2, HALF)
    sum3 = _window_sum((x0, x1, x2, x3), prefix, suffix, 3, HALF)
    return tl.reshape(tl.join(tl.join(sum0, sum2), tl.join(sum1, sum3)), (GROUPS, STRIPS, 4))


@triton.jit
def _window_sum(values, prefix, suffix, COLUMN: tl.constexpr, HALF: tl.constexpr):
    """Σ over the columns within HALF of a group's column number COLUMN, of all groups."""
    if HALF < 3:
        result = values[COLUMN]
        for distance in tl.static_range(1, HALF + 1):
            result += _from_group(values[(COLUMN - distance) % 4], (COLUMN - distance) // 4)
            result += _from_group(values[(COLUMN + distance) % 4], (COLUMN + distance) // 4)
        return result
    else:
        # the groups that lie whole in the windows of all four columns, and the first and the last of this window
        FIRST_WHOLE: tl.constexpr = (6 - HALF) // 4
        LAST_WHOLE: tl.constexpr = (HALF + 1) // 4 - 1
        FIRST: tl.constexpr = (COLUMN - HALF) // 4
        LAST: tl.constexpr = (COLUMN + HALF) // 4
        result = _sum_of_groups(prefix[3], FIRST_WHOLE, LAST_WHOLE - FIRST_WHOLE + 1)
        if FIRST < FIRST_WHOLE:
            result += _from_group(suffix[(COLUMN - HALF) % 4], FIRST)
        if FIRST < FIRST_WHOLE - 1:
            result += _from_group(prefix[3], FIRST_WHOLE - 1)
        if LAST > LAST_WHOLE:
            result += _from_group(prefix[(COLUMN + HALF) % 4], LAST)
        if LAST > LAST_WHOLE + 1:
            result += _from_group(prefix[3], LAST_WHOLE + 1)
        return result


@triton.jit
def _sum_of_groups(x, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Σ over COUNT groups of x (GROUPS, STRIPS), the first of them FIRST groups on."""
    if COUNT == 1:
        return _from_group(x, FIRST)
    elif COUNT % 2 == 1:
        return _sum_of_groups(x, FIRST, COUNT - 1) + _from_group(x, FIRST + COUNT - 1)
    else:
        return _sum_of_groups(x + _from_group(x, COUNT // 2), FIRST, COUNT // 2)


@triton.jit
def _from_group(x, DISTANCE: tl.constexpr):
    """For each group x (GROUPS, STRIPS) of the group DISTANCE groups on; the first one follows the last."""
    if DISTANCE == 0:
        return x
    else:
        groups = (tl.arange(0, x.shape[0]) + DISTANCE) % x.shape[0]
        return tl.gather(x, tl.broadcast_to(groups[:, None], x.shape), 0)


@triton.jit
def window_size(position, size, HALF: tl.constexpr):
    """How many entries within HALF of the position lie in [0, size); 1 where the position itself does not."""
    return tl.maximum(tl.minimum(position + HALF, size - 1) - tl.maximum(position - HALF, 0) + 1, 1)
