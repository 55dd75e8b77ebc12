"""Every op at DeiT-S's own sizes, forward and backward, against the float64 reference."""

import pytest
import torch

import ofb_kernels
from benchmarks.floors import SIZES, Sizes
from benchmarks.measure import mixed_precision
from benchmarks.ops import Case, cases
from ofb_kernels.testing import check_op

SHAPES = {"full": Sizes(2, **SIZES["deit_small"]), "half": Sizes(2, **SIZES["deit_small"]).halved()}
# bimask is left out: its inputs cannot be moved a little without changing ranks
OPS = sorted(set(ofb_kernels.__all__) - {"use_backend", "masked_qkv_attention", "bimask"})


def case_of(op: str, size: str, device: str) -> Case:
    return next(case for case in cases(SHAPES[size], device) if case.op == op)


@pytest.mark.parametrize(
    ("op", "size"), [(op, size) for op in OPS for size in SHAPES if (op, size) != ("local_norm", "half")]
)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_against_float64(backend, op, size, device):
    case = case_of(op, size, device)
    function = getattr(ofb_kernels, op)

    def joined(**arguments):
        with mixed_precision(device):
            result = function(**arguments)
        return torch.cat(result, -1) if isinstance(result, tuple) else result

    if not case.leaves():
        exact = joined(**{name: tensor.double() for name, tensor in case.inputs.items()}, backend="reference")
        torch.testing.assert_close(joined(**case.inputs, backend=backend).double(), exact, rtol=1e-3, atol=1e-3)
        return
    rows = SHAPES[size].rows
    check_op(joined, case.inputs, case.options, backend, reduction=max(rows, SHAPES[size].hidden))
