"""timm's VisionTransformer (ViT, DeiT, distilled DeiT): submodules, masked forward pass, folding, description.

Submodules are "embed" (the residual width), "attn0", "attn1", … (heads × channels) and "mlp0", "mlp1", ….
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from timm.layers import Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofb.supernet.macs import Macs
from ofb.supernet.masked_images import TokenArea
from ofb.supernet.pruning import Coupling
from ofb.supernet.search_space import Candidates, attention_candidates, embed_candidates, mlp_candidates
from ofb_kernels import masked_add_layer_norm, masked_layer_norm, masked_mlp, masked_qkv_attention

NAME = "vit"
ACTIVATION_LAYERS = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True)
class Submodule:
    """A searchable submodule: its candidate sizes and the parameter dimensions that hold its units."""

    candidates: Candidates
    couplings: tuple[Coupling, ...]


def check(model: nn.Module) -> None:
    """Raise ValueError, saying why, where the model is no Vision Transformer that can be searched."""
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        got = f"{type(model).__module__}.{type(model).__name__}"
        raise ValueError(f"model: expected a timm VisionTransformer (ViT or DeiT), got {got}")
    for wrong, reason in _obstacles(model):
        if wrong:
            raise ValueError(f"model: cannot be searched: {reason}")


def submodules(model: VisionTransformer) -> dict[str, Submodule]:
    """All searchable submodules at the model's present sizes; couplings name the model's own parameters."""
    found = {"embed": Submodule(embed_candidates(model.embed_dim), tuple(_embed_couplings(model)))}
    for i, block in enumerate(model.blocks):
        attention = [Coupling(f"blocks.{i}.attn.qkv.weight", 0, 3), Coupling(f"blocks.{i}.attn.proj.weight", 1)]
        if block.attn.qkv.bias is not None:
            attention.append(Coupling(f"blocks.{i}.attn.qkv.bias", 0, 3))
        mlp = [Coupling(f"blocks.{i}.mlp.fc1.weight", 0), Coupling(f"blocks.{i}.mlp.fc2.weight", 1)]
        if block.mlp.fc1.bias is not None:
            mlp.append(Coupling(f"blocks.{i}.mlp.fc1.bias", 0))
        heads, head_dim = block.attn.num_heads, block.attn.head_dim
        found[f"attn{i}"] = Submodule(attention_candidates(heads, head_dim), tuple(attention))
        found[f"mlp{i}"] = Submodule(mlp_candidates(block.mlp.fc1.out_features), tuple(mlp))
    return found


def macs(model: VisionTransformer) -> Macs:
    """Cost model: 4·N·D + 2·N² for a channel of attention, 2·N·D for a hidden channel, N tokens, width D."""
    patches, tokens = model.patch_embed.num_patches, model.patch_embed.num_patches + model.num_prefix_tokens
    projection = model.patch_embed.proj.weight[0].numel()
    classifiers = sum(head.out_features for head in _classifiers(model))
    linear, products = {"embed": patches * projection + classifiers}, {}
    for i in range(len(model.blocks)):
        linear[f"attn{i}"] = 2 * tokens**2
        products |= {(f"attn{i}", "embed"): 4 * tokens, (f"mlp{i}", "embed"): 2 * tokens}
    return Macs(("embed",), linear, products)


def token_area(model: VisionTransformer) -> TokenArea:
    """A patch."""
    rows, columns = model.patch_embed.grid_size
    return TokenArea(model.patch_embed.patch_size[0], rows, columns)


def blocks(model: VisionTransformer) -> list[nn.Module]:
    """All blocks, from the images on."""
    return list(model.blocks)


def patch_embeddings(model: VisionTransformer, images: Tensor) -> Tensor:
    """(B, patches, D), before mask tokens and position embedding."""
    return model.patch_embed(images)


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
        norm_masks: (D,), V of the residual width, with which LayerNorm weighs channels; empty for plain LayerNorm.
    """
    residual_mask, norm_mask = residual_masks.get("embed"), norm_masks.get("embed")
    x = model._pos_embed(patches) * masks["embed"]
    blocks = list(model.blocks)
    normalized = _norm(blocks[0].norm1, x, norm_mask)
    for i, (block, next_norm) in enumerate(zip(blocks, [*(b.norm1 for b in blocks[1:]), model.norm], strict=True)):
        inputs = (x, normalized, masks[f"attn{i}"], masks[f"mlp{i}"].flatten(), residual_mask, norm_mask)
        if model.grad_checkpointing and torch.is_grad_enabled():
            x, normalized = checkpoint(_block, block, next_norm, *inputs, use_reentrant=False)
        else:
            x, normalized = _block(block, next_norm, *inputs)
    return normalized


