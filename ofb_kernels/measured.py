"""What was the fastest where: decisions of the benchmark, kept as data in measured.json.

The table maps a compute capability to "backends" and "configurations": for an op, pairs of sizes and the backend that
was fastest there; for a kernel, pairs of sizes and its fastest configuration. It is written by
`python -m benchmarks.decide` from measured times; a capability that was never measured has no entry.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).with_name("measured.json")
TABLE: Mapping[str, Mapping[str, Mapping[str, Sequence]]] = json.loads(PATH.read_text())


def sizes_of(inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
    """What a decision depends on: rows and columns of the first input, the mask's shape, and that of attention's bias.

    Other inputs may be there or not. What was measured without a bias says nothing of a call with one.
    """
    first = next(iter(inputs.values()))
    mask = inputs["mask"].shape if "mask" in inputs else ()
    biases = [tensor.shape for name, tensor in inputs.items() if name.endswith("bias") and tensor.dim() > 2]
    return first.shape[:-1].numel(), first.shape[-1], *mask, *(size for shape in biases for size in shape)


def nearest(entries: Sequence[tuple[Sequence[int], Any]], sizes: Sequence[int]) -> Any | None:
    """What was decided at the measured sizes nearest to these, None where nothing was measured.

    Near is a small Σ |log(size / measured size)|: twice as many rows are as far as half as many.
    """
    found, least = None, math.inf
    for measured_at, decided in entries:  # torch.compile (2.11) takes no min() by a key of sizes that may change
        if len(measured_at) == len(sizes) and (distance := _distance(measured_at, sizes)) < least:
            found, least = decided, distance
    return found


@torch.compiler.assume_constant_result
def capability_of(device_index: int) -> str:
    """Compute capability of a GPU, as in "9.0"."""
    return ".".join(map(str, torch.cuda.get_device_capability(device_index)))


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(abs(math.log(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))
