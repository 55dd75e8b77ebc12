"""The op bimask: checks, choice of backend, and the Triton backend as a torch library op with its autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.autocast import without_autocast
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops import checks
from ofb_kernels.ops.checks import candidate_limit, check_alive, check_floating, check_shape
from ofb_kernels.ops.library import library_op

OP = "bimask"
Counts = Sequence[int] | Tensor


def bimask(
    score: Tensor,
    alpha: Tensor,
    counts: Counts | tuple[Counts, Counts],
    lam: float | Tensor,
    alive: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Bi-mask of a submodule's units, or of several submodules' at once: m = λ·S + (1 − λ)·V.

    The mask of OFB (Ye et al., CVPR 2024, section 3.2): S = sigmoid(score) says which units matter, V how many to
    keep. V(r) = Σ_k p_k · [r < c_k] for the unit of rank r, p = softmax(alpha) over the alive candidates. With heads,
    V = Σ_ab p_ab · [r_h < n_a] · [r_c < c_b]: heads are ranked by their summed S (in steps of 2⁻³⁰), channels inside
    their head by score. Equal ones are ranked by index, on every backend alike. Gradients reach score through S, alpha
    through V, and lam where it is a tensor; ranks have none.

    Args:
        score: (d,), or (H, d) for H heads of d channels, or (S, H, d) for S submodules. A submodule smaller than
            others in its stack is filled up with scores of −inf, its candidates with dead ones.
        alpha: (K,) architecture logits of K candidate sizes, or (A, B) of A head counts × B channel counts, or
            (S, A, B).
        counts: K ascending ints in 1 … d, or a pair of such sequences (head counts in 1 … H, channel counts in 1 … d).
            An int64 tensor on score's device serves as well; its values are not checked. For S submodules a pair of
            such tensors, (S, A) and (S, B).
        lam: λ in [0, 1], a float or a 0-d tensor on score's device.
        alive: bool of alpha's shape with at least one candidate of each submodule, None where all are alive.
        backend: None, "reference", "eager" or "triton"; see `dispatch`.

    Returns:
        Mask of score's shape and dtype, computed in float32 at least, also under autocast.

    Raises:
        ValueError: shapes, devices, counts or lam do not fit, no candidate is alive, or the backend cannot serve.
        TypeError: dtypes do not fit.
    """
    check_floating(OP, score=score, alpha=alpha)
    if score.dim() not in (1, 2, 3):
        raise ValueError(f"{OP}: expected score of shape (d,), (H, d) or (S, H, d), got {tuple(score.shape)}")
    if alpha.dtype != score.dtype:
        raise TypeError(f"{OP}: expected alpha of score's dtype {score.dtype}, got {alpha.dtype}; convert it")
    stack = score.shape[:-2]  # () or (S,)
    names = ("counts",) if score.dim() == 1 else ("head counts", "channel counts")
    counts = (counts,) if score.dim() == 1 else _pair(counts)
    counts = [
        _counts_tensor(name, each, units, stack, score.device)
        for name, each, units in zip(names, counts, score.shape[len(stack) :], strict=True)
    ]
    check_shape(OP, "alpha", alpha, *stack, *(each.shape[-1] for each in counts))
    if alive is None:
        alive = torch.ones_like(alpha, dtype=torch.bool)
    else:
        check_alive(OP, alive, alpha, leading=len(stack))
    chosen = choose_backend(OP, backend, {"score": score}, candidate_limit(alpha.shape[len(stack) :].numel()))
    # Without heads: one head that is always kept.
    head_counts = counts[0] if score.dim() > 1 else torch.ones(1, dtype=torch.int64, device=score.device)
    implementation = {"reference": reference.bimask, "eager": eager.bimask, "triton": _triton}[chosen]
    with without_autocast(score):
        compute = torch.promote_types(score.dtype, torch.float32)
        mask = implementation(
            _with_dims(3, score).to(compute),
            _with_dims(3, alpha).to(compute),
            _with_dims(2, head_counts),
            _with_dims(2, counts[-1]),
            _lam_tensor(lam, score, compute),
            _with_dims(3, alive),
        )
    return mask.view(score.shape).to(score.dtype)


def _with_dims(dims: int, tensor: Tensor) -> Tensor:
    """The tensor with dimensions of size 1 in front."""
    return tensor[(None,) * (dims - tensor.dim())]