def logits(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """(B, classes) from the tokens after the final norm."""
    return model.forward_head(tokens)


def patch_tokens(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """(B, patches, D): the tokens without class and distillation token."""
    return tokens[:, model.num_prefix_tokens :]


@torch.no_grad()
def fold(model: VisionTransformer, masks: Mapping[str, Tensor], residual_masks: Mapping[str, Tensor]) -> None:
    """Multiply final masks into the weights, in place: the plain forward pass then computes the masked function.

    timm's attention scales by (new head size)^−½, the supernet kept the old scale: the ratio goes into q.
    """
    embed = masks["embed"].flatten()
    model.patch_embed.proj.weight.mul_(embed[:, None, None, None])
    for vector in (model.patch_embed.proj.bias, model.cls_token, getattr(model, "dist_token", None), model.pos_embed):
        if vector is not None:
            vector.mul_(embed)
    for i, block in enumerate(model.blocks):
        attention, mlp = masks[f"attn{i}"], masks[f"mlp{i}"].flatten()
        scale_ratio = block.attn.scale * block.attn.head_dim**0.5
        block.attn.scale = block.attn.head_dim**-0.5
        qkv = torch.stack([attention * scale_ratio, attention, attention]).flatten()
        _scale_rows(block.attn.qkv, qkv)
        _scale_rows(block.mlp.fc1, mlp)
        if residual_masks:
            _scale_rows(block.attn.proj, residual_masks["embed"])
            _scale_rows(block.mlp.fc2, residual_masks["embed"])


def sync_sizes(model: VisionTransformer, attention_sizes: list[tuple[int, int]]) -> None:
    """Bring the modules' size attributes in line with their parameters; (heads, channels) of each block is given.

    The attention's softmax scale stays what it was.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
    model.embed_dim = model.num_features = model.head_hidden_size = model.patch_embed.proj.weight.shape[0]
    model.patch_embed.proj.out_channels = model.patch_embed.embed_dim = model.embed_dim
    for info in getattr(model, "feature_info", []):
        info["num_chs"] = model.embed_dim
    for block, (heads, channels) in zip(model.blocks, attention_sizes, strict=True):
        block.attn.num_heads, block.attn.head_dim, block.attn.attn_dim = heads, channels, heads * channels


def describe(model: VisionTransformer) -> dict:
    """Everything that `build` needs, for a plain (folded) model."""
    block, patch_embed = model.blocks[0], model.patch_embed
    return {
        "distilled": isinstance(model, VisionTransformerDistilled),
        "img_size": list(patch_embed.img_size),
        "patch_size": patch_embed.patch_size[0],
        "in_chans": patch_embed.proj.in_channels,
        "num_classes": model.num_classes,
        "embed_dim": model.embed_dim,
        "no_embed_class": model.no_embed_class,
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "layer_scale": not isinstance(block.ls1, nn.Identity),
        "norm_eps": block.norm1.eps,
        "activation": _activation(block.mlp.act),
        "blocks": [
            {"heads": b.attn.num_heads, "head_dim": b.attn.head_dim, "hidden": b.mlp.fc1.out_features}
            for b in model.blocks
        ],
    }


def build(description: dict) -> VisionTransformer:
    """A timm model of this architecture with fresh weights, each block at its own sizes."""
    missing = sorted(_DESCRIPTION_KEYS - description.keys())
    if missing:
        raise ValueError(f"description: expected entries {', '.join(sorted(_DESCRIPTION_KEYS))}, lacking {missing}")
    cls = VisionTransformerDistilled if description["distilled"] else VisionTransformer
    model = cls(
        img_size=tuple(description["img_size"]),
        patch_size=description["patch_size"],
        in_chans=description["in_chans"],
        num_classes=description["num_classes"],
        embed_dim=description["embed_dim"],
        depth=len(description["blocks"]),
        num_heads=1,  # the blocks get their own below
        no_embed_class=description["no_embed_class"],
        qkv_bias=description["qkv_bias"],
        proj_bias=description["proj_bias"],
        init_values=1e-5 if description["layer_scale"] else None,
        norm_layer=lambda dim, **kwargs: nn.LayerNorm(dim, eps=description["norm_eps"], **kwargs),
        act_layer=ACTIVATION_LAYERS[description["activation"]],
    )
    width = description["embed_dim"]
    for block, sizes in zip(model.blocks, description["blocks"], strict=True):
        attn_dim, hidden = sizes["heads"] * sizes["head_dim"], sizes["hidden"]
        block.attn.qkv = nn.Linear(width, 3 * attn_dim, bias=description["qkv_bias"])
        block.attn.proj = nn.Linear(attn_dim, width, bias=description["proj_bias"])
        block.attn.scale = sizes["head_dim"] ** -0.5
        block.mlp.fc1 = nn.Linear(width, hidden, bias=description["proj_bias"])
        block.mlp.fc2 = nn.Linear(hidden, width, bias=description["proj_bias"])
    sync_sizes(model, [(sizes["heads"], sizes["head_dim"]) for sizes in description["blocks"]])
    return model


_DESCRIPTION_KEYS = {
    "distilled", "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "no_embed_class",
    "qkv_bias", "proj_bias", "layer_scale", "norm_eps", "activation", "blocks",
}  # fmt: skip


def _block(
    block: Block,
    next_norm: nn.LayerNorm,
    x: Tensor,
    normalized: Tensor,
    attention_mask: Tensor,
    mlp_mask: Tensor,
    residual_mask: Tensor | None,
    norm_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A transformer block with masks, from norm to norm: it takes the stream and its norm1, and returns the new stream
    and what the next norm makes of it."""
    attn, mlp = block.attn, block.mlp
    attended = masked_qkv_attention(normalized, attn.qkv.weight, attn.qkv.bias, attention_mask, attn.scale)
    branch = attn.proj(attended)
    x, normalized = _add_norm(x, branch, block.ls1, block.drop_path1, residual_mask, block.norm2, norm_mask)
    fc1, fc2 = mlp.fc1, mlp.fc2
    branch = masked_mlp(normalized, fc1.weight, fc1.bias, mlp_mask, fc2.weight, fc2.bias, _activation(mlp.act))
    return _add_norm(x, branch, block.ls2, block.drop_path2, residual_mask, next_norm, norm_mask)


def _add_norm(
    x: Tensor,
    branch: Tensor,
    layer_scale: nn.Module,
    drop_path: nn.Module,
    residual_mask: Tensor | None,
    norm: nn.LayerNorm,
    norm_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The new stream x + drop_path(layer_scale(branch ⊙ mask)), and its norm.

    Mask, layer scale and drop path all only scale: they are multiplied together before they meet the branch.
    """
    if residual_mask is None:
        x = x + drop_path(layer_scale(branch))
        return x, norm(x)
    branch_mask = layer_scale(residual_mask)
    if norm_mask is None:
        x = torch.addcmul(x, branch, drop_path(branch_mask.expand(len(x), 1, -1)))
        return x, norm(x)
    drops = drop_path.training and not isinstance(drop_path, nn.Identity)
    sample_scale = drop_path(branch_mask.new_ones(len(x))) if drops else None
    return masked_add_layer_norm(
        x, branch, branch_mask, norm.weight, norm.bias, norm_mask, norm.eps, sample_scale=sample_scale
    )


def _norm(norm: nn.LayerNorm, x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return norm(x)
    return masked_layer_norm(x, norm.weight, norm.bias, mask, norm.eps)


def _embed_couplings(model: VisionTransformer) -> list[Coupling]:
    """The residual width runs through the whole network."""
    dims = {"patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0, "cls_token": 2, "dist_token": 2, "pos_embed": 2}
    dims |= {"norm.weight": 0, "norm.bias": 0, "head.weight": 1, "head_dist.weight": 1}
    for i in range(len(model.blocks)):
        dims |= {f"blocks.{i}.{norm}.{kind}": 0 for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        dims |= {f"blocks.{i}.{linear}.weight": 1 for linear in ("attn.qkv", "mlp.fc1")}
        dims |= {f"blocks.{i}.{linear}.{kind}": 0 for linear in ("attn.proj", "mlp.fc2") for kind in ("weight", "bias")}
        dims |= {f"blocks.{i}.{scale}.gamma": 0 for scale in ("ls1", "ls2")}
    present = dict(model.named_parameters())
    return [Coupling(name, dim) for name, dim in dims.items() if name in present]


def _classifiers(model: VisionTransformer) -> list[nn.Linear]:
    heads = (model.head, getattr(model, "head_dist", None))
    return [head for head in heads if isinstance(head, nn.Linear)]


def _scale_rows(linear: nn.Linear, scale: Tensor) -> None:
    linear.weight.mul_(scale[:, None])
    if linear.bias is not None:
        linear.bias.mul_(scale)


def _activation(layer: nn.Module) -> str | None:
    """Name of an activation in ofb_kernels, None where it has none."""
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(layer))


def _obstacles(model: VisionTransformer) -> Iterator[tuple[bool, str]]:
    """(whether it stands in the way, what it is) for everything the search cannot handle."""
    yield model.cls_token is None or model.global_pool != "token", "expected a class token and global_pool='token'"
    yield getattr(model, "reg_token", None) is not None, "register tokens are not supported"
    yield model.pos_embed is None, "expected an absolute position embedding (pos_embed)"
    yield model.dynamic_img_size, "dynamic_img_size is not supported; give a fixed img_size"
    yield type(model.patch_embed) is not PatchEmbed, "expected timm's PatchEmbed"
    yield not isinstance(model.patch_embed.norm, nn.Identity), "a norm in the patch embedding is not supported"
    yield len(set(model.patch_embed.patch_size)) > 1, "expected square patches"
    yield not isinstance(model.norm_pre, nn.Identity), "a norm before the blocks (norm_pre) is not supported"
    yield not isinstance(model.patch_drop, nn.Identity), "patch_drop_rate > 0 clashes with masked image modelling"
    yield not isinstance(model.fc_norm, nn.Identity), "a norm before the classifier (fc_norm) is not supported"
    norms = [module for name, module in model.named_modules() if name.split(".")[-1].startswith("norm")]
    allowed = (nn.LayerNorm, nn.Identity)
    yield not all(isinstance(norm, allowed) for norm in norms), "expected LayerNorm everywhere"
    for i, block in enumerate(model.blocks):
        yield type(block) is not Block, f"blocks.{i}: expected timm's pre-norm Block, got {type(block).__name__}"
        attn, mlp = block.attn, block.mlp
        yield type(attn) is not Attention, f"blocks.{i}.attn: expected timm's Attention, got {type(attn).__name__}"
        extras = (attn.q_norm, attn.k_norm, getattr(attn, "norm", None), getattr(attn, "gate", None))
        has_extras = any(not isinstance(extra, nn.Identity | None) for extra in extras)
        yield has_extras, f"blocks.{i}.attn: qk_norm, scale_norm or a gate is not supported"
        yield attn.attn_drop.p > 0 or attn.proj_drop.p > 0, f"blocks.{i}.attn: expected no attention dropout"
        yield type(mlp) is not Mlp, f"blocks.{i}.mlp: expected timm's Mlp, got {type(mlp).__name__}"
        yield not isinstance(mlp.norm, nn.Identity) or mlp.drop1.p > 0, f"blocks.{i}.mlp: expected no norm, no dropout"
        yield _activation(mlp.act) is None, f"blocks.{i}.mlp: activation {type(mlp.act).__name__} is not supported"
