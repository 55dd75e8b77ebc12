"""dispatch: the order of decision, refusals, and a package that works where triton is not installed."""

import os
import subprocess
import sys

import pytest
import torch

import ofb_kernels
from ofb_kernels import dispatch, use_backend
from ofb_kernels.dispatch import choose_backend, triton_refusal

VARIABLE = "OFB_KERNELS_BACKEND"


def choose(backend=None, dtype=torch.float32, device="cpu", limits=None):
    return choose_backend("some_op", backend, {"x": torch.ones(2, dtype=dtype, device=device)}, limits)


@pytest.fixture(autouse=True)
def without_the_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_nothing_asked_for_on_a_cpu_is_eager():
    assert choose() == "eager"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_asked_for_on_a_gpu_is_triton_where_it_serves():
    assert choose(device="cuda") == "triton"
    assert choose(device="cuda", dtype=torch.float64) == "eager"
    assert choose(device="cuda", limits="expected less") == "eager"


def test_environment_then_context_then_argument(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose() == "reference"
    with use_backend("eager"):
        assert choose() == "eager"
        with use_backend("reference"):
            assert choose() == "reference"
            assert choose("eager") == "eager"
        assert choose() == "eager"
    assert choose() == "reference"


def test_empty_variable_asks_for_nothing(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    assert choose() == "eager"


def test_context_ends_with_an_error():
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert choose() == "eager"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend: expected one of reference, eager, triton, got 'cuda'"):
        choose("cuda")
    with pytest.raises(ValueError, match="backend: expected one of reference, eager, triton, got 'cuda'"):
        use_backend("cuda").__enter__()
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{VARIABLE}: expected one of reference, eager, triton, got 'cuda'"):
        choose()


def test_triton_by_name_serves_or_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert choose("triton") == "triton"
    with pytest.raises(ValueError, match="backend='triton' .* expected x as one of .*, got bfloat16"):
        choose("triton", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: expected less"):
        choose("triton", limits="expected less")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="some_op: backend='triton' .* expected x on a CUDA device, got cpu"):
        choose("triton")
    with use_backend("triton"), pytest.raises(ValueError, match="some_op: use_backend='triton' cannot serve"):
        choose()
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match=f"some_op: {VARIABLE}='triton' cannot serve"):
        choose()


def test_refusal_names_the_first_tensor_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    inputs = {"x": torch.ones(2), "mask": torch.ones(2, dtype=torch.bfloat16)}
    assert "expected mask as one of float32, float16, float64, got bfloat16" in triton_refusal(inputs)
    assert triton_refusal({"x": torch.ones(2)}) is None


def test_public_names_are_there():
    assert all(callable(getattr(ofb_kernels, name)) for name in ofb_kernels.__all__)


def test_works_without_triton():
    """A Python in which importing triton fails: the package imports, falls back to eager, refuses triton by name."""
    script = """
import sys
sys.modules["triton"] = None
import torch, ofb_kernels, ofb_kernels.nn
x, weight, mask = torch.randn(3, 4), torch.randn(5, 4), torch.rand(5)
out = ofb_kernels.masked_linear(x, weight, None, mask, "gelu")
torch.testing.assert_close(out, ofb_kernels.masked_linear(x, weight, None, mask, "gelu", backend="reference"))
try:
    ofb_kernels.masked_linear(x, weight, None, mask, backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "TRITON_INTERPRET")}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "expected the package triton to be installed, got no such package" in result.stdout
