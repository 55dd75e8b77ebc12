"""Which of timm's plain Vision Transformers can be searched, and what stands in the way of the others."""

from collections.abc import Iterator, Mapping

from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from ofb.supernet.families import attentions, mlps, pools
from ofb.supernet.families.layers import norm_kind, present
from ofb.supernet.families.tokens import kept_patches

HEADS = ("head", "head_dist")
Obstacles = Iterator[tuple[bool, str]]  # whether it stands in the way, and what it is


def check(model: nn.Module) -> None:
    """Raise ValueError, saying why, where the model is no Vision Transformer that can be searched."""
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        got = f"{type(model).__module__}.{type(model).__name__}"
        raise ValueError(f"model: expected a timm VisionTransformer (ViT, DeiT), Eva or SwinTransformer, got {got}")
    raise_first(obstacles(model, Block, (Attention,)))


def raise_first(found: Obstacles) -> None:
    """Raise ValueError for the first obstacle there is."""
    for wrong, reason in found:
        if wrong:
            raise ValueError(f"model: cannot be searched: {reason}")


def obstacles(model: nn.Module, block_kind: type[nn.Module], attention_kinds: tuple[type[nn.Module], ...]) -> Obstacles:
    """Everything about a VisionTransformer, or an Eva, that the search cannot handle."""
    yield (
        type(model.patch_embed) is not PatchEmbed,
        f"expected timm's PatchEmbed, got {type(model.patch_embed).__name__}",
    )
    drops = present(model.patch_drop) and kept_patches(model) is None
    yield drops, "patch_drop_rate > 0 clashes with masked image modelling"
    yield from head_obstacles(model, {name: getattr(model, name) for name in HEADS if hasattr(model, name)})
    yield from pools.obstacles(model)
    for i, block in enumerate(model.blocks):
        kind = type(block).__name__
        yield type(block) is not block_kind, f"blocks.{i}: expected timm's pre-norm {block_kind.__name__}, got {kind}"
        attention, mlp = attentions.obstacle(block.attn, attention_kinds), mlps.obstacle(block.mlp)
        yield attention is not None, f"blocks.{i}.attn: {attention}"
        yield mlp is not None, f"blocks.{i}.mlp: {mlp}"
    yield from _norm_obstacles(model)
    alike = {block_options(block) for block in model.blocks}
    yield len(alike) > 1, "expected the same options in all blocks"


def head_obstacles(model: nn.Module, heads: Mapping[str, nn.Module]) -> Obstacles:
    """A classifier that is not one linear layer for the classes that the model says it has."""
    for name, head in heads.items():
        kind = type(head).__name__
        yield not isinstance(head, nn.Linear | nn.Identity), f"{name}: expected one Linear, or Identity, got {kind}"
        outputs = getattr(head, "out_features", 0)
        reason = f"{name}: expected num_classes={model.num_classes} outputs, got {outputs}; "
        yield outputs != model.num_classes, f"{reason}make it with model.reset_classifier({outputs})"


def block_options(block: nn.Module) -> tuple:
    """What all blocks must have in common: a description says it once."""
    attn, mlp = block.attn, block.mlp
    parameters = {name for name, _ in block.named_parameters()}
    return type(attn), type(mlp), type(mlp.act), getattr(mlp, "gate_last", None), frozenset(parameters)


def _norm_obstacles(model: nn.Module) -> Obstacles:
    norms = [module for name, module in model.named_modules() if "norm" in name.split(".")[-1] and present(module)]
    wrong = {type(norm).__name__ for norm in norms if norm_kind(norm) is None}
    yield bool(wrong), f"expected LayerNorm or RmsNorm with weights everywhere, got {', '.join(sorted(wrong))}"
    kinds = {(norm_kind(norm), norm.eps, norm_kind(norm) == "layernorm" and norm.bias is None) for norm in norms}
    yield len(kinds) > 1, "expected the same kind of norm with the same eps everywhere"
