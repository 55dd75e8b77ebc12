"""Masked attention, on packed qkv or with the projection inside: checks, choice of backend, torch library op."""

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_floating, check_shape, compute_dtype, present
from ofb_kernels.ops.masked_linear import plain_linear

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
        return torch.ops.ofb_kernels.masked_attention(qkv, mask, scale, bias)[0]
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
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    inputs = present(x=x, attention_bias=attention_bias, mask=mask)
    chosen = choose_backend(op, backend, inputs, _limits(mask.shape[1]))
    if chosen == "triton":
        qkv = plain_linear(x, weight, bias).unflatten(-1, (3, *mask.shape))
        return torch.ops.ofb_kernels.masked_attention(qkv, mask, scale, attention_bias)[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_qkv_attention
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


@torch.library.custom_op("ofb_kernels::masked_attention", mutates_args=())
def _forward(qkv: Tensor, mask: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    from ofb_kernels.kernels import masked_attention as kernel

    return kernel.forward(qkv, mask, scale, bias)


@_forward.register_fake
def _(qkv, mask, scale, bias):
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    return out, qkv.new_empty((batch, heads, tokens), dtype=torch.promote_types(qkv.dtype, torch.float32))


@torch.library.custom_op("ofb_kernels::masked_attention_backward", mutates_args=())
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

    return kernel.backward(grad_out, qkv, mask, out, log_sum_exp, scale, bias)


@_backward.register_fake
def _(grad_out, qkv, mask, out, log_sum_exp, scale, bias):
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return grad_qkv, qkv.new_empty(mask.shape, dtype=log_sum_exp.dtype)


@torch.library.custom_op("ofb_kernels::masked_attention_backward_bias", mutates_args=())
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
    qkv, mask, bias, out, log_sum_exp = ctx.saved_tensors
    arguments = (grad_out, qkv, mask, out, log_sum_exp, ctx.scale, bias)
    grad_qkv, grad_mask = torch.ops.ofb_kernels.masked_attention_backward(*arguments)
    grad_bias = None
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = torch.ops.ofb_kernels.masked_attention_backward_bias(*arguments).to(bias.dtype)
    return grad_qkv, grad_mask.to(mask.dtype), None, grad_bias


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
