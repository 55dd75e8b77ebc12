"""What breaks around it

A full or read-only disk, a damaged checkpoint, memory that runs out, a process that dies, two runs in one folder, a
clock that is wrong, options or code that changed: one line says what happened and what to do, nothing is half written,
and once the trouble is gone the run goes on and ends with the network it would have found anyway, to the bit.

What may change when a run is resumed, beside what it computes on: {free}. Anything else is an error, but for a
folder that has moved. Other versions of this package, torch or timm are one too, unless `--allow-other-code` says that
they compute the same.

Images that cannot be read, and processes of a job that die, are in `tests/test_readable.py` and
`tests/test_distributed.py`.

Found and fixed: on a full disk TensorBoard's thread spoke first, with a traceback that named no file.
"""

import os
import resource
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from ofb.commands import _new_folder
from ofb.engine.checkpoint import TEMPORARY, load_checkpoint, save_checkpoint
from ofb.engine.config import TrainConfig
from ofb.engine.stage import FREE_ON_RESUME
from tests.reliability.runs import finished, image_folder, results, started, stopped

__doc__ = __doc__.format(free=", ".join(f"`{option}`" for option in sorted(FREE_ON_RESUME)))

TRAIN = (
    "train --model vit_tiny_patch16_224 --model-kwargs embed_dim=32 depth=2 num_heads=4 --device cpu --batch-size 64 "
    "--epochs 3 --lr 1e-3 --checkpoint-every 5"
).split()
LARGE = (
    "train --model vit_tiny_patch16_224 --model-kwargs embed_dim=96 depth=8 num_heads=4 --device cpu --batch-size 1024 "
    "--epochs 2 --lr 1e-3"
).split()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the training finds when nothing happens."""
    folder = tmp_path_factory.mktemp("straight")
    assert finished(started(TRAIN, folder / "run", folder / "log")) == 0, (folder / "log").read_text()
    return results(folder / "run")


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that was stopped in its first epoch, and the file of what it prints."""
    folder, log = tmp_path / "disk" / "run", tmp_path / "log"
    stop_early(folder, log)
    return folder, log


def stop_early(folder: Path, log: Path) -> None:
    assert stopped(started(TRAIN, folder, log), lambda: len(list(folder.glob("checkpoints/*"))) > 1) == 143
    log.write_text("")


def goes_on(folder: Path, log: Path, expected: dict, *more: str) -> bool:
    assert finished(started([*TRAIN, *more], folder, log)) == 0, log.read_text()
    return results(folder) == expected and not list(folder.rglob(f"*{TEMPORARY}"))


def fails(folder: Path, log: Path, *more: str) -> str:
    """The last line of a run that ends as a user's error does."""
    assert finished(started([*TRAIN, *more], folder, log)) == 2, log.read_text()
    assert "Traceback" not in log.read_text()
    return log.read_text().splitlines()[-1]


@contextmanager
def small_disk(folder: Path):
    """A file system of 4 MB."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tmp_path, expected, evidence):
    folder, log = tmp_path / "disk" / "run", tmp_path / "log"
    with small_disk(tmp_path / "disk"):
        stop_early(folder, log)
        newest = load_checkpoint(folder / "checkpoints", "train")["parts"]["optimization"]["steps"]
        with pytest.raises(OSError, match="No space left"), open(tmp_path / "disk" / "filler", "wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        line = fails(folder, log)
        assert "cannot write" in line and "No space left on device; make room" in line
        assert load_checkpoint(folder / "checkpoints", "train")["parts"]["optimization"]["steps"] == newest
        assert not list(folder.rglob(f"*{TEMPORARY}"))
        (tmp_path / "disk" / "filler").unlink()
        assert goes_on(folder, log, expected)
    evidence("faults injected", 1)


def test_a_read_only_disk(tmp_path, expected, evidence):
    folder, log = tmp_path / "disk" / "run", tmp_path / "log"
    with small_disk(tmp_path / "disk"):
        stop_early(folder, log)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        assert "Read-only file system" in fails(folder, log)
        subprocess.run(["mount", "-o", "remount,rw", tmp_path / "disk"], check=True)
        assert goes_on(folder, log, expected)
    evidence("faults injected", 1)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_a_damaged_checkpoint(begun, expected, place, evidence):
    folder, log = begun
    newest = max((folder / "checkpoints").iterdir())
    content = bytearray(newest.read_bytes())
    content[int(place * len(content))] ^= 1
    newest.write_bytes(content)
    assert goes_on(folder, log, expected)
    assert f"note: {newest} is damaged" in log.read_text()
    evidence("faults injected", 1)


def little_memory() -> None:
    """Address space for no more than 500 MB above what this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 500_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_memory_that_runs_out(tmp_path, evidence):
    """What the advice says helps."""
    folder, log = tmp_path / "run", tmp_path / "log"
    assert finished(started(LARGE, folder, log, first=little_memory)) == 2, log.read_text()
    line = log.read_text().splitlines()[-1]
    assert (
        line.startswith("ofb: out of memory with batch_size 1024 in 1 part (") and "--grad-accum-steps 2 halves" in line
    )
    assert line.endswith(f"continue with: ofb train --resume --output {folder}")
    assert not list(folder.rglob(f"*{TEMPORARY}"))
    more = ["--grad-accum-steps", "8"]
    assert finished(started([*LARGE, *more], folder, log, first=little_memory)) == 0, log.read_text()
    evidence("faults injected", 1)


