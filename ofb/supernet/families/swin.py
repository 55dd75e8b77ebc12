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
from ofb.supernet.families.layers import (
    ACTIVATION_LAYERS,
    Submodule,
    activation,
    add_norm,
    masked_norm,
    present,
    resized,
    scale_rows,
    sync_layers,
)
from ofb.supernet.masked_images import TokenArea
from ofb.supernet.pruning import Coupling
from ofb.supernet.search_space import attention_candidates, embed_candidates, mlp_candidates
from ofb_kernels import masked_mlp, masked_qkv_attention

NAME = "swin"
MERGED = 4  # neighbours that become one token between stages


def check(model: nn.Module) -> None:
    """Raise ValueError, saying why, where the model is no Swin Transformer that can be searched."""
    if type(model) is not SwinTransformer:
        got = f"{type(model).__module__}.{type(model).__name__}"
        raise ValueError(f"model: expected a timm SwinTransformer, got {got}")
    for wrong, reason in _obstacles(model):
        if wrong:
            raise ValueError(f"model: cannot be searched: {reason}")


def blocks(model: SwinTransformer) -> list[SwinTransformerBlock]:
    """All blocks, from the images on."""
    return [block for stage in model.layers for block in stage.blocks]


def submodules(model: SwinTransformer) -> dict[str, Submodule]:
    """All searchable submodules at the model's present sizes; couplings name the model's own parameters."""
    present = dict(model.named_parameters())
    found = {}
    for s, width in enumerate(_widths(model)):
        found[f"embed{s}"] = Submodule(
            embed_candidates(width), tuple(c for c in _width_couplings(model, s) if c.parameter in present)
        )
    for i, (name, block) in enumerate(_named_blocks(model)):
        attention = [
            Coupling(f"{name}.attn.qkv.weight", 0, 3),
            Coupling(f"{name}.attn.qkv.bias", 0, 3),
            Coupling(f"{name}.attn.proj.weight", 1),
            Coupling(f"{name}.attn.relative_position_bias_table", 1, heads=True),
        ]
        mlp = [Coupling(f"{name}.mlp.fc1.{kind}", 0) for kind in ("weight", "bias")]
        mlp.append(Coupling(f"{name}.mlp.fc2.weight", 1))
        heads, head_dim = block.attn.num_heads, block.attn.qkv.out_features // (3 * block.attn.num_heads)
        attention = tuple(coupling for coupling in attention if coupling.parameter in present)
        found[f"attn{i}"] = Submodule(attention_candidates(heads, head_dim), attention)
        found[f"mlp{i}"] = Submodule(mlp_candidates(block.mlp.fc1.out_features), tuple(mlp))
    return found


def macs(model: SwinTransformer) -> Cost:
    """Cost model, with a block's tokens T (in attention those that fill its windows up, too), N in a window, width D:
    4·T·D + 2·T·N for a channel of attention, 2·T·D for a hidden channel, and 4 times the tokens for two widths that
    meet in a patch merging."""
    widths = tuple(f"embed{s}" for s in range(len(model.layers)))
    patches = model.patch_embed.num_patches
    linear = dict.fromkeys(widths, 0)
    linear[widths[0]] += patches * model.patch_embed.proj.weight[0].numel()
    linear[widths[-1]] += model.num_classes
    products, i = {}, 0
    for s, stage in enumerate(model.layers):
        rows, columns = stage.output_resolution
        if s > 0:
            products[widths[s], widths[s - 1]] = MERGED * rows * columns
        for block in stage.blocks:
            padded = _round_up(rows, block.window_size[0]) * _round_up(columns, block.window_size[1])
            linear[f"attn{i}"] = 2 * padded * block.window_area
            products |= {(f"attn{i}", widths[s]): 4 * padded, (f"mlp{i}", widths[s]): 2 * rows * columns}
            i += 1
    return Cost(widths, linear, products)


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


def patch_embeddings(model: SwinTransformer, images: Tensor) -> Tensor:
    """(B, patches, D), before the norm that belongs to them."""
    return model.patch_embed.proj(images).flatten(2).mT


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
            x = (
                _merge(stage.downsample, x, stage.input_resolution, norm_masks.get(f"embed{s - 1}"))
                * masks[f"embed{s}"]
            )
        residual_mask, norm_mask = residual_masks.get(f"embed{s}"), norm_masks.get(f"embed{s}")
        for block in stage.blocks:
            inputs = (x, masks[f"attn{i}"], masks[f"mlp{i}"].flatten(), residual_mask, norm_mask)
            if stage.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(_block, block, *inputs, use_reentrant=False)
            else:
                x = _block(block, *inputs)
            i += 1
    return masked_norm(model.norm, x, norm_mask)


def logits(model: SwinTransformer, tokens: Tensor, *masks: Mapping[str, Tensor]) -> Tensor:
    """(B, classes) from the tokens after the final norm; no mask acts after it."""
    return model.forward_head(tokens.unflatten(1, model.layers[-1].output_resolution))


