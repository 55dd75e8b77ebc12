"""The op masked_layer_norm: checks, choice of backend, the Triton backend as a torch library op with its autograd."""

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.autocast import without_autocast
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_eps, check_floating, check_shape, compute_dtype, present
from ofb_kernels.ops.library import library_op
from ofb_kernels.rows import as_rows, count_rows

MAX_WIDTH = 4096  # the kernels hold a whole row in registers; a wider one would spill


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last dimension in which channel i counts with weight mᵢ, its output ⊙ m.

    mean = Σ mᵢxᵢ / Σ mᵢ,  var = Σ mᵢ(xᵢ − mean)² / Σ mᵢ,  y = ((x − mean)/√(var + eps) ⊙ weight + bias) ⊙ m

    A channel with mask 0 counts for nothing, a mask of ones gives LayerNorm: the layer moves without a jump from the
    full width to a pruned one, which the search of OFB (Ye et al., CVPR 2024, section 3) needs on a residual stream
    whose width it searches. Statistics are kept in float32 or better. Differentiable in x, weight, bias and mask.

    Args:
        x: (..., D), any leading shape and strides; D up to 4096 on the Triton backend.
        weight: (D,), of x's dtype (any floating dtype under autocast).
        bias: (D,) or None.
        mask: (D,), any floating dtype, with a positive sum; None is a plain LayerNorm, what a mask of ones gives.
        eps: added to the variance.
        backend: None, "reference", "eager" or "triton"; see `dispatch`.

    Returns:
        (..., D) in x's dtype, or autocast's where it is on.

    Raises:
        ValueError: shapes or devices do not fit, eps is negative, or the backend cannot serve the call.
        TypeError: a tensor is no floating-point tensor, or dtypes cannot mix.
    """
    op = "masked_layer_norm"
    check_floating(op, x=x, weight=weight, bias=bias, **present(mask=mask))
    check_shape(op, "x", x, "...", "D")
    width = x.shape[-1]
    for name, vector in {"weight": weight, "bias": bias, "mask": mask}.items():
        check_shape(op, name, vector, width)
    check_eps(op, eps)
    dtype = compute_dtype(op, x, weight=weight, bias=bias)
    chosen = choose_backend(op, backend, present(x=x, mask=mask), width_limit(width))
    if chosen == "triton":
        return _forward(x, weight, bias, mask, eps, dtype)[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_layer_norm
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        bias, mask = (None if vector is None else vector.to(wide) for vector in (bias, mask))
        return implementation(x.to(wide), weight.to(wide), bias, mask, eps).to(dtype)


def width_limit(width: int) -> str | None:
    """Why the kernels cannot take rows of this width, or None where they can."""
    return f"expected x of at most {MAX_WIDTH} channels, got {width}" if width > MAX_WIDTH else None


@library_op("masked_layer_norm")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from ofb_kernels.kernels import masked_layer_norm as kernel

    out, _, mean, rstd = kernel.forward(as_rows(x), weight, bias, mask, eps, dtype)
    return out.view(x.shape), mean, rstd


@_forward.register_fake
def _(x, weight, bias, mask, eps, dtype):
    mean = x.new_empty(count_rows(x), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape, dtype=dtype), mean, torch.empty_like(mean)


@library_op("masked_layer_norm_backward")
def _backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    mean: Tensor, rstd: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ofb_kernels.kernels import masked_layer_norm as kernel

    grad_x, _, grad_vectors = kernel.backward(as_rows(grad_out), as_rows(x), weight, bias, mask, mean, rstd, eps)
    return grad_x.view(x.shape), grad_vectors


@_backward.register_fake
def _(grad_out, x, weight, bias, mask, mean, rstd, eps):
    return x.new_empty(x.shape), mean.new_empty(3, x.shape[-1])


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, bias, mask, ctx.eps, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mask, mean, rstd)


def _autograd_backward(ctx, grad_out, _grad_mean, _grad_rstd):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    x, weight, bias, mask, mean, rstd = ctx.saved_tensors
    grad_x, (grad_weight, grad_bias, grad_mask) = _backward(grad_out, x, weight, bias, mask, mean, rstd, ctx.eps)
    vectors = grad_weight.to(weight.dtype), gradient_like(bias, grad_bias), gradient_like(mask, grad_mask)
    return grad_x, *vectors, None, None


def gradient_like(vector: Tensor | None, gradient: Tensor) -> Tensor | None:
    """The gradient in its vector's dtype; none for a vector that was not given."""
    return None if vector is None else gradient.to(vector.dtype)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
