"""Launches of each op at a list of shapes: those that a run on a card makes, and others that compile to other code.

Tensors are on the meta device: they have shapes, strides and a position in memory, and no memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from benchmarks.compile_only import Recorder, every_configuration
from benchmarks.floors import PATCH, SIZES, TINY, Sizes
from ofb_kernels.kernels import (
    bimask,
    candidate_statistics,
    fold,
    local_norm,
    masked_attention,
    masked_layer_norm,
    masked_linear,
    masked_mlp,
    masked_reconstruction_loss,
)
from ofb_kernels.ops.masked_add_layer_norm import MAX_WIDTH_WITH_BIAS
from ofb_kernels.ops.masked_linear import ACTIVATIONS

TIMED = [Sizes(256, **sizes) for sizes in SIZES.values()]
PRUNED = [*(sizes.pruned() for sizes in TIMED), Sizes(2, **TINY).pruned()]  # multiples of 8 and not of 16
TIMED += [sizes.halved() for sizes in TIMED]


@dataclass(frozen=True)
class Precision:
    """What the ops compute in.

    float16 and TF32 take the main sizes alone: their code differs from that of bfloat16 and float32 in the products'
    instruction. The op tests launch float16 at many more sizes.
    """

    dtype: torch.dtype
    tf32: bool = False

    @property
    def main_sizes_only(self) -> bool:
        return self.tf32 or self.dtype == torch.float16


PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "float32": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def unaligned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that starts one element past a multiple of 16 bytes."""
    return meta(prod(shape) + 1, dtype=dtype)[1:].view(shape)


