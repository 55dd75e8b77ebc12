"""The op masked_attention: checks, choice of backend, the Triton backend as a torch library op with its autograd."""

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_floating, check_shape, compute_dtype

MAX_HEAD_DIM = 128  # beyond it the Triton kernels' tiles no longer fit on chip


def masked_attention(qkv: Tensor, mask: Tensor, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Multi-head self-attention with one mask on the channels of q, k and v: softmax(q kᵀ · scale) v.

    The masked attention of OFB (Ye et al., CVPR 2024, section 3): q, k and v are each multiplied by the mask after
    their projection and bias. Differentiable in qkv and mask.

    Args:
        qkv: (B, N, 3, H, d), the packed projection of N tokens, any strides.
        mask: (H, d), any floating dtype.
        scale: of the scores; d^−½ where None. Pruned heads keep the scale they were trained with.
        backend: None, "reference", "eager" or "triton" (d up to 128); see `dispatch`.

    Returns:
        (B, N, H·d) in qkv's dtype, or autocast's where it is on.

    Raises:
        ValueError: shapes or devices do not fit, or the backend cannot serve the call.
        TypeError: an argument is no floating-point tensor, or scale is no number.
    """
    op = "masked_attention"
    check_floating(op, qkv=qkv, mask=mask)
    check_shape(op, "qkv", qkv, "B", "N", 3, "H", "d")
    heads, head_dim = qkv.shape[-2:]
    check_shape(op, "mask", mask, heads, head_dim)
    if scale is None:
        scale = max(head_dim, 1) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: expected scale as a float or None, got {type(scale).__name__}")
    qkv = qkv.to(compute_dtype(op, qkv))
    limits = None if head_dim <= MAX_HEAD_DIM else f"expected heads of d ≤ {MAX_HEAD_DIM} channels, got {head_dim}"
    chosen = choose_backend(op, backend, {"qkv": qkv, "mask": mask}, limits)
    if chosen == "triton":
        return torch.ops.ofb_kernels.masked_attention(qkv, mask, float(scale))[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_attention
    return implementation(qkv, mask, scale)


@torch.library.custom_op("ofb_kernels::masked_attention", mutates_args=())
def _forward(qkv: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from ofb_kernels.kernels import masked_attention as kernel

    return kernel.forward(qkv, mask, scale)


@_forward.register_fake
def _(qkv, mask, scale):
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    return out, qkv.new_empty((batch, heads, tokens), dtype=torch.promote_types(qkv.dtype, torch.float32))


@torch.library.custom_op("ofb_kernels::masked_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, qkv: Tensor, mask: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from ofb_kernels.kernels import masked_attention as kernel

    return kernel.backward(grad_out, qkv, mask, out, log_sum_exp, scale)


@_backward.register_fake
def _(grad_out, qkv, mask, out, log_sum_exp, scale):
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return grad_qkv, qkv.new_empty(mask.shape, dtype=log_sum_exp.dtype)


def _setup_context(ctx, inputs, output):
    qkv, mask, ctx.scale = inputs
    ctx.save_for_backward(qkv, mask, *output)


def _autograd_backward(ctx, grad_out, _grad_log_sum_exp):
    qkv, mask, out, log_sum_exp = ctx.saved_tensors
    grad_qkv, grad_mask = torch.ops.ofb_kernels.masked_attention_backward(
        grad_out, qkv, mask, out, log_sum_exp, ctx.scale
    )
    return grad_qkv, grad_mask.to(mask.dtype), None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
