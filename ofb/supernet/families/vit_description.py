"""A VisionTransformer as plain numbers and strings, and back: each block has sizes of its own."""

from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ofb.supernet.families import attentions, mlps, pools
from ofb.supernet.families.layers import ACTIVATION_LAYERS, NORM_LAYERS, activation, materialize, norm_kind, present
from ofb.supernet.families.tokens import KeptPatches, kept_patches

REQUIRED = {
    "distilled", "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "no_embed_class",
    "qkv_bias", "proj_bias", "layer_scale", "norm_eps", "activation", "blocks",
}  # fmt: skip
# What a description may leave out: those of earlier versions do.
DEFAULTS = {
    "global_pool": "token", "class_token": True, "reg_tokens": 0, "pos_embed": True, "pool_include_prefix": False,
    "pre_norm": False, "final_norm": "norm", "patch_norm": False, "qk_norm": False, "attn_norm": False,
    "mlp_norm": False, "norm": "layernorm", "norm_bias": True, "mlp": "mlp", "attn_pool": None,
    "dynamic_img_size": False, "dynamic_img_pad": False, "kept_patches": None,
}  # fmt: skip
MLP_LAYERS = {
    "mlp": Mlp,
    "glu": partial(GluMlp, gate_last=False),
    "glu_gate_last": GluMlp,
    "swiglu": SwiGLU,
}


def describe(model: VisionTransformer) -> dict:
    """Everything that `build` needs, for a plain (folded) model."""
    attn, distilled = model.blocks[0].attn, isinstance(model, VisionTransformerDistilled)
    return describe_common(model) | {
        "distilled": distilled,
        "qkv_bias": attn.qkv.bias is not None,
        "proj_bias": attn.proj.bias is not None,
        "layer_scale": present(model.blocks[0].ls1),
        "pool_include_prefix": model.pool_include_prefix,
        "kept_patches": None if (kept := kept_patches(model)) is None else len(kept.weight),
        "final_norm": "norm" if present(model.norm) else "fc_norm" if present(model.fc_norm) else None,
    }


def describe_common(model: nn.Module) -> dict:
    """What a VisionTransformer and an Eva have alike."""
    block, patch_embed = model.blocks[0], model.patch_embed
    height, width = patch_embed.patch_size
    return {
        "img_size": list(patch_embed.img_size),
        "patch_size": height if height == width else [height, width],
        "in_chans": patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "embed_dim": model.embed_dim,
        "global_pool": model.global_pool,
        "class_token": model.cls_token is not None,
        "reg_tokens": 0 if getattr(model, "reg_token", None) is None else model.reg_token.shape[1],
        "pos_embed": model.pos_embed is not None,
        "no_embed_class": model.no_embed_class,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": patch_embed.dynamic_img_pad,
        "patch_norm": present(patch_embed.norm),
        "pre_norm": present(model.norm_pre),
        "norm": norm_kind(block.norm1),
        "norm_bias": getattr(block.norm1, "bias", None) is not None,
        "norm_eps": block.norm1.eps,
        "qk_norm": present(block.attn.q_norm),
        "attn_norm": present(getattr(block.attn, "norm", None)),
        "mlp_norm": present(block.mlp.norm),
        "mlp": mlps.KINDS[type(block.mlp)] + ("_gate_last" if getattr(block.mlp, "gate_last", False) else ""),
        "activation": activation(block.mlp.act),
        "attn_pool": pools.describe(model),
        "blocks": [
            {"heads": b.attn.num_heads, "head_dim": attentions.head_dim(b.attn), "hidden": mlps.hidden_units(b.mlp)}
            for b in model.blocks
        ],
    }


def build(description: dict) -> VisionTransformer:
    """A timm model of this architecture with fresh weights, each block at its own sizes."""
    description = completed(description, REQUIRED, DEFAULTS)
    final_norm = description["final_norm"]
    cls = VisionTransformerDistilled if description["distilled"] else VisionTransformer
    model = without_memory(
        cls,
        img_size=tuple(description["img_size"]),
        patch_size=patch_size(description),
        in_chans=description["in_chans"],
        num_classes=description["num_classes"],
        global_pool=description["global_pool"],
        embed_dim=description["embed_dim"],
        depth=len(description["blocks"]),
        num_heads=1,  # the blocks get their own below
        qkv_bias=description["qkv_bias"],
        qk_norm=description["qk_norm"],
        scale_attn_norm=description["attn_norm"],
        scale_mlp_norm=description["mlp_norm"],
        proj_bias=description["proj_bias"],
        init_values=1e-5 if description["layer_scale"] else None,
        class_token=description["class_token"],
        pos_embed="learn" if description["pos_embed"] else "none",
        no_embed_class=description["no_embed_class"],
        reg_tokens=description["reg_tokens"],
        pre_norm=description["pre_norm"],
        final_norm=final_norm is not None,
        fc_norm=final_norm == "fc_norm",
        pool_include_prefix=description["pool_include_prefix"],
        dynamic_img_size=description["dynamic_img_size"],
        dynamic_img_pad=description["dynamic_img_pad"],
        embed_norm_layer=norm_layer(description) if description["patch_norm"] else None,
        norm_layer=norm_layer(description),
        act_layer=ACTIVATION_LAYERS[description["activation"]],
        mlp_layer=MLP_LAYERS[description["mlp"]],
    )
    resize(model, description)
    kept, patches = description["kept_patches"], model.patch_embed.num_patches
    if kept is not None:
        if kept not in range(1, patches + 1):
            raise ValueError(f"description: expected kept_patches of 1 to {patches}, got {kept!r}")
        model.patch_drop = KeptPatches(kept, model.num_prefix_tokens)
    return model


def completed(description: dict, required: set[str], defaults: dict[str, Any]) -> dict:
    """The description with defaults for what it may leave out.

    Raises:
        ValueError: it lacks what it may not, or its norms divide by nothing.
    """
    missing = sorted(required - description.keys())
    if missing:
        raise ValueError(f"description: expected entries {', '.join(sorted(required))}, lacking {missing}")
    if not 0 < description["norm_eps"] < 1:
        raise ValueError(f"description: expected norm_eps between 0 and 1, got {description['norm_eps']}")
    return defaults | description


def without_memory(cls: type[nn.Module], **options: Any) -> nn.Module:
    """A model on the meta device: timm makes all blocks as wide as the stream, which `resize` does not keep."""
    with torch.device("meta"):
        return cls(**options)


def patch_size(description: dict) -> int | tuple[int, int]:
    """As timm takes it: a number for square patches."""
    size = description["patch_size"]
    return tuple(size) if isinstance(size, list) else size


def norm_layer(description: dict) -> partial:
    """What makes a norm of a number of channels."""
    options = {} if description["norm_bias"] or description["norm"] != "layernorm" else {"bias": False}
    return partial(NORM_LAYERS[description["norm"]], eps=description["norm_eps"], **options)


def resize(model: nn.Module, description: dict) -> None:
    """Give each block, and the attention pooling, its own sizes, in fresh layers, and all of it memory."""
    width = description["embed_dim"]
    for block, sizes in zip(model.blocks, description["blocks"], strict=True):
        attentions.resize(block.attn, width, sizes["heads"], sizes["head_dim"])
        mlps.resize(block.mlp, width, sizes["hidden"])
    if description["attn_pool"] is not None:
        model.attn_pool = pools.build(description["attn_pool"], width, norm_layer(description))
    materialize(model)
