"""timm's SwinTransformer: submodules, masked forward pass, folding, description.

Submodules are "embed0", "embed1", … (the residual width of each stage), and over all stages in their order "attn0",
"attn1", … (heads × channels) and "mlp0", "mlp1", ….
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, Mlp, PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofb.supernet.cost import Cost
from ofb.supernet.families import attentions, mlps, vit_checks
from ofb.supernet.families.layers import (
    Submodule,
    add_norm,
    adds_bias,
    drop_path_scales,
    linear_without_bias,
    masked_norm,
    patch_embeddings,
    present,
    scale_rows,
)
from ofb.supernet.families.swin_description import MERGED, build, describe, sync_sizes, widths
from ofb.supernet.masked_images import TokenArea
from ofb.supernet.pruning import Coupling
from ofb.supernet.search_space import attention_candidates, embed_candidates, mlp_candidates
from ofb_kernels import masked_qkv_attention
from ofb_kernels.eager import add_branch

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

NAME = "swin"


def check(model: nn.Module) -> None:
    """Raise ValueError, saying why, where the model is no Swin Transformer that can be searched."""
    if type(model) is not SwinTransformer:
        got = f"{type(model).__module__}.{type(model).__name__}"
        raise ValueError(f"model: expected a timm SwinTransformer, got {got}")
    vit_checks.raise_first(_obstacles(model))


def blocks(model: SwinTransformer) -> list[SwinTransformerBlock]:
    """All blocks, from the images on."""
    return [block for stage in model.layers for block in stage.blocks]


def submodules(model: SwinTransformer) -> dict[str, Submodule]:
    """All searchable submodules at the model's present sizes; couplings name the model's own parameters."""
    names = dict(model.named_parameters())
    found = {}
    for s, width in enumerate(widths(model)):
        couplings = tuple(coupling for coupling in _width_couplings(model, s) if coupling.parameter in names)
        found[f"embed{s}"] = Submodule(embed_candidates(width), couplings)
    for i, (name, block) in enumerate(_named_blocks(model)):
        attn, mlp = block.attn, block.mlp
        attention = attentions.couplings(attn, f"{name}.attn")
        attention.append(Coupling(f"{name}.attn.relative_position_bias_table", 1, heads=True))
        candidates = attention_candidates(attn.num_heads, attentions.head_dim(attn))
        found[f"attn{i}"] = Submodule(candidates, tuple(attention))
        hidden = mlp_candidates(mlps.hidden_units(mlp))
        found[f"mlp{i}"] = Submodule(hidden, tuple(mlps.couplings(mlp, f"{name}.mlp")))
    return found


def macs(model: SwinTransformer) -> Cost:
    """Cost model, with a block's tokens T (in attention those that fill its windows up, too), N in a window, width D:
    4·T·D + 2·T·N for a channel of attention, 2·T·D for a hidden channel, and 4 times the tokens for two widths that
    meet in a patch merging."""
    names = tuple(f"embed{s}" for s in range(len(model.layers)))
    linear = dict.fromkeys(names, 0)
    linear[names[0]] += model.patch_embed.num_patches * model.patch_embed.proj.weight[0].numel()
    linear[names[-1]] += model.num_classes
    products, i = {}, 0
    for s, stage in enumerate(model.layers):
        rows, columns = stage.output_resolution
        if s > 0:
            products[names[s], names[s - 1]] = MERGED * rows * columns
        for block in stage.blocks:
            padded = _round_up(rows, block.window_size[0]) * _round_up(columns, block.window_size[1])
            linear[f"attn{i}"] = 2 * padded * block.window_area
            products |= {(f"attn{i}", names[s]): 4 * padded, (f"mlp{i}", names[s]): 2 * rows * columns}
            i += 1
    return Cost(names, linear, products)


def token_area(model: SwinTransformer) -> TokenArea:
    """All patches that are merged into one token by the last stage.

    Raises:
        ValueError: the images do not divide into such areas.
    """
    patches = 2 ** (len(model.layers) - 1)
    rows, columns = model.patch_embed.grid_size
    patch_size = model.patch_embed.patch_size[0]
    if rows % patches or columns % patches:
        raise ValueError(
            f"model: expected img_size as a multiple of {patches * patch_size} pixels, the area of a last token, got "
            f"{model.patch_embed.img_size}; make the model with another img_size"
        )
    return TokenArea((patches * patch_size,) * 2, rows // patches, columns // patches, patches)


def unmasked_block(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """A block, all masks at one, for the tokens (B, rows, columns, D)."""
    masks = x.new_ones(block.attn.num_heads, attentions.head_dim(block.attn)), x.new_ones(mlps.hidden_units(block.mlp))
    return _block(block, x.flatten(1, 2), *masks, (None, None), None, None).view_as(x)


def features(
    model: SwinTransformer,
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
        residual_masks: (D,) of every residual width, applied to each block's output into the stream; empty leaves it.
        norm_masks: (D,), V of the open residual widths, with which LayerNorm weighs channels.
    """
    x = masked_norm(model.patch_embed.norm, patches, norm_masks.get("embed0")) * masks["embed0"]
    i = 0
    for s, stage in enumerate(model.layers):
        if s > 0:
            x = _merge(stage.downsample, x, stage.input_resolution, norm_masks.get(f"embed{s - 1}"))
            x = x * masks[f"embed{s}"]
        residual_mask, norm_mask = residual_masks.get(f"embed{s}"), norm_masks.get(f"embed{s}")
        blocks = list(stage.blocks)
        scales = drop_path_scales([drop for block in blocks for drop in (block.drop_path1, block.drop_path2)], x)
        for block, pair in zip(blocks, zip(scales[::2], scales[1::2], strict=True), strict=True):
            inputs = (x, masks[f"attn{i}"], masks[f"mlp{i}"].flatten(), pair, residual_mask, norm_mask)
            if stage.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(_block, block, *inputs, use_reentrant=False)
            else:
                x = _block(block, *inputs)
            i += 1
    return masked_norm(model.norm, x, norm_mask)


