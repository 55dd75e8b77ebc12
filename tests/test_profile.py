"""Costs by layer: they add up, agree with the cost model, and say what a smaller network saves."""

from dataclasses import replace

import pytest

from ofb.export import count_params
from ofb.network_latency import latency_note
from ofb.profile import REST, TOTAL, profile, profile_networks, profile_table
from ofb.supernet.families import count_macs
from ofb.supernet.params import cut_to
from tests.common import tiny_swin, tiny_vit
from tests.test_supernet import make_supernet


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin, lambda: tiny_vit("vit_base_patch16_siglip_224")])
def test_layers_add_up(make):
    model = make()
    costs = profile(model, batch_size=2)
    assert costs[TOTAL].macs == count_macs(model) and costs[TOTAL].params == count_params(model)
    for figure in ("macs", "params"):
        assert sum(getattr(cost, figure) for name, cost in costs.items() if name != TOTAL) == getattr(
            costs[TOTAL], figure
        )
    assert costs[REST].macs == 0 and costs[REST].params > 0, "all products are in the layers, not all parameters"
    assert all(cost.ms > 0 for name, cost in costs.items() if name != REST)
    assert all(cost.macs > 0 for name, cost in costs.items() if name != REST)


@pytest.fixture(scope="module")
def networks() -> dict:
    model = tiny_vit()
    sizes = {name: bimask.candidates.full for name, bimask in make_supernet().bimasks.items()}
    return profile_networks({"dense": model, "small": cut_to(model, sizes | {"mlp0": (1, 64)})}, batch_size=2)


def with_waiting(networks: dict, waiting: float) -> dict:
    """The networks' costs, as if their threads had waited so much when they were timed."""
    changed = {}
    for name, layers in networks.items():
        total = layers[TOTAL]
        latency = replace(total.latency, low=total.ms, high=total.ms, waiting=waiting)
        changed[name] = layers | {TOTAL: replace(total, latency=latency)}
    return changed


def test_the_total_is_the_latency_of_the_network(networks):
    """The same measurement as in the table that a search ends with."""
    for layers in networks.values():
        assert layers[TOTAL].ms == layers[TOTAL].latency.ms
        assert layers[TOTAL].latency.on.endswith(", batch size 2")


def test_an_unstable_table_has_no_shares_of_time(networks):
    busy = with_waiting(networks, 0.5)
    layer, total = (line for line in profile_table(busy).splitlines() if line.startswith(("blocks.0.mlp", "total")))
    assert layer.count("%)") == total.count("%)") == 2, "of MACs and parameters"
    assert total.count("(unstable)") == 2
    assert "unstable: " in latency_note({name: layers[TOTAL].latency for name, layers in busy.items()})


def test_table_shows_shares_of_the_first_network(networks):
    lines = profile_table(with_waiting(networks, 0.0)).splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    row = next(line for line in lines if line.startswith("blocks.0.mlp"))
    assert "(50%)" in row
    assert next(line for line in lines if line.startswith("blocks.1.mlp")).count("(100%)") >= 2
