"""A SwinTransformer as plain numbers and strings, and back: each stage and each block has sizes of its own."""

from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock
from torch import nn

from ofb.supernet.families import attentions, mlps
from ofb.supernet.families.layers import ACTIVATION_LAYERS, activation, resized, sync_layers
from ofb.supernet.families.vit_description import completed

MERGED = 4  # neighbours that become one token between stages
REQUIRED = {
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "window_size", "always_partition", "qkv_bias",
    "norm_eps", "activation", "stages",
}  # fmt: skip


def describe(model: SwinTransformer) -> dict:
    """Everything that `build` needs, for a plain (folded) model."""
    block, patch_embed = model.layers[0].blocks[0], model.patch_embed
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
                        "head_dim": attentions.head_dim(block.attn),
                        "hidden": mlps.hidden_units(block.mlp),
                    }
                    for block in stage.blocks
                ],
            }
            for width, stage in zip(widths(model), model.layers, strict=True)
        ],
    }


def build(description: dict) -> SwinTransformer:
    """A timm model of this architecture with fresh weights, each block at its own sizes."""
    description = completed(description, REQUIRED, {})
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
    _resize(model, stages, description["activation"])
    sync_sizes(model, [(block["heads"], block["head_dim"]) for stage in stages for block in stage["blocks"]])
    return model


def widths(model: SwinTransformer) -> list[int]:
    """Residual width of each stage."""
    return [stage.blocks[0].norm1.weight.shape[0] for stage in model.layers]


def sync_sizes(model: SwinTransformer, attention_sizes: list[tuple[int, int]]) -> None:
    """Bring the modules' size attributes in line with their parameters; (heads, channels) of each block is given.

    The attention's softmax scale stays what it was.
    """
    sync_layers(model)
    first, *_, last = sizes = widths(model)
    model.patch_embed.proj.out_channels = model.patch_embed.embed_dim = model.embed_dim = first
    model.num_features = model.head_hidden_size = model.head.in_features = model.head.num_features = last
    for stage, info, width, before in zip(model.layers, model.feature_info, sizes, [first, *sizes], strict=False):
        info["num_chs"] = width
        if isinstance(stage.downsample, PatchMerging):
            stage.downsample.dim, stage.downsample.out_dim = before, width
        stage.dim = before
        for block in stage.blocks:
            block.dim = block.attn.dim = width
    all_blocks = (block for stage in model.layers for block in stage.blocks)
    for block, (heads, _) in zip(all_blocks, attention_sizes, strict=True):
        block.attn.num_heads = heads


def _resize(model: SwinTransformer, stages: list[dict], activation_name: str) -> None:
    """Give everything its described size, in fresh layers."""
    first, last = stages[0]["embed_dim"], stages[-1]["embed_dim"]
    patch_embed, proj = model.patch_embed, model.patch_embed.proj
    patch_embed.proj = nn.Conv2d(proj.in_channels, first, proj.kernel_size, proj.stride)
    patch_embed.norm = resized(patch_embed.norm, first)
    before = first
    for stage, sizes in zip(model.layers, stages, strict=True):
        width, merging = sizes["embed_dim"], stage.downsample
        if isinstance(merging, PatchMerging):
            merging.norm = resized(merging.norm, MERGED * before)
            merging.reduction = resized(merging.reduction, MERGED * before, width)
        for block, block_sizes in zip(stage.blocks, sizes["blocks"], strict=True):
            _resize_block(block, width, block_sizes)
            block.mlp.act = ACTIVATION_LAYERS[activation_name]()
        before = width
    model.norm, model.num_features = resized(model.norm, last), last
    model.reset_classifier(model.num_classes, model.global_pool)


def _resize_block(block: SwinTransformerBlock, width: int, sizes: dict) -> None:
    attn, heads, units = block.attn, sizes["heads"], sizes["heads"] * sizes["head_dim"]
    block.norm1, block.norm2 = resized(block.norm1, width), resized(block.norm2, width)
    table = attn.relative_position_bias_table
    attn.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table.new_empty(len(table), heads)))
    attn.qkv, attn.proj = resized(attn.qkv, width, 3 * units), resized(attn.proj, units, width)
    attn.scale = sizes["head_dim"] ** -0.5
    mlps.resize(block.mlp, width, sizes["hidden"])
