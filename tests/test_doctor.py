"""ofb doctor: it tells versions, backends and reasons, and finds an op that computes the wrong thing."""

import importlib.metadata

import pytest
import torch

import ofb_kernels
from ofb import doctor
from ofb.cli import main
from ofb_kernels import dispatch
from tests.fake_cuda import pretend_cuda

OPS = set(ofb_kernels.__all__) - {"use_backend"}


def test_all_is_well_here(device, capsys, monkeypatch):
    monkeypatch.delenv("OFB_KERNELS_BACKEND", raising=False)
    assert main(["doctor", "--device", str(device)]) == 0
    shown = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}" in shown and shown.endswith("all is well\n")
    assert "each agrees with float64, forward and backward" in shown
    assert "extra   export: onnx " in shown


def backends_shown(shown: str) -> dict[str, str]:
    """What the doctor says of each op."""
    lines = [line.split(maxsplit=1) for line in shown.splitlines()]
    return {words[0]: words[1] for words in lines if words[0] in OPS}


def test_why_a_backend_runs(monkeypatch):
    """Every public op has a line."""
    monkeypatch.setenv("OFB_KERNELS_BACKEND", "reference")
    shown, well = doctor.diagnose(torch.device("cpu"))
    assert "\nsteps   by default in fp32, without a CUDA graph: the device is cpu\n" in shown
    assert well and backends_shown(shown) == dict.fromkeys(OPS, "reference: asked for by OFB_KERNELS_BACKEND")
    monkeypatch.delenv("OFB_KERNELS_BACKEND")
    shown, well = doctor.diagnose(torch.device("cpu"))
    assert well and backends_shown(shown) == dict.fromkeys(OPS, "eager: no CUDA device")


def test_what_was_measured_decides(monkeypatch, device):
    """Tensors only claim to be on a GPU; interpreted kernels and the eager form of a GPU are checked behind that."""
    monkeypatch.delenv("OFB_KERNELS_BACKEND", raising=False)
    measured = {"masked_qkv_attention": [[[34, 32, 2, 16], "eager"], [[50_432, 384, 6, 64], "triton"]]}
    measured |= {"masked_mlp": [[[50_432, 384, 1536], "triton"]]}
    monkeypatch.setattr(dispatch, "TABLE", {"9.0": {"backends": measured}})
    pretend_cuda(monkeypatch, "9.0")
    shown, well = doctor.diagnose(torch.device(device))
    expected = dict.fromkeys(OPS, "triton: not measured on capability 9.0")
    expected["masked_qkv_attention"] = "eager: measured faster at the nearest sizes"
    expected["masked_mlp"] = "triton: measured faster at the nearest sizes"
    assert well and backends_shown(shown) == expected
    assert all(len(line) <= 80 for line in shown.splitlines() if line.split()[0] in OPS)


def test_a_wrong_result_is_found(monkeypatch, capsys):
    right = ofb_kernels.masked_linear

    def masked_linear(*args, backend=None, **options):
        return right(*args, backend=backend, **options) * (1.0 if backend == "reference" else 1.01)

    monkeypatch.setattr(ofb_kernels, "masked_linear", masked_linear)
    monkeypatch.delenv("OFB_KERNELS_BACKEND", raising=False)
    assert main(["doctor", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert backends_shown(shown)["masked_linear"].startswith("eager: no CUDA device; failed: eager result: error")
    assert "something is wrong: see above" in shown and "agrees" not in shown


@pytest.mark.parametrize("missing", ["onnx"])
def test_what_is_missing_says_how_to_get_it(missing, monkeypatch):
    version = importlib.metadata.version

    def version_of(name):
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    shown, _ = doctor.diagnose(torch.device("cpu"))
    assert f"{missing} not installed" in shown and 'pip install "ofb-kernels[export]"' in shown