def patch_tokens(model: SwinTransformer, tokens: Tensor) -> Tensor:
    """(B, areas, D): all of them."""
    return tokens


@torch.no_grad()
def fold(model: SwinTransformer, masks: Mapping[str, Tensor], residual_masks: Mapping[str, Tensor]) -> None:
    """Multiply final masks into the weights, in place: the plain forward pass then computes the masked function.

    timm's attention scales by (new head size)^−½, the supernet kept the old scale: the ratio goes into q.
    """
    scale_rows(model.patch_embed.norm, masks["embed0"].flatten())
    i = 0
    for s, stage in enumerate(model.layers):
        if s > 0:
            scale_rows(stage.downsample.reduction, masks[f"embed{s}"].flatten())
        for block in stage.blocks:
            attention = masks[f"attn{i}"]
            scale = attention.shape[1] ** -0.5
            scale_rows(
                block.attn.qkv, torch.stack([attention * block.attn.scale / scale, attention, attention]).flatten()
            )
            block.attn.scale = scale
            scale_rows(block.mlp.fc1, masks[f"mlp{i}"].flatten())
            if residual_masks:
                scale_rows(block.attn.proj, residual_masks[f"embed{s}"])
                scale_rows(block.mlp.fc2, residual_masks[f"embed{s}"])
            i += 1


def sync_sizes(model: SwinTransformer, attention_sizes: list[tuple[int, int]]) -> None:
    """Bring the modules' size attributes in line with their parameters; (heads, channels) of each block is given.

    The attention's softmax scale stays what it was.
    """
    sync_layers(model)
    widths = _widths(model)
    model.patch_embed.proj.out_channels = model.patch_embed.embed_dim = model.embed_dim = widths[0]
    model.num_features = model.head_hidden_size = model.head.in_features = model.head.num_features = widths[-1]
    for stage, info, width, before in zip(model.layers, model.feature_info, widths, [widths[0], *widths], strict=False):
        info["num_chs"] = width
        if isinstance(stage.downsample, PatchMerging):
            stage.downsample.dim, stage.downsample.out_dim = before, width
        stage.dim = before
        for block in stage.blocks:
            block.dim = block.attn.dim = width
    for block, (heads, _) in zip(blocks(model), attention_sizes, strict=True):
        block.attn.num_heads = heads


def describe(model: SwinTransformer) -> dict:
    """Everything that `build` needs, for a plain (folded) model."""
    block, patch_embed = blocks(model)[0], model.patch_embed
    return {
        "img_size": list(patch_embed.img_size),
        "patch_size": patch_embed.patch_size[0],
        "in_chans": patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "window_size": [list(stage.blocks[0].window_size) for stage in model.layers],
        "always_partition": block.always_partition,
        "qkv_bias": block.attn.qkv.bias is not None,
        "norm_eps": block.norm1.eps,
        "activation": activation(block.mlp.act),
        "stages": [
            {
                "embed_dim": width,
                "blocks": [
                    {
                        "heads": block.attn.num_heads,
                        "head_dim": block.attn.qkv.out_features // (3 * block.attn.num_heads),
                        "hidden": block.mlp.fc1.out_features,
                    }
                    for block in stage.blocks
                ],
            }
            for width, stage in zip(_widths(model), model.layers, strict=True)
        ],
    }


def build(description: dict) -> SwinTransformer:
    """A timm model of this architecture with fresh weights, each block at its own sizes."""
    missing = sorted(_DESCRIPTION_KEYS - description.keys())
    if missing:
        raise ValueError(f"description: expected entries {', '.join(sorted(_DESCRIPTION_KEYS))}, lacking {missing}")
    stages = description["stages"]
    model = SwinTransformer(
        img_size=tuple(description["img_size"]),
        patch_size=description["patch_size"],
        in_chans=description["in_chans"],
        num_classes=description["num_classes"],
        global_pool=description["global_pool"],
        embed_dim=1,  # the stages and blocks get their own sizes below
        depths=tuple(len(stage["blocks"]) for stage in stages),
        num_heads=(1,) * len(stages),
        window_size=[tuple(size) for size in description["window_size"]],
        always_partition=description["always_partition"],
        qkv_bias=description["qkv_bias"],
        mlp_ratio=1.0,
        drop_path_rate=0.0,
        norm_layer=lambda dim, **kwargs: nn.LayerNorm(dim, eps=description["norm_eps"], **kwargs),
    )
    before = stages[0]["embed_dim"]
    _set_patch_embed(model, before)
    for stage, sizes in zip(model.layers, stages, strict=True):
        width = sizes["embed_dim"]
        if isinstance(stage.downsample, PatchMerging):
            stage.downsample.norm = resized(stage.downsample.norm, MERGED * before)
            stage.downsample.reduction = resized(stage.downsample.reduction, MERGED * before, width)
        for block, block_sizes in zip(stage.blocks, sizes["blocks"], strict=True):
            _set_block(block, width, block_sizes, description["activation"])
        before = width
    model.norm = resized(model.norm, before)
    model.num_features = before
    model.reset_classifier(description["num_classes"], description["global_pool"])
    sync_sizes(model, [(block["heads"], block["head_dim"]) for stage in stages for block in stage["blocks"]])
    return model


