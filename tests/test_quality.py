"""The quality benchmark: rivals cost what they may and keep the right units, data lies right, rows sum up."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ofb
from benchmarks.measure import ROOT
from benchmarks.quality import __main__ as quality
from benchmarks.quality import fashion_mnist, grid, latency, page, results, rivals, settings
from benchmarks.quality.images import Batches, small_images
from benchmarks.quality.results import FOLDER, Mean, difference, read_rows, write_rows
from ofb.export import count_params
from ofb.supernet.families import count_macs, describe, vit
from ofb.supernet.ranking import magnitudes
from tests.common import tiny_vit

IMAGES, TARGETS = torch.randn(8, 3, 16, 16), torch.arange(8) % 5


def loss_of(model):
    return F.cross_entropy(model(IMAGES), TARGETS)


RIVALS = {
    "uniform": rivals.uniform,
    "from_scratch": rivals.from_scratch,
    "random": lambda dense, target: rivals.random_sizes(dense, target, seed=3),
    "magnitude": rivals.torch_pruning,
    "taylor": lambda dense, target: rivals.torch_pruning(dense, target, loss_of),
    "taylor_global": lambda dense, target: rivals.torch_pruning(dense, target, loss_of, everywhere=True),
}


@pytest.mark.parametrize("share", [0.6, 0.3])
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_meet_the_target(name, share, tmp_path):
    dense = tiny_vit().eval()
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    target = int(share * count_macs(dense))
    model = RIVALS[name](dense, target).eval()
    assert 0.75 * target <= count_macs(model) <= target
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())
    ofb.save(model, tmp_path)  # a plain timm model of its family, and nothing else
    torch.testing.assert_close(ofb.load(tmp_path)(IMAGES), model(IMAGES))


def test_shrinking_by_nothing_changes_nothing():
    dense = tiny_vit().eval()
    sizes = {name: submodule.candidates.full for name, submodule in vit.submodules(dense).items()}
    same = rivals.shrink(dense, sizes, magnitudes(dense))
    torch.testing.assert_close(same(IMAGES), dense(IMAGES))


def test_shrinking_takes_dead_units_first():
    """Hidden units without weights are the first to go, and nothing notices."""
    dense = tiny_vit().eval()
    dead = torch.arange(0, dense.blocks[0].mlp.fc1.out_features, 2)
    with torch.no_grad():
        for parameter in (
            dense.blocks[0].mlp.fc1.weight,
            dense.blocks[0].mlp.fc1.bias,
            dense.blocks[0].mlp.fc2.weight.T,
        ):
            parameter[dead] = 0
    sizes = {name: submodule.candidates.full for name, submodule in vit.submodules(dense).items()}
    sizes["mlp0"] = (1, sizes["mlp0"][1] // 2)
    small = rivals.shrink(dense, sizes, magnitudes(dense))
    assert describe(small)["blocks"][0]["hidden"] == sizes["mlp0"][1]
    torch.testing.assert_close(small(IMAGES), dense(IMAGES))


def test_random_sizes_differ_by_seed():
    dense = tiny_vit()
    target = count_macs(dense) // 2
    a, b, again = (describe(rivals.random_sizes(dense, target, seed)) for seed in (0, 1, 0))
    assert a == again != b


def test_batches_shuffle_shift_and_mirror():
    images = torch.arange(10 * 36, dtype=torch.float32).view(10, 1, 6, 6)
    still = list(Batches(images, torch.arange(10), 4, train=False))
    assert [len(targets) for _, targets in still] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in still]), images)
    loader = Batches(images, torch.arange(10), 4, train=True)
    torch.manual_seed(0)
    first = list(loader)
    torch.manual_seed(0)
    again = list(loader)
    assert len(first) == len(loader) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    for batch, targets in first:
        for image, target in zip(batch, targets, strict=True):
            inner = image[:, 2:4, 2:4]  # wherever the image moved and whichever way it looks, these pixels are its own
            assert torch.isin(inner, images[target]).all() and image.shape == (1, 6, 6)


@pytest.fixture
def fashion(tmp_path):
    """Four files as Debian ships them, with 20 training and 10 test images."""
    source, rng = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    for part, count in (("train", 20), ("t10k", 10)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (source / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        labels = np.array([2049, count], ">i4").tobytes() + (np.arange(count, dtype=np.uint8) % 10).tobytes()
        (source / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return source


def test_fashion_mnist_is_laid_out_and_read(fashion, tmp_path):
    fashion_mnist.lay_out(fashion, tmp_path / "data")
    loaders = small_images("torch/fashion_mnist", str(tmp_path / "data"), 4, train_images=12, val_images=8)
    assert [len(part.images) for part in (loaders.train, loaders.val, loaders.test)] == [12, 8, 10]
    assert loaders.test.targets.tolist() == list(range(10))
    torch.testing.assert_close(loaders.train.images.mean(), torch.zeros(()), atol=1e-5, rtol=0)
    torch.testing.assert_close(loaders.train.images.std(), torch.ones(()), atol=1e-5, rtol=0)
    train, val = ({tuple(image.flatten().tolist()) for image in part.images} for part in (loaders.train, loaders.val))
    assert len(train | val) == 20


def test_fashion_mnist_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        fashion_mnist.lay_out(tmp_path, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.fixture
def quick_digits(monkeypatch, tmp_path):
    setting = replace(settings.SETTINGS["digits"], dense_epochs=1, search_epochs=4, finetune_epochs=1)
    setting = replace(setting, model=setting.model | {"embed_dim": 32, "depth": 1, "num_heads": 2})
    monkeypatch.setitem(settings.SETTINGS, "digits", setting)
    monkeypatch.chdir(tmp_path)
    settings.train_dense("digits", "data")


def test_the_dense_training_goes_on(quick_digits, capsys):
    """Where it was stopped before its network was saved, its epochs are not trained again."""
    (settings.dense_folder("digits") / "config.json").unlink()
    capsys.readouterr()
    settings.train_dense("digits", "data")
    assert "train 1/1" not in capsys.readouterr().out
    assert (settings.dense_folder("digits") / "config.json").exists()


@pytest.mark.parametrize("method", grid.METHODS)
def test_every_method_runs(method, quick_digits):
    job = grid.Job("digits", method, "60%", seed=0, distillation="soft", options=("macs_weight=7",))
    (row,) = grid.run(job)
    dense = count_macs(ofb.load(settings.dense_folder("digits")))
    assert 0.5 * dense < row["macs"] <= 0.6 * dense
    assert 0 <= float(row["test_top1"]) <= 100 and row["options"] == "macs_weight=7"
    assert float(row["search_epochs"]) + row["finetune_epochs"] == 5 or method == "best of random"


def test_one_search_finds_all_targets(quick_digits):
    rows = grid.run(grid.Job("digits", grid.ONE_SEARCH, "80%,60%", seed=1))
    dense = count_macs(ofb.load(settings.dense_folder("digits")))
    assert [row["target"] for row in rows] == ["80%", "60%"]
    assert [0.98 * share <= row["macs"] / dense <= share for row, share in zip(rows, (0.8, 0.6), strict=True)]
    assert sum(float(row["search_epochs"]) for row in rows) == 4  # half of twice four


def test_latencies_are_of_networks_that_are_kept(quick_digits, monkeypatch, capsys):
    monkeypatch.setattr(results, "FOLDER", Path("results"))
    about = [("uniform", "", "60%", "0"), ("ofb", "soft", "60%", "0")]
    others = [("ofb", "", "60%", "1"), ("ofb, PMIM", "", "60%", "0")]  # another seed, a part left out
    rows = [dict(zip((*results.NETWORK_KEY, "seed"), each, strict=True)) | {"options": ""} for each in about + others]
    write_rows(rows, results.csv_path("digits"))
    monkeypatch.setattr("sys.argv", ["latency", "--data", "digits"])
    latency.main()
    told = capsys.readouterr().out
    assert told.count("making") == 2
    assert "search 4/4" in told and "train 2/2" in told  # what is learned takes its time, the rest does not
    latency.main()
    assert "making" not in capsys.readouterr().out
    dense, *timed = read_rows(results.latency_path("digits"))
    assert dense["method"] == "dense"
    assert [tuple(row[name] for name in results.NETWORK_KEY) for row in timed] == [each[:3] for each in about]
    assert all(float(row["latency_ms"]) > 0 for row in timed)
    shown = page.series("digits")
    assert shown["uniform", "60%"][0]["latency_ms"] == timed[0]["latency_ms"]
    assert "latency_ms" not in shown["ofb", "60%"][0]  # there was no network of seed 0


def test_the_kept_dense_network_is_the_one_of_the_figures():
    figures = json.loads((FOLDER / "fashion_mnist-reduced.dense.json").read_text())
    dense = ofb.load(settings.dense_folder("fashion_mnist-reduced"))
    assert (count_macs(dense), count_params(dense)) == (figures["macs"], figures["params"])
    assert len(figures["val_top1"]) == settings.SETTINGS["fashion_mnist-reduced"].dense_epochs


def arguments(**options):
    defaults = dict(
        data="digits", data_dir="data", methods=[*grid.METHODS, grid.ONE_SEARCH], targets=["50%", "30%", "15%"],
        seeds=[0, 1], distillation=["", "soft"], options=[], reduced=False,
    )  # fmt: skip
    return Namespace(**defaults | options)


def test_rows_stay_and_known_runs_are_not_repeated(tmp_path):
    jobs = quality.jobs_of(arguments(methods=["ofb", grid.ONE_SEARCH], distillation=[""]))
    assert [len(job.keys()) for job in jobs] == [1, 1, 1, 3] * 2
    write_rows([dict(zip(grid.KEY, key, strict=True)) for job in jobs[:4] for key in job.keys()], tmp_path / "rows.csv")
    known = {tuple(row[name] for name in grid.KEY) for row in read_rows(tmp_path / "rows.csv")}
    assert [known.issuperset(job.keys()) for job in jobs] == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--targets", "50"], "expected a share of the dense network's MACs such as 30%, got '50'"),
        (["--targets", "0%"], "such as 30%, got '0%'"),
        (["--targets", "130%"], "such as 30%, got '130%'"),
        (["--options", "pace"], "options: expected key=value, got 'pace'"),
        (["--options", "no_such=1"], "has no option no_such"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "data_dir: expected torch/cifar10 in nowhere"),
        (["--data", "imagenet", "--data-dir", "nowhere"], "got nowhere, which is not there"),
    ],
)
def test_wrong_arguments_are_told_before_anything_runs(wrong, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quality", *wrong])
    with pytest.raises(SystemExit):
        quality.parse_arguments()
    assert message in capsys.readouterr().err


def test_an_interrupt_ends_all_processes(tmp_path):
    """Ctrl-C ends the runs as well, and keeps the rows that are there."""
    known = dict.fromkeys([*grid.KEY, "commit"], "") | {"data": "digits", "method": "uniform", "target": "50%"}
    write_rows([known | {"seed": "0"}], tmp_path / "rows.csv")
    (tmp_path / "rows.dense.json").write_text("{}")
    dense = tmp_path / "runs" / "quality" / "digits"
    ofb.save(tiny_vit(img_size=8, patch_size=2, in_chans=1, num_classes=10), dense)
    command = "-m benchmarks.quality --data digits --methods uniform --targets 50% --processes 1 --output rows.csv"
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    run = subprocess.Popen(
        [sys.executable, *command.split()], cwd=tmp_path, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert run.stdout.readline().startswith("5 runs to do, 1 rows in rows.csv")
    time.sleep(8)  # so that a run is at work, most likely
    os.killpg(run.pid, signal.SIGINT)
    try:
        _, told = run.communicate(timeout=60)  # which returns when the last process has closed its output
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert run.returncode == quality.INTERRUPTED and "interrupted: finished runs are in the CSV" in told
    assert "Traceback" not in told
    assert [row["seed"] for row in read_rows(tmp_path / "rows.csv")] == ["0"]


def test_the_reduced_grid_is_part_of_the_grid():
    full, reduced = (quality.jobs_of(arguments(reduced=reduced)) for reduced in (False, True))
    assert set(reduced) < set(full)
    rivals = set(grid.METHODS) - set(grid.OFB)
    assert {job.method for job in reduced} == {"ofb", *rivals} and {job.distillation for job in reduced} == {""}
    assert [job.target for job in reduced if job.method == "ofb"] == ["50%", "30%", "15%"] * 2
    assert {job.target for job in reduced if job.method == "magnitude"} == {"15%"}


def test_difference_of_means():
    lead, error = difference(Mean.of([90, 91, 92]), Mean.of([89, 89, 89]))
    assert lead == 2 and error == pytest.approx(1 / math.sqrt(3))
    assert str(Mean.of([90, 91, 92])) == "91.00 ± 1.00" and Mean.of([5]).deviation == 0 and str(Mean.of([5])) == "5.00"


def test_a_single_seed_has_no_spread():
    row = {"left_open": "", "search_epochs": "1", "finetune_epochs": "1", "seconds": "2"}
    found = {
        ("ofb", "50%"): [row | {"test_top1": "80"}, row | {"test_top1": "82"}],
        ("uniform", "50%"): [row | {"test_top1": "70"}],
        ("taylor", "50%"): [row | {"test_top1": "71"}, row | {"test_top1": "73"}],
    }
    lines = {line.split(" | ")[0]: line for line in page._table(found, "50%")}
    assert "| 70.00 | +11.00 | 1 |" in lines["| uniform"]
    assert "| 72.00 ± 1.41 | +9.00 ± 1.41 | 2 |" in lines["| taylor"]


def test_the_picture_shows_ofb_and_rivals_that_have_several_targets():
    counts = {"uniform": 2, "ofb": 2, "taylor": 1, "ofb, PMIM": 2}
    found = {(method, f"{target}%"): [{}] for method, count in counts.items() for target in range(count)}
    assert page._lines(found, "") == ["ofb", "uniform"]
    assert page._lines(found, f"{page.TAUGHT}soft") == []
