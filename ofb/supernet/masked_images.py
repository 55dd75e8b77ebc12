"""Masked image modelling: which patches are hidden, and the loss of rebuilding them (OFB, CVPR 2024, section 3.3)."""

import math

import torch
from torch import Tensor

from ofb_kernels import local_norm


def draw_patches(embeddings: Tensor, ratio: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """(B, K) distinct patches of every image and (K,) bool, which of them to mask: a share `ratio`, at least one.

    K is the largest number that is ever masked, so that shapes stay what they are while the share grows.

    Args:
        embeddings: (B, patches, D).
        ratio: 0-d, the present share of masked patches.
        most: the largest share there will be.
    """
    images, patches = embeddings.shape[:2]
    count = max(1, math.ceil(most * patches))
    drawn = torch.rand(images, patches, device=embeddings.device).argsort(1)[:, :count]
    return drawn, torch.arange(count, device=embeddings.device) < (ratio * patches).clamp(min=1)


def replace_patches(embeddings: Tensor, patches: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
    """Embeddings with the mask token (1, 1, D) in place of the masked patches."""
    replaced = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    replaced = replaced.scatter(1, patches, masked.expand(patches.shape))
    return torch.where(replaced[..., None], mask_token.to(embeddings.dtype), embeddings)


def reconstruction_loss(decoded: Tensor, images: Tensor, patches: Tensor, masked: Tensor, patch_size: int) -> Tensor:
    """Mean absolute error over the pixels of masked patches against the locally normalized image.

    Args:
        decoded: (B, K, C·p²), the decoder's output for K patches of each image.
        images: (B, C, H, W), the network's input.
        patches: (B, K), which patches these are, counted row by row.
        masked: (K,) bool, False for patches that do not count.
        patch_size: p.
    """
    normalized = local_norm(images.float())
    blocks = normalized.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, H/p, p, W/p, p)
    row, column = patches // blocks.shape[4], patches % blocks.shape[4]
    image = torch.arange(len(images), device=images.device)[:, None]
    target = blocks[image, :, row, :, column].flatten(2)  # (B, K, C·p²)
    error = (decoded.float() - target).abs().mean(2)  # (B, K)
    return (error * masked).sum() / (masked.sum() * len(images)).clamp(min=1)