def expanded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gradient that a sum hands back: one number, all strides 0."""
    return meta(1, dtype=dtype).expand(shape)


# ---- one function for each op: it yields a label, then makes the launches that the label names ----


def launch_masked_linear(precision: Precision) -> Iterator[str]:
    dtype = precision.dtype
    yield "timed"
    for sizes in TIMED:
        x, weight = meta(sizes.rows, sizes.width, dtype=dtype), meta(sizes.hidden, sizes.width, dtype=dtype)
        _linear(x, weight, meta(sizes.hidden))
    if dtype != torch.float32:
        yield "float32 weights"
        mask = meta(len(weight))
        for each in (mask, None):
            _linear(x, weight.float(), each, bias=mask)
    if precision.main_sizes_only:
        return
    yield "options"
    mask = meta(len(weight))
    for activation in ACTIVATIONS:
        _linear(x, weight, mask, activation=activation)
    _linear(x, weight, mask, bias=None)
    _linear(x, weight, mask, keep=False)
    if dtype != torch.float32:
        yield "16-bit mask"
        _linear(x, weight, mask.to(dtype))
    yield "few rows"
    for rows in (1, 197):
        _linear(x[:rows], weight, mask)
    yield "multiples of 8"
    pruned = [(sizes.rows, sizes.width, sizes.hidden) for sizes in PRUNED]
    for rows, inner, columns in (*pruned, (50_432, 384, 1000), (50_432, 328, 384)):
        _linear(meta(rows, inner, dtype=dtype), meta(columns, inner, dtype=dtype), meta(columns))
    yield "odd"
    for rows, inner, columns in ((577, 384, 1536), (1, 17, 9)):
        _linear(meta(rows, inner, dtype=dtype), meta(columns, inner, dtype=dtype), meta(columns))
    yield "unaligned"
    _linear(unaligned(1024, 384, dtype=dtype), unaligned(1536, 384, dtype=dtype), unaligned(1536))
    yield "strided"
    _linear(meta(1024, 1152, dtype=dtype)[:, ::3], meta(384, 1536, dtype=dtype).t(), meta(1536))
    slope = meta(1024, 1536, dtype=dtype)
    for grad_out in (expanded(1024, 1536, dtype=dtype), meta(1536, 1024, dtype=dtype).t()):
        masked_linear.backward(grad_out, slope, "gelu")


def _linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    activation: str | None = "gelu",
    bias: Tensor | None | str = "of x's dtype",
    keep: bool = True,
) -> None:
    bias = mask.to(x.dtype) if isinstance(bias, str) else bias
    out, slope, folded = masked_linear.forward(x, weight, bias, mask, activation, keep)
    if keep:
        grad, sums = masked_linear.backward(out, slope, activation)
        fold.data_gradient(grad, x, weight, folded, mask)
        fold.parameter_gradients(grad, sums, x, weight, bias, mask)


def launch_masked_mlp(precision: Precision) -> Iterator[str]:
    dtype = precision.dtype
    yield "timed"
    for sizes in TIMED:
        _mlp(sizes.rows, sizes.width, sizes.hidden, dtype)
    if precision.main_sizes_only:
        return
    yield "options"
    for activation in ACTIVATIONS:
        _mlp(1024, 384, 1536, dtype, activation)
    yield "multiples of 8"
    pruned = [(sizes.rows, sizes.width, sizes.hidden) for sizes in PRUNED]
    for rows, width, hidden in (*pruned, (50_432, 384, 1000), (50_432, 328, 384)):
        _mlp(rows, width, hidden, dtype)
    yield "odd"
    for rows, width, hidden in ((577, 384, 1536), (1, 17, 9)):
        _mlp(rows, width, hidden, dtype)
    yield "unaligned"
    shapes = (1024, 384), (384, 1536), (1024, 1536)
    masked_mlp.backward(*(unaligned(*shape, dtype=dtype) for shape in shapes), "gelu")
    yield "strided"
    transposed, slope = meta(1536, 384, dtype=dtype).t(), meta(1024, 1536, dtype=dtype)
    masked_mlp.backward(expanded(1024, 384, dtype=dtype), transposed, slope, "gelu")


def _mlp(rows: int, width: int, hidden: int, dtype: torch.dtype, activation: str | None = "gelu") -> None:
    grad_out, fc2_weight = meta(rows, width, dtype=dtype), meta(width, hidden, dtype=dtype)
    masked_mlp.backward(grad_out, fc2_weight, meta(rows, hidden, dtype=dtype), activation)


def launch_masked_attention(precision: Precision) -> Iterator[str]:
    dtype = precision.dtype
    yield "timed"
    for sizes in TIMED:
        _attention(meta(sizes.batch, sizes.tokens, 3, sizes.heads, sizes.head_dim, dtype=dtype))
    yield "widths"
    for head_dim in (128,) if precision.main_sizes_only else (16, 128):
        _attention(meta(4, 197, 3, 6, head_dim, dtype=dtype))
    yield "windows"
    for head_dim in (32, 128):
        _attention(meta(64, 49, 3, 6, head_dim, dtype=dtype), bias=meta(4, 6, 49, 49))
    yield "multiples of 8"
    for head_dim in (24,) if precision.main_sizes_only else (24, 40, 56, 104):
        _attention(meta(4, 197, 3, 6, head_dim, dtype=dtype))
    if precision.main_sizes_only:
        return
    for sizes in PRUNED:
        _attention(meta(sizes.batch, sizes.tokens, 3, sizes.heads, sizes.head_dim, dtype=dtype))
    tiny = PRUNED[-1]
    windows = meta(1, tiny.heads, tiny.tokens, tiny.tokens)
    _attention(meta(2, tiny.tokens, 3, tiny.heads, tiny.head_dim, dtype=dtype), bias=windows)
    yield "tokens"
    for tokens in (1, 17, 64, 577, 1025):
        _attention(meta(2, tokens, 3, 6, 64, dtype=dtype))
    yield "windows of other sizes"
    for head_dim, tokens in ((24, 49), (64, 197), (32, 1)):
        _attention(meta(8, tokens, 3, 4, head_dim, dtype=dtype), bias=meta(4, 4, tokens, tokens))
    _attention(meta(8, 49, 3, 4, 32, dtype=dtype), bias=meta(1, 4, 49, 49))
    yield "unaligned"
    _attention(unaligned(4, 197, 3, 6, 64, dtype=dtype), mask=unaligned(6, 64))
    yield "strided"
    heads_first = meta(4, 6, 197, 3, 40, dtype=dtype).permute(0, 2, 3, 1, 4)
    # sums are asked for of a projection made here, which is packed
    _attention(heads_first, grad_out=expanded(4, 197, 240, dtype=dtype), sums=False)
    if dtype != torch.float32:
        yield "16-bit mask and bias"
        qkv, mask = meta(8, 49, 3, 4, 64, dtype=dtype), meta(4, 64, dtype=dtype)
        _attention(qkv, mask)
        _attention(qkv, mask, meta(4, 4, 49, 49, dtype=dtype))


def _attention(
    qkv: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, grad_out: Tensor | None = None,
    sums: bool = True,
) -> None:  # fmt: skip
    heads, head_dim = qkv.shape[3:]
    mask = meta(heads, head_dim) if mask is None else mask
    scale = head_dim**-0.5
    out, log_sum_exp = masked_attention.forward(qkv, mask, scale, bias)
    grad_out = out if grad_out is None else grad_out
    masked_attention.backward(grad_out, qkv, mask, out, log_sum_exp, scale, bias, sums)
    if bias is not None:
        masked_attention.backward_bias(grad_out, qkv, mask, out, log_sum_exp, scale, bias)


def launch_masked_layer_norm(precision: Precision) -> Iterator[str]:
    dtype = precision.dtype
    if precision.tf32:
        return  # no product
    yield "timed"
    for sizes in TIMED:  # under autocast the residual stream and all vectors are in float32
        _norm(meta(sizes.rows, sizes.width), dtype)
        _norm(meta(sizes.rows, sizes.width), dtype, branch=meta(sizes.rows, sizes.width, dtype=dtype))
    if precision.main_sizes_only:
        return
    yield "widths"
    for width in masked_layer_norm.FORWARD_CONFIGURATIONS:
        x = meta(1576, width, dtype=dtype)
        _norm(x, dtype, bias=False)
        _norm(x, dtype, masked=False)
        biased = width <= MAX_WIDTH_WITH_BIAS
        _norm(x, dtype, branch=x, sample_scale=meta(8), branch_bias=biased)
        _norm(meta(1576, width), dtype, branch=x, masked=False, branch_bias=biased)
        _norm(meta(1576, width), dtype, branch=x, branch_bias=False)
        _norm(meta(1576, width), dtype, branch=x, sample_scale=meta(8), branch_bias=biased)
    yield "multiples of 8"
    for sizes in PRUNED:
        _norm(meta(sizes.rows, sizes.width), dtype)
        _norm(meta(sizes.rows, sizes.width), dtype, branch=meta(sizes.rows, sizes.width, dtype=dtype))
    for width in (328, 1000):
        x = meta(1576, width, dtype=dtype)
        _norm(x, dtype, vectors=dtype)
        _norm(meta(1576, width), dtype, branch=x, sample_scale=meta(8))
    yield "one output used"
    _norm(meta(1576, 384), dtype, branch=meta(1576, 384, dtype=dtype), used=("out",))
    _norm(meta(1576, 384), dtype, branch=meta(1576, 384, dtype=dtype), used=("stream",))
    yield "unaligned"
    _norm(unaligned(1576, 384), dtype, branch=unaligned(1576, 384, dtype=dtype))
    yield "odd"
    _norm(meta(1, 17, dtype=dtype), dtype, branch=meta(1, 17, dtype=dtype))
    yield "strided"
    _norm(meta(384, 577).t(), dtype, grad_out=expanded(577, 384, dtype=dtype))


def _norm(
    x: Tensor,
    dtype: torch.dtype,
    branch: Tensor | None = None,
    sample_scale: Tensor | None = None,
    bias: bool = True,
    masked: bool = True,
    vectors: torch.dtype = torch.float32,
    grad_out: Tensor | None = None,
    used: tuple[str, ...] = ("out", "stream"),
    branch_bias: bool = True,
) -> None:
    columns = x.shape[1]
    weight, bias = meta(columns, dtype=vectors), meta(columns, dtype=vectors) if bias else None
    mask = meta(columns) if masked else None
    vector = None if branch is None else meta(columns)
    extra = masked_layer_norm.Branch(branch, vector if branch_bias else None, vector, sample_scale, 197)
    out, stream, mean, rstd = masked_layer_norm.forward(x, weight, bias, mask, 1e-6, dtype, extra)
    grad_out = (out if grad_out is None else grad_out) if "out" in used else None
    grad_stream = stream if branch is not None and "stream" in used else None
    masked_layer_norm.backward(grad_out, stream, weight, bias, mask, mean, rstd, 1e-6, grad_stream, extra)


def launch_bimask(precision: Precision) -> Iterator[str]:
    if precision != PRECISIONS["float32"]:
        return  # the op hands its kernels float32 whatever the dtype of the scores
    yield "timed"
    for sizes in TIMED:  # attention, MLP and residual width
        _bimask(sizes.depth, sizes.heads, sizes.head_dim, max(1, sizes.heads // 2), 7)
        _bimask(sizes.depth, 1, sizes.hidden, 1, 7)
        _bimask(1, 1, sizes.width, 1, 33)
    yield "multiples of 8"
    for sizes in PRUNED:
        _bimask(sizes.depth, sizes.heads, sizes.head_dim, max(1, sizes.heads // 2), 7)
    yield "odd"
    _bimask(1, 1, 1, 1, 1)
    _bimask(1, 20, 70, 5, 9)
    yield "1,024 candidates"
    _bimask(1, 1, 1200, 1, 1024)
    yield "4,096 candidates"
    _bimask(1, 1, 4096, 1, 4096)


def _bimask(submodules: int, heads: int, channels: int, *counts: int) -> None:
    score, alpha, lam = meta(submodules, heads, channels), meta(submodules, *counts), meta()
    alive = meta(submodules, *counts, dtype=torch.bool)
    head_counts, channel_counts = (meta(submodules, count, dtype=torch.int64) for count in counts)
    arguments = score, alpha, head_counts, channel_counts, lam, alive
    mask, head_rank, channel_rank = bimask.forward(*arguments)
    bimask.backward(mask, *arguments, head_rank, channel_rank)


def launch_candidate_statistics(precision: Precision) -> Iterator[str]:
    if precision != PRECISIONS["float32"]:
        return  # as with bimask
    yield "timed"
    for sizes in TIMED:  # a row for each attention and MLP, and one for the residual width
        _candidate_statistics(2 * sizes.depth + 1, 33)
    yield "odd"
    _candidate_statistics(1, 1)
    _candidate_statistics(7, 256)
    yield "one result used"
    for used in range(3):
        _candidate_statistics(25, 33, used)
    yield "4,096 candidates"
    _candidate_statistics(3, 4096)


def _candidate_statistics(rows: int, candidates: int, used: int | None = None) -> None:
    alive, sizes = meta(rows, candidates, dtype=torch.bool), meta(rows, candidates, dtype=torch.int64)
    arguments = meta(rows, candidates), alive, sizes, sizes
    results = candidate_statistics.forward(*arguments)
    grads = tuple(result if used in (None, number) else None for number, result in enumerate(results))
    candidate_statistics.backward(grads, *arguments)


def launch_local_norm(precision: Precision) -> Iterator[str]:
    dtype = precision.dtype
    if precision.tf32:
        return  # no product
    yield "timed"
    local_norm.forward(meta(256, 3, 224, 224, dtype=dtype), 47, 1e-6)
    if precision.main_sizes_only:
        return
    yield "odd"
    for shape, window in (((2, 3, 381, 381), 47), ((2, 1, 9, 11), 5), ((1, 1, 1, 1), 1)):
        local_norm.forward(meta(*shape, dtype=dtype), window, 1e-6)
    yield "wide"
    local_norm.forward(meta(2, 3, 384, 384, dtype=dtype), 129, 1e-6)
    yield "unaligned"
    local_norm.forward(unaligned(2, 3, 224, 224, dtype=dtype), 47, 1e-6)


def launch_masked_reconstruction_loss(precision: Precision) -> Iterator[str]:
    dtype = precision.dtype
    if precision.tf32:
        return  # no product
    yield "timed"
    for sizes in TIMED[:1]:
        _reconstruction_loss(meta(sizes.batch, 3, sizes.side, sizes.side), sizes.drawn, (PATCH, PATCH), dtype)
    if precision.main_sizes_only:
        return
    yield "options"
    images = meta(2, 3, 224, 224)
    _reconstruction_loss(images, 49, (16, 16), dtype, keep=False)
    _reconstruction_loss(images.to(dtype), 49, (16, 16), dtype)
    yield "areas"
    for pixels, drawn in (((32, 32), 13), ((14, 14), 64), ((8, 8), 196), ((4, 4), 784), ((2, 2), 3136)):
        _reconstruction_loss(images, drawn, pixels, dtype)
    yield "odd"
    for shape, pixels, window in (((2, 3, 381, 381), (14, 14), 47), ((2, 1, 9, 11), (2, 3), 5), ((1,) * 4, (1, 1), 1)):
        _reconstruction_loss(meta(*shape), 1, pixels, dtype, window)
    yield "wide"
    _reconstruction_loss(meta(2, 3, 384, 384), 144, (16, 16), dtype, window=129)
    yield "unaligned"
    _reconstruction_loss(unaligned(2, 3, 224, 224), 49, (16, 16), dtype)


def _reconstruction_loss(
    images: Tensor, drawn: int, pixels: tuple[int, int], dtype: torch.dtype, window: int = 47, keep: bool = True
) -> None:
    batch, channels = images.shape[:2]
    decoded = meta(batch, drawn, channels * prod(pixels), dtype=dtype)
    areas, masked = meta(batch, drawn, dtype=torch.int64), meta(drawn, dtype=torch.bool)
    loss, sign, share = masked_reconstruction_loss.forward(decoded, images, areas, masked, pixels, window, 1e-6, keep)
    if keep:
        masked_reconstruction_loss.backward(loss, sign, share, dtype)


LAUNCHES: dict[str, Callable[[Precision], Iterator[str]]] = {
    "masked_attention": launch_masked_attention,
    "masked_linear": launch_masked_linear,
    "masked_layer_norm": launch_masked_layer_norm,
    "masked_mlp": launch_masked_mlp,
    "bimask": launch_bimask,
    "candidate_statistics": launch_candidate_statistics,
    "local_norm": launch_local_norm,
    "masked_reconstruction_loss": launch_masked_reconstruction_loss,
}


def run_shapes(op: str, precision: str, recorder: Recorder) -> None:
    """Every launch of one op in one precision, each in every shipped configuration."""
    with every_configuration(), _allow_tf32(PRECISIONS[precision].tf32):
        for label in LAUNCHES[op](PRECISIONS[precision]):
            recorder.source = f"{op} {precision}: {label}"


@contextmanager
def _allow_tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
