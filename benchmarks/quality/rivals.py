"""What a user would do instead of a search: smaller networks of a given cost, made from a dense one.

Each rival is a function of a dense timm Vision Transformer and a target in MACs. It returns a smaller network that
costs no more than the target; training is the caller's.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ofb.supernet.budget import choose_sizes
from ofb.supernet.families import build, count_macs, describe, vit
from ofb.supernet.pruning import keep_units
from ofb.supernet.ranking import magnitudes
from ofb_kernels.reference import unit_ranks

Size = tuple[int, int]  # heads, channels; one head for submodules without


def uniform(dense: nn.Module, target: int) -> nn.Module:
    """Width, head width and hidden size all shrink by the same share; the units of largest weights stay."""
    return shrink(dense, uniform_sizes(dense, target), magnitudes(dense))


def from_scratch(dense: nn.Module, target: int) -> nn.Module:
    """The sizes of `uniform`, fresh weights."""
    fresh = build(describe(uniform(dense, target)))
    fresh.pretrained_cfg = fresh.default_cfg = dense.pretrained_cfg
    return fresh


def random_sizes(dense: nn.Module, target: int, seed: int) -> nn.Module:
    """Sizes drawn from the search space; the units of largest weights stay.

    Drawn are probabilities of the candidates, and taken is the likeliest combination that meets the target.
    """
    generator = torch.Generator().manual_seed(seed)
    options = {
        name: {
            (heads, channels): float(torch.rand((), generator=generator)) ** 4
            for heads in submodule.candidates.heads
            for channels in submodule.candidates.channels
        }
        for name, submodule in vit.submodules(dense).items()
    }
    return shrink(dense, choose_sizes({"macs": vit.macs(dense)}, options, {"macs": target}), magnitudes(dense))


def torch_pruning(
    dense: nn.Module, target: int, loss_of: Callable[[nn.Module], Tensor] | None = None, *, everywhere: bool = False
) -> nn.Module:
    """One-shot structured pruning by Torch-Pruning: by weight magnitude, or with `loss_of` by Taylor expansion.

    Args:
        dense: the network.
        target: MACs.
        loss_of: a loss of the network on training images.
        everywhere: rank the units of all layers together instead of taking the same share of each.
    """
    low, high = 0.0, 1.0
    for _ in range(20):
        ratio = (low + high) / 2
        try:
            fits = count_macs(_pruned(dense, ratio, loss_of, everywhere)) <= target
        except Exception:  # a layer lost all its units
            fits = True
        low, high = (low, ratio) if fits else (ratio, high)
    return _pruned(dense, high, loss_of, everywhere)


def uniform_sizes(dense: nn.Module, target: int) -> dict[str, Size]:
    """The largest share of all sizes that costs no more than the target; the number of heads stays."""
    full = {name: submodule.candidates.full for name, submodule in vit.submodules(dense).items()}
    macs = vit.macs(dense)

    def sizes(share: float) -> dict[str, Size]:
        return {name: (heads, max(1, round(channels * share))) for name, (heads, channels) in full.items()}

    shares = [step / 1000 for step in range(1, 1001)]
    costs = {share: macs.total(sizes(share)) for share in shares}
    return sizes(max(share for share in shares if costs[share] <= target))


@torch.no_grad()
def shrink(dense: nn.Module, sizes: Mapping[str, Size], importance: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network at these sizes, with the most important units (H · d,) of each submodule."""
    model = copy.deepcopy(dense)
    submodules = vit.submodules(model)
    for name, (heads, channels) in sizes.items():
        full = submodules[name].candidates.full
        head_rank, channel_rank = unit_ranks(_logits(importance[name].view(full)))
        kept = ((head_rank[:, None] < heads) & (channel_rank < channels)).flatten().nonzero().flatten()
        keep_units(model, submodules[name].couplings, kept, full, None)
    vit.sync_sizes(model, [sizes[f"attn{i}"] for i in range(len(model.blocks))])
    ones = {name: torch.ones(submodule.candidates.full) for name, submodule in vit.submodules(model).items()}
    vit.fold(model, ones, {})
    return model


def _logits(importance: Tensor) -> Tensor:
    """Scores of the same order, such that heads are ranked by a sum in proportion to their importance."""
    share = importance / importance.max() * 0.98 + 0.01
    return torch.logit(share)


def _pruned(
    dense: nn.Module, ratio: float, loss_of: Callable[[nn.Module], Tensor] | None, everywhere: bool
) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(dense).train()
    images = torch.randn(1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    for block in model.blocks:
        block.attn.fused_attn = False
    pruner = tp.pruner.BasePruner(
        model,
        images,
        importance=tp.importance.GroupMagnitudeImportance()
        if loss_of is None
        else tp.importance.GroupTaylorImportance(),
        global_pruning=everywhere,
        isomorphic=everywhere,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        ignored_layers=[model.head],
        num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
        prune_num_heads=False,
        prune_head_dims=True,
    )
    if loss_of is not None:
        loss_of(model).backward()
    pruner.step()
    model.zero_grad(set_to_none=True)
    for block in model.blocks:
        heads, attn_dim = block.attn.num_heads, block.attn.qkv.weight.shape[0] // 3
        block.attn.fused_attn = dense.blocks[0].attn.fused_attn
        block.attn.head_dim, block.attn.attn_dim = attn_dim // heads, attn_dim
    vit.sync_sizes(model, [(b.attn.num_heads, b.attn.head_dim) for b in model.blocks])
    ones = {name: torch.ones(submodule.candidates.full) for name, submodule in vit.submodules(model).items()}
    vit.fold(model, ones, {})
    return model
