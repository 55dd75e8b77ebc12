"""How long a stage will take, told once its first steps have been timed."""

import sys
import time
from importlib.util import find_spec

import torch

TIMED_STEPS = 10, 20  # behind the first and up to the last of them: kernels are compiled and the step is captured
WORDS = {"train": "training", "finetune": "fine-tuning"}  # for stages
UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}


class StepClock:
    """Times some of a stage's first steps, to say what is left.

    Where an epoch has fewer than 20 steps, it times those of a whole epoch but for the first one, and the validation
    after them; where it has a single one, the whole second epoch. The host waits for the device twice.

    Args:
        device: of the steps.
        steps_per_epoch: steps in an epoch.

    Attributes:
        step_seconds: for one step; None until it is known.
        epoch_seconds: for what comes after the steps of an epoch; 0 where epochs are long.
    """

    def __init__(self, device: torch.device, steps_per_epoch: int) -> None:
        self.device = device
        self.is_short = steps_per_epoch < TIMED_STEPS[1]
        self.first, self.last = (min(1, steps_per_epoch - 1), steps_per_epoch) if self.is_short else TIMED_STEPS
        self.steps, self.start, self.end = 0, None, 0.0
        self.step_seconds: float | None = None
        self.epoch_seconds, self.is_done = 0.0, False

    def stepped(self) -> bool:
        """Count a step of an epoch; whether all there is to know has just become known."""
        self.steps += 1
        if self.step_seconds is not None:
            return False
        if self.steps == self.first:
            self.start = self._now()
        elif self.steps == self.last and self.start is not None:
            self.end = self._now()
            self.step_seconds = (self.end - self.start) / (self.last - self.first)
            self.is_done = not self.is_short
        return self.is_done

    def epoch_ended(self) -> bool:
        """Count an epoch; whether all there is to know has just become known."""
        self.steps = 0
        if self.is_done:
            return False
        if self.step_seconds is None:
            self.start = self._now() if self.first == 0 else None
            return False
        self.epoch_seconds, self.is_done = time.perf_counter() - self.end, True
        return True

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def describe_estimate(clock: StepClock, name: str, steps: tuple[int, int], epochs: tuple[int, int]) -> str:
    """How long it will take, and what memory it has taken so far, in a line.

    Args:
        clock: that has timed the stage's first steps.
        name: of the stage.
        steps, epochs: that are left of the stage, and that come after it, taken to be as fast.
    """
    left, later = (
        some_steps * clock.step_seconds + some_epochs * clock.epoch_seconds
        for some_steps, some_epochs in zip(steps, epochs, strict=True)
    )
    kind, _, target = name.partition("-")
    stage = f"{WORDS.get(kind, kind)}{f' to {target}' if target else ''}"
    words = f"about {describe_seconds(left)} for {epochs[0]} epoch{'s' if epochs[0] > 1 else ''} of {stage}"
    if epochs[1]:
        more = "more " if kind == "finetune" else ""
        words += f", {describe_seconds(left + later)} with {epochs[1]} {more}of fine-tuning"
    each = clock.step_seconds
    words += f"; {f'{1000 * each:.3g} ms' if each < 1 else f'{each:.1f} s'} a step"
    words += "" if clock.is_short else ", validation not counted"
    memory = peak_memory(clock.device)
    return words if memory is None else f"{words}; peak memory {memory / 2**30:.1f} GiB"


def describe_seconds(seconds: float) -> str:
    """A time in its two largest units, 3 h 10 min; seconds only below ten minutes."""
    rounded = max(1, round(seconds))
    units = {name: unit for name, unit in UNITS.items() if unit > 1 or rounded < 600}
    largest = next(i for i, unit in enumerate(units.values()) if unit <= rounded)
    smallest = list(units.values())[largest : largest + 2][-1]
    rounded, words = round(rounded / smallest) * smallest, []
    for name, unit in units.items():
        count, rounded = divmod(rounded, unit)
        words += [f"{count} {name}"] if count else []
    return " ".join(words)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes this process has held so far: of the GPU's memory, or else of the host's; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if find_spec("resource") is None:  # Windows
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
