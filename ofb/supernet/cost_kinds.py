"""The cost model of each kind of cost that a target may limit."""

from collections.abc import Collection

from torch import nn

from ofb.supernet.cost import Cost
from ofb.supernet.families import family_of
from ofb.supernet.latency import LatencyTable, measure_latency
from ofb.supernet.params import params_cost


def costs_of(
    model: nn.Module, kinds: Collection[str], latency_table: LatencyTable | None = None
) -> dict[str, Cost | LatencyTable]:
    """Cost models of a dense model, of these kinds; where the latency table is None, it is measured now."""
    makers = {
        "macs": lambda: family_of(model).macs(model),
        "params": lambda: params_cost(model),
        "latency_ms": lambda: measure_latency(model) if latency_table is None else latency_table,
    }
    return {kind: make() for kind, make in makers.items() if kind in kinds}
