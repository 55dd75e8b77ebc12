"""What a search does at which step: λ, the share of masked patches, the one-hot loss, the goal, and when to prune."""

from dataclasses import dataclass

from ofb.checks import at_least, check_numbers, within

COUNTS = ("epochs", "steps_per_epoch", "targets", "prunes_per_epoch")
SHARES = ("lam_start", "lam_end", "mask_ratio_start", "mask_ratio_end", "one_hot_delay", "pace", "settling")


@dataclass(frozen=True, kw_only=True)
class Course:
    """The course of a search, as a function of the number of steps alone. Its targets have equal shares of the steps.

    Attributes:
        epochs, steps_per_epoch: length of the search.
        targets: how many costs it passes.
        warmup_epochs: over which λ and the share of masked patches change; a fifth of `epochs` if None.
        lam_start, lam_end: λ at step 0 and after the warm-up.
        mask_ratio_start, mask_ratio_end: the share of masked patches, likewise.
        one_hot_delay: share of the first target's steps before the one-hot loss sets in, for good.
        pace: share of a target's steps over which the goal falls to the target, before any candidate may die.
        settling: share of the search at its end in which every pruning event drops candidates.
        prunes_per_epoch: pruning events in an epoch.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int
    steps_per_epoch: int
    targets: int
    warmup_epochs: float | None
    lam_start: float
    lam_end: float
    mask_ratio_start: float
    mask_ratio_end: float
    one_hot_delay: float
    pace: float
    settling: float
    prunes_per_epoch: int

    def __post_init__(self) -> None:
        check_numbers(self)
        at_least(self, 1, *COUNTS)
        within(self, 0, 1, *SHARES)
        within(self, 0, self.epochs, "warmup_epochs")

    @property
    def total_steps(self) -> int:
        """Steps of the search."""
        return self.epochs * self.steps_per_epoch

    @property
    def most_masked(self) -> float:
        """The largest share of masked patches there will be."""
        return max(self.mask_ratio_start, self.mask_ratio_end)

    def lam(self, step: int) -> float:
        """λ, the share of the importance in a mask."""
        return ramp(step, self._warmup_steps, self.lam_start, self.lam_end)

    def mask_ratio(self, step: int) -> float:
        """The share of masked patches."""
        return ramp(step, self._warmup_steps, self.mask_ratio_start, self.mask_ratio_end)

    def sharpens(self, step: int) -> bool:
        """Whether the one-hot loss has set in."""
        return step >= self.one_hot_delay * self._target_steps

    def way(self, step: int, targets_passed: int) -> float:
        """How far the goal has come from the cost before to the target that follows those passed: 1 is there."""
        return ramp(max(0.0, step - targets_passed * self._target_steps), self.pace * self._target_steps, 0.0, 1.0)

    def prunes_after(self, step: int, targets_passed: int = 0) -> bool:
        """Whether a pruning event follows the `step`-th step (counted from 1); none does before the goal is its target.

        Events are spread evenly over an epoch, one always at its end, also when an epoch has fewer steps than events.
        """
        within, events = (step - 1) % self.steps_per_epoch + 1, range(1, self.prunes_per_epoch + 1)
        is_event = any(within == -(-self.steps_per_epoch * event // self.prunes_per_epoch) for event in events)
        return is_event and self.way(step, targets_passed) == 1

    def events_left(self, step: int, targets_passed: int = 0) -> int | None:
        """How many pruning events are left, one at this step counted; None before the search settles, on the way to its
        last target."""
        if step < (1 - self.settling) * self.total_steps or targets_passed + 1 < self.targets:
            return None
        return sum(self.prunes_after(later, targets_passed) for later in range(step, self.total_steps + 1))

    def check_target(self, step: int, targets_passed: int) -> None:
        """Raise ValueError where a step ends the next target's share and the search is not yet on its way there."""
        target = targets_passed + 1
        if target < self.targets and step * self.targets >= self.total_steps * (target + 1):
            due = -(-self.total_steps * target // self.targets)
            raise ValueError(
                f"later_targets: expected next_target() after step {due}, where the share of target {target} of "
                f"{self.targets} ends, got none before step {step}; call extract() for its network, then next_target()"
            )

    @property
    def _warmup_steps(self) -> int:
        epochs = self.epochs / 5 if self.warmup_epochs is None else self.warmup_epochs
        return round(epochs * self.steps_per_epoch)

    @property
    def _target_steps(self) -> float:
        """Steps for each target."""
        return self.total_steps / self.targets


def ramp(step: float, warmup_steps: float, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at `warmup_steps`, then constant."""
    if step >= warmup_steps:
        return end
    return start + (end - start) * step / warmup_steps