def test_a_worker_that_dies(tmp_path, evidence):
    log, images = tmp_path / "log", image_folder(tmp_path / "images")
    arguments = (
        "train --model vit_tiny_patch16_224 --model-kwargs img_size=32 embed_dim=24 depth=1 num_heads=2 --data= "
        f"--device cpu --data-dir {images} --batch-size 4 --epochs 2 --lr 1e-3 --val-share 0.1 --checkpoint-every 2 "
        "--workers 1"
    ).split()
    assert finished(started(arguments, tmp_path / "straight", log)) == 0, log.read_text()
    folder = tmp_path / "run"
    process = started(arguments, folder, log)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list(folder.glob("checkpoints/*")) or not children.read_text().split():
        assert process.is_alive()
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert finished(process) == 2, log.read_text()
    line = log.read_text().splitlines()[-1]
    assert "a process that reads images died" in line and f"continue with: ofb train --resume --output {folder}" in line
    assert finished(started(arguments, folder, log)) == 0, log.read_text()
    assert results(folder) == results(tmp_path / "straight")
    evidence("faults injected", 1)


def test_two_runs_in_one_folder(tmp_path, expected, evidence):
    folder, log, other = tmp_path / "run", tmp_path / "log", tmp_path / "other"
    first = started(TRAIN, folder, log)
    while not list(folder.glob("checkpoints/*")):
        assert first.is_alive()
    os.kill(first.pid, signal.SIGSTOP)
    try:
        line = fails(folder, other)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert f"expected a folder that no other run is writing to, got {folder} (process {first.pid} on " in line
    assert finished(first) == 0, log.read_text()
    assert results(folder) == expected
    evidence("faults injected", 1)


def test_a_clock_that_was_wrong(begun, expected, evidence):
    """Files from the future, the newest one the oldest by date."""
    folder, log = begun
    for years, path in enumerate(sorted((folder / "checkpoints").iterdir(), reverse=True)):
        os.utime(path, times=(4e9 + 3e7 * years,) * 2)
    assert goes_on(folder, log, expected)
    evidence("faults injected", 1)


def test_two_runs_in_one_second(tmp_path, monkeypatch):
    """Or the same second again, after the clock went back: a folder of its own for each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    for expected in ("", "-2", "-3"):
        folder = _new_folder("train", TrainConfig())
        assert folder == f"runs/train-deit_small_patch16_224-20260101-000000{expected}"
        Path(folder).mkdir(parents=True)


def test_options_that_changed(begun, expected, evidence):
    folder, log = begun
    line = fails(folder, log, "--weight-decay", "0.1")
    assert f"weight_decay: the run in {folder} was started with 0.05, got 0.1; leave the option out" in line
    assert goes_on(folder, log, expected, "--checkpoint-every", "7", "--keep-checkpoints", "1", "--workers", "2")
    evidence("faults injected", 1)


def test_code_that_changed(begun, expected, evidence):
    folder, log = begun
    state = load_checkpoint(folder / "checkpoints", "train")
    step = state["batches"]
    state["code"] |= {"ofb": "0123456789ab", "torch": "1.0"}
    save_checkpoint(folder / "checkpoints", "train", step + 1, state, keep=1)
    line = fails(folder, log)
    assert "was last written by ofb 0123456789ab, torch 1.0, timm" in line and "--allow-other-code" in line
    assert goes_on(folder, log, expected, "--allow-other-code")
    evidence("faults injected", 1)


def test_other_images(begun, evidence):
    folder, log = begun
    state = load_checkpoint(folder / "checkpoints", "train")
    save_checkpoint(folder / "checkpoints", "train", 9, state | {"steps_per_epoch": 17}, keep=1)
    assert "was started with 17 batches an epoch, got 18; give it the same images" in fails(folder, log)
    evidence("faults injected", 1)
