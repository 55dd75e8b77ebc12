"""Launches of the op tests: pytest runs a test module in this process, where launches are compiled instead of run.

CPU tensors pass for CUDA ones, in the dtypes that a GPU takes. What an op returns is memory that no kernel wrote, so
results are not compared, and what a test still finds wrong with them says nothing.
"""

from contextlib import ExitStack, redirect_stdout
from io import StringIO
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.compile_only import Recorder, cpu_as_gpu
from ofb_kernels import dispatch, testing
from tests import common

MODULES = (
    "masked_attention",  # makes the most launches: first, so that it is not what the others wait for
    "bimask",
    "candidate_statistics",
    "masked_linear",
    "masked_mlp",
    "masked_layer_norm",
    "masked_add_layer_norm",
    "local_norm",
    "masked_reconstruction_loss",
    "dispatch",
    "nn",
    "tuning",
    "deit_shapes",
)


def run_tests(module: str, recorder: Recorder) -> None:
    """Every launch of tests/test_<module>.py; those of other backends than triton make none and are left out."""
    patches = [
        cpu_as_gpu(),
        mock.patch.object(common, "dtypes_of", _dtypes_of),
        mock.patch.object(testing, "check_op", _launch_op),
        mock.patch.object(testing, "assert_accurate", lambda *_: None),
        mock.patch.object(torch.testing, "assert_close", lambda *_, **__: None),
        mock.patch.object(torch, "equal", lambda *_: True),
    ]
    options = ["-qq", "--no-summary", "-pno:cacheprovider", "-pno:xdist", "-pno:warnings", f"tests/test_{module}.py"]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        with redirect_stdout(StringIO()) as output:
            code = pytest.main(options, plugins=[_Plugin(recorder)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest did not run tests/test_{module}.py to its end: {code!r}\n{output.getvalue()}")


class _Plugin:
    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def backend_of(item: pytest.Item) -> str:
            return item.callspec.params.get("backend", "triton") if hasattr(item, "callspec") else "triton"

        items[:] = [item for item in items if backend_of(item) not in ("reference", "eager")]

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self.recorder.source = item.nodeid


def _dtypes_of(*backends: str) -> list:
    dtypes = dispatch._CUDA_DTYPES if "triton" in backends else ()
    return [pytest.param("triton", dtype, id=f"triton-{str(dtype).removeprefix('torch.')}") for dtype in dtypes]


def _launch_op(
    op, inputs: dict[str, Tensor], options: dict, backend: str, reduction: int, cotangent: Tensor | None = None
) -> None:
    """In the place of `testing.check_op`: the op and all its gradients on one backend, without a reference."""
    leaves = {name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in inputs.items()}
    result = op(**leaves, **options, backend=backend)
    cotangent = torch.ones_like(result) if cotangent is None else cotangent.to(result.dtype)
    torch.autograd.grad(result, [leaf for leaf in leaves.values() if leaf.requires_grad], cotangent)
