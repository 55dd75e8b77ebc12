"""The course of a search: how its goals fall, when candidates may die, how it settles."""

import copy

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


def test_no_target_after_the_last():
    supernet = make_supernet(target="80%", later_targets=["40%"])
    supernet.next_target()
    goals = supernet.goals.goals.clone()
    with pytest.raises(ValueError, match="next_target: expected one of 1 later_targets to be left, got none; leave"):
        supernet.next_target()
    assert supernet.targets_passed == 1 and torch.equal(supernet.goals.goals, goals)
    decided = make_supernet(target="80%", later_targets=["40%"])
    decided.finalize()
    with pytest.raises(ValueError, match="next_target: expected sizes that are open, got a search that is over"):
        decided.next_target()
    assert decided.targets_passed == 0


def test_a_loop_that_forgets_its_later_targets():
    """The step that would settle for the first target says so, and changes nothing: the loop may still go on."""
    supernet = make_supernet(target="80%", later_targets=["40%"], epochs=2, steps_per_epoch=4, pace=0.0)
    for _ in range(7):
        supernet.step()
    before = snapshot(supernet)
    message = r"later_targets: expected next_target\(\) after step 4, where the share of target 1 of 2 ends, got none "
    for _ in range(2):
        with pytest.raises(ValueError, match=message + r"before step 8; call extract\(\) for its network"):
            supernet.step()
        assert_unchanged(supernet, before)
    first = supernet.extract()
    supernet.next_target()
    supernet.step()
    assert supernet.finished
    macs = [count_macs(network) for network in (first, supernet.extract())]
    assert all(m <= target["macs"] for m, target in zip(macs, supernet.targets, strict=True)) and macs[1] < macs[0]


@pytest.mark.parametrize("tensor", ["score", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settling", [0.0, 1.0])
def test_what_is_not_finite_is_named_before_it_decides(tensor, value, settling):
    """In every call that decides sizes, and not in the steps between."""
    supernet = make_supernet(epochs=1, steps_per_epoch=4, prunes_per_epoch=2, pace=0.0, settling=settling)
    spoil = getattr(supernet.bimasks["mlp1"], tensor)
    with torch.no_grad():
        supernet.bimasks["embed"].alpha[..., -1] = -9  # it would be pruned first
        spoil.view(-1)[1] = value
    assert not supernet.step()
    before = snapshot(supernet)
    rate = {"score": "score_lr", "alpha": "architecture_lr"}[tensor]
    message = f"{tensor}: expected finite numbers in submodule mlp1, got NaN or infinity; .* lower {rate} or clip"
    for decide in (supernet.step, supernet.prune, supernet.finalize, supernet.extract):
        with pytest.raises(ValueError, match=message):
            decide()
        assert_unchanged(supernet, before)


def test_minus_infinity_and_dead_candidates_decide():
    supernet = make_supernet(target="60%")
    bimask = supernet.bimasks["mlp1"]
    with torch.no_grad():
        bimask.score[3] = bimask.alpha[0, 0] = -torch.inf
        bimask.alpha[0, 1] = torch.nan
    bimask.alive[0, 1] = False
    supernet.prune()
    assert not bimask.alive[0, :2].any() and bimask.alive.any()
    supernet.finalize()
    assert supernet.finished


def snapshot(supernet):
    """All that a supernet knows."""
    return copy.deepcopy(supernet.state_dict()), supernet.alive_candidates(), supernet.revision


def assert_unchanged(supernet, before):
    state, *others = before
    assert others == [supernet.alive_candidates(), supernet.revision]
    assert state.keys() == supernet.state_dict().keys()
    for name, value in supernet.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)
        else:
            assert value == state[name], name


def test_decided_goes_from_nothing_to_everything():
    """The mean of σ over the submodules: 0 where all sizes are equally likely, 1 where one is left."""
    supernet = make_supernet(architecture_init="equal")
    assert supernet.decided() < 1e-6
    first = next(iter(supernet.bimasks.values()))
    first.alpha.data.flatten()[0] = 50.0
    assert abs(supernet.decided() - 1 / len(supernet.bimasks)) < 1e-6
    supernet.finalize()
    assert supernet.decided() == 1.0
