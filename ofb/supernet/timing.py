"""How long calls take: timed in turns, again until the times are stable, or else said to be unstable."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

QUANTILES = (0.2, 0.5, 0.8)
STABLE = 0.10  # the most that the quantiles of a stable timing lie apart, and that its threads wait for a core
TRIALS, TRIAL_SECONDS, MOST_SECONDS = 4, 0.5, 10.0
LEAST_ROUNDS, FEWEST_ROUNDS = 15, 5  # of a trial; of one that has taken all the time there is
LEAST_MS = 0.5  # of one measurement: a shorter call is repeated
WARMUP_CALLS = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call.

    Attributes:
        low, ms, high: the 20 % quantile, the median and the 80 % quantile over the rounds.
        rounds: how often it was measured.
        waiting: the share of the time that this process's threads waited for a core; 0 except on Linux, which tells.
    """

    low: float
    ms: float
    high: float
    rounds: int
    waiting: float = 0.0

    @property
    def spread(self) -> float:
        """How far the quantiles lie apart, relative to the median."""
        return (self.high - self.low) / self.ms

    @property
    def noise(self) -> float:
        """The spread or the waiting, whichever is more."""
        return max(self.spread, self.waiting)

    @property
    def stable(self) -> bool:
        """The machine was quiet enough for this timing to be compared with others."""
        return self.noise <= STABLE


@torch.inference_mode()
def time_calls(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    judged: Collection[str] | None = None,
    trial_seconds: float = TRIAL_SECONDS,
) -> dict[str, Timing]:
    """Time calls in turns, so that what else the machine does slows all of them alike.

    A trial has at least 15 rounds. The first trial in which all judged calls are stable is the result. After four
    trials, or ten seconds, it is the best of those that were not.

    Args:
        calls: what is timed, by name.
        device: where they run.
        judged: names of the calls that have to be stable; all if None.
        trial_seconds: how long a trial lasts at least.
    """
    judged, deadline = list(calls) if judged is None else judged, time.perf_counter() + MOST_SECONDS
    repeats = {name: _repeats(call, device) for name, call in calls.items()}
    trials = []
    while len(trials) < TRIALS and (not trials or time.perf_counter() < deadline):
        trials.append(_trial(calls, repeats, device, trial_seconds, deadline))
        if all(trials[-1][name].stable for name in judged):
            return trials[-1]
    return min(trials, key=lambda timings: max(timings[name].noise for name in judged))


def device_name(device: torch.device) -> str:
    """The device as a timing names it: a GPU's product name, or the CPU with torch's present number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}"


def _trial(
    calls: Mapping[str, Callable[[], object]],
    repeats: Mapping[str, int],
    device: torch.device,
    seconds: float,
    deadline: float,
) -> dict[str, Timing]:
    order, rounds = list(calls), []
    start, waited = time.perf_counter(), _seconds_waited()
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() < start + seconds:
        rounds.append({name: _milliseconds(calls[name], repeats[name], device) for name in order})
        order.reverse()  # so that no call always comes after the same one
        if len(rounds) >= FEWEST_ROUNDS and time.perf_counter() > deadline:
            break
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    waiting = (_seconds_waited() - waited) / (time.perf_counter() - start) / threads
    quantiles = {name: np.quantile([times[name] for times in rounds], QUANTILES).tolist() for name in calls}
    return {name: Timing(*each, len(rounds), waiting) for name, each in quantiles.items()}


def _repeats(call: Callable[[], object], device: torch.device) -> int:
    """Warm a call up, and say how often it runs in one measurement."""
    fastest = min(_milliseconds(call, 1, device) for _ in range(WARMUP_CALLS))
    return math.ceil(LEAST_MS / fastest)


def _milliseconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Milliseconds of a call, of so many one after the other."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _seconds_waited() -> float:
    """How long the threads of this process have been ready to run and had no core; 0 where the system does not say.

    With more threads than free cores, all of them wait for the last at each operation: a hundred times slower, and just
    as slow each time.
    """
    waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that has just ended, or a kernel without these figures
            continue
    return 1e-9 * waited
