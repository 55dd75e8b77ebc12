"""The bi-masks of submodules: ranks by counting, the candidates' softmax and the staircase in one launch.

Forward:   m = λ·S + (1 − λ)·V,   S = sigmoid(s),   V = Σ_k p_k·[head rank < heads_k]·[channel rank < channels_k]
Backward:  ds = dm·λ·S·(1 − S),   dλ = Σ dm·(S − V),   dα = p⊙(dp − Σ p·dp)
           dp_k = (1 − λ)·Σ_units dm·[head rank < heads_k]·[channel rank < channels_k]

The A × B grid of candidates is walked as one flat list, k = a·B + b. A rank is the number of larger entries, and of
equal ones with a smaller index; heads are compared by integers, whose sum does not depend on its order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import accumulator_dtype, cdiv, on_device_of
from ofb_kernels.reference import HEAD_IMPORTANCE_UNIT

FORWARD_CONFIGURATION = dict(BLOCK_UNITS=32, BLOCK_OTHERS=256, BLOCK_HEADS=16, num_warps=8)
BACKWARD_CONFIGURATION = dict(TILE=4096, num_warps=8)  # units × candidates held at once


def forward(
    score: Tensor, alpha: Tensor, head_counts: Tensor, channel_counts: Tensor, lam: Tensor, alive: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """mask (S, H, d), and for the backward int32 ranks of heads (S, H) and channels (S, H, d); all contiguous."""
    submodules, heads, channels = score.shape
    candidates = alpha.shape[1:]
    mask = torch.empty_like(score)
    head_rank = score.new_empty(submodules, heads, dtype=torch.int32)
    channel_rank = torch.empty_like(score, dtype=torch.int32)
    with on_device_of(score):
        _forward_kernel[(submodules * heads * cdiv(channels, FORWARD_CONFIGURATION["BLOCK_UNITS"]),)](
            score, alpha, head_counts, channel_counts, lam, alive, mask, head_rank, channel_rank,
            heads, channels, *candidates,
            BLOCK_CANDIDATES=triton.next_power_of_2(candidates.numel()), IMPORTANCE_UNIT=HEAD_IMPORTANCE_UNIT,
            **FORWARD_CONFIGURATION,
        )  # fmt: skip
    return mask, head_rank, channel_rank


def backward(
    grad_mask: Tensor, score: Tensor, alpha: Tensor, head_counts: Tensor, channel_counts: Tensor, lam: Tensor,
    alive: Tensor, head_rank: Tensor, channel_rank: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of score (S, H, d) and alpha (S, A, B), and what each submodule adds to lam's (S,); all contiguous."""
    submodules, heads, channels = score.shape
    candidates = alpha.shape[1:]
    grad_score, grad_alpha, grad_lam = torch.empty_like(score), torch.empty_like(alpha), lam.new_empty(submodules)
    with on_device_of(score):
        _backward_kernel[(submodules,)](
            grad_mask, score, alpha, head_counts, channel_counts, lam, alive, head_rank, channel_rank,
            grad_score, grad_alpha, grad_lam,
            heads, channels, *candidates,
            BLOCK_CANDIDATES=triton.next_power_of_2(candidates.numel()), ACCUMULATOR=accumulator_dtype(score),
            **BACKWARD_CONFIGURATION,
        )  # fmt: skip
    return grad_score, grad_alpha, grad_lam


