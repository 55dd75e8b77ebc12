"""Masked image modelling: which parts are hidden, and the loss of rebuilding them (OFB, CVPR 2024, section 3.3)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ofb_kernels import local_norm, masked_linear, masked_reconstruction_loss


@dataclass(frozen=True)
class TokenArea:
    """What part of the image each of a network's last tokens stands for; such areas are masked and rebuilt as a whole.

    A network that merges patches on its way has areas of several patches.

    Attributes:
        pixels: its height and width.
        columns: areas side by side.
        rows: areas one below the other.
        patches: patches along a side of an area.
    """

    pixels: tuple[int, int]
    rows: int
    columns: int
    patches: int = 1

    def patches_of(self, areas: Tensor) -> Tensor:
        """The patches (B, K, patches²), counted row by row over the image, of areas (B, K)."""
        if self.patches == 1:
            return areas[..., None]
        side = torch.arange(self.patches, device=areas.device)
        row, column = areas // self.columns, areas % self.columns
        rows = row[..., None] * self.patches + side  # (B, K, patches)
        columns = column[..., None] * self.patches + side
        return (rows[..., :, None] * self.patches * self.columns + columns[..., None, :]).flatten(2)


class MaskedImages(nn.Module):
    """Hides areas of the images under a mask token and rebuilds their pixels from the network's last tokens.

    Args:
        area: of the network.
        in_chans: channels of the images.
        first, last: residual widths, of the patch embeddings and of the last tokens.
        most: the largest share of areas that is ever hidden.
    """

    def __init__(self, area: TokenArea, in_chans: int, first: int, last: int, most: float, **like) -> None:
        super().__init__()
        self.area, self.most = area, most
        self.decoder = nn.Linear(last, in_chans * math.prod(area.pixels), **like)  # the paper's 1 × 1 convolution
        self.mask_token = nn.Parameter(torch.empty(1, 1, first, **like))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def hide(self, embeddings: Tensor, ratio: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, patches, D) with a share `ratio` of the last tokens' areas hidden, and `draw_areas` of the
        tokens; `positions` as in `loss`."""
        count = self.area.rows * self.area.columns if positions is None else len(positions)
        drawn, masked = draw_areas(len(embeddings), count, ratio, self.most)
        areas = drawn if positions is None else positions[drawn]
        return replace_patches(embeddings, self.area, areas, masked, self.mask_token), drawn, masked

    def loss(self, tokens: Tensor, images: Tensor, drawn: Tensor, masked: Tensor, positions: Tensor | None) -> Tensor:
        """Loss of rebuilding what was hidden of images (B, C, H, W), 0-d.

        Args:
            tokens: the last tokens (B, N, D).
            images: the network's input.
            drawn, masked: of `hide`.
            positions: (N,), the area of each token, if they are not all areas in their order.
        """
        decoded = masked_linear(tokens_of(tokens, drawn), self.decoder.weight, self.decoder.bias, None)
        areas = drawn if positions is None else positions[drawn]
        return masked_reconstruction_loss(decoded, images, areas, masked, self.area.pixels)

    def pictures(
        self, tokens: Tensor, images: Tensor, drawn: Tensor, masked: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What there is to rebuild, what is left of it, and what was rebuilt, each (B, C, H, W): locally normalized
        images, zeros for the hidden areas, and the decoder's pixels in their place. Arguments as in `loss`."""
        p, q = self.area.pixels
        areas = (drawn if positions is None else positions[drawn])[:, masked]
        decoded = self.decoder(tokens_of(tokens, drawn))[:, masked]
        target = local_norm(images.float())
        hidden, rebuilt = target.clone(), target.clone()
        for image, index in enumerate(areas.tolist()):
            for k, area in enumerate(index):
                row, column = area // self.area.columns * p, area % self.area.columns * q
                hidden[image, :, row : row + p, column : column + q] = 0
                rebuilt[image, :, row : row + p, column : column + q] = decoded[image, k].view(-1, p, q)
        return target, hidden, rebuilt


def draw_areas(images: int, areas: int, ratio: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """(B, K) distinct areas of every image and (K,) bool, which of them to mask: a share `ratio`, at least one.

    K is the largest number that is ever masked, so that shapes stay what they are while the share grows.

    Args:
        images: B.
        areas: how many there are in an image.
        ratio: 0-d, the present share of masked areas.
        most: the largest share there will be.
    """
    count = max(1, math.ceil(most * areas))
    drawn = torch.rand(images, areas, device=ratio.device).topk(count).indices
    return drawn, torch.arange(count, device=ratio.device) < (ratio * areas).clamp(min=1)


def tokens_of(tokens: Tensor, drawn: Tensor) -> Tensor:
    """The drawn ones (B, K, D) of tokens (B, N, D), drawn being (B, K)."""
    return tokens.gather(1, drawn[..., None].expand(-1, -1, tokens.shape[2]))  # take_along_dim compiles for one B


def replace_patches(embeddings: Tensor, area: TokenArea, areas: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
    """Embeddings (B, patches, D) with the mask token (1, 1, D) in place of the patches of the masked areas."""
    replaced = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    patches = area.patches_of(areas)
    replaced.scatter_(1, patches.flatten(1), masked[:, None].expand(patches.shape).flatten(1))
    return torch.where(replaced[..., None], mask_token.to(embeddings.dtype), embeddings)
