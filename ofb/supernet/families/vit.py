"""timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP, SigLIP, …): submodules, masked forward pass, folding.

Submodules are "embed" (the residual width), "attn0", "attn1", … (heads × channels), "mlp0", "mlp1", …, "pool" where the
tokens are pooled by attention, and "tokens" where the number of patches is searched.
timm's Eva has the same anatomy but for what `families.eva` says, and shares these functions.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofb.supernet.cost import Cost
from ofb.supernet.families import attentions, mlps, pools, tokens
from ofb.supernet.families.layers import (
    Submodule,
    add_norm,
    adds_bias,
    copies,
    drop_path_scales,
    linear,
    masked_norm,
    patch_embeddings,
    present,
    scale_rows,
    sync_layers,
)
from ofb.supernet.families.vit_checks import check
from ofb.supernet.families.vit_description import build, describe
from ofb.supernet.masked_images import TokenArea
from ofb.supernet.pruning import Coupling
from ofb.supernet.search_space import TOKENS, Candidates, embed_candidates, mlp_candidates

__all__ = [
    "NAME",
    "blocks",
    "build",
    "check",
    "describe",
    "features",
    "fold",
    "logits",
    "macs",
    "patch_embeddings",
    "split_tokens",
    "submodules",
    "sync_sizes",
    "token_area",
    "unmasked_block",
]

NAME = "vit"


def submodules(model: VisionTransformer) -> dict[str, Submodule]:
    """All searchable submodules at the model's present sizes; couplings name the model's own parameters."""
    widths = Candidates((1,), (model.embed_dim,)) if pools.width_stays(model) else embed_candidates(model.embed_dim)
    found = {"embed": Submodule(widths, tuple(_embed_couplings(model)))}
    rotated = getattr(model, "rope", None) is not None
    for i, block in enumerate(model.blocks):
        attn, mlp, name = block.attn, block.mlp, f"blocks.{i}"
        found[f"attn{i}"] = Submodule(
            attentions.candidates(attn, rotated),
            tuple(attentions.couplings(attn, f"{name}.attn")),
            present(getattr(attn, "norm", None)),
        )
        found[f"mlp{i}"] = Submodule(
            mlp_candidates(mlps.hidden_units(mlp)), tuple(mlps.couplings(mlp, f"{name}.mlp")), present(mlp.norm)
        )
    if model.attn_pool is not None:
        found["pool"] = pools.submodule(model)
    kept = tokens.kept_patches(model)
    return found if kept is None else found | {TOKENS: tokens.submodule(kept, model.patch_embed.num_patches)}


def macs(model: VisionTransformer) -> Cost:
    """Cost model: 4·N·D + 2·N² for a channel of attention, 2·N·D for a hidden channel, 3·N·D for one with a gate,
    N tokens in the blocks, width D."""
    embedded, kept = model.patch_embed.num_patches, tokens.kept_patches(model)
    patches = embedded if kept is None else len(kept.weight)
    length = patches + model.num_prefix_tokens
    classified = 1 if model.global_pool else length
    for_width = embedded * model.patch_embed.proj.weight[0].numel()
    for_width += classified * sum(head.out_features for head in _classifiers(model))
    linear, products = {"embed": for_width}, {}
    for i, block in enumerate(model.blocks):
        linear[f"attn{i}"] = 2 * length**2
        products[f"attn{i}", "embed"] = 4 * length
        products[f"mlp{i}", "embed"] = mlps.matrices(block.mlp) * length
    if model.attn_pool is not None:
        pooled = length if getattr(model, "pool_include_prefix", True) else patches
        linear["pool"], pool_for_width, products["pool", "embed"] = pools.macs(model, pooled)
        linear["embed"] += pool_for_width
    return Cost(("embed",), linear, products)


def token_area(model: VisionTransformer) -> TokenArea:
    """A patch."""
    return TokenArea(tuple(model.patch_embed.patch_size), *model.patch_embed.grid_size)


def blocks(model: VisionTransformer) -> list[nn.Module]:
    """All blocks, from the images on."""
    return list(model.blocks)


def unmasked_block(block: nn.Module, x: Tensor, rope: Tensor | None = None, **_: object) -> Tensor:
    """A block, all masks at one, for the tokens (B, N, D)."""
    masks = x.new_ones(block.attn.num_heads, attentions.head_dim(block.attn)), x.new_ones(mlps.hidden_units(block.mlp))
    none = (None, None)
    inputs = (x, masked_norm(block.norm1, x, None), *masks, none, none, none, None, None, rope, None)
    return _block(block, nn.Identity(), *inputs)[0]


def features(
    model: VisionTransformer,
    patches: Tensor,
    masks: Mapping[str, Tensor],
    residual_masks: Mapping[str, Tensor] = MappingProxyType({}),
    norm_masks: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Tokens after the final norm (B, N, D), the network masked throughout.

    Args:
        model: the timm model.
        patches: (B, patches, D) patch embeddings.
        masks: m of every submodule: (1, D) or (1, hidden), (H, d) for attention.
        residual_masks: (D,) of the residual width, applied to every block's output into the stream; empty leaves it.
        norm_masks: V of open submodules, flat, with which the norms over their units weigh them: of the residual width
            (none for plain norms), and of the submodules that are `normed`. That of "tokens" weighs the keys of the
            attention.
    """
    residual_mask, norm_mask = residual_masks.get("embed"), norm_masks.get("embed")
    x, rope = _embedded(model, masked_norm(model.patch_embed.norm, patches, norm_mask))
    if TOKENS in masks:
        x = tokens.masked(x, masks[TOKENS].flatten())
    x = masked_norm(model.norm_pre, x, norm_mask) * masks["embed"]
    blocks = list(model.blocks)
    normalized = masked_norm(blocks[0].norm1, x, norm_mask)
    residual_copies, norm_copies = (copies(mask, 2 * len(blocks)) for mask in (residual_mask, norm_mask))
    scales = drop_path_scales([drop for block in blocks for drop in (block.drop_path1, block.drop_path2)], x)
    for i, (block, next_norm) in enumerate(zip(blocks, [*(b.norm1 for b in blocks[1:]), model.norm], strict=True)):
        pair = slice(2 * i, 2 * i + 2)
        inputs = (x, normalized, masks[f"attn{i}"], masks[f"mlp{i}"].flatten())
        inputs += (scales[pair], residual_copies[pair], norm_copies[pair])
        inputs += (norm_masks.get(f"attn{i}"), norm_masks.get(f"mlp{i}"))
        inputs += (rope, norm_masks.get(TOKENS))
        if model.grad_checkpointing and torch.is_grad_enabled():
            x, normalized = checkpoint(_block, block, next_norm, *inputs, use_reentrant=False)
        else:
            x, normalized = _block(block, next_norm, *inputs)
    return normalized


