"""The op masked_linear: checks, choice of backend, and the Triton backend as a torch library op with its autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ofb_kernels import eager, reference
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_choice, check_floating, check_shape, compute_dtype, needs_grad, present
from ofb_kernels.rows import as_rows, count_rows

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with a mask on its output units: act((x Wᵀ + b) ⊙ mask).

    The masked linear layer of OFB (Ye et al., CVPR 2024, section 3), differentiable in x, weight, bias and mask.

    Args:
        x: (..., K), any leading shape and strides.
        weight: (N, K), of x's dtype (any floating dtype under autocast).
        bias: (N,) or None.
        mask: (N,), any floating dtype; None is a plain linear layer, what a mask of ones gives.
        activation: None, "gelu" (exact), "gelu_tanh", "relu" or "silu".
        backend: None, "reference", "eager" or "triton"; see `dispatch`.

    Returns:
        (..., N) in x's dtype, or autocast's where it is on.

    Raises:
        ValueError: shapes, devices or the activation do not fit, or the backend cannot serve the call.
        TypeError: an argument is no floating-point tensor, or dtypes cannot mix.
    """
    op = "masked_linear"
    check_floating(op, x=x, weight=weight, bias=bias, **present(mask=mask))
    check_shape(op, "x", x, "...", "K")
    check_shape(op, "weight", weight, "N", x.shape[-1])
    check_shape(op, "bias", bias, weight.shape[0])
    check_shape(op, "mask", mask, weight.shape[0])
    check_choice(op, "activation", activation, ACTIVATIONS)
    dtype = compute_dtype(op, x, weight=weight, bias=bias)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    chosen = choose_backend(op, backend, present(x=x, mask=mask))
    if chosen == "triton" and mask is None and activation is None:
        return plain_linear(x, weight, bias)
    if chosen == "triton":
        mask = weight.new_ones(len(weight)) if mask is None else mask
        keep = needs_grad(x, weight, bias, mask)
        return torch.ops.ofb_kernels.masked_linear(x, weight, bias, mask, activation, keep)[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_linear
    return implementation(x, weight, bias, mask, activation)


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b of tensors that the Triton backend serves, all of one dtype; the bias's gradient is its own kernel's."""
    return F.linear(x, weight) if bias is None else _PlainLinear.apply(x, weight, bias)


class _PlainLinear(torch.autograd.Function):
    """torch's own layer but for Σ_rows dout, which `column_sums` adds up in half of torch.sum's time."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor | None):
        if grad_out is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_rows = as_rows(grad_out)
        return (
            grad_out @ weight if needs_x else None,
            grad_rows.t() @ as_rows(x) if needs_weight else None,
            torch.ops.ofb_kernels.column_sums(grad_rows) if needs_bias else None,
        )


@torch.library.custom_op("ofb_kernels::column_sums", mutates_args=())
def _column_sums(matrix: Tensor) -> Tensor:
    from ofb_kernels.kernels.column_sums import column_sums

    return column_sums(matrix, matrix.dtype)


@_column_sums.register_fake
def _(matrix):
    return matrix.new_empty(matrix.shape[1])


@torch.library.custom_op("ofb_kernels::masked_linear", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the activation's slope (M, N), empty unless `keep` and there is an activation."""
    from ofb_kernels.kernels import masked_linear as kernel

    out, slope = kernel.forward(as_rows(x), weight, bias, mask, activation, keep)
    return out.view(*x.shape[:-1], weight.shape[0]), slope


@_forward.register_fake
def _(x, weight, bias, mask, activation, keep):
    rows, columns = count_rows(x) if keep and activation is not None else 0, weight.shape[0]
    return x.new_empty(*x.shape[:-1], columns), x.new_empty(rows, columns)


@torch.library.custom_op("ofb_kernels::masked_linear_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    slope: Tensor,
    activation: str | None,
    needs_x: bool,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and mask, empty where they are not needed."""
    from ofb_kernels.kernels import fold
    from ofb_kernels.kernels import masked_linear as kernel

    grad, sums = kernel.backward(as_rows(grad_out), slope, activation)
    needs = needs_x, needs_parameters
    grad_x, *others = fold.linear_gradients(grad, sums, as_rows(x), weight, bias, mask, needs)
    return grad_x.view(x.shape if needs_x else 0), *others


@_backward.register_fake
def _(grad_out, x, weight, bias, mask, slope, activation, needs_x, needs_parameters):
    return empty_gradients(x, weight, bias, mask, needs_x, needs_parameters)


def empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, needs_x: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fold.linear_gradients` returns, without values."""
    grad_x = x.new_empty(x.shape if needs_x else 0)
    if not needs_parameters:
        return grad_x, weight.new_empty(0), weight.new_empty(0), mask.new_empty(0)
    grad_bias = weight.new_empty(0 if bias is None else len(bias))
    return grad_x, weight.new_empty(weight.shape), grad_bias, mask.new_empty(mask.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, bias, mask, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight, bias, mask, output[1])


def _autograd_backward(ctx, grad_out, _grad_slope):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    needs_x, *needs = ctx.needs_input_grad[:4]
    gradients = torch.ops.ofb_kernels.masked_linear_backward(
        grad_out, *ctx.saved_tensors, ctx.activation, needs_x, any(needs)
    )
    needed = zip((needs_x, *needs), gradients, strict=True)
    return *(gradient if needs else None for needs, gradient in needed), None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
