"""Kill it anywhere

A search that is killed (SIGKILL, as by a power cut or by an out-of-memory killer) at random moments, in the middle of
writing a file as well, and resumed each time, finds the network of the run that was never killed, to the bit on a CPU.
Not measured: the same on a GPU.

SIGTERM (Slurm, docker stop, torchrun) and Ctrl-C end a run after a step and a checkpoint, within the time of a step; a
second one ends it at once.

Found and fixed: a run that was killed in the middle of its very first file could neither resume nor start again.
"""

import signal
from pathlib import Path

import pytest

from ofb.engine.checkpoint import TEMPORARY, load_checkpoint
from tests.reliability.runs import (
    after,
    after_a_checkpoint,
    dense_network,
    finished,
    image_folder,
    killed,
    moments,
    results,
    started,
    stopped,
)

SEARCH = (
    "search --device cpu --batch-size 64 --epochs 4 --finetune-epochs 2 --lr 1e-3 --finetune-lr 1e-3 --clip-grad 1 "
    "--targets 60%,30% --architecture-lr 0.3 --mask-ratio-start 0.1 --mask-ratio-end 0.3 --round-to 1 "
    "--checkpoint-every 3 --workers 0"
)
TRAIN = (
    "train --model vit_tiny_patch16_224 --model-kwargs img_size=32 embed_dim=24 depth=1 num_heads=2 --device cpu "
    "--data= --batch-size 4 --epochs 3 --lr 1e-3 --val-share 0.1 --checkpoint-every 2 --workers 2"
)
FINDS = {"found.json", "metrics.jsonl", "history.jsonl", "importance.json"}
FINDS |= {f"export/{target}/{file}" for target in ("30%", "60%") for file in ("model.safetensors", "config.json")}


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A search, and what it finds when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = [*SEARCH.split(), "--checkpoint", str(dense_network(folder / "dense"))]
    assert finished(started(arguments, folder / "run", folder / "log")) == 0, (folder / "log").read_text()
    found = results(folder / "run")
    assert found.keys() == FINDS
    return arguments, found


def being_written(folder: Path) -> list[Path]:
    return list(folder.rglob(f".*{TEMPORARY}"))


def test_killed_at_random_moments(search, tmp_path, night, evidence):
    """Every other time in the middle of a file."""
    arguments, expected = search
    folder, log = tmp_path / "run", tmp_path / "log"
    kills, halves = 0, 0
    for moment, number in zip(moments(seed=0, longest=1.0), range(200 if night else 16), strict=False):
        process, wait = started(arguments, folder, log), after(moment)
        killed(process, wait)  # may end first, late in the test: killing what is finished is no loss either
        kills += process.exitcode == -signal.SIGKILL
        if number % 2:
            process = started(arguments, folder, log)
            killed(process, lambda: bool(being_written(folder)))
            kills += process.exitcode == -signal.SIGKILL
            halves += bool(being_written(folder))
    assert finished(started(arguments, folder, log)) == 0, log.read_text()
    assert kills >= 20 and halves >= 3
    assert results(folder) == expected
    assert not being_written(folder)
    evidence("searches killed and resumed to the same bits", kills)
    evidence("of these in the middle of writing a file", halves)


def test_killed_before_it_began(search, tmp_path, evidence):
    """In the middle of its first file: there is nothing to resume, and nothing in the way of starting again."""
    arguments, expected = search
    folder, log = tmp_path / "run", tmp_path / "log"
    process = started(arguments, folder, log)
    assert killed(process, lambda: bool(being_written(folder)))
    for name in (".config.yaml.abcd.tmp", ".running", ".lock"):  # whatever of these it came to
        (folder / name).touch()
    (folder / "config.yaml").unlink(missing_ok=True)
    assert finished(started(arguments, folder, log)) == 0, log.read_text()
    assert results(folder) == expected and not being_written(folder)
    evidence("searches killed and resumed to the same bits", 1)


def test_images_that_other_processes_augment(tmp_path, evidence):
    """Order, crops, RandAugment and random erasing are those of the run that was never killed."""
    arguments = [*TRAIN.split(), "--data-dir", str(image_folder(tmp_path / "images"))]
    log = tmp_path / "log"
    assert finished(started(arguments, tmp_path / "straight", log)) == 0, log.read_text()
    folder, kills = tmp_path / "run", 0
    for moment, _ in zip(moments(seed=0, longest=0.1), range(3), strict=False):
        kills += killed(started(arguments, folder, log), after_a_checkpoint(folder, moment))
    assert finished(started(arguments, folder, log)) == 0, log.read_text()
    assert results(folder) == results(tmp_path / "straight")
    assert kills >= 2
    evidence("trainings on image files killed and resumed to the same bits", kills)


def test_asked_to_stop(search, tmp_path, evidence):
    arguments, expected = search
    folder, log = tmp_path / "run", tmp_path / "log"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        ready = after_a_checkpoint(folder, 0)
        assert stopped(started(arguments, folder, log), ready, number) == code, log.read_text()
        state = load_checkpoint(folder / "checkpoints", "search")
        assert state["epoch"] * 18 + state["batches"] == state["parts"]["optimization"]["steps"] > 0
    text = log.read_text()
    assert text.count("ofb: finishing a step and saving it; once more to stop at once") == 2
    assert text.count(f"ofb: interrupted; continue with: ofb search --resume --output {folder}") == 2
    assert finished(started(arguments, folder, log)) == 0, log.read_text()
    assert results(folder) == expected
    evidence("searches asked to stop, and resumed to the same bits", 2)