@triton.jit
def _forward_kernel(
    score_ptr, alpha_ptr, head_counts_ptr, channel_counts_ptr, lam_ptr, alive_ptr,
    mask_ptr, head_rank_ptr, channel_rank_ptr,
    heads, channels, head_candidates, channel_candidates,
    IMPORTANCE_UNIT: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_UNITS channels of one head of one submodule."""
    tiles = tl.cdiv(channels, BLOCK_UNITS)
    head_of_stack = tl.program_id(0) // tiles
    submodule, head = (head_of_stack // heads).to(tl.int64), head_of_stack % heads
    offsets_d = tl.program_id(0) % tiles * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    in_channels = offsets_d < channels
    score_ptr += submodule * heads * channels
    first = head * channels
    score = tl.load(score_ptr + first + offsets_d, mask=in_channels, other=0.0)  # (BLOCK_UNITS,)
    head_rank = _rank_of_head(score_ptr, head, heads, channels, IMPORTANCE_UNIT, BLOCK_HEADS, BLOCK_OTHERS)
    channel_rank = tl.zeros((BLOCK_UNITS,), tl.int32)
    for start in range(0, channels, BLOCK_OTHERS):
        others_d = start + tl.arange(0, BLOCK_OTHERS)
        others = tl.load(score_ptr + first + others_d, mask=others_d < channels, other=0.0)
        before = _comes_before(others[None, :], others_d[None, :], score[:, None], offsets_d[:, None])
        before &= (others_d < channels)[None, :]  # (BLOCK_UNITS, BLOCK_OTHERS)
        channel_rank += tl.sum(before.to(tl.int32), 1)
    probability, head_count, channel_count = _candidates(
        submodule, alpha_ptr, alive_ptr, head_counts_ptr, channel_counts_ptr, head_candidates, channel_candidates,
        BLOCK_CANDIDATES,
    )  # fmt: skip
    # V = Σ_k p_k·[head rank < heads_k]·[channel rank < channels_k], m = λ·S + (1 − λ)·V
    keeps = (head_rank < head_count)[None, :] & (channel_rank[:, None] < channel_count[None, :])
    sparsity = tl.sum(tl.where(keeps, probability[None, :], 0.0), 1)  # over (BLOCK_UNITS, BLOCK_CANDIDATES)
    lam = tl.load(lam_ptr)
    mask = lam * tl.sigmoid(score) + (1.0 - lam) * sparsity
    first += submodule * heads * channels
    tl.store(mask_ptr + first + offsets_d, mask, mask=in_channels)
    tl.store(channel_rank_ptr + first + offsets_d, channel_rank, mask=in_channels)
    tl.store(head_rank_ptr + submodule * heads + head, head_rank)  # every program of a head stores the same value


@triton.jit
def _backward_kernel(
    grad_mask_ptr, score_ptr, alpha_ptr, head_counts_ptr, channel_counts_ptr, lam_ptr, alive_ptr,
    head_rank_ptr, channel_rank_ptr, grad_score_ptr, grad_alpha_ptr, grad_lam_ptr,
    heads, channels, head_candidates, channel_candidates,
    ACCUMULATOR: tl.constexpr, BLOCK_CANDIDATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program for a whole submodule: a few thousand units at most, and dα and dλ need them all."""
    BLOCK_UNITS: tl.constexpr = TILE // BLOCK_CANDIDATES if TILE > BLOCK_CANDIDATES else 1
    submodule, units = tl.program_id(0).to(tl.int64), heads * channels
    probability, head_count, channel_count = _candidates(
        submodule, alpha_ptr, alive_ptr, head_counts_ptr, channel_counts_ptr, head_candidates, channel_candidates,
        BLOCK_CANDIDATES,
    )  # fmt: skip
    lam = tl.load(lam_ptr)
    grad_probability = tl.zeros((BLOCK_CANDIDATES,), ACCUMULATOR)
    grad_lam = tl.zeros((BLOCK_UNITS,), ACCUMULATOR)
    for start in range(0, units, BLOCK_UNITS):
        units_here = start + tl.arange(0, BLOCK_UNITS)
        in_units = units_here < units
        offsets = submodule * units + units_here
        grad_mask = tl.load(grad_mask_ptr + offsets, mask=in_units, other=0.0)  # (BLOCK_UNITS,)
        score = tl.load(score_ptr + offsets, mask=in_units, other=0.0)
        head_rank = tl.load(head_rank_ptr + submodule * heads + units_here // channels, mask=in_units, other=0)
        channel_rank = tl.load(channel_rank_ptr + offsets, mask=in_units, other=0)
        # ds = dm·λ·S·(1 − S), dλ = Σ dm·(S − V)
        importance = tl.sigmoid(score)
        tl.store(grad_score_ptr + offsets, grad_mask * lam * importance * (1.0 - importance), mask=in_units)
        keeps = (head_rank[:, None] < head_count[None, :]) & (channel_rank[:, None] < channel_count[None, :])
        sparsity = tl.sum(tl.where(keeps, probability[None, :], 0.0), 1)  # over (BLOCK_UNITS, BLOCK_CANDIDATES)
        grad_lam += grad_mask * (importance - sparsity)
        grad_probability += tl.sum(tl.where(keeps, grad_mask[:, None], 0.0), 0)
    # dp = (1 − λ)·Σ_units …, dα = p⊙(dp − Σ p·dp)
    grad_probability *= 1.0 - lam
    grad_alpha = probability * (grad_probability - tl.sum(probability * grad_probability, 0))
    candidates, offsets_k = head_candidates * channel_candidates, tl.arange(0, BLOCK_CANDIDATES)
    tl.store(grad_alpha_ptr + submodule * candidates + offsets_k, grad_alpha, mask=offsets_k < candidates)
    tl.store(grad_lam_ptr + submodule, tl.sum(grad_lam, 0))


@triton.jit
def _candidates(
    submodule, alpha_ptr, alive_ptr, head_counts_ptr, channel_counts_ptr, head_candidates, channel_candidates,
    BLOCK_CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Probability, head count and channel count of a submodule's candidates, each (BLOCK_CANDIDATES,)."""
    candidates, offsets = head_candidates * channel_candidates, tl.arange(0, BLOCK_CANDIDATES)
    inside = offsets < candidates
    alive = tl.load(alive_ptr + submodule * candidates + offsets, mask=inside, other=0) != 0
    alpha = tl.load(alpha_ptr + submodule * candidates + offsets, mask=alive, other=-float("inf"))
    exponential = tl.exp(alpha - tl.max(alpha, 0))
    head_counts_ptr += submodule * head_candidates
    channel_counts_ptr += submodule * channel_candidates
    head_count = tl.load(head_counts_ptr + offsets // channel_candidates, mask=inside, other=0)
    channel_count = tl.load(channel_counts_ptr + offsets % channel_candidates, mask=inside, other=0)
    return exponential / tl.sum(exponential, 0), head_count, channel_count


@triton.jit
def _rank_of_head(
    score_ptr, head, heads, channels,
    IMPORTANCE_UNIT: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Rank of one head by Σ S; a lone head's is 0 without a pass over its scores."""
    rank = tl.full((), 0, tl.int32)
    if heads > 1:
        own = _head_importance(
            score_ptr, head + tl.arange(0, 1), heads, channels, IMPORTANCE_UNIT, BLOCK_CHANNELS
        )  # (1,)
        for start in range(0, heads, BLOCK_HEADS):
            others_h = start + tl.arange(0, BLOCK_HEADS)
            others = _head_importance(score_ptr, others_h, heads, channels, IMPORTANCE_UNIT, BLOCK_CHANNELS)
            before = _comes_before(others, others_h, own, head) & (others_h < heads)  # (BLOCK_HEADS,)
            rank += tl.sum(before.to(tl.int32), 0)
    return rank


@triton.jit
def _head_importance(
    score_ptr, offsets_h, heads, channels, IMPORTANCE_UNIT: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Σ_channels S in integer units for each head of the tile."""
    importance = tl.zeros(offsets_h.shape, tl.int64)
    for start in range(0, channels, BLOCK_CHANNELS):
        offsets_d = start + tl.arange(0, BLOCK_CHANNELS)
        inside = (offsets_h < heads)[:, None] & (offsets_d < channels)[None, :]
        offsets = offsets_h[:, None] * channels + offsets_d[None, :]
        score = tl.load(score_ptr + offsets, mask=inside, other=-float("inf"))  # (heads, BLOCK_CHANNELS)
        importance += tl.sum((tl.sigmoid(score) * IMPORTANCE_UNIT).to(tl.int64), 1)
    return importance


@triton.jit
def _comes_before(a, index_a, b, index_b):
    """Whether a ranks before b: larger, or equal with the smaller index."""
    return (a > b) | ((a == b) & (index_a < index_b))
