"""timm's self-attentions as searchable submodules: Attention, EvaAttention and AttentionRope.

A unit is a channel of a head, with its rows in q, k and v. Where every head's channels meet something that all heads
share, a norm of q and k or a rotation by position, a head cannot do without channels of its own choice: heads are
searched as a whole.
"""

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.layers.attention import Attention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from ofb.supernet.families.layers import linear_without_bias, masked_norm, present, resized
from ofb.supernet.pruning import Coupling
from ofb.supernet.search_space import Candidates, attention_candidates
from ofb_kernels import masked_linear, masked_qkv_attention

KINDS = {Attention: "vit", EvaAttention: "eva", AttentionRope: "rope"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def obstacle(attn: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """What stands in the way of a search, None where nothing does."""
    if type(attn) not in kinds:
        return f"expected timm's {' or '.join(kind.__name__ for kind in kinds)}, got {type(attn).__name__}"
    if attn.attn_drop.p > 0 or attn.proj_drop.p > 0:
        return "expected no attention dropout"
    if present(getattr(attn, "gate", None)):
        return "a gate on the attention's output is not supported"
    if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        return "heads that share keys and values (num_kv_heads) are not supported"
    return None


def candidates(attn: nn.Module, rotated: bool) -> Candidates:
    """Heads × channels, or heads alone.

    Args:
        attn: the attention.
        rotated: whether rotary position embeddings turn its q and k.
    """
    grid = attention_candidates(attn.num_heads, head_dim(attn))
    whole_heads = rotated or present(attn.q_norm, attn.k_norm)
    return Candidates(grid.heads, grid.channels[-1:]) if whole_heads else grid


def head_dim(attn: nn.Module) -> int:
    """Channels of a head."""
    return attn.proj.in_features // attn.num_heads


def couplings(attn: nn.Module, name: str) -> list[Coupling]:
    """All dimensions that hold channels of heads."""
    rows = {f"{layer}.{kind}": 1 for layer in (*PROJECTIONS, "norm") for kind in ("weight", "bias")}
    rows |= {"qkv.weight": 3, "qkv.bias": 3, "q_bias": 1, "v_bias": 1}
    found = [Coupling(f"{name}.{key}", 0, rows[key]) for key, _ in attn.named_parameters() if key in rows]
    return [*found, Coupling(f"{name}.proj.weight", 1)]


def qkv_parameters(attn: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (3·H·d, width) and bias (3·H·d,) of q, k and v, one after the other."""
    if getattr(attn, "qkv", None) is None:
        layers = [getattr(attn, name) for name in PROJECTIONS]
        weight = torch.cat([layer.weight for layer in layers])
        if all(layer.bias is None for layer in layers):
            return weight, None
        return weight, torch.cat(
            [weight.new_zeros(len(each.weight)) if each.bias is None else each.bias for each in layers]
        )
    if getattr(attn, "q_bias", None) is not None:
        return attn.qkv.weight, torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    return attn.qkv.weight, attn.qkv.bias


def masked_forward(
    attn: nn.Module,
    x: Tensor,
    mask: Tensor,
    norm_mask: Tensor | None,
    rope: Tensor | None = None,
    bias: Tensor | None = None,
    without_bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The attention with mask (H, d), and the bias of its projection that it lacks.

    Args:
        attn: the attention.
        x: (B, N, width).
        mask: (H, d), for q, k and v alike.
        norm_mask: (H · d,), V for the norm of what it attended to, if it has one.
        rope: timm's embedding of the positions behind the prefix tokens, None where q and k are not turned.
        bias: (H, N, N), added to the scores.
        without_bias: whether to leave the bias of the projection to who adds the branch to the stream.
    """
    weight, qkv_bias = qkv_parameters(attn)
    if rope is None and not present(attn.q_norm, attn.k_norm):
        attended = masked_qkv_attention(x, weight, qkv_bias, mask, attn.scale, attention_bias=bias)
    else:
        qkv = masked_linear(x, weight, qkv_bias, mask.flatten().repeat(3)).unflatten(-1, (3, *mask.shape))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, d)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            q, k = (_rotate(attn, each, rope).type_as(v) for each in (q, k))
        bias = None if bias is None else bias.to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, bias, scale=attn.scale).transpose(1, 2).flatten(2)
    norm = getattr(attn, "norm", None)
    attended = attended if norm is None else masked_norm(norm, attended, norm_mask)
    return linear_without_bias(attn.proj, attended, without_bias)


def fold(attn: nn.Module, mask: Tensor) -> None:
    """Multiply the final mask (H, d) into the weights.

    timm's attention scales by (new head size)^−½, the supernet kept the old scale: the ratio goes into q.
    """
    channels = mask.shape[1]
    ratio, attn.scale = attn.scale * channels**0.5, channels**-0.5
    q, v = (mask * ratio).flatten(), mask.flatten()
    if getattr(attn, "qkv", None) is None:
        layers = [getattr(attn, name) for name in PROJECTIONS]
        scaled = [(layer.weight, scale) for layer, scale in zip(layers, (q, v, v), strict=True)]
        scaled += [(layer.bias, scale) for layer, scale in zip(layers, (q, v, v), strict=True)]
    else:
        scaled = [(attn.qkv.weight, torch.cat([q, v, v])), (attn.qkv.bias, torch.cat([q, v, v]))]
        scaled += [(getattr(attn, "q_bias", None), q), (getattr(attn, "v_bias", None), v)]
    for parameter, scale in scaled:
        if parameter is not None:
            parameter.mul_(scale.view(-1, *[1] * (parameter.dim() - 1)))


def set_sizes(attn: nn.Module, heads: int, channels: int) -> None:
    """Size attributes in line with the parameters; the softmax scale stays what it was."""
    attn.num_heads, attn.head_dim, attn.attn_dim = heads, channels, heads * channels
    if hasattr(attn, "num_kv_heads"):
        attn.num_kv_heads, attn.kv_dim = heads, heads * channels
    if getattr(attn, "k_bias", None) is not None:
        attn.k_bias = attn.k_bias.new_zeros(heads * channels)


def resize(attn: nn.Module, width: int, heads: int, channels: int) -> None:
    """Fresh layers of these sizes."""
    units = heads * channels
    if getattr(attn, "qkv", None) is None:
        for name in PROJECTIONS:
            setattr(attn, name, resized(getattr(attn, name), width, units))
    else:
        attn.qkv = resized(attn.qkv, width, 3 * units)
    for name in ("q_bias", "v_bias"):
        if getattr(attn, name, None) is not None:
            setattr(attn, name, nn.Parameter(torch.zeros(units)))
    attn.q_norm, attn.k_norm = resized(attn.q_norm, channels), resized(attn.k_norm, channels)
    if getattr(attn, "norm", None) is not None:
        attn.norm = resized(attn.norm, units)
    attn.proj, attn.scale = resized(attn.proj, units, width), channels**-0.5
    set_sizes(attn, heads, channels)


def _rotate(attn: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    """q or k (B, H, N, d), turned by position behind the prefix tokens."""
    prefix, rest = x.split([attn.num_prefix_tokens, x.shape[2] - attn.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=getattr(attn, "rotate_half", False))], dim=2)
