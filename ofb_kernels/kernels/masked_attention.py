"""Masked attention on packed qkv, each of q, k and v under the same mask, without a copy of any of them.

Forward:   s = scale · (q ⊙ m)(k ⊙ m)ᵀ + b,   p = softmax(s),   o = p (v ⊙ m)
Backward:  dp = do (v ⊙ m)ᵀ,   delta = Σ_d do ⊙ o,   ds = p ⊙ (dp − delta)
           dq = scale · (ds k) ⊙ m²,   dk = scale · (dsᵀ q) ⊙ m²,   dv = (pᵀ do) ⊙ m
           dm = 2 · scale · m ⊙ Σ_rows q ⊙ (ds k) + Σ_rows v ⊙ (pᵀ do),   db = Σ_sequences ds
The two ways by which m reaches the scores, through q and through k, have equal gradients, hence the 2.

Since (q ⊙ m)(k ⊙ m)ᵀ = (q ⊙ m²) kᵀ and p (v ⊙ m) = (p v) ⊙ m, the mask is multiplied into the operand that stays on
chip or into the result; those that stream past go from memory to the tensor cores as they are. Scores are in base 2,
p = 2^(s − lse): log₂ e goes with the scale into the operand that stays.

The bias b is optional. It is (W, H, N, N), and sequence i has that of window i mod W. Its gradient has a kernel of its
own, for those who need it: a program computes the scores of one tile once more, in all sequences of its chunk, and
keeps their sum on chip. That reads q, k, v, do and o again, 10·N·d bytes of half precision for a head of a sequence
(15.7 KB in Swin's windows, N = 49, d = 32), where writing ds in float32 and adding it up would move 8·N² (19.2 KB) and
hold memory for it. It adds two products to the backward's five and the two that those compute once more.

Queries and keys past the last token are loaded as zeros. Only the last tile of a row needs that. In half precision and
heads of up to 64 channels it comes first, and the loop over all others has no bounds; elsewhere the code of a tile
twice would take too many registers. Where the last tile is a quarter of the others or less, the mask goes into the few
keys and values that it streams: another width of product would take the scaled queries in other registers. What is
needed once more after the loop is loaded again, since registers decide how many blocks a multiprocessor holds.
Gradients of mask and bias are kept per program in float32 and added up by one reduction: no atomics, the same bits
every time.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.column_sums import column_sums
from ofb_kernels.kernels.common import (
    accumulator_dtype,
    cdiv,
    dot_precision,
    hidden_multiple,
    known_multiple,
    on_device_of,
)
from ofb_kernels.kernels.tuning import Result, run_configured

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3e38)  # close to the smallest float32

# Queries (BLOCK_M) and keys (BLOCK_N) of a tile, warps and pipeline stages, for each element size in bytes (8:
# interpreted only) and padded head width; the default first. In float32 a product takes no tensor cores and its tiles
# must be small. Where all keys are in one tile, the softmax takes them at once. TAIL_M are the queries of a head's last
# program where no more are left, as 5 of 197: not measured yet.
FORWARD_CONFIGURATIONS = {
    (2, 64): (
        dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2, maxnreg=128),
        dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2, maxnreg=128, TAIL_M=16),
    ),
    (2, 128): (
        dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
        dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
    ),
    (4, 64): (dict(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=2),),
    (4, 128): (dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2),),
    (8, 64): (dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),),
    (8, 128): (dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),),
}
BACKWARD_QUERY_CONFIGURATIONS = FORWARD_CONFIGURATIONS | {
    (2, 64): (
        dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2, maxnreg=128),
        dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2, maxnreg=128, TAIL_M=16),
        dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2, maxnreg=168),
    ),
    (2, 128): (
        dict(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
        dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
    ),
}
BACKWARD_KEY_VALUE_CONFIGURATIONS = FORWARD_CONFIGURATIONS | {
    (2, 64): (
        dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=1),
        dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
    ),
    (2, 128): (
        dict(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
        dict(BLOCK_M=32, BLOCK_N=64, num_warps=8, num_stages=2),
    ),
}
# With a bias; not measured yet. Its tile takes registers: the others would spill on sm_80.
BIASED_CONFIGURATIONS = {
    (2, 64): (dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),),
    (2, 128): (dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),),
    (4, 64): (dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2),),
    (4, 128): (dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2),),
    (8, 64): (dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),),
    (8, 128): (dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),),
}
BIASED_FORWARD_CONFIGURATIONS = BIASED_CONFIGURATIONS | {
    # a window of Swin's is one tile: no running maximum
    (2, 64): (dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2), *BIASED_CONFIGURATIONS[2, 64]),
}
BIASED_KEY_VALUE_CONFIGURATIONS = BIASED_CONFIGURATIONS | {
    (2, 64): (dict(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2),),
    (2, 128): (dict(BLOCK_M=32, BLOCK_N=64, num_warps=8, num_stages=2),),
}
# Tiles of BLOCK_M queries and of BLOCK_N keys in shared memory: those held all the time, those of each pipeline stage.
SHARED_TILES = {
    "forward": ((1, 0), (0, 2)),
    "backward_query": ((2, 0), (0, 2)),
    "backward_key_value": ((0, 2), (2, 0)),
    "backward_bias": ((4, 2), (0, 0)),
}
BIAS_PROGRAMS = 1024  # at least so many where there are as many sequences: enough for every multiprocessor


def forward(qkv: Tensor, mask: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out (B, N, H·d) and log₂ Σ_keys 2^s (B, H, N) in accumulator precision.

    qkv (B, N, 3, H, d), mask (H, d), bias (W, H, N, N).
    """
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    log_sum_exp = qkv.new_empty((batch, heads, tokens), dtype=torch.promote_types(qkv.dtype, torch.float32))
    mask, bias, windows = mask.contiguous(), *_dense(bias)

    def launch(configuration: dict) -> None:
        _forward_kernel[(batch * heads * cdiv(tokens, configuration["BLOCK_M"]),)](
            qkv, mask, bias, out, log_sum_exp,
            tokens, heads, windows, *_strides(qkv),
            WHOLE_ROW=tokens <= configuration["BLOCK_N"], TAIL=_tail(tokens, configuration["BLOCK_N"]),
            SCALE=scale, **_constants(qkv), **_with_tail_rows(configuration, tokens),
        )  # fmt: skip

    if qkv.numel() > 0:
        if bias is None:
            _run("forward", FORWARD_CONFIGURATIONS, qkv, launch)
        else:
            _run("biased_forward", BIASED_FORWARD_CONFIGURATIONS, qkv, launch)
    return out, log_sum_exp


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    mask: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    bias: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """grad_qkv, packed and contiguous, in qkv's dtype; and in accumulator precision grad_mask (1, H, d), before it, if
    `sums`, grad_qkv summed over all tokens: the gradient of the projection's bias, (4, H, d) in all."""
    batch, tokens, _, heads, head_dim = qkv.shape
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    delta = torch.empty_like(log_sum_exp)
    mask, bias, windows = mask.contiguous(), *_dense(bias)
    sizes = (tokens, heads, windows, *_strides(qkv), *grad_out.stride())
    constants = dict(SCALE=scale, SUMS=sums, **_constants(qkv, grad_out))
    kind, query, key_value = "", BACKWARD_QUERY_CONFIGURATIONS, BACKWARD_KEY_VALUE_CONFIGURATIONS
    if bias is not None:
        kind, query, key_value = "biased_", BIASED_CONFIGURATIONS, BIASED_KEY_VALUE_CONFIGURATIONS
    # Of each program the sums over its rows: if `sums` dq, dk and dv, those of the other kernel zeros, and always dm.
    programs = _most_programs(query, "BLOCK_M", qkv) + _most_programs(key_value, "BLOCK_N", qkv)
    partial = delta.new_empty(programs, 4 if sums else 1, heads * head_dim)

    def launch_query(configuration: dict) -> int:
        tiles = cdiv(tokens, configuration["BLOCK_M"])
        _backward_query_kernel[(batch * heads * tiles,)](
            grad_out, qkv, mask, bias, out, log_sum_exp, delta, grad_qkv, partial, *sizes,
            WHOLE_ROW=tokens <= configuration["BLOCK_N"], TAIL=_backward_tail(tokens, configuration["BLOCK_N"]),
            **constants, **_with_tail_rows(configuration, tokens),
        )  # fmt: skip
        return batch * tiles

    def launch_key_value(configuration: dict) -> int:
        tiles = cdiv(tokens, configuration["BLOCK_N"])
        _backward_key_value_kernel[(batch * heads * tiles,)](
            grad_out, qkv, mask, bias, log_sum_exp, delta, grad_qkv, partial[written:], *sizes,
            WHOLE_ROW=tokens <= configuration["BLOCK_M"], TAIL=_backward_tail(tokens, configuration["BLOCK_M"]),
            **constants, **configuration,
        )  # fmt: skip
        return batch * tiles

    written = 0
    if qkv.numel() > 0:
        written = _run(f"{kind}backward_query", query, qkv, launch_query)
        written += _run(f"{kind}backward_key_value", key_value, qkv, launch_key_value)
    return grad_qkv, column_sums(partial[:written].flatten(1)).view(partial.shape[1], heads, head_dim)


