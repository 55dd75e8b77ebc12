"""Softmax, adaptive one-hot loss and expected sizes of rows of candidates: one launch forward, one backward.

Forward:   L = −Σ p·log p + cot(πσ)/n,   σ = Σ (p − 1/n)² / (1 − 1/n),   E_heads = Σ p·heads,   E_units = Σ p·units
Backward:  dα = p⊙(dp − Σ p·dp)
           dp = dL·(−log p − 1 − π/sin²(πσ) · 2(p − 1/n) / (n − 1)) + dE_heads·heads + dE_units·units

p is the softmax of a row's α over its n alive candidates. σ and log p are clamped; a clamped σ has no gradient. A row
of one candidate has no loss.
"""

import triton
import triton.language as tl
from torch import Tensor

from ofb_kernels.kernels.common import on_device_of
from ofb_kernels.reference import LOG_PROBABILITY_FLOOR, SIGMA_MARGIN

CONFIGURATION = dict(num_warps=4)


def forward(alpha: Tensor, alive: Tensor, heads: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One-hot losses, expected heads and expected units, (S,) each, of contiguous (S, K)."""
    rows, candidates = alpha.shape
    results = alpha.new_empty(rows), alpha.new_empty(rows), alpha.new_empty(rows)
    with on_device_of(alpha):
        _forward_kernel[(rows,)](alpha, alive, heads, units, *results, candidates, **_constants(candidates))
    return results


def backward(grads: tuple[Tensor | None, ...], alpha: Tensor, alive: Tensor, heads: Tensor, units: Tensor) -> Tensor:
    """Gradient of alpha (S, K) from those of the three results, (S,) of any stride, or None: nobody used that one."""
    grad_alpha, (rows, candidates) = alpha.new_empty(alpha.shape), alpha.shape
    strides = (0 if grad is None else grad.stride(0) for grad in grads)
    with on_device_of(alpha):
        _backward_kernel[(rows,)](
            *grads, *strides, alpha, alive, heads, units, grad_alpha, candidates, **_constants(candidates)
        )
    return grad_alpha


def _constants(candidates: int) -> dict:
    block = triton.next_power_of_2(candidates)
    return {"BLOCK": block, "MARGIN": SIGMA_MARGIN, "FLOOR": LOG_PROBABILITY_FLOOR} | CONFIGURATION


@triton.jit
def _forward_kernel(
    alpha_ptr, alive_ptr, heads_ptr, units_ptr, one_hot_ptr, expected_heads_ptr, expected_units_ptr, candidates,
    BLOCK: tl.constexpr, MARGIN: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    log_p, p, _, share, _, sigma = _distribution(row, alpha_ptr, alive_ptr, candidates, BLOCK, MARGIN, FLOOR)
    heads, units = _sizes(row, heads_ptr, units_ptr, candidates, BLOCK)
    sine, cosine = _sine_and_cosine(sigma, MARGIN)
    loss = share * cosine / sine - tl.sum(p * log_p, 0)
    tl.store(one_hot_ptr + row, tl.where(share < 1.0, loss, 0.0))
    tl.store(expected_heads_ptr + row, tl.sum(p * heads, 0))
    tl.store(expected_units_ptr + row, tl.sum(p * units, 0))


@triton.jit
def _backward_kernel(
    grad_one_hot_ptr, grad_heads_ptr, grad_units_ptr, stride_one_hot, stride_heads, stride_units,
    alpha_ptr, alive_ptr, heads_ptr, units_ptr, grad_alpha_ptr, candidates,
    BLOCK: tl.constexpr, MARGIN: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    log_p, p, off, share, spread, sigma = _distribution(row, alpha_ptr, alive_ptr, candidates, BLOCK, MARGIN, FLOOR)
    heads, units = _sizes(row, heads_ptr, units_ptr, candidates, BLOCK)
    grad_p = tl.zeros_like(p)
    if grad_one_hot_ptr is not None:
        sine, _ = _sine_and_cosine(sigma, MARGIN)
        inside = (sigma >= MARGIN) & (sigma <= 1.0 - MARGIN)  # a clamp's gradient is 0 outside
        slope = tl.where(inside, -3.141592653589793 * share / (sine * sine), 0.0)  # dL/dσ
        grad_one_hot = tl.load(grad_one_hot_ptr + row * stride_one_hot)
        loss_slope = slope * 2.0 * off / spread - log_p - 1.0
        grad_p += tl.where(share < 1.0, grad_one_hot * loss_slope, 0.0)
    if grad_heads_ptr is not None:
        grad_p += tl.load(grad_heads_ptr + row * stride_heads) * heads
    if grad_units_ptr is not None:
        grad_p += tl.load(grad_units_ptr + row * stride_units) * units
    grad_alpha = tl.where(p == 0.0, 0.0, p * (grad_p - tl.sum(p * grad_p, 0)))  # a dead one's stays 0 beside a NaN
    offsets = tl.arange(0, BLOCK)
    tl.store(grad_alpha_ptr + row * candidates + offsets, grad_alpha, mask=offsets < candidates)


@triton.jit
def _distribution(
    row, alpha_ptr, alive_ptr, candidates, BLOCK: tl.constexpr, MARGIN: tl.constexpr, FLOOR: tl.constexpr
):
    """log p, p and p − 1/n, each (BLOCK,) and 0 outside the alive; 1/n, 1 − 1/n and σ."""
    offsets = tl.arange(0, BLOCK)
    alive = tl.load(alive_ptr + row * candidates + offsets, mask=offsets < candidates, other=0) != 0
    alpha = tl.load(alpha_ptr + row * candidates + offsets, mask=alive, other=-float("inf"))
    alpha -= tl.max(alpha, 0)
    log_p = alpha - tl.log(tl.sum(tl.exp(alpha), 0))
    log_p = tl.where(alive, tl.maximum(log_p, FLOOR, tl.PropagateNan.ALL), 0.0)
    p = tl.where(alive, tl.exp(log_p), 0.0)
    share = 1.0 / tl.sum(alive.to(p.dtype), 0)
    off = tl.where(alive, p - share, 0.0)
    spread = tl.maximum(1.0 - share, MARGIN)
    return log_p, p, off, share, spread, tl.sum(off * off, 0) / spread


@triton.jit
def _sizes(row, heads_ptr, units_ptr, candidates, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    heads = tl.load(heads_ptr + row * candidates + offsets, mask=offsets < candidates, other=0)
    units = tl.load(units_ptr + row * candidates + offsets, mask=offsets < candidates, other=0)
    return heads, units


@triton.jit
def _sine_and_cosine(sigma, MARGIN: tl.constexpr):
    """sin(πσ) and cos(πσ), σ clamped; by Taylor's series, as the library's functions take a stack for huge angles."""
    margin = tl.full((), MARGIN, sigma.dtype)
    sigma = tl.minimum(tl.maximum(sigma, margin), 1.0 - margin)
    angle = 3.141592653589793 * tl.minimum(sigma, 1.0 - sigma)  # up to π/2
    square = angle * angle
    sine, cosine = tl.full((), 1.0, sigma.dtype), tl.full((), 1.0, sigma.dtype)
    for k in tl.static_range(10, 0, -1):  # exact in float64
        sine = 1.0 - square * (1.0 / (2 * k * (2 * k + 1))) * sine
        cosine = 1.0 - square * (1.0 / (2 * k * (2 * k - 1))) * cosine
    return angle * sine, tl.where(sigma < 0.5, cosine, -cosine)