def _triton(*arguments: Tensor) -> Tensor:
    return _forward(*(argument.contiguous() for argument in arguments))[0]


def _pair(counts: object) -> tuple[Counts, Counts]:
    if not isinstance(counts, (tuple, list)) or len(counts) != 2 or any(isinstance(each, int) for each in counts):
        raise ValueError(f"{OP}: expected counts as (head counts, channel counts) for a score (H, d), got {counts!r}")
    return tuple(counts)


def _counts_tensor(name: str, counts: Counts, units: int, stack: torch.Size, device: torch.device) -> Tensor:
    if isinstance(counts, Tensor):
        fits = counts.dim() == len(stack) + 1 and counts.shape[:-1] == stack
        if counts.dtype != torch.int64 or not fits or counts.device != device:
            got = f"{counts.dtype} of shape {tuple(counts.shape)} on {counts.device}"
            shape = ", ".join([*map(str, stack), "any number"])
            raise ValueError(
                f"{OP}: expected {name} as ints or an int64 tensor of shape ({shape}) on {device}, got {got}"
            )
        return counts
    if stack:
        raise ValueError(f"{OP}: expected {name} as an int64 tensor for a score (S, H, d), got {counts!r}")
    values = list(counts) if isinstance(counts, Sequence) else []
    if not values or not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{OP}: expected {name} as a sequence of ints, got {counts!r}")
    if values != sorted(set(values)) or values[0] < 1 or values[-1] > units:
        raise ValueError(f"{OP}: expected {name} ascending within 1 … {units} units, got {values}")
    return torch.tensor(values, device=device)


def _lam_tensor(lam: float | Tensor, score: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(lam, Tensor):
        if lam.dim() != 0 or lam.device != score.device or not lam.is_floating_point():
            got = f"{lam.dtype} of shape {tuple(lam.shape)} on {lam.device}"
            raise ValueError(f"{OP}: expected lam as a float or a 0-d tensor on {score.device}, got {got}")
        if checks.on_host(lam) and not 0 <= lam <= 1:
            raise ValueError(f"{OP}: expected lam in [0, 1], got {lam.item()}")
        return lam.to(dtype)
    if not isinstance(lam, (float, int)):
        raise TypeError(f"{OP}: expected lam as a float or a 0-d tensor, got {type(lam).__name__}")
    if not 0 <= lam <= 1:
        raise ValueError(f"{OP}: expected lam in [0, 1], got {lam}")
    return score.new_full((), lam, dtype=dtype)


@library_op("bimask")
def _forward(
    score: Tensor, alpha: Tensor, head_counts: Tensor, channel_counts: Tensor, lam: Tensor, alive: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from ofb_kernels.kernels import bimask as kernel

    return kernel.forward(score, alpha, head_counts, channel_counts, lam, alive)


@_forward.register_fake
def _(score, alpha, head_counts, channel_counts, lam, alive):
    ranks = torch.empty_like(score, dtype=torch.int32)
    return torch.empty_like(score), ranks.new_empty(score.shape[:2]), ranks


@library_op("bimask_backward")
def _backward(
    grad_mask: Tensor,
    score: Tensor,
    alpha: Tensor,
    head_counts: Tensor,
    channel_counts: Tensor,
    lam: Tensor,
    alive: Tensor,
    head_rank: Tensor,
    channel_rank: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from ofb_kernels.kernels import bimask as kernel

    saved = (score, alpha, head_counts, channel_counts, lam, alive, head_rank, channel_rank)
    return kernel.backward(grad_mask.contiguous(), *saved)


@_backward.register_fake
def _(grad_mask, score, alpha, head_counts, channel_counts, lam, alive, head_rank, channel_rank):
    return torch.empty_like(score), torch.empty_like(alpha), lam.new_empty(len(score))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _autograd_backward(ctx, grad_mask, _grad_head_rank, _grad_channel_rank):
    if grad_mask is None:
        return (None,) * len(ctx.needs_input_grad)
    grad_score, grad_alpha, grad_lam = _backward(grad_mask, *ctx.saved_tensors)
    return grad_score, grad_alpha, None, None, grad_lam.sum() if ctx.needs_input_grad[4] else None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
