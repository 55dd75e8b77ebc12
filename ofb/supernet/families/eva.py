"""timm's Eva (EVA, EVA02, DINOv3, Perception Encoder, ViT with rotary positions): what is not as in `families.vit`.

Its EvaAttention runs only where heads × channels is the residual width. The folded network has timm's AttentionRope
instead, which computes the same and knows no such limit.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import AttentionRope, RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from ofb.supernet.families import attentions, mlps, vit, vit_checks, vit_description
from ofb.supernet.families.layers import activation, present
from ofb.supernet.families.vit import (
    blocks,
    features,
    logits,
    macs,
    patch_embeddings,
    split_tokens,
    submodules,
    sync_sizes,
    token_area,
    unmasked_block,
)

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

NAME = "eva"
ROTARY = {"cat": RotaryEmbeddingCat, "dinov3": RotaryEmbeddingDinoV3}
ACTIVATIONS = {"mlp": "gelu", "glu": "silu", "swiglu": "silu"}  # Eva leaves no other choice


def check(model: nn.Module) -> None:
    """Raise ValueError, saying why, where the model is no Eva that can be searched."""
    if type(model) is not Eva:
        raise ValueError(f"model: expected a timm Eva, got {type(model).__module__}.{type(model).__name__}")
    vit_checks.raise_first(_obstacles(model))


@torch.no_grad()
def fold(model: Eva, masks: Mapping[str, Tensor], residual_masks: Mapping[str, Tensor]) -> None:
    """Multiply final masks into the weights, in place; every EvaAttention becomes an AttentionRope."""
    vit.fold(model, masks, residual_masks)
    for block in model.blocks:
        if type(block.attn) is EvaAttention:
            block.attn = _attention_of_any_width(block.attn)


def describe(model: Eva) -> dict:
    """Everything that `build` needs, for a plain (folded) model."""
    block, attn = model.blocks[0], model.blocks[0].attn
    return vit_description.describe_common(model) | {
        "attention": attentions.KINDS[type(attn)],
        "qkv_fused": attn.qkv is not None,
        "qkv_bias": attentions.qkv_parameters(attn)[1] is not None,
        "layer_scale": block.gamma_1 is not None,
        "mlp_layer_scale": block.gamma_2 is not None,
        "post_norm": present(model.norm),
        "fc_norm": present(model.fc_norm),
        "rotate_half": getattr(attn, "rotate_half", False),
        "rope": None if model.rope is None else _describe_rope(model.rope),
    }


def build(description: dict) -> Eva:
    """A timm model of this architecture with fresh weights, each block at its own sizes."""
    description = vit_description.completed(description, REQUIRED, {})
    options = {"qk_norm": True} if description["qk_norm"] else {}
    if description["layer_scale"] and not description["mlp_layer_scale"]:
        options["attn_only_layer_scale"] = True
    model = vit_description.without_memory(
        Eva,
        img_size=tuple(description["img_size"]),
        patch_size=vit_description.patch_size(description),
        in_chans=description["in_chans"],
        num_classes=description["num_classes"],
        global_pool=description["global_pool"],
        embed_dim=description["embed_dim"],
        depth=len(description["blocks"]),
        num_heads=1,  # the blocks get their own below
        qkv_bias=description["qkv_bias"],
        qkv_fused=description["qkv_fused"],
        swiglu_mlp=description["mlp"] != "mlp",
        swiglu_align_to=int(description["mlp"] == "swiglu"),
        scale_mlp=description["mlp_norm"],
        scale_attn_inner=description["attn_norm"],
        attn_type=description["attention"],
        norm_layer=vit_description.norm_layer(description),
        init_values=1e-5 if description["layer_scale"] else None,
        class_token=description["class_token"],
        num_reg_tokens=description["reg_tokens"],
        no_embed_class=description["no_embed_class"],
        use_abs_pos_emb=description["pos_embed"],
        rope_rotate_half=description["rotate_half"],
        use_pre_transformer_norm=description["pre_norm"],
        use_post_transformer_norm=description["post_norm"],
        use_fc_norm=description["fc_norm"],
        dynamic_img_size=description["dynamic_img_size"],
        dynamic_img_pad=description["dynamic_img_pad"],
        **options,
    )
    model.rope = None if description["rope"] is None else _build_rope(description["rope"])
    vit_description.resize(model, description)
    return model


REQUIRED = {
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "class_token", "reg_tokens",
    "pos_embed", "no_embed_class", "dynamic_img_size", "dynamic_img_pad", "pre_norm", "post_norm", "fc_norm", "norm",
    "norm_bias", "norm_eps", "qk_norm", "attn_norm", "mlp_norm", "mlp", "attn_pool", "attention", "qkv_fused",
    "qkv_bias", "layer_scale", "mlp_layer_scale", "rotate_half", "rope", "blocks",
}  # fmt: skip


def _obstacles(model: Eva) -> vit_checks.Obstacles:
    rope = type(model.rope).__name__
    known = model.rope is None or type(model.rope) in ROTARY.values()
    yield not known, f"rotary positions of kind {rope} are not supported: all blocks and heads share its parameters"
    yield from vit_checks.obstacles(model, EvaBlock, (EvaAttention, AttentionRope))
    mlp = model.blocks[0].mlp
    expected, got = ACTIVATIONS[mlps.KINDS[type(mlp)]], activation(mlp.act)
    wrong = got != expected or getattr(mlp, "gate_last", False)
    yield wrong, f"expected the MLP that timm's Eva makes, with {expected}, got one with {got}"


def _attention_of_any_width(attn: EvaAttention) -> AttentionRope:
    """timm's AttentionRope with the parameters of an EvaAttention; k gets a bias, of 0, where q and v have one."""
    units, width = attn.proj.in_features, attn.proj.out_features
    weight, bias = attentions.qkv_parameters(attn)
    new = AttentionRope(
        width,
        num_heads=attn.num_heads,
        attn_head_dim=units // attn.num_heads,
        qkv_bias=bias is not None,
        qkv_fused=attn.qkv is not None,
        num_prefix_tokens=attn.num_prefix_tokens,
        rotate_half=getattr(attn, "rotate_half", False),
        device=weight.device,
        dtype=weight.dtype,
    )
    new.q_norm, new.k_norm, new.norm, new.proj = attn.q_norm, attn.k_norm, attn.norm, attn.proj
    layers = [new.qkv] if attn.qkv is not None else [getattr(new, name) for name in attentions.PROJECTIONS]
    for layer, rows in zip(layers, weight.chunk(len(layers)), strict=True):
        layer.weight.copy_(rows)
    for layer, entries in zip(layers, () if bias is None else bias.chunk(len(layers)), strict=bias is not None):
        layer.bias.copy_(entries)
    return new.train(attn.training)


def _describe_rope(rope: nn.Module) -> dict[str, Any]:
    """What its constructor was given, apart from defaults."""
    kind = next(name for name, layer in ROTARY.items() if type(rope) is layer)
    defaults = {name: p.default for name, p in inspect.signature(type(rope)).parameters.items()}
    given = {name: getattr(rope, name) for name, default in defaults.items() if getattr(rope, name, default) != default}
    return {"kind": kind} | {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}


def _build_rope(description: dict[str, Any]) -> nn.Module:
    layer = ROTARY[description["kind"]]
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in description.items() if name != "kind"}
    known = inspect.signature(layer).parameters.keys() - {"device", "dtype"}
    if not options.keys() <= known:
        raise ValueError(f"description: expected rope with {', '.join(sorted(known))}, got {sorted(options)}")
    return layer(**options)
