"""Every op at DeiT-S's own sizes, forward and backward, against the float64 reference."""

import pytest
import torch

import ofb_kernels
from benchmarks.card.smoke import case_of, check
from benchmarks.floors import SIZES, Sizes
from benchmarks.ops import OF_IMAGES

DEIT_SMALL = Sizes(1, **SIZES["deit_small"])
OPS = sorted(set(ofb_kernels.__all__) - {"use_backend"})


@pytest.mark.parametrize(
    ("op", "size"), [(op, size) for op in OPS for size in ("full", "half") if size == "full" or op not in OF_IMAGES]
)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_against_float64(backend, op, size, device):
    """In bfloat16 on a GPU, as in a search; in float32 in Triton's interpreter."""
    case = case_of(op, DEIT_SMALL.named(size), device)
    assert check(case, torch.bfloat16 if device == "cuda" else torch.float32, backend) <= 1
