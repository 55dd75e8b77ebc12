"""The course of a search: how its goals fall, when candidates may die, how it settles."""

import pytest
import torch

from ofb.supernet import decisions
from ofb.supernet.budget import TOLERANCE
from ofb.supernet.families import count_macs
from tests.test_supernet import make_supernet


def test_later_budgets_ramp_from_those_before():
    options = {"target": {"macs": "80%", "params": "70%"}, "later_targets": ["macs=60%,params=50%"], "pace": 0.5}
    supernet = make_supernet(**options)
    supernet.next_target()
    assert supernet.goals.goals.tolist() == pytest.approx(list(supernet.targets[0].values()))
    supernet.steps = supernet.total_steps
    supernet._set_schedules()
    assert supernet.goals.goals.tolist() == pytest.approx(list(supernet.targets[1].values()))


def test_the_macs_loss_lowers_its_target_at_the_asked_pace():
    supernet = make_supernet(target="80%", later_targets=["40%"], epochs=4, steps_per_epoch=5, pace=0.5)
    dense, seen = supernet.dense_macs, {}
    for step in range(20):
        seen[step] = float(supernet.goals.goals) / dense
        if step == 10:
            supernet.next_target()
            assert float(supernet.goals.goals) / dense == pytest.approx(0.8)
        supernet.steps += 1
        supernet._set_schedules()
    assert seen[0] == pytest.approx(1) and seen[4] == pytest.approx(0.84) and seen[5] == pytest.approx(0.8)
    assert seen[9] == pytest.approx(0.8) and seen[14] == pytest.approx(0.48) and seen[19] == pytest.approx(0.4)
    assert float(make_supernet(target="80%", pace=0.0).goals.goals) == pytest.approx(0.8 * dense)


def test_no_candidate_dies_before_the_target_is_asked_for():
    supernet = make_supernet(target="80%", epochs=2, steps_per_epoch=6, prunes_per_epoch=3, pace=0.5)
    with torch.no_grad():
        for bimask in supernet.bimasks.values():
            bimask.alpha.view(-1)[0] = -9
    before = supernet.alive_candidates()
    for step in range(1, 9):
        supernet.step()
        assert (supernet.alive_candidates() == before) == (step < 6), step


def test_the_search_settles_step_by_step():
    supernet = make_supernet(target="40%", epochs=2, steps_per_epoch=10, prunes_per_epoch=5, pace=0.0, settling=0.5)
    supernet.prune_threshold = 0.0  # nothing dies but by settling
    with torch.no_grad():
        for bimask in supernet.bimasks.values():
            bimask.alpha.normal_()
    at_start, seen = supernet.alive_candidates(), []
    for _ in range(20):
        supernet.step()
        seen.append(supernet.alive_candidates())
    assert seen[8] == at_start and seen[-1] == dict.fromkeys(at_start, 1) and supernet.finished
    for name in at_start:
        left = [alive[name] for alive in seen]
        assert left == sorted(left, reverse=True)
        assert at_start[name] < 4 or len(set(left)) > 2  # not in one stroke
    assert {choice["how"] for choice in supernet.choices} == {"pruned"}
    assert 1 - TOLERANCE <= count_macs(supernet.extract()) / supernet.target_macs <= 1


def test_settling_keeps_the_likeliest_combination():
    supernet = make_supernet(target="40%", epochs=1, steps_per_epoch=10, prunes_per_epoch=1, pace=0.0, settling=0.5)
    with torch.no_grad():
        for bimask in supernet.bimasks.values():
            bimask.alpha.normal_()
    chosen = decisions.choose(supernet.bimasks, supernet.costs, supernet.target)
    supernet.steps = 9
    supernet.step()
    assert {name: bimask.candidates.full for name, bimask in supernet.bimasks.items()} == chosen


def test_settling_waits_for_the_last_target():
    supernet = make_supernet(target="80%", later_targets=["40%"], epochs=2, steps_per_epoch=4, pace=0.0, settling=1.0)
    supernet.prune_threshold = 0.0
    at_start = supernet.alive_candidates()
    for _ in range(4):
        supernet.step()
    assert supernet.alive_candidates() == at_start
    supernet.next_target()
    for _ in range(4):
        supernet.step()
    assert supernet.finished and count_macs(supernet.extract()) <= supernet.targets[1]["macs"]


def test_decided_goes_from_nothing_to_everything():
    """The mean of σ over the submodules: 0 where all sizes are equally likely, 1 where one is left."""
    supernet = make_supernet(architecture_init="equal")
    assert supernet.decided() < 1e-6
    first = next(iter(supernet.bimasks.values()))
    first.alpha.data.flatten()[0] = 50.0
    assert abs(supernet.decided() - 1 / len(supernet.bimasks)) < 1e-6
    supernet.finalize()
    assert supernet.decided() == 1.0
