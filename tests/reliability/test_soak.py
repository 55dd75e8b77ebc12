"""Ten thousand steps leave no trace

Memory, files, threads, tensors and step time stay flat.

A real supernet of a small ViT is searched with its optimizer, masked images and pruning to the end, and what it found
is then trained like any network, in one process. After a tenth of each stage for warming up, a footprint is taken nine
times: resident memory may grow by 16 MiB in all (at night 1.7 KB for each step, less than an image), open files and
threads not at all, and tensors that Python can reach not at all in training, in the search by one for each parameter
(the losses that set in halfway give some their first gradient, the first pruning event stacks the masks anew). The
processor time of a step, the median over a tenth of the stage, may not grow by more than half: pruning makes the
network smaller, and others work on the same processor.
"""

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from ofb import Supernet
from tests.common import tiny_vit

BATCH = 8
STEPS = {False: (240, 60), True: (10_000, 2_000)}  # of search and training: in the ordinary run, at night
MOST_GROWTH = 16 * 2**20  # bytes of resident memory
MOST_SLOWDOWN = 1.5
LEAST_TIMES = 100


@pytest.fixture(autouse=True)
def only_what_is_made_here():
    """The garbage collector looks at nothing that was there before, and free memory of others hides no growth."""
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)
    yield
    gc.unfreeze()


@dataclass(frozen=True)
class Footprint:
    resident: int  # bytes
    files: int
    threads: int
    tensors: int

    @classmethod
    def now(cls) -> "Footprint":
        gc.collect()
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        return cls(resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), tensors)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, 3, 16, 16), torch.randint(5, (BATCH,))


def watch(step: Callable[[], None], steps: int) -> tuple[list[Footprint], float | None]:
    """Nine footprints after a tenth for warming up, and a step's time in the last tenth, by that in the second.

    The time is None where a tenth is too few steps for a median that others on this processor do not move.
    """
    footprints, seconds = [], []
    for number in range(steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
        if number >= steps // 10 and (number + 1) % (steps // 10) == 0:
            footprints.append(Footprint.now())
    tenth = steps // 10
    slowdown = statistics.median(seconds[-tenth:]) / statistics.median(seconds[tenth : 2 * tenth])
    return footprints, slowdown if tenth >= LEAST_TIMES else None


def assert_flat(footprints: list[Footprint], slowdown: float | None, more_tensors: int = 0) -> int:
    """Bytes of resident memory that were added."""
    first, later = footprints[0], footprints[1:]
    growth = max(each.resident for each in later) - first.resident
    assert growth <= MOST_GROWTH, f"{growth:,} bytes more resident memory: {footprints}"
    for kind, more in {"files": 0, "threads": 0, "tensors": more_tensors}.items():
        assert max(getattr(each, kind) for each in later) <= getattr(first, kind) + more, f"more {kind}: {footprints}"
    assert slowdown is None or slowdown <= MOST_SLOWDOWN, f"a step takes {slowdown:.2f} times as long at the end"
    return growth


def search_step(supernet: Supernet, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        losses = supernet.loss(*batch())
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        supernet.step(optimizer)

    return step


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        images, classes = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()

    return step


def test_ten_thousand_steps_leave_no_trace(night, evidence):
    search_steps, train_steps = STEPS[night]
    supernet = Supernet(tiny_vit(), "50%", epochs=search_steps // 20, steps_per_epoch=20, mask_ratio_end=0.5)
    optimizer = torch.optim.AdamW(supernet.parameter_groups(), lr=1e-3)
    footprints, slowdown = watch(search_step(supernet, optimizer), search_steps)
    assert supernet.finished and len(supernet.choices) == len(supernet.bimasks)
    growth = assert_flat(footprints, slowdown, more_tensors=len(list(supernet.parameters())))
    evidence("search steps in one process", search_steps)
    evidence("resident memory added by the search", f"{growth / 2**20:.1f} MiB")
    evidence("files, threads, tensors at its end", _described(footprints))
    evidence("time of its last steps, by its first", _times(slowdown))

    model = supernet.extract().train()
    del supernet, optimizer
    footprints, slowdown = watch(train_step(model, torch.optim.AdamW(model.parameters(), lr=1e-3)), train_steps)
    evidence("training steps of the found network", train_steps)
    evidence("resident memory added by its training", f"{assert_flat(footprints, slowdown) / 2**20:.1f} MiB")
    evidence("files, threads, tensors at the end of training", _described(footprints))
    evidence("time of its last training steps, by its first", _times(slowdown))


def _times(slowdown: float | None) -> str:
    return "too few steps" if slowdown is None else f"{slowdown:.2f}"


def _described(footprints: list[Footprint]) -> str:
    first, last = footprints[0], footprints[-1]
    pairs = ((first.files, last.files), (first.threads, last.threads), (first.tensors, last.tensors))
    return ", ".join(f"{before} → {after}" for before, after in pairs)


def test_a_leak_would_be_seen():
    """A tensor kept at every step, a file never closed: the same measurement finds them."""
    kept = []
    with pytest.raises(AssertionError, match="more tensors"):
        assert_flat(*watch(lambda: kept.append(torch.randn(8)), 100))
    with pytest.raises(AssertionError, match="more files"):
        assert_flat(*watch(lambda: kept.append(open(os.devnull)), 100))
    with pytest.raises(AssertionError, match="bytes more resident memory"):
        assert_flat(*watch(lambda: kept.append(bytearray(os.urandom(2**20))), 100))
    for each in kept:
        if hasattr(each, "close"):
            each.close()
