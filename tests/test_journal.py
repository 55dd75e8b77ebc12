"""The journal: one line an epoch, a resumed stage replaces what was lost, and whoever watches is told."""

import io
import json
import re
import sys
import time

import pytest
import torch
from rich.console import Console

import ofb
from ofb.engine.bar import StageBar
from ofb.engine.config import TrainConfig
from ofb.engine.history import History, in_order
from ofb.engine.journal import Journal
from tests.common import tiny_vit


def config(folder, **options) -> TrainConfig:
    return TrainConfig(output=None if folder is None else str(folder), device="cpu", **options)


def entries(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_entries_and_lines(tmp_path, capsys):
    with Journal(config(tmp_path, epochs=2), "search") as journal:
        journal.record(0, {"loss": 1.23456, "expected_macs": 3.84e6, "alive_candidates": {"embed": 2}})
    assert capsys.readouterr().out == "search 1/2  loss 1.235  expected 3.84 M MACs\n"
    assert entries(tmp_path) == [
        {"stage": "search", "epoch": 0, "loss": 1.23456, "expected_macs": 3.84e6, "alive_candidates": {"embed": 2}}
    ]


def test_a_line_can_be_read(tmp_path, monkeypatch, capsys):
    """Losses that are off are left out, those that are tiny or huge need no exponent; the file has everything."""
    monkeypatch.setenv("COLUMNS", "80")
    losses = {"loss": 532.06, "classification": 1.15, "one_hot": 1e-9, "macs": 5.8e-6, "reconstruction": 0.0}
    figures = {"val_top1": 98.333, "val_top5": 100.0, "val_loss": 123456.7, "expected_params": 13300.0}
    figures |= {"decided": 0.714, "alive": 45}
    unshown = {"reconstruction", "one_hot", "loss"}
    with Journal(config(tmp_path, epochs=20), "search", unshown=lambda: unshown) as journal:
        journal.record(9, losses | figures)
    assert capsys.readouterr().out.splitlines() == [
        "search 10/20  classification 1.150  budget <0.001",
        "  val top-1 98.33 %, top-5 100.00 %, loss 123457  expected 13.3 K parameters",
        "  decided 71 %  candidates alive 45",
    ]
    assert entries(tmp_path) == [{"stage": "search", "epoch": 9, **losses, **figures}]


def test_what_was_pruned_breaks_between_items(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    supernet = ofb.Supernet(tiny_vit(depth=4), epochs=1, steps_per_epoch=1)
    history = History(supernet)
    supernet.step()
    history.stepped()
    with Journal(config(None), "search") as journal:
        journal.record_history(0, history)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("  pruned: embed 32") and others and max(map(len, [first, *others])) <= 80
    assert all(line.startswith("    ") and line.endswith(("left),", "left)")) for line in others)
    names = re.findall(r"[a-z]+\d* (?=\d)", " ".join([first, *others]))
    assert [name.strip() for name in names] == in_order(supernet)


def test_a_resumed_stage_replaces_its_lost_epochs_alone(tmp_path):
    with Journal(config(tmp_path), "search") as journal:
        journal.record(0, {"loss": 1})
    with Journal(config(tmp_path), "finetune") as journal:
        for epoch in range(3):
            journal.record(epoch, {"loss": epoch})
    with Journal(config(tmp_path), "finetune", start_epoch=2) as journal:
        journal.record(2, {"loss": 20})
    found = [(entry["stage"], entry["epoch"], entry["loss"]) for entry in entries(tmp_path)]
    assert found == [("search", 0, 1), ("finetune", 0, 0), ("finetune", 1, 1), ("finetune", 2, 20)]


def test_a_stage_goes_on_where_its_last_line_breaks_off(tmp_path):
    with Journal(config(tmp_path), "train") as journal:
        for epoch in range(2):
            journal.record(epoch, {"loss": epoch})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    with Journal(config(tmp_path), "train", start_epoch=1) as journal:
        journal.record(1, {"loss": 10})
    assert [(entry["epoch"], entry["loss"]) for entry in entries(tmp_path)] == [(0, 0), (1, 10)]


@pytest.mark.parametrize("name", ["metrics.jsonl", "history.jsonl"])
def test_a_damaged_line_is_named_and_kept(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"stage": "train", "epoch": 0}\n{"stage": \n{"stage": "train", "epoch": 2}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"run: {path} is damaged: line 2: Expecting value; remove this line"):
        Journal(config(tmp_path), "train", start_epoch=2)
    assert path.read_bytes() == before


def test_history_has_each_epoch_once(tmp_path):
    """Epoch -1 is the state before the first one: a stage that starts anew, none being saved yet, replaces it."""
    history = History(ofb.Supernet(tiny_vit(), epochs=4, steps_per_epoch=2))
    for start, epochs in ((0, (-1, 0)), (0, (-1, 0, 1)), (1, (1, 2))):
        with Journal(config(tmp_path), "search", start) as journal:
            for epoch in epochs:
                journal.record_history(epoch, history)
    assert [entry["epoch"] for entry in entries(tmp_path, "history.jsonl")] == [-1, 0, 1, 2]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Journal(config(None), "train") as journal:
        journal.record(0, {"loss": 1})
        journal.record_history(0, History(ofb.Supernet(tiny_vit(), epochs=1, steps_per_epoch=2)))
        batches, note = journal.progress([1, 2], 2, "1/1")
        note({"loss": 0.5})
        assert list(batches) == [1, 2]
    assert list(tmp_path.iterdir()) == []


def screen(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def test_bar_shows_rate_time_left_losses_and_status(monkeypatch):
    console = screen()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("ofb.engine.bar.StageBar", lambda stage: StageBar(stage, console))
    status = {"expected macs": "3.1 M, target 2.3 M", "candidates alive": "40", "pruned at step 7": "mlp0 384 → 288"}
    with Journal(config(None, epochs=3), "search", 1, lambda: status) as journal:
        batches, note = journal.progress(range(4), 4, "2/3")
        assert list(batches) == [0, 1, 2, 3]
        note({"classification": 0.5, "reconstruction": 2.25})
        journal.bar.refresh()
        shown = console.file.getvalue()
    losses = "classification 0.5000  reconstruction 2.250"
    for words in ("search 2/3", "4/4", "8/12", "steps/s", losses, *status, *status.values()):
        assert words in shown, words


def test_bar_without_a_first_step_knows_no_rate():
    console = screen()
    with StageBar("train", console) as bar:
        bar.start_epoch("train 1/2", 10, 0, 2)
        bar.refresh()
    assert "0/20" in console.file.getvalue() and "steps/s" not in console.file.getvalue()


def test_tensorboard_gets_scalars_histograms_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, IMAGES, EventAccumulator

    supernet = ofb.Supernet(tiny_vit(), epochs=2, steps_per_epoch=2)
    history = History(supernet)
    for start in (0, 1):  # the second one resumes, its first epoch is lost
        with Journal(config(tmp_path), "search", start) as journal:
            for epoch in range(start, 2):
                journal.record(epoch, {"loss": 1.0 + start})
                journal.record_history(epoch, history)
                journal.record_picture(epoch, "reconstruction", torch.rand(3, 8, 8))
    found = EventAccumulator(str(tmp_path / "tensorboard" / "search"), {HISTOGRAMS: 0, IMAGES: 0}).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 1.0), (1, 2.0)]
    assert [event.step for event in found.Images("reconstruction")] == [0, 1]
    for name, bimask in supernet.bimasks.items():
        importance = found.Histograms(f"importance/{name}")[-1].histogram_value
        assert importance.num == bimask.score.numel()
        assert importance.max == pytest.approx(bimask.score.sigmoid().max().item(), abs=1e-6)
        probability = found.Histograms(f"probability/{name}")[-1].histogram_value
        assert sum(probability.bucket) == pytest.approx(1, abs=1e-5)
        assert probability.bucket_limit[-1] == bimask.candidates.units


def test_weights_and_biases_keeps_one_run(tmp_path, monkeypatch):
    """Offline, where it writes what it would send."""
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    from torchvision.io import decode_image

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    history = History(ofb.Supernet(tiny_vit(), epochs=2, steps_per_epoch=2))
    for stage in ("search", "finetune"):
        with Journal(config(tmp_path, log_wandb=True), stage) as journal:
            journal.record(0, {"loss": 1.5})
            journal.record_history(0, history)
            journal.record_picture(0, "reconstruction", torch.linspace(0, 1, 192).view(3, 8, 8))
        time.sleep(1)  # offline, a folder is named by the second: two stages of one second would share it
    run_id = (tmp_path / "wandb" / "run-id").read_text()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * len(files) and files
    sent = b"".join(file.read_bytes() for file in files)
    assert all(key in sent for key in (b"search/loss", b"finetune/loss", b"search/probability/mlp0"))
    pictures = [decode_image(str(path)) for path in tmp_path.glob("wandb/offline-run-*/files/media/**/*.png")]
    assert pictures and all(picture.min() == 0 and picture.max() == 255 for picture in pictures)


def test_weights_and_biases_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("ofb.engine.config.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="log_wandb: expected Weights & Biases, .* not installed; pip install wandb"):
        config(None, log_wandb=True)


def test_weights_and_biases_that_does_not_start(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")

    def init(**_):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match="log_wandb: .* does not start: no API key; run `wandb login`"):
        Journal(config(tmp_path, log_wandb=True), "train")
