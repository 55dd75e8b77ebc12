"""Which configuration a kernel runs with: its default, the measured one, or, where the user asks for it, the tuned one.

A kernel lists candidates, the default first. The package's table of measurements (`measured`) may name another one for
a compute capability and sizes. With OFB_KERNELS_AUTOTUNE=1 the candidates are timed at the first launch with new sizes
on a GPU, and the fastest is kept for later processes in the file that `tuned_path` names.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
from torch import Tensor

from ofb_kernels.measured import TABLE, capability_of, nearest

Result = TypeVar("Result")
Launch = Callable[[dict], Result]

AUTOTUNE = os.environ.get("OFB_KERNELS_AUTOTUNE", "0") == "1"


def run_configured(kernel: str, candidates: Sequence[dict], sizes: tuple[int, ...], like: Tensor, launch: Launch):
    """launch(configuration), with the candidate chosen for this kernel, these sizes and the GPU of `like`.

    Args:
        kernel: names the kernel, and with it everything but the sizes that decides which candidates there are.
        candidates: configurations, the default first.
        sizes: what the choice depends on, the number of rows first.
        like: a tensor of the launch.
        launch: allocates, launches and returns; it may run many times.
    """
    return launch(choose(kernel, candidates, sizes, like, launch))


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
    return triton.testing.do_bench(lambda: launch(configuration), return_mode="median")


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
