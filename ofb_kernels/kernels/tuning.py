"""Which configuration a kernel runs with: its default, the measured one, or, where the user asks for it, the tuned one.

A kernel lists candidates, the default first. The package's table of measurements (`measured`) may name another one for
a compute capability and sizes. With OFB_KERNELS_AUTOTUNE=1 the candidates are timed at the first launch with new sizes
on a GPU, and the fastest is kept for later processes in the file that `tuned_path` names.

Candidates that a block's shared memory cannot hold are left out: a workstation's GPU has 99 KiB, an H100 227.
"""

import functools
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from ofb_kernels.measured import TABLE, capability_of, nearest

Result = TypeVar("Result")
Launch = Callable[[dict], Result]

AUTOTUNE = os.environ.get("OFB_KERNELS_AUTOTUNE", "0") == "1"


_LOGGER = logging.getLogger(__name__)
_FITTING: dict[tuple, list[dict]] = {}  # the candidates left, for each GPU, kernel and sizes but the rows


def run_configured(
    kernel: str,
    candidates: Sequence[dict],
    sizes: tuple[int, ...],
    like: Tensor,
    launch: Launch,
    shared: Callable[[dict], int] = lambda configuration: 0,
):
    """launch(configuration), with the candidate chosen for this kernel, these sizes and the GPU of `like`.

    A candidate that the GPU refuses for want of resources is not tried again, and the next one is launched.

    Args:
        kernel: names the kernel, and with it everything but the sizes that decides which candidates there are.
        candidates: configurations, the default first.
        sizes: what the choice depends on, the number of rows first.
        like: a tensor of the launch.
        launch: allocates, launches and returns; it may run many times.
        shared: the bytes of shared memory that a block takes at most; without a product they are few.

    Raises:
        OutOfResources: the GPU has room for none of them.
    """
    if like.is_cuda:
        candidates = _fitting(kernel, candidates, sizes, like.device.index, shared)
    while True:
        configuration = choose(kernel, candidates, sizes, like, launch)
        try:
            return launch(configuration)
        except OutOfResources as error:
            if len(candidates) == 1:
                raise
            _LOGGER.warning("%s: leaves out %s on this GPU: %s", kernel, configuration, error)
            candidates.remove(configuration)


def _fitting(
    kernel: str, candidates: Sequence[dict], sizes: tuple[int, ...], device_index: int, shared: Callable[[dict], int]
) -> list[dict]:
    """Candidates that the shared memory holds, the least demanding one where it holds none."""
    key = device_index, kernel, *sizes[1:]
    if key not in _FITTING:
        limit = shared_memory_of(device_index)
        fitting = [configuration for configuration in candidates if shared(configuration) <= limit]
        _FITTING[key] = fitting or [min(candidates, key=shared)]
    return _FITTING[key]


def shared_memory_of(device_index: int) -> int:
    """Bytes of shared memory that one block may have on a GPU: the number that Triton refuses a launch by.

    torch has it too, as shared_memory_per_block_optin, but not in its builds for AMD.
    """
    return driver.active.utils.get_device_properties(device_index)["max_shared_mem"]


def choose(kernel: str, candidates: Sequence[dict], sizes: tuple[int, ...], like: Tensor, launch: Launch) -> dict:
    if len(candidates) == 1 or not like.is_cuda or not (AUTOTUNE or TABLE):
        return candidates[0]
    capability = capability_of(like.device.index)
    if AUTOTUNE and not torch.cuda.is_current_stream_capturing():
        return tuned(kernel, candidates, sizes, capability, lambda c: _milliseconds(launch, c), tuned_path())
    found = nearest(TABLE.get(capability, {}).get("configurations", {}).get(kernel, ()), sizes)
    return found if found in candidates else candidates[0]


def tuned(
    kernel: str,
    candidates: Sequence[dict],
    sizes: tuple[int, ...],
    capability: str,
    time: Callable[[dict], float],
    path: Path,
) -> dict:
    """The candidate of least time, from the file at `path` or, once for these sizes, by timing each.

    Rows count by powers of two, so that the last batch of an epoch is not tuned anew.
    """
    sizes = (triton.next_power_of_2(sizes[0]), *sizes[1:])
    entries = _read(path).setdefault(capability, {}).setdefault(kernel, [])
    for known_sizes, configuration in entries:
        if tuple(known_sizes) == sizes and configuration in candidates:
            return configuration
    fastest = min(candidates, key=time)
    entries.append([list(sizes), fastest])
    _write(path)
    return fastest


def tuned_path() -> Path:
    """Where tuned configurations are kept: $XDG_CACHE_HOME/ofb_kernels, ~/.cache/ofb_kernels without it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ofb_kernels" / f"tuned-triton-{triton.__version__}.json"


def _milliseconds(launch: Launch, configuration: dict) -> float:
    """The time of a launch, infinite where the GPU has no room for it."""
    try:
        return triton.testing.do_bench(lambda: launch(configuration), return_mode="median")
    except OutOfResources:
        return math.inf


@functools.cache
def _read(path: Path) -> dict:
    """The file's table, read once for each process; it grows in memory. An unreadable file counts as empty."""
    try:
        table = json.loads(path.read_text())
        return {
            capability: {kernel: list(table[capability][kernel]) for kernel in table[capability]}
            for capability in table
        }
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def _write(path: Path) -> None:
    """Whole or not at all: other processes may be reading. A cache that cannot be written is no reason to stop."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(_read(path), file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass
