"""The op masked_add_layer_norm: residual add and masked LayerNorm in one pass; checks, backend, torch library op."""

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.autocast import without_autocast
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_eps, check_floating, check_shape, compute_dtype, present
from ofb_kernels.ops.library import library_op
from ofb_kernels.ops.masked_layer_norm import gradient_like, width_limit
from ofb_kernels.rows import as_rows, count_rows

MAX_WIDTH_WITH_BIAS = 2048  # with the bias's sum beside the others the backward of a wider row would spill


def masked_add_layer_norm(
    x: Tensor,
    branch: Tensor,
    branch_mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float = 1e-6,
    sample_scale: Tensor | None = None,
    backend: str | None = None,
    *,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A masked branch added to the residual stream, and `masked_layer_norm` of the result.

    stream = x + sᵦ·((branch + branch_bias) ⊙ branch_mask)
    normalized = masked_layer_norm(stream, weight, bias, mask, eps)

    What stands between two sublayers of a pre-norm transformer whose residual width is searched (OFB, Ye et al., CVPR
    2024, section 3), in one pass over memory on the Triton backend, forward and backward. Differentiable in everything
    but sample_scale.

    Args:
        x: (B, ..., D), the residual stream, any strides; (N, D) is N samples of one row.
        branch: of x's shape and dtype (any floating dtype under autocast), the output of an attention or MLP.
        branch_mask: (D,), any floating dtype.
        weight: (D,), of x's dtype (any floating dtype under autocast).
        bias: (D,) or None.
        mask: (D,), any floating dtype, with a positive sum; None is a plain LayerNorm, what a mask of ones gives.
        eps: added to the variance.
        sample_scale: (B,) or None, the factor s of each sample's branch: stochastic depth's 0 or 1 / keep probability.
        backend: None, "reference", "eager" or "triton" (D up to 4096); see `dispatch`.
        branch_bias: (D,) or None, the bias of the linear layer that made the branch. Here its gradient, a sum over the
            rows of the branch's, takes no pass of its own on the Triton backend.

    Returns:
        stream, of x's shape, in the wider dtype of x and branch; normalized, in x's dtype or autocast's where it is on.

    Raises:
        ValueError: shapes or devices do not fit, eps is negative, sample_scale requires a gradient, or the backend
            cannot serve the call.
        TypeError: a tensor is no floating-point tensor, or dtypes cannot mix.
    """
    op = "masked_add_layer_norm"
    tensors = dict(x=x, branch=branch, branch_mask=branch_mask, weight=weight, bias=bias, branch_bias=branch_bias)
    check_floating(op, **tensors, **present(mask=mask, sample_scale=sample_scale))
    check_shape(op, "x", x, "...", "N", "D")
    check_shape(op, "branch", branch, *x.shape)
    vectors = dict(branch_mask=branch_mask, weight=weight, bias=bias, mask=mask, branch_bias=branch_bias)
    for name, vector in vectors.items():
        check_shape(op, name, vector, x.shape[-1])
    check_shape(op, "sample_scale", sample_scale, x.shape[0])
    if sample_scale is not None and sample_scale.requires_grad:
        raise ValueError(f"{op}: expected sample_scale without a gradient, got one that requires it; detach it")
    check_eps(op, eps)
    dtype = compute_dtype(op, x, branch=branch, weight=weight, bias=bias, branch_bias=branch_bias)
    chosen = choose_backend(op, backend, present(x=x, branch=branch, mask=mask), width_limit(x.shape[-1]))
    if chosen == "triton":
        if branch_bias is not None and x.shape[-1] > MAX_WIDTH_WITH_BIAS:
            branch, branch_bias = (branch + branch_bias).to(branch.dtype), None
        inputs = x, branch, branch_bias, branch_mask, sample_scale, weight, bias, mask
        return _forward(*inputs, eps, dtype)[:2]
    implementation = {"reference": reference, "eager": eager}[chosen]
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        vectors = branch_mask, sample_scale, branch_bias, weight, bias, mask
        *of_branch, weight, bias, mask = (None if vector is None else vector.to(wide) for vector in vectors)
        stream = implementation.add_branch(x, branch, *of_branch)
        return stream, implementation.masked_layer_norm(stream.to(wide), weight, bias, mask, eps).to(dtype)


@library_op("masked_add_layer_norm")
def _forward(
    x: Tensor, branch: Tensor, branch_bias: Tensor | None, branch_mask: Tensor, sample_scale: Tensor | None,
    weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from ofb_kernels.kernels import masked_layer_norm as kernel

    out, stream, mean, rstd = kernel.forward(
        as_rows(x), weight, bias, mask, eps, dtype, _branch(branch, branch_bias, branch_mask, sample_scale)
    )
    return stream.view(x.shape), out.view(x.shape), mean, rstd


@_forward.register_fake
def _(x, branch, branch_bias, branch_mask, sample_scale, weight, bias, mask, eps, dtype):
    stream = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    mean = x.new_empty(count_rows(x), dtype=torch.promote_types(x.dtype, torch.float32))
    return stream, x.new_empty(x.shape, dtype=dtype), mean, torch.empty_like(mean)


@library_op("masked_add_layer_norm_backward")
def _backward(
    grad_stream: Tensor | None, grad_out: Tensor | None,
    stream: Tensor, branch: Tensor, branch_bias: Tensor | None, branch_mask: Tensor, sample_scale: Tensor | None,
    weight: Tensor, bias: Tensor | None, mask: Tensor | None, mean: Tensor, rstd: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from ofb_kernels.kernels import masked_layer_norm as kernel

    grad_stream, grad_out = (None if each is None else as_rows(each) for each in (grad_stream, grad_out))
    added = _branch(branch, branch_bias, branch_mask, sample_scale)
    grad_x, grad_branch, grad_vectors = kernel.backward(
        grad_out, as_rows(stream), weight, bias, mask, mean, rstd, eps, grad_stream, added
    )
    return grad_x.view(stream.shape), grad_branch.view(branch.shape), grad_vectors


@_backward.register_fake
def _(
    grad_stream, grad_out, stream, branch, branch_bias, branch_mask, sample_scale, weight, bias, mask, mean, rstd, eps,
):  # fmt: skip
    vectors = 4 if branch_bias is None else 5
    return stream.new_empty(stream.shape), branch.new_empty(branch.shape), mean.new_empty(vectors, stream.shape[-1])


def _branch(branch: Tensor, bias: Tensor | None, mask: Tensor, sample_scale: Tensor | None):
    from ofb_kernels.kernels.masked_layer_norm import Branch

    rows_per_sample = branch.shape[1:-1].numel()
    return Branch(as_rows(branch), bias, mask, sample_scale, rows_per_sample)


def _setup_context(ctx, inputs, output):
    x, *others, ctx.eps, _ = inputs
    stream, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(stream, *others, mean, rstd)


def _autograd_backward(ctx, grad_stream, grad_out, _grad_mean, _grad_rstd):
    if grad_stream is None and grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    _, _, branch_bias, branch_mask, _, weight, bias, mask, _, _ = ctx.saved_tensors
    grad_x, grad_branch, grad_vectors = _backward(grad_stream, grad_out, *ctx.saved_tensors, ctx.eps)
    vectors = None, None, None  # where only the stream was used, the norm's vectors have no gradient
    if grad_out is not None:
        vectors = (gradient_like(*each) for each in zip((weight, bias, mask), grad_vectors[:3], strict=True))
    of_branch = gradient_like(branch_bias, grad_vectors[-1]), grad_vectors[3].to(branch_mask.dtype)
    return grad_x.to(ctx.x_dtype), grad_branch, *of_branch, None, *vectors, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
