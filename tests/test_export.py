"""Saved networks load as they were, in ONNX too, and damaged ones say so."""

import json
import subprocess
import sys

import pytest
import torch

import ofb
from ofb.export import ARCHITECTURE, WEIGHTS, count_params
from ofb.supernet.families import count_macs
from tests.common import tiny_vit


@pytest.fixture
def pruned():
    """A pruned network: each block has sizes of its own."""
    supernet = ofb.Supernet(tiny_vit(), target="45%")
    with torch.no_grad():
        for parameter in supernet.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return supernet.extract().eval()


def test_saved_network_loads_as_it_was(pruned, tmp_path):
    ofb.save(pruned, tmp_path / "network")
    loaded = ofb.load(tmp_path / "network")
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(loaded(images), pruned(images))
    assert type(loaded) is type(pruned)
    assert not loaded.training
    config = json.loads((tmp_path / "network" / ARCHITECTURE).read_text())
    assert (config["macs"], config["params"]) == (count_macs(pruned), count_params(pruned))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnx_computes_the_same(pruned, tmp_path, batch):
    import onnxruntime

    path = tmp_path / "model.onnx"
    ofb.export_onnx(pruned, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.randn(batch, 3, 16, 16)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), pruned(images).detach(), atol=1e-4, rtol=1e-4)


def test_extracted_network_runs_without_this_package(pruned, tmp_path):
    """A process that has torch and timm but cannot import this package runs the network."""
    images = torch.randn(2, 3, 16, 16)
    program = torch.export.export(pruned, (images,))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys; sys.modules['ofb'] = sys.modules['ofb_kernels'] = None\n"
        "import torch, timm\n"
        f"program = torch.export.load(r'{tmp_path / 'program.pt2'}').module()\n"
        f"images = torch.load(r'{tmp_path / 'images.pt'}', weights_only=True)\n"
        f"torch.save(program(images).detach(), r'{tmp_path / 'logits.pt'}')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), pruned(images))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (ARCHITECTURE, lambda text: text[: len(text) // 2], "config.json is damaged"),
        (ARCHITECTURE, lambda text: text.replace(b'"vit"', b'"os.system"'), "config.json is damaged.*expected family"),
        (ARCHITECTURE, lambda text: text.replace(b'"embed_dim"', b'"width"'), "config.json is damaged.*embed_dim"),
        (WEIGHTS, lambda data: data[: len(data) // 2], "model.safetensors is damaged"),
        (WEIGHTS, lambda data: b"", "model.safetensors is damaged"),
    ],
)
def test_damaged_network(pruned, tmp_path, name, damage, message):
    ofb.save(pruned, tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=message):
        ofb.load(tmp_path)


def test_nothing_saved_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no config.json"):
        ofb.load(tmp_path)


def test_models_of_no_known_family_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a timm VisionTransformer"):
        ofb.save(torch.nn.Linear(2, 2), tmp_path / "network")
    assert not (tmp_path / "network").exists()
