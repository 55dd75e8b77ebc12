"""The op local_norm: checks, choice of backend, and the Triton backend as a torch library op."""

import torch
from torch import Tensor

from ofb_kernels import eager, reference
from ofb_kernels.autocast import without_autocast
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.ops.checks import check_eps, check_floating, check_shape, check_window
from ofb_kernels.ops.library import library_op

MOST_PLANES = 65535  # CUDA's limit on the second grid dimension


@torch.no_grad()
def local_norm(images: Tensor, window: int = 47, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Normalize each pixel by mean and variance of its neighborhood: (x − μ) / √(σ² + eps).

    The reconstruction target of OFB's masked image modelling (Ye et al., CVPR 2024, section 3.4). μ and the unbiased
    σ² are taken over a window around the pixel, as far as it lies inside the image; σ² is clamped at 0. A target, so
    there is no gradient.

    Args:
        images: (B, C, H, W), any floating dtype and strides; computed in float32 at least.
        window: odd side of the window in pixels; it may be larger than the image.
        eps: added to the variance, not negative.
        backend: None, "reference", "eager" or "triton"; see `dispatch`.

    Returns:
        (B, C, H, W) in images' dtype, also under autocast, without gradient.

    Raises:
        ValueError: the shape, the window or eps does not fit, or the backend cannot serve the call.
        TypeError: images is no floating-point tensor.
    """
    op = "local_norm"
    check_floating(op, images=images)
    check_shape(op, "images", images, "B", "C", "H", "W")
    check_window(op, window)
    check_eps(op, eps)
    planes = images.shape[0] * images.shape[1]
    limits = f"expected at most {MOST_PLANES} image planes B · C, got {planes}" if planes > MOST_PLANES else None
    chosen = choose_backend(op, backend, {"images": images}, limits)
    if images.numel() == 0:  # which avg_pool2d takes in some dimensions only
        return torch.empty_like(images, memory_format=torch.contiguous_format)
    if chosen == "triton":
        return _forward(images, window, eps)
    implementation = {"reference": reference, "eager": eager}[chosen].local_norm
    with without_autocast(images):
        values = images.to(torch.promote_types(images.dtype, torch.float32))
        return implementation(values, window, eps).to(images.dtype)


@library_op("local_norm")
def _forward(images: Tensor, window: int, eps: float) -> Tensor:
    from ofb_kernels.kernels import local_norm as kernel

    return kernel.forward(images, window, eps)


@_forward.register_fake
def _(images, window, eps):
    return torch.empty_like(images, memory_format=torch.contiguous_format)
