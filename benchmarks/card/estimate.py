"""How long a run on a card compiles, estimated without one: how many kernels there are, and how long one takes here."""

import os
import tempfile
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import mean
from unittest import mock

from benchmarks.card.parts import ALL_OPS, TESTS
from benchmarks.resources import Piece, compile_all

ARCH = 90  # H100 and H200
CORES = 16  # that compile at once beside such a card
SAMPLE = Piece("shapes", ("masked_mlp", "float16"), ARCH, count=False)  # compiled to see how long one kernel takes
# The launches of a part and its processes. What smoke compiles, the parts behind it find in Triton's cache.
LAUNCHES = {"smoke": ("card", len(ALL_OPS)), "tests": ("tests", len(TESTS))}


def compile_estimate(parts: Collection[str]) -> str:
    """Distinct specialisations × seconds that one takes on this machine ÷ processes, for each part that compiles."""
    seconds = seconds_each()
    lines = [f"compiling, estimated: one kernel takes {seconds:.2f} s here, {CORES} cores are assumed there"]
    for name, (launches, processes) in LAUNCHES.items():
        if name in parts:
            at_once = min(processes, CORES)
            count = len(compile_all([launches], ARCH, os.cpu_count() or 1, count=True))
            expected = f"{count * seconds / at_once:.0f} s"
            lines.append(f"  {name}: {count} specialisations × {seconds:.2f} s ÷ {at_once} processes = {expected}")
    return "\n".join(lines)


def seconds_each() -> float:
    """Mean time of compiling a kernel, in a process of its own and with nothing in Triton's cache."""
    with tempfile.TemporaryDirectory() as cache:
        with mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache, TRITON_INTERPRET="0"):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                return mean(row.seconds for row in pool.submit(SAMPLE.run).result())
