"""The op masked_mlp: checks, choice of backend, and the Triton backend as a torch library op with its autograd."""

from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_choice, check_floating, check_shape, compute_dtype, needs_grad
from ofb_kernels.ops.library import library_op
from ofb_kernels.ops.masked_linear import empty_gradients, kept_weight, linear_gradients, only_needed
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
    if chosen == "triton":
        inputs = x.to(dtype), fc1_weight, fc1_bias, mask, fc2_weight, fc2_bias
        return _forward(*inputs, activation, needs_grad(*inputs))[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_mlp
    w1, b1, w2, b2 = (None if weight is None else weight.to(dtype) for weight in weights.values())
    return implementation(x.to(dtype), w1, b1, mask, w2, b2, activation)


@library_op("masked_mlp")
def _forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    mask: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and what the backward needs if `keep`: the activation's slope and `hidden`, (M, N) each, and what x
    and `hidden` were multiplied with, (N, K) and (E, N); any of these may be empty."""
    from ofb_kernels.kernels import masked_linear as kernel

    hidden, slope, folded = kernel.forward(as_rows(x), fc1_weight, fc1_bias, mask, activation, keep)
    out, _, kept = kernel.forward(hidden, fc2_weight, fc2_bias, None, None, keep)
    out = out.view(*x.shape[:-1], fc2_weight.shape[0])
    return out, slope, hidden if keep else hidden.new_empty(0, hidden.shape[1]), folded, kept


@_forward.register_fake
def _(x, fc1_weight, fc1_bias, mask, fc2_weight, fc2_bias, activation, keep):
    columns, rows = fc1_weight.shape[0], count_rows(x) if keep else 0
    hidden = x.new_empty(rows, columns)
    slope = x.new_empty(0 if activation is None else rows, columns)
    kept = kept_weight(x, fc1_weight, mask, keep), kept_weight(hidden, fc2_weight, None, keep)
    return x.new_empty(*x.shape[:-1], fc2_weight.shape[0]), slope, hidden, *kept


@library_op("masked_mlp_backward")
def _backward(
    grad_out: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    mask: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    slope: Tensor,
    hidden: Tensor,
    fc1_folded: Tensor,
    fc2_kept: Tensor,
    activation: str | None,
    needs_x: bool,
    needs_fc1: bool,
    needs_fc2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, fc1's weight and bias, the mask, fc2's weight and bias, empty where they are not needed."""
    from ofb_kernels.kernels import masked_mlp as kernel

    grad_rows, fc1, needs = as_rows(grad_out), (fc1_weight, fc1_bias, mask), (needs_x, needs_fc1)
    gradients = empty_gradients(x, *fc1, (False, False))
    if any(needs):
        fc2_used = fc2_kept if fc2_kept.shape == fc2_weight.shape else fc2_weight
        grad, sums = kernel.backward(grad_rows, fc2_used, slope, activation)
        gradients = linear_gradients(grad, sums, x, *fc1, fc1_folded, needs)
    fc2 = fc2_weight, fc2_bias, None
    _, *of_fc2, _ = linear_gradients(grad_rows, None, hidden, *fc2, fc2_kept, (False, needs_fc2))
    return *gradients, *of_fc2


@_backward.register_fake
def _(
    grad_out, x, fc1_weight, fc1_bias, mask, fc2_weight, fc2_bias, slope, hidden, fc1_folded, fc2_kept,
    activation, needs_x, needs_fc1, needs_fc2,
):  # fmt: skip
    gradients = empty_gradients(x, fc1_weight, fc1_bias, mask, (needs_x, needs_fc1))
    return *gradients, *empty_gradients(hidden, fc2_weight, fc2_bias, None, (False, needs_fc2))[1:3]


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd_backward(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    needs = needs_x, *_ = ctx.needs_input_grad[:6]
    gradients = _backward(grad_out, *ctx.saved_tensors, ctx.activation, needs_x, any(needs[1:4]), any(needs[4:]))
    return *only_needed(needs, gradients), None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
