"""The op candidate_statistics: checks, choice of backend, and the Triton backend as a torch library op."""

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.autocast import without_autocast
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import candidate_limit, check_alive, check_floating, check_shape
from ofb_kernels.ops.library import library_op

OP = "candidate_statistics"


def candidate_statistics(
    alpha: Tensor, alive: Tensor, heads: Tensor, units: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a search asks of its submodules' candidate sizes: adaptive one-hot losses, and expected sizes.

    p = softmax(alpha) over the n alive candidates of a row, and 0 for the dead. The loss is that of OFB (Ye et al.,
    CVPR 2024, section 3.3): L = −Σ p log p + (1/n) · tan(π/2 − π σ) with σ = Σ (p − 1/n)² / (1 − 1/n), kept off the
    tangent's poles; it is 0 for n = 1. Differentiable in alpha, with finite gradients for every finite alpha.

    Args:
        alpha: (S, K) architecture logits of K candidates of each of S submodules, any floating dtype; K up to 4096 on
            the Triton backend. Dead candidates fill up a shorter row.
        alive: bool of alpha's shape with at least one candidate of each row.
        heads: int64 of alpha's shape, how many heads each candidate has.
        units: int64 of alpha's shape, how many units each has.
        backend: None, "reference", "eager" or "triton"; see `dispatch`.

    Returns:
        One-hot losses L, expected heads Σ p · heads and expected units Σ p · units, (S,) each, in alpha's dtype and
        float32 at least, also under autocast.

    Raises:
        ValueError: shapes or devices do not fit, no candidate is alive, or the backend cannot serve.
        TypeError: dtypes do not fit.
    """
    check_floating(OP, alpha=alpha)
    if alpha.dim() != 2 or alpha.numel() == 0:
        raise ValueError(f"{OP}: expected alpha of shape (S, K) with candidates, got {tuple(alpha.shape)}")
    check_alive(OP, alive, alpha, leading=1)
    for name, sizes in {"heads": heads, "units": units}.items():
        if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64:
            got = getattr(sizes, "dtype", type(sizes).__name__)
            raise TypeError(f"{OP}: expected {name} as an int64 tensor, got {got}")
        check_shape(OP, name, sizes, *alpha.shape)
        if sizes.device != alpha.device:
            raise ValueError(f"{OP}: expected {name} on {alpha.device}, got {sizes.device}; move it there")
    chosen = choose_backend(OP, backend, {"alpha": alpha}, candidate_limit(alpha.shape[1]))
    implementation = {
        "reference": reference.candidate_statistics, "eager": eager.candidate_statistics, "triton": _triton
    }[chosen]  # fmt: skip
    with without_autocast(alpha):
        return implementation(alpha.to(torch.promote_types(alpha.dtype, torch.float32)), alive, heads, units)


def _triton(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(*(argument.contiguous() for argument in arguments))


@library_op("candidate_statistics")
def _forward(alpha: Tensor, alive: Tensor, heads: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from ofb_kernels.kernels import candidate_statistics as kernel

    return kernel.forward(alpha, alive, heads, units)


@_forward.register_fake
def _(alpha, alive, heads, units):
    return alpha.new_empty(len(alpha)), alpha.new_empty(len(alpha)), alpha.new_empty(len(alpha))


@library_op("candidate_statistics_backward")
def _backward(
    grad_one_hot: Tensor | None, grad_heads: Tensor | None, grad_units: Tensor | None,
    alpha: Tensor, alive: Tensor, heads: Tensor, units: Tensor,
) -> Tensor:  # fmt: skip
    from ofb_kernels.kernels import candidate_statistics as kernel

    return kernel.backward((grad_one_hot, grad_heads, grad_units), alpha, alive, heads, units)


@_backward.register_fake
def _(grad_one_hot, grad_heads, grad_units, alpha, alive, heads, units):
    return alpha.new_empty(alpha.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx, *grads):
    used = any(grad is not None for grad in grads)
    return _backward(*grads, *ctx.saved_tensors) if used else None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
