"""The op masked_mlp: checks, choice of backend, and the Triton backend as a torch library op with its autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_choice, check_floating, check_shape, compute_dtype, needs_grad
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
    activation. Differentiable in every tensor. Between forward and backward only fc1's output is kept.

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
    keep = needs_grad(*inputs[:-1])
    return torch.ops.ofb_kernels.masked_mlp(*inputs, keep)[0]


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
    """The result, and what the backward needs: `pre` and `hidden`, both (M, N), empty unless `keep`."""
    from ofb_kernels.kernels import masked_linear as kernel

    hidden, pre = kernel.forward(as_rows(x), fc1_weight, fc1_bias, mask, activation, keep)
    out = F.linear(hidden, fc2_weight, fc2_bias).view(*x.shape[:-1], fc2_weight.shape[0])
    return out, pre, hidden if keep else torch.empty_like(pre)


@_forward.register_fake
def _(x, fc1_weight, fc1_bias, mask, fc2_weight, fc2_bias, activation, keep):
    pre = x.new_empty(count_rows(x) if keep else 0, fc1_weight.shape[0])
    return x.new_empty(*x.shape[:-1], fc2_weight.shape[0]), pre, torch.empty_like(pre)


@torch.library.custom_op("ofb_kernels::masked_mlp_backward", mutates_args=())
def _backward(
    grad_out: Tensor, fc2_weight: Tensor, pre: Tensor, mask: Tensor, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    from ofb_kernels.kernels import masked_mlp as kernel

    return kernel.backward(grad_out, fc2_weight, pre, mask, activation)


@_backward.register_fake
def _(grad_out, fc2_weight, pre, mask, activation):
    columns = pre.new_empty(pre.shape[1], dtype=torch.promote_types(pre.dtype, torch.float32))
    return torch.empty_like(pre), columns, torch.empty_like(columns)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, fc1_weight, fc1_bias, mask, fc2_weight, fc2_bias, ctx.activation, _ = inputs
    ctx.has_fc1_bias, ctx.has_fc2_bias = fc1_bias is not None, fc2_bias is not None
    ctx.save_for_backward(x, fc1_weight, mask, fc2_weight, *output[1:])


def _autograd_backward(ctx, grad_out, _grad_pre, _grad_hidden):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    x, fc1_weight, mask, fc2_weight, pre, hidden = ctx.saved_tensors
    grad_out = as_rows(grad_out)
    grad_pre, grad_mask, grad_fc1_bias = torch.ops.ofb_kernels.masked_mlp_backward(
        grad_out, fc2_weight, pre, mask, ctx.activation
    )
    needs_x, needs_fc1_weight, needs_fc1_bias, needs_mask, needs_fc2_weight, needs_fc2_bias, *_ = ctx.needs_input_grad
    return (
        (grad_pre @ fc1_weight).view_as(x) if needs_x else None,
        grad_pre.t() @ as_rows(x) if needs_fc1_weight else None,
        grad_fc1_bias.to(x.dtype) if ctx.has_fc1_bias and needs_fc1_bias else None,
        grad_mask.to(mask.dtype) if needs_mask else None,
        grad_out.t() @ hidden if needs_fc2_weight else None,
        grad_out.sum(0) if ctx.has_fc2_bias and needs_fc2_bias else None,
        None,
        None,
    )


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
