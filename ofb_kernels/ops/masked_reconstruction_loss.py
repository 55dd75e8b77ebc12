"""The op masked_reconstruction_loss: checks, choice of backend, the Triton backend as a torch library op with its
autograd."""

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.autocast import without_autocast
from ofb_kernels.dispatch import choose_backend, triton_refusal
from ofb_kernels.ops.checks import check_eps, check_floating, check_shape, check_window, needs_grad
from ofb_kernels.ops.library import library_op


def masked_reconstruction_loss(
    decoded: Tensor,
    images: Tensor,
    areas: Tensor,
    masked: Tensor,
    pixels: tuple[int, int],
    window: int = 47,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Mean absolute error of rebuilt image areas against the locally normalized image: L1 over masked pixels.

    The reconstruction loss of OFB's masked image modelling (Ye et al., CVPR 2024, sections 3.3 and 3.4). An image is
    cut into areas of p × q pixels, counted row by row; what no area covers at its right and bottom does not count. K
    areas of each image were drawn and rebuilt, and those count that are masked. Their target is `local_norm` of the
    image; the Triton backend makes it for these areas alone. Computed in float32 at least, also under autocast.
    Differentiable in decoded; the target has no gradient.

    Args:
        decoded: (B, K, C·p·q), the decoder's output for each drawn area, any floating dtype and strides.
        images: (B, C, H, W), the network's input, any floating dtype and strides.
        areas: (B, K) int64, which areas were drawn. On the Triton backend an area that is none of the image's makes the
            loss NaN; the others raise.
        masked: (K,) bool, False for drawn areas that do not count. Without any the loss is 0.
        pixels: p and q, height and width of an area.
        window: odd side of the window of local_norm in pixels; it may be larger than the image.
        eps: added to the variance of local_norm, not negative.
        backend: None, "reference", "eager" or "triton"; see `dispatch`.

    Returns:
        The loss, 0-d in float32, in float64 if decoded or images is.

    Raises:
        ValueError: shapes, devices, pixels, the window or eps do not fit, or the backend cannot serve the call.
        TypeError: a tensor is not of the dtype that it has to be of.
    """
    op = "masked_reconstruction_loss"
    check_floating(op, decoded=decoded, images=images)
    check_shape(op, "images", images, "B", "C", "H", "W")
    (batch, channels), (p, q) = images.shape[:2], _checked_pixels(op, pixels, images)
    check_shape(op, "decoded", decoded, batch, "K", channels * p * q)
    _check_indices(op, "areas", areas, torch.int64, decoded)
    check_shape(op, "areas", areas, batch, decoded.shape[1])
    _check_indices(op, "masked", masked, torch.bool, decoded)
    check_shape(op, "masked", masked, decoded.shape[1])
    check_window(op, window)
    check_eps(op, eps)
    chosen = choose_backend(op, backend, {"decoded": decoded}, triton_refusal({"images": images}))
    wide = torch.promote_types(torch.promote_types(decoded.dtype, images.dtype), torch.float32)
    images = images.detach()
    if decoded.numel() == 0:
        return decoded.sum().to(wide)
    if chosen == "triton":
        keep = needs_grad(decoded)
        return _forward(decoded, images, areas, masked, p, q, window, eps, keep)[0]
    implementation = {"reference": reference, "eager": eager}[chosen].masked_reconstruction_loss
    with without_autocast(decoded):
        return implementation(decoded, images.to(wide), areas, masked, (p, q), window, eps)


def _checked_pixels(op: str, pixels: tuple[int, int], images: Tensor) -> tuple[int, int]:
    is_pair = isinstance(pixels, (tuple, list)) and len(pixels) == 2
    if not is_pair or any(not isinstance(side, int) or side < 1 for side in pixels):
        raise ValueError(f"{op}: expected pixels as two positive ints, height and width of an area, got {pixels!r}")
    p, q = pixels
    if p > images.shape[2] or q > images.shape[3]:
        size = " × ".join(map(str, images.shape[2:]))
        raise ValueError(f"{op}: expected images of at least one area of {p} × {q} pixels, got {size}; lower pixels")
    return p, q


def _check_indices(op: str, name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: expected {name} as a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: expected {name} of dtype {dtype}, got {tensor.dtype}; use .to({dtype})")
    if tensor.device != like.device:
        raise ValueError(f"{op}: expected every tensor on {like.device}, got {name} on {tensor.device}; move it there")


@library_op("masked_reconstruction_loss")
def _forward(
    decoded: Tensor, images: Tensor, areas: Tensor, masked: Tensor, p: int, q: int, window: int, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the errors' signs, empty unless `keep`, and the share of one error in the loss."""
    from ofb_kernels.kernels import masked_reconstruction_loss as kernel

    return kernel.forward(decoded, images, areas, masked, (p, q), window, eps, keep)


@_forward.register_fake
def _(decoded, images, areas, masked, p, q, window, eps, keep):
    wide = torch.promote_types(torch.promote_types(decoded.dtype, images.dtype), torch.float32)
    loss = decoded.new_empty((), dtype=wide)
    return loss, decoded.new_empty(decoded.shape if keep else 0, dtype=torch.int8), torch.empty_like(loss)


@library_op("masked_reconstruction_loss_backward")
def _backward(grad_loss: Tensor, sign: Tensor, share: Tensor, dtype: torch.dtype) -> Tensor:
    from ofb_kernels.kernels import masked_reconstruction_loss as kernel

    return kernel.backward(grad_loss, sign, share, dtype)


@_backward.register_fake
def _(grad_loss, sign, share, dtype):
    return torch.empty_like(sign, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[1:])


def _autograd_backward(ctx, grad_loss, _grad_sign, _grad_share):
    none = (None,) * (len(ctx.needs_input_grad) - 1)
    if grad_loss is None:
        return None, *none
    return _backward(grad_loss, *ctx.saved_tensors, ctx.dtype), *none


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