def logits(
    model: VisionTransformer,
    x: Tensor,
    masks: Mapping[str, Tensor],
    residual_masks: Mapping[str, Tensor] = MappingProxyType({}),
    norm_masks: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """(B, classes) from the tokens after the final norm; what was pooled (B, D) where the model has no classifier.

    Args:
        model: the timm model.
        x: tokens (B, N, D).
        masks: as in `features`, as are the others.
        residual_masks: of the residual width.
        norm_masks: V of open submodules.
    """
    if isinstance(model, VisionTransformerDistilled):
        return model.forward_head(x)
    norm_mask = norm_masks.get("embed")
    if TOKENS in norm_masks:
        pooled = tokens.pooled(model, x, norm_masks[TOKENS])
    elif model.attn_pool is None:
        pooled = model.pool(x)
    else:
        pool, mask, x = pools.pool_of(model), masks["pool"].flatten(), pools.pooled_tokens(model, x)
        pooled = pools.masked_forward(pool, x, mask, residual_masks.get("embed"), norm_mask)
    return linear(model.head, model.head_drop(masked_norm(model.fc_norm, pooled, norm_mask)))


def split_tokens(model: VisionTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens after the final norm (B, N, D) those that `logits` looks at, and the patches' (B, patches, D)."""
    sizes = model.num_prefix_tokens, x.shape[1] - model.num_prefix_tokens
    if isinstance(model, VisionTransformerDistilled) or (model.attn_pool is None and model.global_pool == "token"):
        return x.split(sizes, 1)  # nothing is in both: their gradients are laid side by side and not added
    return x, x[:, model.num_prefix_tokens :]


@torch.no_grad()
def fold(model: VisionTransformer, masks: Mapping[str, Tensor], residual_masks: Mapping[str, Tensor]) -> None:
    """Multiply final masks into the weights, in place: the plain forward pass then computes the masked function."""
    _fold_embedding(model, masks["embed"].flatten())
    for i, block in enumerate(model.blocks):
        attentions.fold(block.attn, masks[f"attn{i}"])
        mlps.fold(block.mlp, masks[f"mlp{i}"].flatten())
        if residual_masks:
            scale_rows(block.attn.proj, residual_masks["embed"])
            scale_rows(block.mlp.fc2, residual_masks["embed"])
    if model.attn_pool is not None:
        pools.fold(model, masks["pool"].flatten(), residual_masks.get("embed"))
    if TOKENS in masks:
        model.patch_drop.weight.mul_(masks[TOKENS].flatten())


def sync_sizes(model: VisionTransformer, attention_sizes: list[tuple[int, int]]) -> None:
    """Bring the modules' size attributes in line with their parameters; (heads, channels) of each block is given.

    The attention's softmax scale stays what it was.
    """
    sync_layers(model)
    model.embed_dim = model.num_features = model.head_hidden_size = model.patch_embed.proj.weight.shape[0]
    model.patch_embed.proj.out_channels = model.patch_embed.embed_dim = model.embed_dim
    for info in getattr(model, "feature_info", []):
        info["num_chs"] = model.embed_dim
    for block, (heads, channels) in zip(model.blocks, attention_sizes, strict=True):
        attentions.set_sizes(block.attn, heads, channels)


def _embed_couplings(model: VisionTransformer) -> list[Coupling]:
    """The residual width runs through the whole network."""
    norms = ("patch_embed.norm", "norm_pre", "norm", "fc_norm")
    dims = {f"{layer}.{kind}": 0 for layer in (*norms, "patch_embed.proj") for kind in ("weight", "bias")}
    dims |= {"cls_token": 2, "dist_token": 2, "reg_token": 2, "pos_embed": 2, "head.weight": 1, "head_dist.weight": 1}
    for i in range(len(model.blocks)):
        readers = (
            "attn.qkv",
            *(f"attn.{name}" for name in attentions.PROJECTIONS),
            "mlp.fc1",
            "mlp.fc1_g",
            "mlp.fc1_x",
        )
        writers = ("norm1", "norm2", "attn.proj", "mlp.fc2")
        dims |= {f"blocks.{i}.{layer}.weight": 1 for layer in readers}
        dims |= {f"blocks.{i}.{layer}.{kind}": 0 for layer in writers for kind in ("weight", "bias")}
        dims |= {f"blocks.{i}.{scale}": 0 for scale in ("ls1.gamma", "ls2.gamma", "gamma_1", "gamma_2")}
    if model.attn_pool is not None:
        dims |= pools.width_couplings(model)
    present_names = dict(model.named_parameters())
    return [Coupling(name, dim) for name, dim in dims.items() if name in present_names]


def _classifiers(model: VisionTransformer) -> list[nn.Linear]:
    heads = (model.head, getattr(model, "head_dist", None))
    return [head for head in heads if isinstance(head, nn.Linear)]


def _embedded(model: VisionTransformer, patches: Tensor) -> tuple[Tensor, Tensor | None]:
    """All tokens (B, N, D) with position embedding, and the rotary one where the model has it."""
    if model.dynamic_img_size:
        patches = patches.unflatten(1, model.patch_embed.grid_size)
    embedded = model._pos_embed(patches)
    return embedded if isinstance(embedded, tuple) else (model.patch_drop(embedded), None)


def _block(
    block: nn.Module,
    next_norm: nn.Module,
    x: Tensor,
    normalized: Tensor,
    attention_mask: Tensor,
    mlp_mask: Tensor,
    sample_scales: Sequence[Tensor | None],
    residual_masks: Sequence[Tensor | None],
    norm_masks: Sequence[Tensor | None],
    attention_norm_mask: Tensor | None,
    mlp_norm_mask: Tensor | None,
    rope: Tensor | None,
    key_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A transformer block with masks, from norm to norm: it takes the stream and its norm1, and returns the new stream
    and what the next norm makes of it. Drop path's scales, residual and norm masks are given for the attention and for
    the MLP."""
    bias = None if key_weight is None else tokens.attention_bias(key_weight, x.shape[1], len(attention_mask))
    masks, without_bias = (attention_mask, attention_norm_mask), adds_bias(block.norm2, x)
    branch = attentions.masked_forward(block.attn, normalized, *masks, rope, bias, without_bias)
    scale1, scale2 = _layer_scales(block)
    x, normalized = add_norm(x, branch, scale1, sample_scales[0], residual_masks[0], block.norm2, norm_masks[0])
    branch = mlps.masked_forward(block.mlp, normalized, mlp_mask, mlp_norm_mask, adds_bias(next_norm, x))
    return add_norm(x, branch, scale2, sample_scales[1], residual_masks[1], next_norm, norm_masks[1])


def _layer_scales(block: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """LayerScale of both branches: modules in timm's Block, parameters in its EvaBlock."""
    if hasattr(block, "ls1"):
        return [block.ls1, block.ls2]
    return [nn.Identity() if gamma is None else gamma.mul for gamma in (block.gamma_1, block.gamma_2)]


def _fold_embedding(model: VisionTransformer, mask: Tensor) -> None:
    """What makes the tokens gets the mask: the norm before the blocks, or else all that is added or concatenated."""
    if present(model.norm_pre):
        scale_rows(model.norm_pre, mask)
        return
    patch_embed = model.patch_embed
    scale_rows(patch_embed.norm if present(patch_embed.norm) else patch_embed.proj, mask)
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        if getattr(model, name, None) is not None:
            getattr(model, name).mul_(mask)
