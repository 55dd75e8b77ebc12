"""What changes with the step alone: λ, the share of masked patches, and when to prune."""


def ramp(step: float, warmup_steps: float, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at `warmup_steps`, then constant."""
    if step >= warmup_steps:
        return end
    return start + (end - start) * step / warmup_steps


def prunes_after(step: int, steps_per_epoch: int, prunes_per_epoch: int) -> bool:
    """Whether a pruning event follows the `step`-th step (counted from 1).

    Events are spread evenly over an epoch, one always at its end, also when an epoch has fewer steps than events.
    """
    within = (step - 1) % steps_per_epoch + 1
    return any(within == -(-steps_per_epoch * event // prunes_per_epoch) for event in range(1, prunes_per_epoch + 1))
