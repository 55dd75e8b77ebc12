"""The op masked_linear: checks, choice of backend, and the Triton backend as a torch library op with its autograd."""

from collections.abc import Sequence

from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_choice, check_floating, check_shape, compute_dtype, needs_grad, present
from ofb_kernels.ops.library import library_op
from ofb_kernels.rows import as_rows, count_rows, few_rows

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
    x = x.to(dtype)
    chosen = choose_backend(op, backend, present(x=x, mask=mask))
    if chosen == "triton":
        return _forward(x, weight, bias, mask, activation, needs_grad(x, weight, bias, mask))[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_linear
    return implementation(x, weight.to(dtype), None if bias is None else bias.to(dtype), mask, activation)


@library_op("masked_linear")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what the backward needs if `keep`: the activation's slope (M, N), and what x was multiplied with
    (N, K); either may be empty."""
    from ofb_kernels.kernels import masked_linear as kernel

    out, *kept = kernel.forward(as_rows(x), weight, bias, mask, activation, keep)
    return out.view(*x.shape[:-1], weight.shape[0]), *kept


@_forward.register_fake
def _(x, weight, bias, mask, activation, keep):
    rows, columns = count_rows(x) if keep and activation is not None else 0, weight.shape[0]
    return x.new_empty(*x.shape[:-1], columns), x.new_empty(rows, columns), kept_weight(x, weight, mask, keep)


def kept_weight(x: Tensor, weight: Tensor, mask: Tensor | None, keep: bool) -> Tensor:
    """What a forward keeps of the weight, without values: nothing where it took it as it is."""
    copied = weight.dtype != x.dtype or not (mask is None or few_rows(x))
    return x.new_empty(weight.shape if keep and copied else 0)


@library_op("masked_linear_backward")
def _backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    slope: Tensor,
    folded: Tensor,
    activation: str | None,
    needs_x: bool,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and mask, empty where they are not needed."""
    from ofb_kernels.kernels import masked_linear as kernel

    grad, sums = kernel.backward(as_rows(grad_out), slope, activation)
    return linear_gradients(grad, sums, x, weight, bias, mask, folded, (needs_x, needs_parameters))


def linear_gradients(
    grad: Tensor,
    sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    folded: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (..., K), weight, bias and mask of u = (x Wᵀ + b) ⊙ m from du (M, N) and, where they are known,
    its sums over parts of the rows (P, N); those empty that nobody needs, x's and any of the others'."""
    from ofb_kernels.kernels import fold

    grad_x, *parameters = empty_gradients(x, weight, bias, mask, (False, False))
    if needs[0]:
        grad_x = fold.data_gradient(grad, x, weight, folded, mask).view(x.shape)
    if needs[1]:
        parameters = fold.parameter_gradients(grad, sums, as_rows(x), weight, bias, mask)
    return grad_x, *parameters


@_backward.register_fake
def _(grad_out, x, weight, bias, mask, slope, folded, activation, needs_x, needs_parameters):
    return empty_gradients(x, weight, bias, mask, (needs_x, needs_parameters))


def empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `linear_gradients` returns, without values."""

    def empty(tensor: Tensor | None, needed: bool) -> Tensor:
        return weight.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)

    return empty(x, needs[0]), *(empty(each, needs[1]) for each in (weight, bias, mask))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, bias, mask, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight, bias, mask, *output[1:])


def _autograd_backward(ctx, grad_out, _grad_slope, _grad_folded):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    needs_x, *needs = ctx.needs_input_grad[:4]
    gradients = _backward(grad_out, *ctx.saved_tensors, ctx.activation, needs_x, any(needs))
    return *only_needed((needs_x, *needs), gradients), None, None


def only_needed(needs: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that are needed, None for the others."""
    return [gradient if needed else None for needed, gradient in zip(needs, gradients, strict=True)]


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
