"""Which backends and dtypes a test runs with on this machine."""

import pytest
import torch

BACKENDS = ("reference", "eager", "triton")


def dtypes_of(*backends: str) -> list:
    """(backend, dtype) pairs; Triton takes no float64 on a GPU, and its interpreter computes garbage in bfloat16."""
    has_gpu = torch.cuda.is_available()
    triton_dtypes = [torch.float32, torch.float16, torch.bfloat16 if has_gpu else torch.float64]
    plain_dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    return [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in backends
        for dtype in (triton_dtypes if backend == "triton" else plain_dtypes)
    ]