_DESCRIPTION_KEYS = {
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "window_size", "always_partition", "qkv_bias",
    "norm_eps", "activation", "stages",
}  # fmt: skip


def _set_patch_embed(model: SwinTransformer, width: int) -> None:
    proj, norm = model.patch_embed.proj, model.patch_embed.norm
    model.patch_embed.proj = nn.Conv2d(proj.in_channels, width, proj.kernel_size, proj.stride)
    model.patch_embed.norm = resized(norm, width)


def _set_block(block: SwinTransformerBlock, width: int, sizes: dict, activation_name: str) -> None:
    """Give a block layers of the described sizes."""
    heads, attn_dim, hidden = sizes["heads"], sizes["heads"] * sizes["head_dim"], sizes["hidden"]
    block.norm1, block.norm2 = resized(block.norm1, width), resized(block.norm2, width)
    table = block.attn.relative_position_bias_table
    block.attn.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table.new_empty(len(table), heads)))
    block.attn.qkv, block.attn.proj = (
        resized(block.attn.qkv, width, 3 * attn_dim),
        resized(block.attn.proj, attn_dim, width),
    )
    block.attn.scale = sizes["head_dim"] ** -0.5
    block.mlp.fc1, block.mlp.fc2 = resized(block.mlp.fc1, width, hidden), resized(block.mlp.fc2, hidden, width)
    block.mlp.act = ACTIVATION_LAYERS[activation_name]()


def _block(
    block: SwinTransformerBlock,
    x: Tensor,
    attention_mask: Tensor,
    mlp_mask: Tensor,
    residual_mask: Tensor | None,
    norm_mask: Tensor | None,
) -> Tensor:
    """A transformer block with masks, from stream to stream, (B, N, D)."""
    windows = _to_windows(block, masked_norm(block.norm1, x, norm_mask))
    attn, mlp = block.attn, block.mlp
    bias = attn._get_rel_pos_bias()  # (1, H, N, N)
    bias = bias[0] if block.attn_mask is None else bias + block.attn_mask[:, None]
    attended = masked_qkv_attention(
        windows, attn.qkv.weight, attn.qkv.bias, attention_mask, attn.scale, attention_bias=bias
    )
    branch = _from_windows(block, attn.proj(attended))
    x, normalized = add_norm(x, branch, nn.Identity(), block.drop_path1, residual_mask, block.norm2, norm_mask)
    fc1, fc2 = mlp.fc1, mlp.fc2
    branch = masked_mlp(normalized, fc1.weight, fc1.bias, mlp_mask, fc2.weight, fc2.bias, activation(mlp.act))
    return x + block.drop_path2(branch if residual_mask is None else branch * residual_mask)


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


def _widths(model: SwinTransformer) -> list[int]:
    return [stage.blocks[0].norm1.weight.shape[0] for stage in model.layers]


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


def _obstacles(model: SwinTransformer) -> Iterator[tuple[bool, str]]:
    """(whether it stands in the way, what it is) for everything the search cannot handle."""
    yield model.dynamic_img_size, "dynamic_img_size is not supported; give a fixed img_size"
    yield type(model.patch_embed) is not PatchEmbed, "expected timm's PatchEmbed"
    yield not isinstance(model.patch_embed.norm, nn.LayerNorm), "expected a LayerNorm in the patch embedding"
    yield len(set(model.patch_embed.patch_size)) > 1, "expected square patches"
    yield type(model.head) is not ClassifierHead, f"expected timm's ClassifierHead, got {type(model.head).__name__}"
    norms = [module for name, module in model.named_modules() if name.split(".")[-1].startswith("norm")]
    yield not all(isinstance(norm, nn.LayerNorm | nn.Identity) for norm in norms), "expected LayerNorm everywhere"
    for name, block in _named_blocks(model):
        attn, mlp = block.attn, block.mlp
        yield type(attn) is not WindowAttention, f"{name}.attn: expected timm's WindowAttention"
        yield attn.attn_drop.p > 0 or attn.proj_drop.p > 0, f"{name}.attn: expected no dropout"
        yield type(mlp) is not Mlp, f"{name}.mlp: expected timm's Mlp, got {type(mlp).__name__}"
        yield present(mlp.norm) or mlp.drop1.p > 0, f"{name}.mlp: expected no norm, no dropout"
        yield activation(mlp.act) is None, f"{name}.mlp: activation {type(mlp.act).__name__} is not supported"
