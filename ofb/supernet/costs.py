"""The cost model of each kind of cost that a target may limit."""

from collections.abc import Iterable

from torch import nn

from ofb.supernet.cost import Cost
from ofb.supernet.families import family_of
from ofb.supernet.params import params_cost


def costs_of(model: nn.Module, kinds: Iterable[str]) -> dict[str, Cost]:
    """Cost models of a dense model, of these kinds; MACs first, then as named in `targets.UNITS`."""
    makers = {"macs": lambda: family_of(model).macs(model), "params": lambda: params_cost(model)}
    return {kind: make() for kind, make in makers.items() if kind in set(kinds)}
