"""The op masked_linear: checks, choice of backend, and the Triton backend as a torch library op with its autograd."""

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_choice, check_floating, check_shape, compute_dtype, needs_grad
from ofb_kernels.rows import as_rows, count_rows

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with a mask on its output units: act((x Wᵀ + b) ⊙ mask).

    The masked linear layer of OFB (Ye et al., CVPR 2024, section 3), differentiable in x, weight, bias and mask.

    Args:
        x: (..., K), any leading shape and strides.
        weight: (N, K), of x's dtype (any floating dtype under autocast).
        bias: (N,) or None.
        mask: (N,), any floating dtype.
        activation: None, "gelu" (exact), "gelu_tanh", "relu" or "silu".
        backend: None, "reference", "eager" or "triton"; see `dispatch`.

    Returns:
        (..., N) in x's dtype, or autocast's where it is on.

    Raises:
        ValueError: shapes, devices or the activation do not fit, or the backend cannot serve the call.
        TypeError: an argument is no floating-point tensor, or dtypes cannot mix.
    """
    op = "masked_linear"
    check_floating(op, x=x, weight=weight, bias=bias, mask=mask)
    check_shape(op, "x", x, "...", "K")
    check_shape(op, "weight", weight, "N", x.shape[-1])
    check_shape(op, "bias", bias, weight.shape[0])
    check_shape(op, "mask", mask, weight.shape[0])
    check_choice(op, "activation", activation, ACTIVATIONS)
    dtype = compute_dtype(op, x, weight=weight, bias=bias)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    chosen = choose_backend(op, backend, {"x": x, "mask": mask})
    if chosen == "triton":
        save_pre = needs_grad(x, weight, bias, mask)
        return torch.ops.ofb_kernels.masked_linear(x, weight, bias, mask, activation, save_pre)[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_linear
    return implementation(x, weight, bias, mask, activation)


@torch.library.custom_op("ofb_kernels::masked_linear", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, activation: str | None, save_pre: bool
) -> tuple[Tensor, Tensor]:
    from ofb_kernels.kernels import masked_linear as kernel

    out, pre = kernel.forward(as_rows(x), weight, bias, mask, activation, save_pre)
    return out.view(*x.shape[:-1], weight.shape[0]), pre


@_forward.register_fake
def _(x, weight, bias, mask, activation, save_pre):
    rows, columns = count_rows(x) if save_pre else 0, weight.shape[0]
    return x.new_empty(*x.shape[:-1], columns), x.new_empty(rows, columns)


@torch.library.custom_op("ofb_kernels::masked_linear_backward", mutates_args=())
def _backward(grad_out: Tensor, pre: Tensor, mask: Tensor, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
    from ofb_kernels.kernels import masked_linear as kernel

    return kernel.backward(as_rows(grad_out), pre, mask, activation)


@_backward.register_fake
def _(grad_out, pre, mask, activation):
    partial_dtype = torch.promote_types(pre.dtype, torch.float32)
    columns = pre.new_empty(pre.shape[1], dtype=partial_dtype)
    return torch.empty_like(pre), columns, torch.empty_like(columns)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, bias, mask, ctx.activation, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, mask, output[1])


def _autograd_backward(ctx, grad_out, _grad_pre):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    x, weight, mask, pre = ctx.saved_tensors
    grad_pre, grad_mask, grad_bias = torch.ops.ofb_kernels.masked_linear_backward(grad_out, pre, mask, ctx.activation)
    needs_x, needs_weight, needs_bias, needs_mask, *_ = ctx.needs_input_grad
    return (
        (grad_pre @ weight).view_as(x) if needs_x else None,
        grad_pre.t() @ as_rows(x) if needs_weight else None,
        grad_bias.to(x.dtype) if ctx.has_bias and needs_bias else None,
        grad_mask.to(mask.dtype) if needs_mask else None,
        None,
        None,
    )


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
