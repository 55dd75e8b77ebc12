"""A network on the Hugging Face hub: its card tells what is known and nothing private, and whoever pulls it has it."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

import ofb
from ofb.engine.run_folder import CONFIG_FILE, FIGURES_FILE
from ofb.export import model_card
from ofb.supernet.cost import readable
from ofb.supernet.families import count_macs
from tests.common import tiny_swin, tiny_vit
from tests.hub_server import hub

OPTIONS = {
    "model": "deit_tiny_patch16_224", "data": "", "data_dir": "/home/me/secret", "checkpoint": None, "epochs": 12,
    "target": "50%", "targets": None, "output": "/home/me/runs/a", "finetune_epochs": 3, "opt": "adamw",
    "batch_size": 64, "seed": 0,
}  # fmt: skip
FIGURES = {
    "dense": {"top1": 80.5, "macs": 7_750_000, "params": 451_000, "latency_ms": 1.0},
    "compressed": {"top1": 79.25, "macs": 3_830_000, "params": 221_000, "latency_ms": 1.0},
}


def test_card_of_a_run(tmp_path):
    network = tiny_vit()
    ofb.save(network, tmp_path / "export")
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(OPTIONS))
    (tmp_path / FIGURES_FILE).write_text(json.dumps(FIGURES))
    card = model_card(tmp_path / "export", "me/small")
    assert "# small" in card and "`deit_tiny_patch16_224`" in card and "target 50%" in card
    assert "| top-1 on the test images | 79.25 % | 80.50 % |" in card and "7.75 M" in card
    assert "| 0 | 32 | 4 × 8 | 128 |" in card and "hf-hub:me/small" in card
    assert "data: an image folder" in card and "epochs: 12" in card
    assert "/home/me" not in card
    assert ModelCard(card).data.library_name == "timm"


def test_card_of_one_of_several_targets(tmp_path):
    ofb.save(tiny_vit(), tmp_path / "export" / "30%")
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(OPTIONS | {"targets": "50%,30%", "checkpoint": "runs/dense"}))
    (tmp_path / FIGURES_FILE).write_text(json.dumps(FIGURES | {"30%": {"top1": 70.0}, "50%": {"top1": 75.0}}))
    card = model_card(tmp_path / "export" / "30%", "me/small")
    assert "targets 50%,30%" in card and "| 70.00 % | 80.50 % |" in card
    assert "deit_tiny" not in card, "it started from a checkpoint instead"


def test_card_without_a_run(tmp_path):
    network = tiny_swin()
    ofb.save(network, tmp_path)
    card = model_card(tmp_path, "me/small")
    assert "top-1" not in card and "How it was made" not in card and "dense |" not in card
    assert "| 0.0 | 16 |" in card and "| 1.1 | 32 |" in card
    assert f"| multiply-accumulates of an image | {readable(count_macs(network))} |" in card


def test_card_takes_no_other_file_for_a_run(tmp_path):
    ofb.save(tiny_vit(), tmp_path / "mine")
    (tmp_path / CONFIG_FILE).write_text("model: secret\ntarget: 50%\n")
    assert "secret" not in model_card(tmp_path / "mine", "me/small")


def test_card_of_an_earlier_form(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 1, "architecture": {"family": "vit"}}')
    with pytest.raises(ValueError, match="folder: expected a network in timm's form, got an earlier one in .*load and"):
        ofb.push_to_hub(tmp_path, "me/small")


def test_pushed_and_pulled(tmp_path):
    """The client is the real one, and so is every request; the hub runs on this machine."""
    ofb.save(tiny_vit(), tmp_path / "network")
    code = (
        "import sys, torch, timm, ofb, ofb.cli\n"
        "push = ['export', 'network', '--format', 'program', '--push-to-hub', 'someone/tiny']\n"
        "assert ofb.cli.main(push) == 0 and ofb.cli.main(push) == 0\n"
        "pulled = timm.create_model('hf-hub:someone/tiny', pretrained=True).eval()\n"
        "images = torch.randn(2, 3, 16, 16)\n"
        "assert torch.equal(pulled(images), ofb.load('network')(images))\n"
    )
    with hub() as (address, files):
        files["README.md"] = b"my own card"
        env = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": os.getcwd()}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | env, cwd=tmp_path, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert f"{address}/someone/tiny" in done.stdout
    assert files.keys() == {"config.json", "model.safetensors", "model.pt2", "README.md"}
    assert files["README.md"] == b"my own card", "a card that is there stays"


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("tiny", "hf_x", "push_to_hub: expected USER/NAME, got 'tiny'"),
        ("me/tiny", None, "expected a token of the hub, got none; run `hf auth login` or set HF_TOKEN"),
        ("me/tiny", "hf_x", "me/tiny was not written: .*offline.*check the connection.*Nothing is lost"),
    ],
)
def test_push_that_is_not_possible(tmp_path, monkeypatch, repository, token, message):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", token or "")
    ofb.save(tiny_vit(), tmp_path)
    with pytest.raises(ValueError, match=message):
        ofb.push_to_hub(tmp_path, repository)
