"""Timing of calls: in turns, until the times are stable, and never stable where they cannot be trusted."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain, cycle, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ofb.supernet import timing
from ofb.supernet.timing import LEAST_ROUNDS, STABLE, TRIALS, WARMUP_CALLS, Timing, time_calls

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that calls alone move: `clock(seconds)` makes one that takes these seconds, one after the other."""
    state = SimpleNamespace(now=0.0, waited=0.0, called=[])

    def call(seconds: Iterator[float], name: str = "") -> Callable[[], None]:
        def run() -> None:
            state.now += next(seconds)
            state.called.append(name)

        return run

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: state.now))
    monkeypatch.setattr(timing, "_seconds_waited", lambda: state.waited)
    call.state = state
    return call


def test_quantiles_of_a_call(clock):
    seconds = chain(repeat(0.010, WARMUP_CALLS), cycle([0.008, 0.009, 0.010, 0.011, 0.012]))
    found = time_calls({"call": clock(seconds)}, CPU, judged=(), trial_seconds=0)["call"]
    assert found.rounds == LEAST_ROUNDS
    assert (found.low, found.ms, found.high) == pytest.approx((8.8, 10.0, 11.2), abs=0.21)
    assert found.spread == pytest.approx((found.high - found.low) / found.ms) and not found.stable


def test_calls_take_turns(clock):
    calls = {name: clock(repeat(0.002), name) for name in "abc"}
    time_calls(calls, CPU, trial_seconds=0)
    rounds = "".join(clock.state.called)[3 * WARMUP_CALLS :]
    assert rounds == ("abccba" * LEAST_ROUNDS)[: 3 * LEAST_ROUNDS]


def test_a_short_call_is_repeated(clock):
    """A clock's own steps would show in a call of some microseconds."""
    found = time_calls({"short": clock(repeat(0.0001))}, CPU, trial_seconds=0)["short"]
    assert found.ms == pytest.approx(0.1) and found.stable
    assert len(clock.state.called) == WARMUP_CALLS + 5 * LEAST_ROUNDS


def test_a_trial_lasts_as_long_as_asked(clock):
    assert time_calls({"call": clock(repeat(0.010))}, CPU, trial_seconds=1.0)["call"].rounds == pytest.approx(
        100, abs=1
    )


def test_a_disturbance_that_passes_is_waited_for(clock):
    disturbed = chain(repeat(0.010, WARMUP_CALLS), cycle([0.010, 0.030]))
    seconds = chain((next(disturbed) for _ in range(WARMUP_CALLS + LEAST_ROUNDS)), repeat(0.010))
    found = time_calls({"call": clock(seconds)}, CPU, trial_seconds=0)["call"]
    assert found.stable and found.ms == pytest.approx(10.0)
    assert len(clock.state.called) == WARMUP_CALLS + 2 * LEAST_ROUNDS


def test_without_a_stable_trial_the_best_is_unstable(clock):
    trials = (cycle([0.010, 0.010 + 0.005 * worse]) for worse in (3, 2, 1, 4))
    seconds = chain(repeat(0.010, WARMUP_CALLS), *([next(trial) for _ in range(LEAST_ROUNDS)] for trial in trials))
    found = time_calls({"call": clock(seconds)}, CPU, trial_seconds=0)["call"]
    assert not found.stable and found.spread == pytest.approx(0.5)
    assert len(clock.state.called) == WARMUP_CALLS + TRIALS * LEAST_ROUNDS


def test_one_unstable_call_is_enough(clock):
    calls = {"steady": clock(repeat(0.010)), "moving": clock(cycle([0.010, 0.030, 0.050]))}
    found = time_calls(calls, CPU, trial_seconds=0)
    assert found["steady"].stable and not found["moving"].stable
    assert len(clock.state.called) == 2 * (WARMUP_CALLS + TRIALS * LEAST_ROUNDS)


def test_slow_calls_end_in_time(clock):
    assert time_calls({"slow": clock(repeat(60.0))}, CPU)["slow"].rounds == timing.FEWEST_ROUNDS


def test_equal_times_are_not_stable_while_threads_wait(clock):
    """As many threads as cores beside another process: all wait for the last one, a hundred times slower each time."""

    def call() -> None:
        clock.state.now += 0.010
        clock.state.waited += 0.002 * torch.get_num_threads()

    found = time_calls({"call": call}, CPU, trial_seconds=0)["call"]
    assert found.spread == pytest.approx(0) and found.waiting == pytest.approx(0.2) and not found.stable


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux says how long threads waited")
def test_a_busy_machine_is_noticed():
    """Two other processes on the one core of this process: it has to wait for it most of the time."""
    code = (
        "import os, subprocess, sys, torch\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "torch.set_num_threads(1)\n"
        "from ofb.supernet.timing import time_calls\n"
        "others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(2)]\n"
        "try:\n"
        "    found = time_calls({'call': lambda: sum(range(20_000))}, torch.device('cpu'), trial_seconds=0.5)['call']\n"
        "    print(found.waiting, found.stable)\n"
        "finally:\n"
        "    for other in others: other.kill()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    waiting, stable = done.stdout.split()
    assert float(waiting) > STABLE and stable == "False"


def test_noise_is_the_worse_of_both():
    assert Timing(9.9, 10.0, 10.1, 20, 0.3).noise == 0.3
    assert Timing(9.0, 10.0, 12.0, 20, 0.1).noise == pytest.approx(0.3)
    assert Timing(9.5, 10.0, 10.5, 20).stable
