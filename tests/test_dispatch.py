"""dispatch: the order of decision, refusals, and a package that works where triton is not installed."""

import os
import subprocess
import sys

import pytest
import torch

import ofb_kernels
from ofb_kernels import dispatch, use_backend
from ofb_kernels.dispatch import choose_backend, explain_backend, triton_refusal
from tests.fake_cuda import pretend_cuda

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


def test_why(monkeypatch):
    """The reason is that of the choice itself, in each of its cases."""
    x, mask = torch.ones(4, 8), torch.ones(8)

    def why(op="some_op", backend=None, inputs=None, limits=None):
        inputs = inputs or {"x": x, "mask": mask}
        chosen, reason = explain_backend(op, inputs, backend, limits)
        assert chosen == choose_backend(op, backend, inputs, limits)
        return f"{chosen}: {reason}"

    if not torch.cuda.is_available():
        assert why() == "eager: no CUDA device"
    assert why(backend="reference") == "reference: asked for by backend"
    with use_backend("eager"):
        assert why() == "eager: asked for by use_backend"
    monkeypatch.setenv(VARIABLE, "reference")
    assert why() == f"reference: asked for by {VARIABLE}"
    monkeypatch.delenv(VARIABLE)

    pretend_cuda(monkeypatch, "9.0")
    monkeypatch.setattr(dispatch, "TABLE", {})
    assert why() == "triton: nothing was measured"
    entries = [[[4, 8, 8], "eager"], [[400, 8, 8], "triton"]]
    monkeypatch.setattr(dispatch, "TABLE", {"9.0": {"backends": {"some_op": entries}}})
    assert why() == "eager: measured faster at the nearest sizes"
    assert why(inputs={"x": torch.ones(300, 8), "mask": mask}) == "triton: measured faster at the nearest sizes"
    assert why("another_op") == "triton: not measured on capability 9.0"
    pretend_cuda(monkeypatch, "8.0")
    assert why() == "triton: not measured on capability 8.0"
    assert why(limits="expected less") == "eager: triton cannot serve it: expected less"
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert why() == "eager: triton cannot serve it: expected the package triton to be installed, got no such package"


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
