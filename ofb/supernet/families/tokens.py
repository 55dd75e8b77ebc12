"""The number of patches as a searchable submodule, "tokens": which positions of the image a plain ViT looks at.

A unit is the position of a patch, and its mask scales the token that enters the blocks. While the number is open, V
weighs it wherever tokens are averaged, in the softmax of the attention and in average pooling: a position with V = 0
counts for nothing.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ofb.supernet.families.layers import Submodule, present
from ofb.supernet.pruning import Coupling
from ofb.supernet.search_space import token_candidates

LEAST_WEIGHT = 1e-12  # of a position in a softmax, whose logarithm has to be finite


class KeptPatches(nn.Module):
    """Goes on with some of the patches, each times a gain; it stands where timm has its patch dropout.

    The tokens no longer fill a grid: `forward_intermediates` needs output_fmt="NLC", and `features_only` does not work.

    Args:
        patches: how many are kept; at first those at the positions from 0 on.
        prefix_tokens: tokens before the patches, all of which stay.

    Attributes:
        weight: (patches,), the gains.
        positions: (patches,), ascending, row by row over the image.
    """

    def __init__(self, patches: int, prefix_tokens: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.weight = nn.Parameter(torch.ones(patches))
        self.register_buffer("positions", torch.arange(patches))

    def forward(self, x: Tensor) -> Tensor:
        """(B, prefix + kept, D) from (B, prefix + all patches, D)."""
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        return torch.cat([prefix, patches.index_select(1, self.positions) * self.weight[:, None]], 1)


def search_tokens(model: nn.Module) -> None:
    """Make the number of patches a submodule of a model, in place.

    Raises:
        ValueError: this model cannot do without any of them; the message says why.
    """
    if isinstance(getattr(model, "patch_drop", None), KeptPatches):
        return
    for wrong, reason in _obstacles(model):
        if wrong:
            raise ValueError(f"tokens: the number of patches cannot be searched: {reason}; leave tokens out")
    kept = KeptPatches(model.patch_embed.num_patches, model.num_prefix_tokens)
    weight = model.patch_embed.proj.weight
    model.patch_drop = kept.to(weight.device, weight.dtype)


def kept_patches(model: nn.Module) -> KeptPatches | None:
    """The selection of a model's patches, None where it goes on with all of them."""
    patch_drop = getattr(model, "patch_drop", None)
    return patch_drop if isinstance(patch_drop, KeptPatches) else None


def submodule(kept: KeptPatches, all_patches: int) -> Submodule:
    """The kept positions."""
    couplings = (Coupling("patch_drop.weight", 0), Coupling("patch_drop.positions", 0))
    return Submodule(token_candidates(len(kept.weight), all_patches), couplings, normed=True)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Tokens (B, N, D) with a mask (patches,) on those behind the prefix."""
    return x * _with_prefix(mask, x.shape[1])[:, None]


def attention_bias(weight: Tensor, tokens: int, heads: int) -> Tensor:
    """(H, N, N) that gives each key its position's weight (patches,) in the softmax, and full weight to the prefix."""
    return _with_prefix(weight, tokens).clamp(min=LEAST_WEIGHT).log().expand(heads, tokens, tokens)


def pooled(model: VisionTransformer, x: Tensor, weight: Tensor) -> Tensor:
    """What the model pools of tokens (B, N, D), each position with its weight (patches,) in an average."""
    if model.global_pool != "avg":
        return model.pool(x)
    weight = _with_prefix(weight, x.shape[1])
    if not model.pool_include_prefix:
        x, weight = x[:, model.num_prefix_tokens :], weight[model.num_prefix_tokens :]
    return (weight / weight.sum()) @ x


def _with_prefix(values: Tensor, tokens: int) -> Tensor:
    """(N,), 1 for the tokens before the patches."""
    return torch.cat([values.new_ones(tokens - len(values)), values])


def _obstacles(model: nn.Module) -> list[tuple[bool, str]]:
    if not isinstance(model, VisionTransformer):
        return [(True, f"expected a timm VisionTransformer, got {type(model).__name__}")]
    pool = "map" if model.attn_pool is not None else model.global_pool
    return [
        (pool not in ("token", "avg"), f"expected global_pool token or avg, got {pool!r}"),
        (model.dynamic_img_size, "expected images of one size, got dynamic_img_size"),
        (present(model.norm_pre), "a norm between the patches and the blocks (pre_norm) would undo the masks"),
    ]
