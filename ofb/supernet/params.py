"""How many parameters a network of given sizes has, read off the couplings of any model family."""

import copy
import math
from collections import defaultdict

import torch
from torch import nn

from ofb.supernet.cost import Cost, Sizes
from ofb.supernet.families import family_of
from ofb.supernet.pruning import keep_units
from ofb.supernet.search_space import TOKENS


@torch.no_grad()
def cut_to(model: nn.Module, sizes: Sizes) -> nn.Module:
    """A plain copy of a model at these sizes, with the first heads, channels and hidden units of each submodule."""
    family, model = family_of(model), copy.deepcopy(model)
    submodules = family.submodules(model)
    for name, submodule in submodules.items():
        heads, channels = sizes[name]
        units = torch.arange(submodule.candidates.units).view(submodule.candidates.full)
        index = units[:heads, :channels].flatten().to(next(model.parameters()).device)
        keep_units(model, submodule.couplings, index, submodule.candidates.full, optimizer=None)
    family.sync_sizes(model, [sizes[name] for name in submodules if name.startswith("attn")])
    like = next(model.parameters())
    ones = {name: like.new_ones(size) for name, size in sizes.items()}
    family.fold(model, ones, {})
    return model


def params_cost(model: nn.Module) -> Cost:
    """Parameters of the network that `Supernet.extract` gives, as a function of its sizes but the number of patches.

    A parameter adds its uncoupled entries for each unit, or pair of units, that it is coupled to. Counted is in the
    smallest network: a plain module may hold parameters that the supernet does not, once it is folded.
    """
    family = family_of(model)
    submodules = family.submodules(model)
    kept = {TOKENS: submodules.pop(TOKENS).candidates.full} if TOKENS in submodules else {}
    smallest = {name: (s.candidates.heads[0], s.candidates.channels[0]) for name, s in submodules.items()}
    widths = family.macs(model).widths
    plain = cut_to(model, smallest | kept)
    couplings = defaultdict(list)
    for name, submodule in family.submodules(plain).items():
        for coupling in submodule.couplings if name in submodules else ():
            couplings[coupling.parameter].append((name, coupling))
    constant, heads, linear, products = 0, defaultdict(int), defaultdict(int), defaultdict(int)
    for parameter_name, parameter in plain.named_parameters():
        coupled = couplings[parameter_name]
        entries = math.prod(coupling.repeats for _, coupling in coupled)
        dims = {coupling.dim for _, coupling in coupled}
        entries *= math.prod(length for dim, length in enumerate(parameter.shape) if dim not in dims)
        # A pair is named by the submodule, then its width; of two widths, by the later one first.
        names = sorted((name for name, _ in coupled), key=lambda n: -widths.index(n) if n in widths else -len(widths))
        if not coupled:
            constant += entries
        elif any(coupling.heads for _, coupling in coupled):
            (name,) = names
            heads[name] += entries
        elif len(coupled) == 1:
            linear[names[0]] += entries
        else:
            one, other = names
            products[one, other] += entries
    return Cost(widths, dict(linear), dict(products), dict(heads), constant)
