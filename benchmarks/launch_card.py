"""Launches of a run on a card (benchmarks/card): each op as smoke and times call it, and search steps.

CPU tensors pass for CUDA ones; launches are compiled instead of run, so that what the ops return is memory that no
kernel wrote. The batch is small: that of a card has the same specialisations, a multiple of 16 rows.
"""

from argparse import Namespace
from collections.abc import Callable
from unittest import mock

import torch

from benchmarks import ops
from benchmarks.card.tiny_case import biased
from benchmarks.compile_only import Recorder, cpu_as_gpu, every_configuration
from benchmarks.floors import SIZES, TINY, Sizes

BATCH = 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STEPS = (("deit_small", "full"), ("deit_small", "half"), ("deit_base", "full"))


def run_ops(recorder: Recorder, dtype: str) -> None:
    """Every op at DeiT-S's sizes, at pruned ones, and at those that the memory checker watches; every configuration."""
    low = DTYPES[dtype]
    whole = Sizes(BATCH, **SIZES["deit_small"])
    labels = {whole: "timed", whole.pruned(): "multiples of 8", Sizes(2, **TINY).pruned(): "multiples of 8"}
    for sizes, label in labels.items():
        for case in ops.cases(sizes, "cpu", low):
            recorder.source = f"{case.op} {dtype} on a card: {label}"
            with mock.patch.object(ops, "mixed_precision", lambda device: _autocast(low)):
                ops.pass_of(lambda case=case: case.run("triton"), case, "both" if case.leaves() else "forward")()
            if case.op == "masked_attention" and sizes.batch < BATCH:
                biased(case.inputs["qkv"], case.inputs["mask"], "cpu")


def run_steps(recorder: Recorder) -> None:
    """A search step of each network that is timed, in bfloat16."""
    from benchmarks import step  # here: it imports timm, which takes seconds

    arguments = Namespace(device="cpu", residual_mask="stream", variants=["triton"], without=[])
    for model, size in STEPS:
        recorder.source = f"step of {model}, {size}, bfloat16 on a card: timed"
        with mock.patch.object(step, "mixed_precision", lambda device: _autocast(torch.bfloat16)):
            step.make_steps(model, BATCH, size, arguments)["triton"]()()


RUNS: dict[str, Callable[[Recorder], None]] = {
    "bfloat16": lambda recorder: run_ops(recorder, "bfloat16"),
    "float32": lambda recorder: run_ops(recorder, "float32"),
    "steps": run_steps,
}


def run_card(name: str, recorder: Recorder) -> None:
    with cpu_as_gpu(), every_configuration():
        RUNS[name](recorder)


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
