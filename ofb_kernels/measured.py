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
    """What a decision depends on: rows and columns of the first input, and the mask's shape, which comes last."""
    first, *others = inputs.values()
    return first.shape[:-1].numel(), first.shape[-1], *(others[-1].shape if others else ())


def nearest(entries: Sequence[tuple[Sequence[int], Any]], sizes: Sequence[int]) -> Any | None:
    """What was decided at the measured sizes nearest to these, None where nothing was measured.

    Near is a small Σ |log(size / measured size)|: twice as many rows are as far as half as many.
    """
    measured = [entry for entry in entries if len(entry[0]) == len(sizes)]
    if not measured:
        return None
    return min(measured, key=lambda entry: _distance(entry[0], sizes))[1]


@torch.compiler.assume_constant_result
def capability_of(device_index: int) -> str:
    """Compute capability of a GPU, as in "9.0"."""
    return ".".join(map(str, torch.cuda.get_device_capability(device_index)))


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(abs(math.log(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))
