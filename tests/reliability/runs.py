"""Real runs of the command line to do harm to: small ones, each in a process of its own."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Imported once by the server that the processes are forked from: a run then starts in a fraction of a second.
import numpy as np
import sklearn.datasets  # noqa: F401
import sklearn.model_selection  # noqa: F401
import tensorboard.summary  # noqa: F401
import timm
import torch
import tyro  # noqa: F401
import yaml  # noqa: F401
from PIL import Image

import ofb
from ofb.cli import main
from ofb.engine.data import DIGITS_CFG, DIGITS_OPTIONS

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])
DEADLINE = 120  # seconds until a test gives up on a process


def started(
    arguments: list[str], folder: Path, log: Path, first: Callable[[], object] | None = None
) -> multiprocessing.Process:
    """`ofb …` in a run folder, gone on with if it has begun; what it prints is added to `log`.

    `first` is called in its process before that.
    """
    resume = ["--resume"] if (folder / "config.yaml").is_file() else []
    process = FORKS.Process(target=_run, args=([*arguments, *resume, "--output", str(folder)], log, first))
    process.start()
    return process


def finished(process: multiprocessing.Process) -> int:
    """The exit code of a process that ends by itself."""
    process.join(DEADLINE)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def killed(process: multiprocessing.Process, ready: Callable[[], bool]) -> bool:
    """SIGKILL as soon as it is `ready`; false if it ended before."""
    deadline = time.monotonic() + DEADLINE
    while process.is_alive() and not ready():
        assert time.monotonic() < deadline, "still running"
    if process.exitcode is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed from now on."""
    then = time.monotonic() + seconds

    def passed() -> bool:
        time.sleep(0.001)
        return time.monotonic() > then

    return passed


def stopped(process: multiprocessing.Process, ready: Callable[[], bool], number: int = signal.SIGTERM) -> int:
    """The exit code of a process that is asked to stop as soon as it is `ready`."""
    deadline = time.monotonic() + DEADLINE
    while not ready():
        assert process.is_alive() and time.monotonic() < deadline, "ended before it was ready, or never was"
        time.sleep(0.001)
    os.kill(process.pid, number)
    return finished(process)


def after_a_checkpoint(folder: Path, seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed since a checkpoint was written that is not there yet."""
    before, waits = set(folder.glob("checkpoints/*")), []

    def passed() -> bool:
        if not waits and set(folder.glob("checkpoints/*")) - before:
            waits.append(after(seconds))
        return bool(waits) and waits[0]()

    return passed


def dense_network(folder: Path) -> Path:
    """A small ViT for the digits, saved: what a search starts from and learns from."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **DIGITS_OPTIONS, **sizes, pretrained_cfg_overlay=DIGITS_CFG)
    ofb.save(model, folder)
    return folder


def image_folder(folder: Path) -> Path:
    """Forty images of noise to train on and eight to test on, in two classes."""
    generator = np.random.default_rng(0)
    for split, images in (("train", 40), ("validation", 8)):
        for number in range(images):
            path = folder / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """What a run has found, file by file; without figures.json, in which the latency is measured."""
    files = (path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".safetensors"))
    kept = (path for path in files if path.parent.name != "checkpoints" and path.name != "figures.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def moments(seed: int, longest: float):
    """Endless random times to wait."""
    generator = random.Random(seed)
    while True:
        yield generator.uniform(0, longest)


def _run(arguments: list[str], log: Path, first: Callable[[], object] | None) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for its own processes, as in any other
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, tests there as well
    torch.set_num_threads(1)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if first is not None:
            first()
        code = main(arguments)
    sys.exit(code)