def logits(model: SwinTransformer, tokens: Tensor, *masks: Mapping[str, Tensor]) -> Tensor:
    """(B, classes) from the tokens after the final norm; no mask acts after it."""
    return model.forward_head(tokens.unflatten(1, model.layers[-1].output_resolution))


def split_tokens(model: SwinTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Those that `logits` looks at, and those of the areas (B, areas, D): all of them, twice."""
    return tokens, tokens


@torch.no_grad()
def fold(model: SwinTransformer, masks: Mapping[str, Tensor], residual_masks: Mapping[str, Tensor]) -> None:
    """Multiply final masks into the weights, in place: the plain forward pass then computes the masked function."""
    scale_rows(model.patch_embed.norm, masks["embed0"].flatten())
    i = 0
    for s, stage in enumerate(model.layers):
        if s > 0:
            scale_rows(stage.downsample.reduction, masks[f"embed{s}"].flatten())
        for block in stage.blocks:
            attentions.fold(block.attn, masks[f"attn{i}"])
            mlps.fold(block.mlp, masks[f"mlp{i}"].flatten())
            if residual_masks:
                scale_rows(block.attn.proj, residual_masks[f"embed{s}"])
                scale_rows(block.mlp.fc2, residual_masks[f"embed{s}"])
            i += 1


def _block(
    block: SwinTransformerBlock,
    x: Tensor,
    attention_mask: Tensor,
    mlp_mask: Tensor,
    sample_scales: tuple[Tensor | None, Tensor | None],
    residual_mask: Tensor | None,
    norm_mask: Tensor | None,
) -> Tensor:
    """A transformer block with masks, from stream to stream, (B, N, D); drop path's scales are those of the attention
    and of the MLP."""
    windows = _to_windows(block, masked_norm(block.norm1, x, norm_mask))
    attn = block.attn
    bias = attn._get_rel_pos_bias()  # (1, H, N, N)
    bias = bias[0] if block.attn_mask is None else bias + block.attn_mask[:, None]
    weights = attentions.qkv_parameters(attn)
    attended = masked_qkv_attention(windows, *weights, attention_mask, attn.scale, attention_bias=bias)
    branch, branch_bias = linear_without_bias(attn.proj, attended, adds_bias(block.norm2, x))
    branch = _from_windows(block, branch), branch_bias
    x, normalized = add_norm(x, branch, nn.Identity(), sample_scales[0], residual_mask, block.norm2, norm_mask)
    branch, _ = mlps.masked_forward(block.mlp, normalized, mlp_mask, norm_mask=None)
    branch_mask = x.new_ones(x.shape[-1]) if residual_mask is None else residual_mask
    return add_branch(x, branch, branch_mask, sample_scales[1])


def _merge(merging: PatchMerging, x: Tensor, resolution: tuple[int, int], norm_mask: Tensor | None) -> Tensor:
    """Four neighbours become a token: (B, N, D) → (B, N / 4, D')."""
    x = x.unflatten(1, resolution)
    x = F.pad(x, (0, 0, 0, resolution[1] % 2, 0, resolution[0] % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H / 2, 2, W / 2, 2, D)
    x = x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
    return merging.reduction(masked_norm(merging.norm, x, None if norm_mask is None else norm_mask.repeat(MERGED)))


def _to_windows(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """(B, N, D) → (B · windows, tokens of a window, D), shifted, and filled up with zeros."""
    height, width = block.input_resolution
    x = x.unflatten(1, (height, width))
    if any(block.shift_size):
        x = x.roll((-block.shift_size[0], -block.shift_size[1]), (1, 2))
    x = F.pad(x, (0, 0, 0, -width % block.window_size[1], 0, -height % block.window_size[0]))
    return window_partition(x, block.window_size).flatten(1, 2)


def _from_windows(block: SwinTransformerBlock, windows: Tensor) -> Tensor:
    """The inverse of `_to_windows`."""
    height, width = block.input_resolution
    padded = (_round_up(height, block.window_size[0]), _round_up(width, block.window_size[1]))
    x = window_reverse(windows.unflatten(1, block.window_size), block.window_size, *padded)[:, :height, :width]
    if any(block.shift_size):
        x = x.roll(block.shift_size, (1, 2))
    return x.flatten(1, 2)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _named_blocks(model: SwinTransformer) -> Iterator[tuple[str, SwinTransformerBlock]]:
    for s, stage in enumerate(model.layers):
        for i, block in enumerate(stage.blocks):
            yield f"layers.{s}.blocks.{i}", block


def _width_couplings(model: SwinTransformer, s: int) -> Iterator[Coupling]:
    """The residual width of stage s, from the layer that makes it to the one that takes it on."""
    if s == 0:
        names = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
        yield from (Coupling(f"patch_embed.{name}", 0) for name in names)
    else:
        yield Coupling(f"layers.{s}.downsample.reduction.weight", 0)
    for i in range(len(model.layers[s].blocks)):
        block = f"layers.{s}.blocks.{i}"
        norms = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
        outputs = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")
        yield from (Coupling(f"{block}.{name}", 0) for name in (*norms, *outputs))
        yield from (Coupling(f"{block}.{name}.weight", 1) for name in ("attn.qkv", "mlp.fc1"))
    if s + 1 < len(model.layers):
        merging = f"layers.{s + 1}.downsample"
        yield from (Coupling(f"{merging}.norm.{kind}", 0, MERGED) for kind in ("weight", "bias"))
        yield Coupling(f"{merging}.reduction.weight", 1, MERGED)
    else:
        yield from (Coupling(f"norm.{kind}", 0) for kind in ("weight", "bias"))
        yield Coupling("head.fc.weight", 1)


def _obstacles(model: SwinTransformer) -> vit_checks.Obstacles:
    """Everything that the search cannot handle."""
    yield getattr(model, "dynamic_img_size", False), "dynamic_img_size is not supported; give a fixed img_size"
    yield type(model.patch_embed) is not PatchEmbed, "expected timm's PatchEmbed"
    yield not isinstance(model.patch_embed.norm, nn.LayerNorm), "expected a LayerNorm in the patch embedding"
    yield len(set(model.patch_embed.patch_size)) > 1, "expected square patches"
    yield type(model.head) is not ClassifierHead, f"expected timm's ClassifierHead, got {type(model.head).__name__}"
    yield from vit_checks.head_obstacles(model, {"head.fc": model.head.fc})
    norms = [module for name, module in model.named_modules() if name.split(".")[-1].startswith("norm")]
    yield not all(isinstance(norm, nn.LayerNorm | nn.Identity) for norm in norms), "expected LayerNorm everywhere"
    for name, block in _named_blocks(model):
        attention, mlp = attentions.obstacle(block.attn, (WindowAttention,)), mlps.obstacle(block.mlp)
        yield attention is not None, f"{name}.attn: {attention}"
        yield mlp is not None, f"{name}.mlp: {mlp}"
        plain = type(block.mlp) is Mlp and not present(block.mlp.norm)
        yield not plain, f"{name}.mlp: expected timm's Mlp without a norm"
