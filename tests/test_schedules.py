"""λ, patch ratio and pruning events."""

import pytest

from ofb.supernet.schedules import prunes_after, ramp


def test_ramp_is_linear_then_constant():
    assert ramp(0, 20, 0.99, 0.1) == 0.99
    assert ramp(10, 20, 0.99, 0.1) == pytest.approx(0.545)
    assert ramp(20, 20, 0.99, 0.1) == ramp(1000, 20, 0.99, 0.1) == 0.1
    assert ramp(0, 0, 0.99, 0.1) == 0.1


@pytest.mark.parametrize(("steps_per_epoch", "events"), [(9, [3, 6, 9]), (10, [4, 7, 10]), (2, [1, 2]), (1, [1])])
def test_pruning_events(steps_per_epoch, events):
    for epoch in range(3):
        steps = [
            s for s in range(1, steps_per_epoch + 1) if prunes_after(epoch * steps_per_epoch + s, steps_per_epoch, 3)
        ]
        assert steps == events
