"""Costs by layer: they add up, agree with the cost model, and say what a smaller network saves."""

import pytest

from ofb.export import count_params
from ofb.profile import REST, TOTAL, profile, profile_table
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


def test_table_shows_shares_of_the_first_network():
    model = tiny_vit()
    sizes = {name: bimask.candidates.full for name, bimask in make_supernet().bimasks.items()}
    small = cut_to(model, sizes | {"mlp0": (1, 64)})
    lines = profile_table({"dense": profile(model), "small": profile(small)}).splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    row = next(line for line in lines if line.startswith("blocks.0.mlp"))
    assert "(50%)" in row
    assert next(line for line in lines if line.startswith("blocks.1.mlp")).count("(100%)") >= 2
