"""The cost model of each kind of cost that a target may limit."""

from collections.abc import Collection, Sequence

from torch import nn

from ofb.supernet.cost import Cost
from ofb.supernet.families import family_of
from ofb.supernet.latency import LatencyTable, measure_latency
from ofb.supernet.params import params_cost
from ofb.supernet.token_costs import TokenCosts


def costs_of(
    model: nn.Module,
    kinds: Collection[str],
    latency_table: LatencyTable | None = None,
    patches: Sequence[int] = (),
) -> dict[str, Cost | LatencyTable | TokenCosts]:
    """Cost models of a dense model, of these kinds.

    Args:
        model: a timm model that `ofb.supports`.
        kinds: of "macs", "params" and "latency_ms".
        latency_table: measured now if None.
        patches: numbers of patches, ascending, where that is searched.

    Raises:
        ValueError: latency, which is known for one number of patches only, is asked for together with several.
    """
    makers = {"macs": lambda each: family_of(each).macs(each), "params": params_cost}
    if patches:
        if "latency_ms" in kinds:
            raise ValueError(
                "tokens: expected a target of macs or params where the number of patches is searched, got latency_ms; "
                "leave one of the two out"
            )
        return {kind: TokenCosts.measure(model, patches, make) for kind, make in makers.items() if kind in kinds}
    makers["latency_ms"] = lambda each: measure_latency(each) if latency_table is None else latency_table
    return {kind: make(model) for kind, make in makers.items() if kind in kinds}
