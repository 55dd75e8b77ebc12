"""Masked attention, on packed qkv or with the projection inside: checks, choice of backend, torch library op."""

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_floating, check_shape, compute_dtype, needs_grad, present
from ofb_kernels.ops.library import library_op
from ofb_kernels.ops.masked_linear import empty_gradients, kept_weight, linear_gradients, only_needed
from ofb_kernels.rows import as_rows

MAX_HEAD_DIM = 128  # beyond it the Triton kernels' tiles no longer fit on chip


def masked_attention(
    qkv: Tensor,
    mask: Tensor,
    scale: float | None = None,
    backend: str | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention with one mask on the channels of q, k and v: softmax(q kᵀ · scale + bias) v.

    The masked attention of OFB (Ye et al., CVPR 2024, section 3): q, k and v are each multiplied by the mask after
    their projection and bias. Differentiable in qkv, mask and bias.

    Args:
        qkv: (B, N, 3, H, d), the packed projection of N tokens, any strides.
        mask: (H, d), any floating dtype.
        scale: of the scores; d^−½ where None. Pruned heads keep the scale they were trained with.
        backend: None, "reference", "eager" or "triton" (d up to 128); see `dispatch`.
        bias: (H, N, N), or (W, H, N, N) with B a multiple of W: sequence b has that of window b mod W. In Swin
            Transformers (Liu et al., ICCV 2021, eq. 4) the relative position bias, plus the mask of shifted windows.
            Any floating dtype; −∞ hides a key, as long as every query is left one.

    Returns:
        (B, N, H·d) in qkv's dtype, or autocast's where it is on.

    Raises:
        ValueError: shapes or devices do not fit, or the backend cannot serve the call.
        TypeError: an argument is no floating-point tensor, or scale is no number.
    """
    op = "masked_attention"
    check_floating(op, qkv=qkv, mask=mask, bias=bias)
    check_shape(op, "qkv", qkv, "B", "N", 3, "H", "d")
    heads, head_dim = qkv.shape[-2:]
    check_shape(op, "mask", mask, heads, head_dim)
    scale = _checked_scale(op, scale, head_dim)
    bias = _windowed(op, "bias", bias, len(qkv), heads, qkv.shape[1])
    qkv = qkv.to(compute_dtype(op, qkv))
    chosen = choose_backend(op, backend, present(qkv=qkv, bias=bias, mask=mask), _limits(head_dim))
    if chosen == "triton":
        return _forward(qkv, mask, scale, bias)[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_attention
    return implementation(qkv, mask, scale, bias)


def masked_qkv_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    scale: float | None = None,
    backend: str | None = None,
    *,
    attention_bias: Tensor | None = None,
) -> Tensor:
    """`masked_attention` of a projection qkv = x Wᵀ + b, with the projection inside.

    Where the mask costs least depends on the backend: eager multiplies it into the projection's weights, triton into
    the tiles of the attention kernel. Differentiable in x, weight, bias, mask and attention_bias.

    Args:
        x: (B, N, K).
        weight: (3·H·d, K), the rows of q, k and v one after the other, of x's dtype (any under autocast).
        bias: (3·H·d,) or None.
        mask: (H, d), any floating dtype.
        scale: of the scores; d^−½ where None.
        backend: None, "reference", "eager" or "triton" (d up to 128); see `dispatch`.
        attention_bias: (H, N, N) or (W, H, N, N), the bias of `masked_attention`.

    Returns:
        (B, N, H·d) in x's dtype, or autocast's where it is on.

    Raises:
        ValueError: shapes or devices do not fit, or the backend cannot serve the call.
        TypeError: an argument is no floating-point tensor, dtypes cannot mix, or scale is no number.
    """
    op = "masked_qkv_attention"
    check_floating(op, x=x, weight=weight, bias=bias, mask=mask, attention_bias=attention_bias)
    check_shape(op, "x", x, "B", "N", "K")
    check_shape(op, "mask", mask, "H", "d")
    check_shape(op, "weight", weight, 3 * mask.numel(), x.shape[-1])
    check_shape(op, "bias", bias, 3 * mask.numel())
    scale = _checked_scale(op, scale, mask.shape[1])
    attention_bias = _windowed(op, "attention_bias", attention_bias, len(x), mask.shape[0], x.shape[1])
    dtype = compute_dtype(op, x, weight=weight, bias=bias)
    x = x.to(dtype)
    inputs = present(x=x, attention_bias=attention_bias, mask=mask)
    chosen = choose_backend(op, backend, inputs, _limits(mask.shape[1]))
    if chosen == "triton":
        keep = needs_grad(x, weight, bias, mask, attention_bias)
        return _qkv_forward(x, weight, bias, mask, scale, attention_bias, keep)[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_qkv_attention
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return implementation(x, weight, bias, mask, scale, attention_bias)


def _checked_scale(op: str, scale: float | None, head_dim: int) -> float:
    if scale is None:
        return max(head_dim, 1) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: expected scale as a float or None, got {type(scale).__name__}")
    return float(scale)


def _windowed(op: str, name: str, bias: Tensor | None, batch: int, heads: int, tokens: int) -> Tensor | None:
    """The bias as (W, H, N, N), W = 1 where all sequences share it."""
    if bias is None:
        return None
    if bias.dim() not in (3, 4) or bias.shape[-3:] != (heads, tokens, tokens):
        shared = f"{heads}, {tokens}, {tokens}"
        raise ValueError(f"{op}: expected {name} of shape ({shared}) or (W, {shared}), got {tuple(bias.shape)}")
    bias = bias[None] if bias.dim() == 3 else bias
    if len(bias) == 0 or batch % len(bias):
        raise ValueError(
            f"{op}: expected {name} for W windows that divide the batch of {batch}, got W = {len(bias)}; "
            "give one for each window of an image, and whole images"
        )
    return bias


def _limits(head_dim: int) -> str | None:
    return None if head_dim <= MAX_HEAD_DIM else f"expected heads of d ≤ {MAX_HEAD_DIM} channels, got {head_dim}"


@library_op("masked_attention")
def _forward(qkv: Tensor, mask: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    from ofb_kernels.kernels import masked_attention as kernel

    return kernel.forward(qkv, mask, scale, bias)


@_forward.register_fake
def _(qkv, mask, scale, bias):
    return _empty_results(qkv)


def _empty_results(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """What `_forward` returns, without values."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    return out, qkv.new_empty((batch, heads, tokens), dtype=torch.promote_types(qkv.dtype, torch.float32))


@library_op("masked_attention_backward")
def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    mask: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from ofb_kernels.kernels import masked_attention as kernel

    grad_qkv, grad_mask = kernel.backward(grad_out, qkv, mask, out, log_sum_exp, scale, bias)
    return grad_qkv, grad_mask[0]


@_backward.register_fake
def _(grad_out, qkv, mask, out, log_sum_exp, scale, bias):
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return grad_qkv, qkv.new_empty(mask.shape, dtype=log_sum_exp.dtype)


@library_op("masked_attention_backward_bias")
def _backward_bias(
    grad_out: Tensor, qkv: Tensor, mask: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float, bias: Tensor
) -> Tensor:
    from ofb_kernels.kernels import masked_attention as kernel

    return kernel.backward_bias(grad_out, qkv, mask, out, log_sum_exp, scale, bias)


@_backward_bias.register_fake
def _(grad_out, qkv, mask, out, log_sum_exp, scale, bias):
    return bias.new_empty(bias.shape, dtype=log_sum_exp.dtype)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    qkv, mask, ctx.scale, bias = inputs
    ctx.save_for_backward(qkv, mask, bias, *output)


def _autograd_backward(ctx, grad_out, _grad_log_sum_exp):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    qkv, mask, bias, *results = ctx.saved_tensors
    arguments = (grad_out, qkv, mask, *results, ctx.scale, bias)
    grad_qkv, grad_mask = _backward(*arguments)
    grad_bias = _backward_bias(*arguments).to(bias.dtype) if ctx.needs_input_grad[3] else None
    return grad_qkv, grad_mask.to(mask.dtype), None, grad_bias


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@library_op("masked_qkv_attention")
def _qkv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    scale: float,
    attention_bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; log_sum_exp; the packed projection and, if `keep`, what x was multiplied with (it may be empty)."""
    from ofb_kernels.kernels import masked_attention, masked_linear

    qkv, _, kept = masked_linear.forward(as_rows(x), weight, bias, None, None, keep)
    qkv = qkv.view(*x.shape[:2], 3, *mask.shape)
    return *masked_attention.forward(qkv, mask, scale, attention_bias), qkv, kept


@_qkv_forward.register_fake
def _(x, weight, bias, mask, scale, attention_bias, keep):
    qkv = x.new_empty(*x.shape[:2], 3, *mask.shape)
    return *_empty_results(qkv), qkv, kept_weight(x, weight, None, keep)


@library_op("masked_qkv_attention_backward")
def _qkv_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    attention_bias: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    qkv: Tensor,
    kept: Tensor,
    scale: float,
    needs_x: bool,
    needs_projection: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and weight, empty where they are not needed, and in accumulator precision those of the bias, where
    it is needed, and of the mask, (3, H, d) and (1, H, d) behind each other."""
    from ofb_kernels.kernels import masked_attention

    sums = bias is not None and needs_projection
    grad_qkv, grad_sums = masked_attention.backward(
        grad_out, qkv, mask, out, log_sum_exp, scale, attention_bias, sums
    )
    rows, needs = as_rows(grad_qkv.flatten(2)), (needs_x, needs_projection)
    return *linear_gradients(rows, None, x, weight, None, None, kept, needs)[:2], grad_sums


@_qkv_backward.register_fake
def _(grad_out, x, weight, bias, mask, attention_bias, out, log_sum_exp, qkv, kept, scale, needs_x, needs_projection):
    gradients = empty_gradients(x, weight, None, None, (needs_x, needs_projection))[:2]
    return *gradients, log_sum_exp.new_empty(4 if bias is not None and needs_projection else 1, *mask.shape)


def _qkv_setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, bias, mask, ctx.scale, attention_bias, _ = inputs
    ctx.save_for_backward(x, weight, bias, mask, attention_bias, *output)


def _qkv_autograd_backward(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    needs = needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad[:4]
    _, _, bias, mask, attention_bias, out, log_sum_exp, qkv, _ = saved = ctx.saved_tensors
    *gradients, sums = _qkv_backward(grad_out, *saved, ctx.scale, needs_x, needs_weight or needs_bias)
    grad_bias = sums[:3].flatten().to(bias.dtype) if needs_bias else None
    gradients = only_needed(needs, (*gradients, grad_bias, sums[-1].to(mask.dtype)))
    if not ctx.needs_input_grad[5]:
        return *gradients, None, None, None
    of_scores = _backward_bias(grad_out, qkv, mask, out, log_sum_exp, ctx.scale, attention_bias)
    return *gradients, None, of_scores.to(attention_bias.dtype), None


_qkv_forward.register_autograd(_qkv_autograd_backward, setup_context=_qkv_setup_context)
