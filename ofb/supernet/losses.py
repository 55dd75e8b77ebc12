"""The losses of a search step (OFB, CVPR 2024, sections 3.2 to 3.4)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ofb_kernels import local_norm

# σ stays this far from 0 and 1, where the tangent has its poles; in float32 it even has the wrong sign there.
SIGMA_MARGIN = 1e-4
# A probability below e^-80 contributes nothing to an entropy in float32; the bound keeps 0 · log 0 at 0.
LOG_PROBABILITY_FLOOR = -80.0


def adaptive_one_hot_loss(alpha: Tensor, alive: Tensor | None = None) -> Tensor:
    """Adaptive one-hot loss of a submodule's candidate probabilities p = softmax(alpha) over its n alive candidates.

        σ = Σ (p − mean p)² / (1 − 1/n)          1 if and only if p is one-hot, 0 if and only if it is uniform
        L = −Σ p log p + (1/n) · tan(π/2 − π σ)

    Finite with finite gradients for every finite alpha. One candidate alive gives 0.

    Args:
        alpha: architecture logits, any shape, floating point.
        alive: bool, of alpha's shape; None where all candidates are alive.

    Returns:
        0-d tensor of alpha's dtype (float32 for half-precision alpha).

    Raises:
        TypeError: alpha is no floating-point tensor or alive no bool tensor.
        ValueError: the shapes differ, or no candidate is given.
    """
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        got = alpha.dtype if isinstance(alpha, Tensor) else type(alpha).__name__
        raise TypeError(f"adaptive_one_hot_loss: expected alpha as a floating-point tensor, got {got}")
    if alpha.numel() == 0:
        raise ValueError("adaptive_one_hot_loss: expected alpha with at least one candidate, got none")
    if alive is None:
        alive = torch.ones_like(alpha, dtype=torch.bool)
    if alive.dtype != torch.bool:
        raise TypeError(f"adaptive_one_hot_loss: expected alive as a bool tensor, got {alive.dtype}")
    if alive.shape != alpha.shape:
        raise ValueError(
            f"adaptive_one_hot_loss: expected alive of alpha's shape {tuple(alpha.shape)}, got {tuple(alive.shape)}"
        )
    logits = alpha.to(torch.promote_types(alpha.dtype, torch.float32)).masked_fill(~alive, -torch.inf).flatten()
    log_p = logits.log_softmax(0).clamp(min=LOG_PROBABILITY_FLOOR)
    p = log_p.exp() * alive.flatten()
    n = alive.sum()
    share = 1 / n
    entropy = -(p * log_p).sum()
    sigma = ((p - share).square() * alive.flatten()).sum() / (1 - share).clamp(min=SIGMA_MARGIN)
    sigma = sigma.clamp(SIGMA_MARGIN, 1 - SIGMA_MARGIN)
    loss = entropy + share * torch.tan(math.pi / 2 - math.pi * sigma)
    return torch.where(n > 1, loss, torch.zeros_like(loss))


def macs_loss(expected: Tensor, target: float, dense: float) -> Tensor:
    """((F(p) − F_target) / F_dense)², all in MACs."""
    return ((expected - target) / dense).square()


def reconstruction_loss(decoded: Tensor, images: Tensor, patch_mask: Tensor) -> Tensor:
    """Mean absolute error over the pixels of masked patches against the locally normalized image.

    The decoder's pixel shuffle is undone on the target instead: the same pairs of values, but nothing to differentiate.

    Args:
        decoded: (B, C·p², H/p, W/p), the decoder's output, one column of channels for each p × p patch.
        images: (B, C, H, W), the network's input.
        patch_mask: (B, H/p, W/p) bool, True where a patch was replaced by the mask token.
    """
    patch_size = images.shape[-1] // patch_mask.shape[-1]
    target = F.pixel_unshuffle(local_norm(images.float()), patch_size)
    error = F.l1_loss(decoded.float(), target, reduction="none").sum(1)  # (B, H/p, W/p)
    return (error * patch_mask).sum() / (patch_mask.sum() * target.shape[1]).clamp(min=1)


def classification_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy; targets are class indices (B,) or, after mixup, probabilities (B, classes) used as they are."""
    if targets.is_floating_point():
        return F.cross_entropy(logits.float(), targets)
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
