"""The course of a search: ramps, pruning events, and what is out of range."""

import numpy as np
import pytest
import torch

from ofb.supernet.schedules import Course, ramp

PAPER = dict(
    epochs=100,
    steps_per_epoch=10,
    targets=1,
    warmup_epochs=None,
    lam_start=0.99,
    lam_end=0.1,
    mask_ratio_start=0.05,
    mask_ratio_end=0.25,
    one_hot_delay=0.0,
    pace=0.0,
    settling=0.0,
    prunes_per_epoch=3,
)


def course(**options) -> Course:
    return Course(**(PAPER | options))


def test_ramp_is_linear_then_constant():
    assert ramp(0, 20, 0.99, 0.1) == 0.99
    assert ramp(10, 20, 0.99, 0.1) == pytest.approx(0.545)
    assert ramp(20, 20, 0.99, 0.1) == ramp(1000, 20, 0.99, 0.1) == 0.1
    assert ramp(0, 0, 0.99, 0.1) == 0.1


def test_warmup_is_a_fifth_of_the_epochs_or_as_asked():
    assert course().lam(100) == pytest.approx(0.545) and course().lam(200) == course().lam(999) == 0.1
    assert course().mask_ratio(100) == pytest.approx(0.15) and course().most_masked == 0.25
    assert course(warmup_epochs=2.5).lam(25) == 0.1 and course(warmup_epochs=0).lam(0) == 0.1


@pytest.mark.parametrize(("steps_per_epoch", "events"), [(9, [3, 6, 9]), (10, [4, 7, 10]), (2, [1, 2]), (1, [1])])
def test_pruning_events(steps_per_epoch, events):
    search = course(steps_per_epoch=steps_per_epoch)
    for epoch in range(3):
        steps = [s for s in range(1, steps_per_epoch + 1) if search.prunes_after(epoch * steps_per_epoch + s)]
        assert steps == events


def test_nothing_is_pruned_before_the_goal_is_there():
    search = course(pace=0.3, targets=2)
    assert [search.way(step, 0) for step in (0, 75, 150, 400)] == [0, 0.5, 1, 1]
    assert [search.way(step, 1) for step in (500, 575, 650)] == [0, 0.5, 1]
    assert not search.prunes_after(140) and search.prunes_after(150)
    assert not search.prunes_after(640, 1) and search.prunes_after(650, 1)


def test_events_left_count_down_to_the_last_step():
    search = course(epochs=2, settling=0.5)
    assert [search.events_left(step) for step in (9, 10, 14, 17, 20)] == [None, 4, 3, 2, 1]
    assert course(targets=2, settling=1.0).events_left(990) is None, "a later target is still to come"
    assert course(targets=2, settling=1.0).events_left(990, 1) == 4


@pytest.mark.parametrize(("epochs", "targets"), [(10, 10), (11, 10), (5, 3), (3, 2), (100, 3)])
def test_targets_at_the_ends_of_epochs_are_in_time(epochs, targets):
    """Where `ofb.search_targets` goes on to the next one; a whole share later it is too late."""
    search, passed = course(epochs=epochs, steps_per_epoch=7, targets=targets), 0
    for step in range(1, search.total_steps + 1):
        search.check_target(step, passed)
        if step % 7 == 0 and targets * (step // 7) >= epochs * (passed + 1):
            passed += 1
    late = -(-search.total_steps * 2 // targets)
    search.check_target(late - 1, 0)
    with pytest.raises(ValueError, match=f"later_targets: expected .* of {targets} ends, got none before step {late};"):
        search.check_target(late, 0)


def test_the_one_hot_loss_sets_in_late():
    search = course(one_hot_delay=0.5)
    assert not search.sharpens(499) and search.sharpens(500)
    of_two = course(one_hot_delay=0.5, targets=2)  # a share of each target's steps
    assert not of_two.sharpens(249) and of_two.sharpens(250)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"prunes_per_epoch": 0}, "prunes_per_epoch: expected at least 1, got 0"),
        ({"settling": 1.5}, "settling: expected 0 to 1, got 1.5"),
        ({"mask_ratio_end": -0.1}, "mask_ratio_end: expected 0 to 1, got -0.1"),
        ({"lam_start": float("nan")}, "lam_start: expected a finite number, got nan"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs: expected a finite number, got nan"),
        ({"warmup_epochs": -1}, "warmup_epochs: expected 0 to 100, got -1"),
        ({"warmup_epochs": 100.5}, "warmup_epochs: expected 0 to 100, got 100.5"),
        ({"epochs": 10.0}, r"epochs: expected a whole number, got 10.0; round it, such as with int\(...\)"),
        ({"epochs": float("nan")}, "epochs: expected a whole number, got nan"),
        ({"steps_per_epoch": 2.5}, "steps_per_epoch: expected a whole number, got 2.5"),
    ],
)
def test_what_is_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        course(**wrong)


def test_integers_and_numbers_of_any_kind():
    search = course(epochs=np.int64(4), steps_per_epoch=torch.tensor(10), lam_end=np.float32(0.5), warmup_epochs=4)
    assert search == course(epochs=4, steps_per_epoch=10, lam_end=0.5, warmup_epochs=4)
    assert type(search.total_steps) is int and type(search.lam(40)) is float
