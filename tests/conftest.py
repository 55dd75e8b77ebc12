"""One test suite for both worlds: Triton kernels run natively where there is a GPU, interpreted where there is none."""

import os

import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before ofb_kernels is imported

import pytest
from hypothesis import settings

settings.register_profile("ofb", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ofb")

torch.backends.cudnn.allow_tf32 = False  # cuDNN's default, which errs by more than the tests allow


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
