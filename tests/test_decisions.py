"""Which candidates survive an event: the likely ones, what a target needs, and at the end of the search one of each."""

import pytest
import torch
from torch import nn

from ofb.supernet import decisions
from ofb.supernet.bimask import BiMask
from ofb.supernet.cost import Cost
from ofb.supernet.search_space import Candidates

COSTS = {"macs": Cost(("embed",), {"embed": 10, "attn0": 2}, {("attn0", "embed"): 4, ("mlp0", "embed"): 2})}
GRIDS = {
    "embed": Candidates((1,), (8, 12, 16)),
    "attn0": Candidates((1, 2), (4, 8)),
    "mlp0": Candidates((1,), (32, 64)),
}
# A target that the full sizes meet.
FULL = round(1.01 * COSTS["macs"].total({name: candidates.full for name, candidates in GRIDS.items()}))


@pytest.fixture
def bimasks() -> nn.ModuleDict:
    found = nn.ModuleDict({name: BiMask(candidates, architecture_init="equal") for name, candidates in GRIDS.items()})
    with torch.no_grad():
        found["embed"].alpha.copy_(torch.tensor([[0.01, 0.01, 0.98]]).log())
        found["mlp0"].alpha.copy_(torch.tensor([[0.2, 0.8]]).log())
        found["attn0"].alpha.copy_(torch.tensor([[0.1, 0.2], [0.3, 0.4]]).log())
    return found


def alive_at(bimasks, targets, **options):
    return decisions.survivors(
        bimasks, COSTS, [{"macs": target} for target in targets], **{"threshold": 0.2, "events_left": None} | options
    )


def test_the_unlikely_die(bimasks):
    alive = alive_at(bimasks, [FULL])
    assert alive["embed"].tolist() == [[False, False, True]]
    assert alive["attn0"].all() and alive["mlp0"].all()


def test_a_target_keeps_what_it_needs(bimasks):
    """A fourth of the cost is out of reach at full width, so the unlikely widths have to stay."""
    target = COSTS["macs"].total({"embed": (1, 8), "attn0": (1, 4), "mlp0": (1, 32)})
    assert alive_at(bimasks, [target])["embed"].all()
    assert alive_at(bimasks, [FULL, target])["embed"].all()  # a later target counts as well


def test_settling_leaves_ever_fewer_and_then_the_chosen(bimasks):
    target = COSTS["macs"].total({"embed": (1, 16), "attn0": (1, 8), "mlp0": (1, 32)})
    chosen = decisions.choose(bimasks, COSTS, {"macs": target})
    left = []
    for events_left in (4, 2, 1):
        alive = alive_at(bimasks, [target], threshold=0.0, events_left=events_left)
        assert all(alive[name][bimasks[name].holds(*chosen[name])].all() for name in chosen)
        left.append([int(alive[name].sum()) for name in GRIDS])
    assert left == [[3, 3, 2], [2, 2, 2], [1, 1, 1]]  # n^(3/4), n^(1/2), n^0, rounded up
    assert {name: bimasks[name].units_kept_by(alive[name])[1] for name in GRIDS} == chosen


def test_settling_aims_at_the_first_target(bimasks):
    """The later one only has to stay within reach."""
    later = COSTS["macs"].total({"embed": (1, 8), "attn0": (1, 4), "mlp0": (1, 32)})
    alive = alive_at(bimasks, [FULL, later], threshold=0.0, events_left=1)
    assert {name: bimasks[name].units_kept_by(alive[name])[1] for name in GRIDS} == decisions.choose(
        bimasks, COSTS, {"macs": FULL}
    )


def test_settling_never_revives(bimasks):
    alive = alive_at(bimasks, [FULL], events_left=2)
    assert alive["embed"].tolist() == [[False, False, True]]
