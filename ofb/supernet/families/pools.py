"""timm's attention pooling (AttentionPoolLatent, SigLIP's "map") in a network whose residual width is searched.

A latent query attends to the tokens, inside at a width of its own that stays: the submodule "pool" has one size. timm
shapes what was attended to like the tokens that come in, so that a network of a smaller residual width fills its tokens
up with zeros first: `Sequential(ConstantPad1d, AttentionPoolLatent)`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from ofb.supernet.families.layers import (
    ACTIVATION_LAYERS,
    Submodule,
    activation,
    masked_norm,
    present,
    resized,
    scale_rows,
)
from ofb.supernet.pruning import Coupling
from ofb.supernet.search_space import Candidates


def pool_of(model: nn.Module) -> AttentionPoolLatent | None:
    """The attention pooling of a model, without what fills up its tokens; None where it has none."""
    return model.attn_pool[1] if isinstance(model.attn_pool, nn.Sequential) else model.attn_pool


def obstacles(model: nn.Module) -> Iterator[tuple[bool, str]]:
    """(whether it stands in the way, what it is)."""
    pool = pool_of(model)
    if pool is not None:
        kind = type(pool).__name__
        yield type(pool) is not AttentionPoolLatent, f"expected AttentionPoolLatent where there is one, got {kind}"
        yield pool.mlp is None or pool.proj.out_features != model.embed_dim, "expected an attention pool with an MLP"
        extras = present(pool.q_norm) or pool.pos_embed is not None or not present(pool.q)
        yield extras, "expected an attention pool with a q projection, without qk_norm and pos_embed"
        usual = pool.latent_len == 1 and pool.pool == "token" and pool.latent_dim == pool.q.out_features
        yield (
            not usual or pool.kv.bias is None,
            "expected an attention pool with one latent of its width and biases",
        )
        yield activation(pool.mlp.act) is None, f"activation {type(pool.mlp.act).__name__} is not supported"
        yield pool.proj_drop.p > 0, "expected an attention pool without dropout"


def submodule(model: nn.Module) -> Submodule:
    """The channels inside, all of which stay."""
    name, pool = _name(model), pool_of(model)
    rows = {"q.weight": 1, "q.bias": 1, "kv.weight": 2, "kv.bias": 2}
    couplings = [Coupling(f"{name}.{key}", 0, rows[key]) for key, _ in pool.named_parameters() if key in rows]
    return Submodule(Candidates((1,), (pool.q.out_features,)), (*couplings, Coupling(f"{name}.proj.weight", 1)))


def width_couplings(model: nn.Module) -> dict[str, int]:
    """Parameters with the residual width, and its dimension in each."""
    dims = {f"{layer}.{kind}": 0 for layer in ("proj", "norm", "mlp.fc2") for kind in ("weight", "bias")}
    dims |= {"mlp.fc1.weight": 1} if width_stays(model) else {"mlp.fc1.weight": 1, "kv.weight": 1}
    return {f"{_name(model)}.{key}": dim for key, dim in dims.items()}


def width_stays(model: nn.Module) -> bool:
    """Whether the residual width cannot be searched: tokens that are filled up already leave no room for a choice."""
    return isinstance(model.attn_pool, nn.Sequential)


def macs(model: nn.Module, tokens: int) -> tuple[int, int, int]:
    """MACs for each channel inside, for each of the residual width, and for each pair, of a number of tokens."""
    pool = pool_of(model)
    inner = pool.q.out_features
    kv, q, attention = 2 * tokens * inner, inner, 2 * tokens
    return kv + q + attention, 2 * pool.mlp.fc1.out_features, 1


def pooled_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    """Those of (B, N, D) that are pooled."""
    return tokens if getattr(model, "pool_include_prefix", True) else tokens[:, model.num_prefix_tokens :]


def masked_forward(
    pool: AttentionPoolLatent, x: Tensor, mask: Tensor, residual_mask: Tensor | None, norm_mask: Tensor | None
) -> Tensor:
    """(B, D) from tokens (B, N, D), with the mask of the channels inside on v, and those of the residual width."""
    k, v = F.linear(x, pool.kv.weight[:, : x.shape[-1]], pool.kv.bias).chunk(2, -1)
    q = pool.q(pool.latent.expand(len(x), -1, -1))
    q, k, v = (each.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for each in (q, k, v * mask))
    attended = F.scaled_dot_product_attention(q, k, v, scale=pool.scale).transpose(1, 2).flatten(2)
    pooled = _masked(pool.proj(attended), residual_mask)
    pooled = pooled + _masked(pool.mlp(masked_norm(pool.norm, pooled, norm_mask)), residual_mask)
    return pooled[:, 0]


def fold(model: nn.Module, mask: Tensor, residual_mask: Tensor | None) -> None:
    """Multiply final masks into the weights, and fill up the tokens if the residual width became smaller."""
    pool = pool_of(model)
    scale_rows(pool.kv, torch.cat([torch.ones_like(mask), mask]))
    if residual_mask is not None:
        scale_rows(pool.proj, residual_mask)
        scale_rows(pool.mlp.fc2, residual_mask)
    pool.out_features, missing = pool.proj.out_features, pool.q.out_features - pool.kv.in_features
    if missing:
        pool.kv.weight = nn.Parameter(F.pad(pool.kv.weight, (0, missing)))
        pool.kv.in_features += missing
        model.attn_pool = _filled_up(pool, missing)


def describe(model: nn.Module) -> dict | None:
    """What `build` needs, None for a model without attention pooling."""
    pool = pool_of(model)
    if pool is None:
        return None
    mlp = {"hidden": pool.mlp.fc1.out_features, "activation": activation(pool.mlp.act)}
    return {"heads": pool.num_heads, "width": pool.q.out_features} | mlp


def build(description: dict, residual_width: int, norm_layer: type[nn.Module]) -> nn.Module:
    """An attention pooling with fresh weights for tokens of the residual width, filled up where that is smaller."""
    width, hidden = description["width"], description["hidden"]
    act_layer = ACTIVATION_LAYERS[description["activation"]]
    pool = AttentionPoolLatent(width, num_heads=description["heads"], norm_layer=norm_layer, act_layer=act_layer)
    pool.out_features, mlp = residual_width, pool.mlp
    pool.proj, pool.norm = resized(pool.proj, width, residual_width), resized(pool.norm, residual_width)
    mlp.fc1, mlp.fc2 = resized(mlp.fc1, residual_width, hidden), resized(mlp.fc2, hidden, residual_width)
    return pool if width == residual_width else _filled_up(pool, width - residual_width)


def _name(model: nn.Module) -> str:
    return "attn_pool.1" if isinstance(model.attn_pool, nn.Sequential) else "attn_pool"


def _filled_up(pool: AttentionPoolLatent, missing: int) -> nn.Sequential:
    return nn.Sequential(nn.ConstantPad1d((0, missing), 0.0), pool).train(pool.training)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
