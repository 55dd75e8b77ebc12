"""ofb doctor: it tells versions, backends and reasons, and finds an op that computes the wrong thing."""

import importlib.metadata

import pytest
import torch

import ofb_kernels
from ofb import doctor
from ofb.cli import main


def test_all_is_well_here(device, capsys, monkeypatch):
    monkeypatch.delenv("OFB_KERNELS_BACKEND", raising=False)
    assert main(["doctor", "--device", str(device)]) == 0
    shown = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}" in shown and shown.endswith("all is well\n")
    assert shown.count("agrees with float64") == 4
    assert "extra   export: onnx " in shown


def test_why_a_backend_runs(monkeypatch):
    monkeypatch.setenv("OFB_KERNELS_BACKEND", "reference")
    shown, well = doctor.diagnose(torch.device("cpu"))
    assert well and "run on the backend that OFB_KERNELS_BACKEND names" in shown
    assert "\nsteps   by default in fp32, without a CUDA graph: the device is cpu\n" in shown
    assert shown.count("reference") == 4


def test_a_wrong_result_is_found(monkeypatch, capsys):
    right = ofb_kernels.masked_linear

    def masked_linear(*args, backend=None, **options):
        return right(*args, backend=backend, **options) * (1.0 if backend == "reference" else 1.01)

    monkeypatch.setattr(ofb_kernels, "masked_linear", masked_linear)
    monkeypatch.delenv("OFB_KERNELS_BACKEND", raising=False)
    assert main(["doctor", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "failed: eager result: error" in shown and "something is wrong: see above" in shown


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