def backward_bias(
    grad_out: Tensor, qkv: Tensor, mask: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float, bias: Tensor
) -> Tensor:
    """grad_bias (W, H, N, N) in accumulator precision."""
    batch, tokens, _, heads, _ = qkv.shape
    mask, bias, windows = mask.contiguous(), *_dense(bias)
    sizes = (batch // windows, tokens, heads, windows, *_strides(qkv), *grad_out.stride())

    def launch(configuration: dict) -> Tensor:
        tiles = cdiv(tokens, configuration["BLOCK_M"]) * cdiv(tokens, configuration["BLOCK_N"])
        tiles_of_bias = windows * heads * tiles
        chunks = min(batch // windows, cdiv(BIAS_PROGRAMS, tiles_of_bias))
        partial = bias.new_empty((chunks, *bias.shape), dtype=log_sum_exp.dtype)
        _backward_bias_kernel[(tiles_of_bias * chunks,)](
            grad_out, qkv, mask, bias, out, log_sum_exp, partial, *sizes, chunks,
            SCALE=scale, **_constants(qkv, grad_out), **configuration,
        )  # fmt: skip
        return partial.sum(0)

    if qkv.numel() == 0:
        return bias.new_zeros(bias.shape, dtype=log_sum_exp.dtype)
    return _run("backward_bias", BIASED_CONFIGURATIONS, qkv, launch)


def _dense(bias: Tensor | None) -> tuple[Tensor | None, int]:
    """The bias as one block of memory, and its windows."""
    return (None, 1) if bias is None else (bias.contiguous(), len(bias))


def _most_programs(configurations: dict, block: str, qkv: Tensor) -> int:
    """How many programs a head takes, all sequences together, in the configuration that takes most of them."""
    batch, tokens, _, _, head_dim = qkv.shape
    candidates = configurations[qkv.element_size(), 64 if head_dim <= 64 else 128]
    return batch * max(cdiv(tokens, configuration[block]) for configuration in candidates)


def _strides(qkv: Tensor) -> tuple[int, ...]:
    """Of a sequence and a token, from q to k and to v, of a head and a channel. Twice a stride may pass 2³¹: not in a
    kernel, where it would stay an int32."""
    stride_b, stride_n, stride_part, stride_h, stride_d = qkv.stride()
    return stride_b, stride_n, stride_part, 2 * stride_part, stride_h, stride_d


def _run(kernel: str, configurations: dict, qkv: Tensor, launch: Callable[[dict], Result]) -> Result:
    batch, tokens, _, heads, head_dim = qkv.shape
    size, width = qkv.element_size(), 64 if head_dim <= 64 else 128
    sizes, candidates = (batch * heads, tokens, head_dim), configurations[size, width]

    def shared(configuration: dict) -> int:
        return shared_bytes(kernel, configuration, _padded(head_dim), size)

    with on_device_of(qkv):
        name = f"masked_attention.{kernel} {size} bytes, {width} wide"
        return run_configured(name, candidates, sizes, qkv, launch, shared)


def shared_bytes(kernel: str, configuration: dict, block_d: int, size: int) -> int:
    """Bytes of shared memory that a block takes at most: tiles of operands, two numbers a row, a tile of the bias.

    Args:
        kernel: one of SHARED_TILES, "biased_" before it where there is a bias.
        configuration: of the kernel.
        block_d: padded width of a head.
        size: bytes of an element.
    """
    block_m, block_n, stages = (configuration[name] for name in ("BLOCK_M", "BLOCK_N", "num_stages"))
    held, streamed = (m * block_m + n * block_n for m, n in SHARED_TILES[kernel.removeprefix("biased_")])
    bias = 4 * block_m * block_n if kernel.startswith("biased_") else 0
    return (held + stages * streamed) * block_d * size + 2 * 4 * stages * block_m + bias


def _constants(*tensors: Tensor) -> dict:
    """Of qkv, and of grad_out in a backward pass."""
    qkv, head_dim = tensors[0], tensors[0].shape[-1]
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    return dict(
        HEAD_DIM=head_dim,
        BLOCK_D=_padded(head_dim),
        LAST_ALONE=qkv.element_size() == 2 and head_dim <= 64,
        MULTIPLE=hidden_multiple(head_dim, *strides),
        ACCUMULATOR=accumulator_dtype(qkv),
        PRECISION=dot_precision(),
    )


def _padded(length: int) -> int:
    """The least tile of a product that holds so many rows or channels."""
    return max(16, triton.next_power_of_2(length))


def _tail(tokens: int, block: int) -> int:
    """The least tile for the last tokens, behind whole tiles of `block`."""
    return _padded((tokens - 1) % block + 1)


def _backward_tail(tokens: int, block: int) -> int:
    """As `_tail`, but `block` where a smaller one would save less than three quarters of one of several tiles.

    A second size of tile has code of its own. By instructions it pays from there on, and less takes registers.
    """
    tail = _tail(tokens, block)
    return tail if tokens <= block or 4 * tail <= block else block


def _with_tail_rows(configuration: dict, tokens: int) -> dict:
    """The configuration, its TAIL_M being BLOCK_M where it names none or the last queries are more than that."""
    block = configuration["BLOCK_M"]
    tail = configuration.get("TAIL_M", block)
    return configuration | {"TAIL_M": tail if block < tokens and _tail(tokens, block) <= tail else block}


@triton.jit
def _forward_kernel(
    qkv_ptr, mask_ptr, bias_ptr, out_ptr, log_sum_exp_ptr,
    tokens, heads, windows,
    stride_b, stride_n, stride_k, stride_v, stride_h, stride_d,
    WHOLE_ROW: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MULTIPLE: tl.constexpr,
    LAST_ALONE: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head (TAIL_M at the end), all keys."""
    stride_b, stride_n = known_multiple(stride_b, MULTIPLE), known_multiple(stride_n, MULTIPLE)
    stride_h = known_multiple(stride_h, MULTIPLE)
    stride_k, stride_v = known_multiple(stride_k, MULTIPLE), known_multiple(stride_v, MULTIPLE)
    tile, head, batch = _tile_of_head(tl.program_id(0), tokens, heads, BLOCK_M)
    qkv_ptr += batch * stride_b + head * stride_h
    mask_ptr += head * HEAD_DIM
    if bias_ptr is not None:
        bias_ptr += (batch % windows * heads + head) * tokens * tokens
    start_m, first_m = tile * BLOCK_M, 0
    whole: tl.constexpr = True
    if TAIL_M < BLOCK_M:
        whole = start_m + BLOCK_M <= tokens
        first_m = start_m  # with two sizes of tile this takes ptxas fewer registers, with one size more
    out_ptr += ((batch * tokens + first_m) * heads + head) * HEAD_DIM
    log_sum_exp_ptr += (batch * heads + head) * tokens + first_m
    if whole:
        _forward_tile(
            qkv_ptr, mask_ptr, bias_ptr, out_ptr, log_sum_exp_ptr, start_m, first_m, tokens, heads,
            stride_n, stride_k, stride_v, stride_d,
            WHOLE_ROW, TAIL, SCALE, HEAD_DIM, BLOCK_D, LAST_ALONE, ACCUMULATOR, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _forward_tile(
            qkv_ptr, mask_ptr, bias_ptr, out_ptr, log_sum_exp_ptr, start_m, first_m, tokens, heads,
            stride_n, stride_k, stride_v, stride_d,
            WHOLE_ROW, TAIL, SCALE, HEAD_DIM, BLOCK_D, LAST_ALONE, ACCUMULATOR, PRECISION, TAIL_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _forward_tile(
    qkv_ptr, mask_ptr, bias_ptr, out_ptr, log_sum_exp_ptr, start_m, first_m, tokens, heads,
    stride_n, stride_k, stride_v, stride_d,
    WHOLE_ROW: tl.constexpr, TAIL: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    LAST_ALONE: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The queries from start_m on; out_ptr and log_sum_exp_ptr point to query first_m."""
    offsets_m = start_m + tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_queries, in_head = offsets_m < tokens, offsets_d < HEAD_DIM
    mask = _load_mask(mask_ptr, offsets_d, in_head, ACCUMULATOR)  # (BLOCK_D,)
    q = _load_rows(qkv_ptr, offsets_m, offsets_d, in_queries, in_head, stride_n, stride_d)  # (BLOCK_M, BLOCK_D)
    factor = mask * mask * (SCALE * _LOG2_E)
    scaled_q = (q.to(ACCUMULATOR) * factor[None, :]).to(q.dtype)

    end = tokens  # of the loop
    if WHOLE_ROW or LAST_ALONE:
        # The last keys, which need not fill a tile, come first: what their smaller tile needs is not kept for later.
        end = (tokens - 1) // BLOCK_N * BLOCK_N
        if WHOLE_ROW or 4 * TAIL > BLOCK_N:
            tail_q, k_factor = scaled_q, None
        else:  # scaled_q would be in registers once more, for a product of another width: few keys are scaled instead
            tail_q, k_factor = q, factor
        row_max, row_sum, attended = _attend(
            tail_q, k_factor, qkv_ptr, bias_ptr, offsets_m, end, tokens, offsets_d, in_head,
            stride_n, stride_k, stride_v, stride_d, ACCUMULATOR, PRECISION, TAIL,
        )  # (BLOCK_M,), (BLOCK_M,), (BLOCK_M, BLOCK_D)  # fmt: skip
    else:
        row_max = tl.full((BLOCK_M,), float("-inf"), ACCUMULATOR)
        row_sum = tl.zeros((BLOCK_M,), ACCUMULATOR)
        attended = tl.zeros((BLOCK_M, BLOCK_D), ACCUMULATOR)
    if not WHOLE_ROW:
        for start_n in range(0, end, BLOCK_N):
            scores, _, v = _scores_k_v(
                scaled_q, None, qkv_ptr, bias_ptr, offsets_m, start_n, tokens, offsets_d, in_head,
                stride_n, stride_k, stride_v, stride_d, ACCUMULATOR, PRECISION, BLOCK_N, LAST_ALONE,
            )  # (BLOCK_M, BLOCK_N), (BLOCK_N, BLOCK_D)  # fmt: skip
            # the softmax of all keys so far: what was summed under the old maximum shrinks by 2^(old − new)
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            if bias_ptr is not None:  # it may have hidden all keys so far: −∞ − −∞ is no number
                new_max = tl.maximum(new_max, _LOWEST)
            shrink = tl.exp2(row_max - new_max)
            p = tl.exp2(scores - new_max[:, None])
            row_sum = row_sum * shrink + tl.sum(p, 1)
            # not the product's accumulator: where that shrinks between two products, ptxas waits for every wgmma
            product = tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACCUMULATOR)
            attended = tl.fma(attended, tl.broadcast_to(shrink[:, None], attended.shape), product)
            row_max = new_max

    mask = _load_mask(mask_ptr, offsets_d, in_head, ACCUMULATOR, True)
    # o = (p v) ⊙ m
    out = attended * mask[None, :] * (1.0 / row_sum)[:, None]
    rows = offsets_m - first_m
    offsets = rows.to(tl.int64)[:, None] * (heads * HEAD_DIM) + offsets_d[None, :]
    tl.store(out_ptr + offsets, out, mask=in_queries[:, None] & in_head[None, :])
    tl.store(log_sum_exp_ptr + rows, row_max + tl.log2(row_sum), mask=in_queries)


@triton.jit
def _backward_query_kernel(
    grad_out_ptr, qkv_ptr, mask_ptr, bias_ptr, out_ptr, log_sum_exp_ptr, delta_ptr, grad_qkv_ptr, partial_ptr,
    tokens, heads, windows,
    stride_b, stride_n, stride_k, stride_v, stride_h, stride_d, stride_gb, stride_gn, stride_gd,
    WHOLE_ROW: tl.constexpr, TAIL: tl.constexpr, SUMS: tl.constexpr,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MULTIPLE: tl.constexpr,
    LAST_ALONE: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_M: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_M queries of one head (TAIL_M at the end), all keys; delta for the other kernel."""
    stride_b, stride_n = known_multiple(stride_b, MULTIPLE), known_multiple(stride_n, MULTIPLE)
    stride_h = known_multiple(stride_h, MULTIPLE)
    stride_k, stride_v = known_multiple(stride_k, MULTIPLE), known_multiple(stride_v, MULTIPLE)
    stride_gb, stride_gn = known_multiple(stride_gb, MULTIPLE), known_multiple(stride_gn, MULTIPLE)
    tile, head, batch = _tile_of_head(tl.program_id(0), tokens, heads, BLOCK_M)
    qkv_ptr += batch * stride_b + head * stride_h
    mask_ptr += head * HEAD_DIM
    if bias_ptr is not None:
        bias_ptr += (batch % windows * heads + head) * tokens * tokens
    start_m, first_m = tile * BLOCK_M, 0
    whole: tl.constexpr = True
    if TAIL_M < BLOCK_M:
        whole = start_m + BLOCK_M <= tokens
        first_m = start_m  # as in the forward
    grad_out_ptr += batch * stride_gb + head * HEAD_DIM * stride_gd
    out_ptr += ((batch * tokens + first_m) * heads + head) * HEAD_DIM
    grad_qkv_ptr += ((batch * tokens + first_m) * (3 * heads) + head) * HEAD_DIM
    log_sum_exp_ptr += (batch * heads + head) * tokens + first_m
    delta_ptr += (batch * heads + head) * tokens + first_m
    partial_ptr += ((batch * tl.cdiv(tokens, BLOCK_M) + tile) * (4 if SUMS else 1) * heads + head) * HEAD_DIM
    if whole:
        _backward_query_tile(
            grad_out_ptr, qkv_ptr, mask_ptr, bias_ptr, out_ptr, log_sum_exp_ptr, delta_ptr, grad_qkv_ptr, partial_ptr,
            start_m, first_m, tokens, heads, stride_n, stride_k, stride_v, stride_d, stride_gn, stride_gd,
            WHOLE_ROW, TAIL, SUMS, SCALE, HEAD_DIM, BLOCK_D, LAST_ALONE, ACCUMULATOR, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _backward_query_tile(
            grad_out_ptr, qkv_ptr, mask_ptr, bias_ptr, out_ptr, log_sum_exp_ptr, delta_ptr, grad_qkv_ptr, partial_ptr,
            start_m, first_m, tokens, heads, stride_n, stride_k, stride_v, stride_d, stride_gn, stride_gd,
            WHOLE_ROW, TAIL, SUMS, SCALE, HEAD_DIM, BLOCK_D, LAST_ALONE, ACCUMULATOR, PRECISION, TAIL_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _backward_query_tile(
    grad_out_ptr, qkv_ptr, mask_ptr, bias_ptr, out_ptr, log_sum_exp_ptr, delta_ptr, grad_qkv_ptr, partial_ptr,
    start_m, first_m, tokens, heads, stride_n, stride_k, stride_v, stride_d, stride_gn, stride_gd,
    WHOLE_ROW: tl.constexpr, TAIL: tl.constexpr, SUMS: tl.constexpr,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    LAST_ALONE: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The queries from start_m on; out_ptr, log_sum_exp_ptr, delta_ptr and grad_qkv_ptr point to query first_m."""
    offsets_m = start_m + tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    in_queries, in_head = offsets_m < tokens, offsets_d < HEAD_DIM
    rows = offsets_m - first_m
    mask = _load_mask(mask_ptr, offsets_d, in_head, ACCUMULATOR)  # (BLOCK_D,)
    q = _load_rows(qkv_ptr, offsets_m, offsets_d, in_queries, in_head, stride_n, stride_d)  # (BLOCK_M, BLOCK_D)
    factor = mask * mask * (SCALE * _LOG2_E)
    scaled_q = (q.to(ACCUMULATOR) * factor[None, :]).to(q.dtype)
    grad_out = _load_rows(grad_out_ptr, offsets_m, offsets_d, in_queries, in_head, stride_gn, stride_gd)
    out = _load_rows(out_ptr, rows, offsets_d, in_queries, in_head, heads * HEAD_DIM, 1)
    # delta = Σ_d do ⊙ o
    delta = tl.sum(grad_out.to(ACCUMULATOR) * out.to(ACCUMULATOR), 1)  # (BLOCK_M,)
    tl.store(delta_ptr + rows, delta, mask=in_queries)
    masked_grad_out = (grad_out.to(ACCUMULATOR) * mask[None, :]).to(q.dtype)
    log_sum_exp = tl.load(log_sum_exp_ptr + rows, mask=in_queries, other=0.0)

    grad_q = tl.zeros((BLOCK_M, BLOCK_D), ACCUMULATOR)
    end = tokens  # of the loop
    if WHOLE_ROW or LAST_ALONE:
        end = (tokens - 1) // BLOCK_N * BLOCK_N
        if WHOLE_ROW or 4 * TAIL > BLOCK_N:
            tail_q, tail_grad_out, k_factor, v_factor = scaled_q, masked_grad_out, None, None
        else:  # as in the forward
            tail_q, tail_grad_out, k_factor, v_factor = q, grad_out, factor, mask
        grad_q = _add_keys(
            grad_q, tail_q, tail_grad_out, k_factor, v_factor, log_sum_exp, delta, qkv_ptr, bias_ptr, offsets_m, end,
            tokens, offsets_d, in_head, stride_n, stride_k, stride_v, stride_d, ACCUMULATOR, PRECISION, TAIL, False,
        )  # fmt: skip
    if not WHOLE_ROW:
        for start_n in range(0, end, BLOCK_N):
            grad_q = _add_keys(
                grad_q, scaled_q, masked_grad_out, None, None, log_sum_exp, delta, qkv_ptr, bias_ptr, offsets_m,
                start_n, tokens, offsets_d, in_head, stride_n, stride_k, stride_v, stride_d,
                ACCUMULATOR, PRECISION, BLOCK_N, LAST_ALONE,
            )  # fmt: skip

    if LAST_ALONE:
        mask = _load_mask(mask_ptr, offsets_d, in_head, ACCUMULATOR, True)
        q = _load_rows(qkv_ptr, offsets_m, offsets_d, in_queries, in_head, stride_n, stride_d, True)
    grad_masked_q = grad_q * (SCALE * mask)[None, :]
    grad_q = grad_masked_q * mask[None, :]  # 0 past the last query
    offsets = rows.to(tl.int64)[:, None] * (3 * heads * HEAD_DIM) + offsets_d[None, :]
    tl.store(grad_qkv_ptr + offsets, grad_q, mask=in_queries[:, None] & in_head[None, :])
    # the share of q and k in dm: 2 · scale · m ⊙ Σ_rows q ⊙ (ds k)
    partial = tl.sum(2.0 * grad_masked_q * q.to(ACCUMULATOR), 0)
    if SUMS:
        part, zeros = heads * HEAD_DIM, tl.zeros((BLOCK_D,), ACCUMULATOR)
        tl.store(partial_ptr + offsets_d, tl.sum(grad_q, 0), mask=in_head)
        tl.store(partial_ptr + part + offsets_d, zeros, mask=in_head)
        tl.store(partial_ptr + 2 * part + offsets_d, zeros, mask=in_head)
        partial_ptr += 3 * part
    tl.store(partial_ptr + offsets_d, partial, mask=in_head)


@triton.jit
def _backward_key_value_kernel(
    grad_out_ptr, qkv_ptr, mask_ptr, bias_ptr, log_sum_exp_ptr, delta_ptr, grad_qkv_ptr, partial_ptr,
    tokens, heads, windows,
    stride_b, stride_n, stride_k, stride_v, stride_h, stride_d, stride_gb, stride_gn, stride_gd,
    WHOLE_ROW: tl.constexpr, TAIL: tl.constexpr, SUMS: tl.constexpr,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MULTIPLE: tl.constexpr,
    LAST_ALONE: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one head, all queries. Scores stand transposed: keys × queries."""
    stride_b, stride_n = known_multiple(stride_b, MULTIPLE), known_multiple(stride_n, MULTIPLE)
    stride_h = known_multiple(stride_h, MULTIPLE)
    stride_k, stride_v = known_multiple(stride_k, MULTIPLE), known_multiple(stride_v, MULTIPLE)
    stride_gb, stride_gn = known_multiple(stride_gb, MULTIPLE), known_multiple(stride_gn, MULTIPLE)
    tile, head, batch = _tile_of_head(tl.program_id(0), tokens, heads, BLOCK_N)
    offsets_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_keys, in_head = offsets_n < tokens, offsets_d < HEAD_DIM
    qkv_ptr += batch * stride_b + head * stride_h
    grad_out_ptr += batch * stride_gb + head * HEAD_DIM * stride_gd
    log_sum_exp_ptr += (batch * heads + head) * tokens
    delta_ptr += (batch * heads + head) * tokens
    grad_qkv_ptr += ((batch * tokens + tile * BLOCK_N) * (3 * heads) + head) * HEAD_DIM
    partial_ptr += ((batch * tl.cdiv(tokens, BLOCK_N) + tile) * (4 if SUMS else 1) * heads + head) * HEAD_DIM
    mask_ptr += head * HEAD_DIM
    mask = _load_mask(mask_ptr, offsets_d, in_head, ACCUMULATOR)  # (BLOCK_D,)
    keys, keys_ptr = tl.arange(0, BLOCK_N), qkv_ptr + (tile * BLOCK_N).to(tl.int64) * stride_n
    k = _load_rows(keys_ptr + stride_k, keys, offsets_d, in_keys, in_head, stride_n, stride_d)
    v = _load_rows(keys_ptr + stride_v, keys, offsets_d, in_keys, in_head, stride_n, stride_d)
    scaled_k = (k.to(ACCUMULATOR) * (mask * mask * (SCALE * _LOG2_E))[None, :]).to(k.dtype)  # (BLOCK_N, BLOCK_D)
    masked_v = (v.to(ACCUMULATOR) * mask[None, :]).to(v.dtype)  # (BLOCK_N, BLOCK_D)
    if bias_ptr is not None:
        bias_ptr += (batch % windows * heads + head) * tokens * tokens

    grad_k = tl.zeros((BLOCK_N, BLOCK_D), ACCUMULATOR)
    grad_masked_v = tl.zeros((BLOCK_N, BLOCK_D), ACCUMULATOR)
    end = tokens  # of the loop
    if WHOLE_ROW or LAST_ALONE:
        end = (tokens - 1) // BLOCK_M * BLOCK_M
        grad_k, grad_masked_v = _add_queries(
            grad_k, grad_masked_v, scaled_k, masked_v, grad_out_ptr, qkv_ptr, bias_ptr,
            log_sum_exp_ptr, delta_ptr, offsets_n, end, tokens, offsets_d, in_head,
            stride_n, stride_d, stride_gn, stride_gd, ACCUMULATOR, PRECISION, TAIL, False,
        )  # fmt: skip
    if not WHOLE_ROW:
        for start_m in range(0, end, BLOCK_M):
            grad_k, grad_masked_v = _add_queries(
                grad_k, grad_masked_v, scaled_k, masked_v, grad_out_ptr, qkv_ptr, bias_ptr,
                log_sum_exp_ptr, delta_ptr, offsets_n, start_m, tokens, offsets_d, in_head,
                stride_n, stride_d, stride_gn, stride_gd, ACCUMULATOR, PRECISION, BLOCK_M, LAST_ALONE,
            )  # fmt: skip

    if LAST_ALONE:
        mask = _load_mask(mask_ptr, offsets_d, in_head, ACCUMULATOR, True)
        v = _load_rows(keys_ptr + stride_v, keys, offsets_d, in_keys, in_head, stride_n, stride_d, True)
    part = heads * HEAD_DIM
    inside = in_keys[:, None] & in_head[None, :]
    offsets = keys.to(tl.int64)[:, None] * (3 * part) + part + offsets_d[None, :]
    # past the last key p may overflow
    grad_k = tl.where(inside, grad_k * (SCALE * mask * mask)[None, :], 0.0)
    grad_masked_v = tl.where(inside, grad_masked_v, 0.0)
    grad_v = grad_masked_v * mask[None, :]
    tl.store(grad_qkv_ptr + offsets, grad_k, mask=inside)
    tl.store(grad_qkv_ptr + offsets + part, grad_v, mask=inside)
    if SUMS:
        tl.store(partial_ptr + offsets_d, tl.zeros((BLOCK_D,), ACCUMULATOR), mask=in_head)
        tl.store(partial_ptr + part + offsets_d, tl.sum(grad_k, 0), mask=in_head)
        tl.store(partial_ptr + 2 * part + offsets_d, tl.sum(grad_v, 0), mask=in_head)
        partial_ptr += 3 * part
    # the share of v in dm: Σ_rows v ⊙ (pᵀ do)
    tl.store(partial_ptr + offsets_d, tl.sum(grad_masked_v * v.to(ACCUMULATOR), 0), mask=in_head)


@triton.jit
def _backward_bias_kernel(
    grad_out_ptr, qkv_ptr, mask_ptr, bias_ptr, out_ptr, log_sum_exp_ptr, partial_ptr,
    sequences, tokens, heads, windows,
    stride_b, stride_n, stride_k, stride_v, stride_h, stride_d, stride_gb, stride_gn, stride_gd,
    chunks,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MULTIPLE: tl.constexpr,
    LAST_ALONE: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: Σ ds of BLOCK_M queries and BLOCK_N keys of one head, over a chunk of the window's sequences."""
    stride_b, stride_n = known_multiple(stride_b, MULTIPLE), known_multiple(stride_n, MULTIPLE)
    stride_h = known_multiple(stride_h, MULTIPLE)
    stride_k, stride_v = known_multiple(stride_k, MULTIPLE), known_multiple(stride_v, MULTIPLE)
    stride_gb, stride_gn = known_multiple(stride_gb, MULTIPLE), known_multiple(stride_gn, MULTIPLE)
    tile, head, window_of_chunk = _tile_of_head(tl.program_id(0), tokens, heads, BLOCK_M, BLOCK_N)
    window, chunk = window_of_chunk % windows, window_of_chunk // windows
    tiles_n = tl.cdiv(tokens, BLOCK_N)
    offsets_m = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)
    in_queries, in_keys, in_head = offsets_m < tokens, offsets_n < tokens, offsets_d < HEAD_DIM
    mask_ptr += head * HEAD_DIM
    mask = _load_mask(mask_ptr, offsets_d, in_head, ACCUMULATOR)  # (BLOCK_D,)
    bias_offset = (window * heads + head) * tokens * tokens
    bias = _load_bias(bias_ptr + bias_offset, offsets_m[:, None], offsets_n[None, :], tokens, ACCUMULATOR)
    bias = tl.where(in_keys[None, :], bias, float("-inf"))

    grad_bias = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for sequence in range(chunk, sequences, chunks):
        batch = sequence * windows + window
        head_ptr = qkv_ptr + batch * stride_b + head * stride_h
        grad_out_head_ptr = grad_out_ptr + batch * stride_gb + head * HEAD_DIM * stride_gd
        out_head_ptr = out_ptr + (batch * tokens * heads + head) * HEAD_DIM
        q = _load_rows(head_ptr, offsets_m, offsets_d, in_queries, in_head, stride_n, stride_d)  # (BLOCK_M, BLOCK_D)
        k = _load_rows(head_ptr + stride_k, offsets_n, offsets_d, in_keys, in_head, stride_n, stride_d)
        v = _load_rows(head_ptr + stride_v, offsets_n, offsets_d, in_keys, in_head, stride_n, stride_d)
        grad_out = _load_rows(grad_out_head_ptr, offsets_m, offsets_d, in_queries, in_head, stride_gn, stride_gd)
        out = _load_rows(out_head_ptr, offsets_m, offsets_d, in_queries, in_head, heads * HEAD_DIM, 1)
        rows = (batch * heads + head) * tokens + offsets_m
        log_sum_exp = tl.load(log_sum_exp_ptr + rows, mask=in_queries, other=0.0)  # (BLOCK_M,)
        grad_out = grad_out.to(ACCUMULATOR)
        delta = tl.sum(grad_out * out.to(ACCUMULATOR), 1)  # (BLOCK_M,)
        scaled_q = (q.to(ACCUMULATOR) * (mask * mask * (SCALE * _LOG2_E))[None, :]).to(q.dtype)
        masked_grad_out = (grad_out * mask[None, :]).to(q.dtype)
        scores = tl.dot(scaled_q, tl.trans(k), input_precision=PRECISION, out_dtype=ACCUMULATOR) + bias
        p = tl.exp2(scores - log_sum_exp[:, None])  # (BLOCK_M, BLOCK_N)
        grad_p = tl.dot(masked_grad_out, tl.trans(v), input_precision=PRECISION, out_dtype=ACCUMULATOR)
        # ds = p ⊙ (dp − delta)
        grad_bias += p * (grad_p - delta[:, None])

    rows = ((chunk * windows + window) * heads + head) * tokens + offsets_m
    offsets = rows[:, None] * tokens + offsets_n[None, :]
    tl.store(partial_ptr + offsets, grad_bias, mask=in_queries[:, None] & in_keys[None, :])


@triton.jit
def _attend(
    scaled_q, k_factor, qkv_ptr, bias_ptr, offsets_m, start_n, tokens, offsets_d, in_head,
    stride_n, stride_k, stride_v, stride_d,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of the softmax over the last tile of keys alone, and what it attends to."""
    scores, _, v = _scores_k_v(
        scaled_q, k_factor, qkv_ptr, bias_ptr, offsets_m, start_n, tokens, offsets_d, in_head,
        stride_n, stride_k, stride_v, stride_d, ACCUMULATOR, PRECISION, BLOCK_N, False,
    )  # (BLOCK_M, BLOCK_N), (BLOCK_N, BLOCK_D)  # fmt: skip
    row_max = tl.max(scores, 1)
    if bias_ptr is not None:  # it may have hidden all of these keys: −∞ − −∞ is no number
        row_max = tl.maximum(row_max, _LOWEST)
    p = tl.exp2(scores - row_max[:, None])
    attended = tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    return row_max, tl.sum(p, 1), attended


@triton.jit
def _scores_k_v(
    scaled_q, k_factor, qkv_ptr, bias_ptr, offsets_m, start_n, tokens, offsets_d, in_head,
    stride_n, stride_k, stride_v, stride_d,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of keys, −∞ past the last key, the keys and their values; with WHOLE no key is past the last.

    k_factor scales the keys where q has not been scaled, and is None otherwise.
    """
    offsets_n = start_n + tl.arange(0, BLOCK_N)
    in_keys = (offsets_n < tokens) | WHOLE
    k = _load_rows(qkv_ptr + stride_k, offsets_n, offsets_d, in_keys, in_head, stride_n, stride_d)
    v = _load_rows(qkv_ptr + stride_v, offsets_n, offsets_d, in_keys, in_head, stride_n, stride_d)
    scaled_k = k if k_factor is None else (k.to(ACCUMULATOR) * k_factor[None, :]).to(k.dtype)
    scores = tl.dot(scaled_q, tl.trans(scaled_k), input_precision=PRECISION, out_dtype=ACCUMULATOR)
    if bias_ptr is not None:
        scores += _load_bias(bias_ptr, offsets_m[:, None], offsets_n[None, :], tokens, ACCUMULATOR)
    return tl.where(in_keys[None, :], scores, float("-inf")), k, v


@triton.jit
def _add_keys(
    grad_q, scaled_q, masked_grad_out, k_factor, v_factor, log_sum_exp, delta, qkv_ptr, bias_ptr, offsets_m, start_n,
    tokens, offsets_d, in_head, stride_n, stride_k, stride_v, stride_d,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """grad_q and what a tile of keys adds to it. See _scores_k_v for the factors and WHOLE."""
    scores, k, v = _scores_k_v(
        scaled_q, k_factor, qkv_ptr, bias_ptr, offsets_m, start_n, tokens, offsets_d, in_head,
        stride_n, stride_k, stride_v, stride_d, ACCUMULATOR, PRECISION, BLOCK_N, WHOLE,
    )  # fmt: skip
    p = tl.exp2(scores - log_sum_exp[:, None])  # (BLOCK_M, BLOCK_N)
    masked_v = v if v_factor is None else (v.to(ACCUMULATOR) * v_factor[None, :]).to(v.dtype)
    grad_p = tl.dot(masked_grad_out, tl.trans(masked_v), input_precision=PRECISION, out_dtype=ACCUMULATOR)
    # ds = p ⊙ (dp − delta), dq = scale · (ds k) ⊙ m²
    grad_scores = (p * (grad_p - delta[:, None])).to(k.dtype)
    return tl.dot(grad_scores, k, grad_q, input_precision=PRECISION, out_dtype=ACCUMULATOR)


@triton.jit
def _add_queries(
    grad_k, grad_masked_v, scaled_k, masked_v, grad_out_ptr, qkv_ptr, bias_ptr, log_sum_exp_ptr, delta_ptr,
    offsets_n, start_m, tokens, offsets_d, in_head, stride_n, stride_d, stride_gn, stride_gd,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_masked_v and what a tile of queries adds to them; with WHOLE no query is past the last."""
    offsets_m = start_m + tl.arange(0, BLOCK_M)
    in_queries = (offsets_m < tokens) | WHOLE
    q = _load_rows(qkv_ptr, offsets_m, offsets_d, in_queries, in_head, stride_n, stride_d)
    grad_out = _load_rows(grad_out_ptr, offsets_m, offsets_d, in_queries, in_head, stride_gn, stride_gd)
    # past the last query q and do are 0, so p is finite there and adds nothing
    log_sum_exp = tl.load(log_sum_exp_ptr + offsets_m, mask=in_queries, other=0.0)  # (BLOCK_M,)
    delta = tl.load(delta_ptr + offsets_m, mask=in_queries, other=0.0)  # (BLOCK_M,)
    scores = tl.dot(scaled_k, tl.trans(q), input_precision=PRECISION, out_dtype=ACCUMULATOR)
    if bias_ptr is not None:
        scores += _load_bias(bias_ptr, offsets_m[None, :], offsets_n[:, None], tokens, ACCUMULATOR)
    p = tl.exp2(scores - log_sum_exp[None, :])  # (BLOCK_N, BLOCK_M)
    # d(v ⊙ m) = pᵀ do
    grad_masked_v = tl.dot(p.to(q.dtype), grad_out, grad_masked_v, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    grad_p = tl.dot(masked_v, tl.trans(grad_out), input_precision=PRECISION, out_dtype=ACCUMULATOR)
    # ds = p ⊙ (dp − delta), dk = scale · (dsᵀ q) ⊙ m²
    grad_scores = (p * (grad_p - delta[None, :])).to(q.dtype)
    grad_k = tl.dot(grad_scores, q, grad_k, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    return grad_k, grad_masked_v


@triton.jit
def _load_mask(ptr, offsets_d, in_head, ACCUMULATOR: tl.constexpr, AGAIN: tl.constexpr = False):
    """The mask of a head, zero outside.

    AGAIN names the cache that every load takes: a difference that keeps the compiler from merging it with an earlier
    load, whose result would then stay in registers in between.
    """
    mask = tl.load(ptr + offsets_d, mask=in_head, other=0.0, cache_modifier=".ca" if AGAIN else "")
    return mask.to(ACCUMULATOR)


@triton.jit
def _load_bias(ptr, offsets_m, offsets_n, tokens, ACCUMULATOR: tl.constexpr):
    """The bias of a tile of scores, in base 2, zero outside; either of queries and keys may stand in rows."""
    inside = (offsets_m < tokens) & (offsets_n < tokens)
    bias = tl.load(ptr + offsets_m.to(tl.int64) * tokens + offsets_n, mask=inside, other=0.0)
    return bias.to(ACCUMULATOR) * _LOG2_E


@triton.jit
def _tile_of_head(program, tokens, heads, BLOCK: tl.constexpr, OTHER_BLOCK: tl.constexpr = None):
    """Tile, head and image of a program; int64, for offsets. All tiles of a head run side by side.

    A tile is one of tokens, or with another block size one of tokens × tokens.
    """
    tiles = tl.cdiv(tokens, BLOCK)
    if OTHER_BLOCK is not None:
        tiles *= tl.cdiv(tokens, OTHER_BLOCK)
    head_of_batch = (program // tiles).to(tl.int64)
    return program % tiles, head_of_batch % heads, head_of_batch // heads


@triton.jit
def _load_rows(ptr, offsets, offsets_d, in_rows, in_head, stride_row, stride_d, AGAIN: tl.constexpr = False):
    """A (len(offsets), BLOCK_D) tile, zero outside. See _load_mask for AGAIN."""
    rows = offsets.to(tl.int64)[:, None] * stride_row
    columns = offsets_d.to(tl.int64)[None, :] * stride_d
    inside = in_rows[:, None] & in_head[None, :]
    return tl.load(ptr + rows + columns, mask=inside, other=0.0, cache_modifier=".ca" if AGAIN else "")
