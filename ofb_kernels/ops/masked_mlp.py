"""The op masked_mlp: checks, choice of backend, and the Triton backend as a torch library op with its autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_choice, check_floating, check_shape, compute_dtype, needs_grad
from ofb_kernels.ops.masked_linear import empty_gradients
from ofb_kernels.rows import as_rows, count_rows

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def masked_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    mask: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None = "gelu",
    backend: str | None = None,
) -> Tensor:
    """Two-layer MLP with a mask on its hidden units: fc2(act(fc1(x) ⊙ mask)).

    The masked MLP of OFB (Ye et al., CVPR 2024, section 3): the mask meets fc1's output, bias included, before the
    activation. Differentiable in every tensor. Between forward and backward the hidden activations are
    kept, and the activation's slope at each.

    Args:
        x: (..., K), any leading shape and strides.
        fc1_weight: (N, K), of x's dtype (any floating dtype under autocast), as are the other weights and biases.
        fc1_bias: (N,) or None.
        mask: (N,), any floating dtype.
        fc2_weight: (E, N).
        fc2_bias: (E,) or None.
        activation: None, "gelu" (exact), "gelu_tanh", "relu" or "silu".
        backend: None, "reference", "eager" or "triton"; see `dispatch`.

    Returns:
        (..., E) in x's dtype, or autocast's where it is on.

    Raises:
        ValueError: shapes, devices or the activation do not fit, or the backend cannot serve the call.
        TypeError: an argument is no floating-point tensor, or dtypes cannot mix.
    """
    op = "masked_mlp"
    weights = dict(fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    check_floating(op, x=x, mask=mask, **weights)
    check_shape(op, "x", x, "...", "K")
    check_shape(op, "fc1_weight", fc1_weight, "N", x.shape[-1])
    check_shape(op, "fc1_bias", fc1_bias, fc1_weight.shape[0])
    check_shape(op, "mask", mask, fc1_weight.shape[0])
    check_shape(op, "fc2_weight", fc2_weight, "E", fc1_weight.shape[0])
    check_shape(op, "fc2_bias", fc2_bias, fc2_weight.shape[0])
    check_choice(op, "activation", activation, ACTIVATIONS)
    dtype = compute_dtype(op, x, **weights)
    chosen = choose_backend(op, backend, {"x": x.to(dtype), "mask": mask})
    implementation = {"reference": reference.masked_mlp, "eager": eager.masked_mlp, "triton": _triton}[chosen]
    w1, b1, w2, b2 = (None if weight is None else weight.to(dtype) for weight in weights.values())
    return implementation(x.to(dtype), w1, b1, mask, w2, b2, activation)


def _triton(*inputs) -> Tensor:
    return torch.ops.ofb_kernels.masked_mlp(*inputs, needs_grad(*inputs[:-1]))[0]


@torch.library.custom_op("ofb_kernels::masked_mlp", mutates_args=())
def _forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    mask: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what the backward needs: the activation's slope and `hidden`, (M, N) each or empty."""
    from ofb_kernels.kernels import masked_linear as kernel

    hidden, slope = kernel.forward(as_rows(x), fc1_weight, fc1_bias, mask, activation, keep)
    out = F.linear(hidden, fc2_weight, fc2_bias).view(*x.shape[:-1], fc2_weight.shape[0])
    return out, slope, hidden if keep else hidden.new_empty(0, hidden.shape[1])


@_forward.register_fake
def _(x, fc1_weight, fc1_bias, mask, fc2_weight, fc2_bias, activation, keep):
    columns, rows = fc1_weight.shape[0], count_rows(x) if keep else 0
    slope = x.new_empty(0 if activation is None else rows, columns)
    return x.new_empty(*x.shape[:-1], fc2_weight.shape[0]), slope, x.new_empty(rows, columns)


@torch.library.custom_op("ofb_kernels::masked_mlp_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    mask: Tensor,
    fc2_weight: Tensor,
    slope: Tensor,
    activation: str | None,
    needs_x: bool,
    needs_fc1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, fc1's weight and bias and the mask, empty where they are not needed."""
    from ofb_kernels.kernels import fold
    from ofb_kernels.kernels import masked_mlp as kernel

    grad, sums = kernel.backward(as_rows(grad_out), fc2_weight, slope, activation)
    grad_x, *others = fold.linear_gradients(grad, sums, as_rows(x), fc1_weight, fc1_bias, mask, (needs_x, needs_fc1))
    return grad_x.view(x.shape if needs_x else 0), *others


@_backward.register_fake
def _(grad_out, x, fc1_weight, fc1_bias, mask, fc2_weight, slope, activation, needs_x, needs_fc1):
    return empty_gradients(x, fc1_weight, fc1_bias, mask, needs_x, needs_fc1)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, fc1_weight, fc1_bias, mask, fc2_weight, _, ctx.activation, _ = inputs
    ctx.save_for_backward(x, fc1_weight, fc1_bias, mask, fc2_weight, *output[1:])


def _autograd_backward(ctx, grad_out, _grad_slope, _grad_hidden):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    *inputs, slope, hidden = ctx.saved_tensors
    needs_x, *needs_fc1, needs_fc2_weight, needs_fc2_bias = ctx.needs_input_grad[:6]
    gradients = (None,) * 4
    if needs_x or any(needs_fc1):
        gradients = torch.ops.ofb_kernels.masked_mlp_backward(
            grad_out, *inputs, slope, ctx.activation, needs_x, any(needs_fc1)
        )
    grad_rows = as_rows(grad_out)
    return (
        *(gradient if needs else None for needs, gradient in zip((needs_x, *needs_fc1), gradients, strict=True)),
        grad_rows.t() @ hidden if needs_fc2_weight else None,
        torch.ops.ofb_kernels.column_sums(grad_rows) if needs_fc2_bias else None,
        None,
        None,
    )


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
