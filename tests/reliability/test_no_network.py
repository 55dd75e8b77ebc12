"""Nothing is sent or fetched unless you ask

And nothing is written where you would not look.

All modules are imported, and a network is trained, searched, evaluated, exported, reported and profiled, under two
guards. Python notes each connection, each name looked up and each file opened for writing, in worker processes too. On
Linux the kernel ends any process whose native code asks for an internet socket. None does, and what is written lies in
the run folder, in matplotlib's and torch's caches, or is temporary and gone at the end.

onnxruntime collects what it can learn of a machine and sends it to its makers; `ofb export` turns that off, unless you
set `ORT_DISABLE_TELEMETRY=0`. What you ask for still goes out: `--pretrained`, `hf-hub:`, `hfds/`, `--push-to-hub`,
`--log-wandb`.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
WATCH = Path(__file__).with_name("watch")
KERNEL_GUARDS = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
IMPORTS = """
import importlib, pkgutil
import ofb, ofb_kernels
names = {module.name for p in (ofb, ofb_kernels) for module in pkgutil.walk_packages(p.__path__, p.__name__ + ".")}
for name in names - {"ofb.__main__"}:
    importlib.import_module(name)
print("modules", len(names))
"""
COMMANDS = """
from ofb.cli import main
DATA = "--device cpu --batch-size 16 --workers 2 --data-dir images".split() + ["--data", ""]
MODEL = "--model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=8 embed_dim=32 depth=1 num_heads=2".split()
SEARCH = "--checkpoint dense --output found --target 60% --architecture-lr 0.3 --finetune-epochs 1".split()
for command in (
    ["train", *MODEL, "--output", "dense", "--epochs", "1", *DATA],
    ["search", *SEARCH, "--epochs", "2", *DATA],
    ["evaluate", "found", *DATA],
    ["export", "found"],
    ["export", "found", "--format", "program"],
    ["report", "found"],
    ["profile", "found", "--device", "cpu"],
    ["doctor", "--device", "cpu"],
):
    assert main(command) == 0, command
"""


@pytest.fixture
def place():
    """A folder of a short name: worker processes speak by sockets in it, whose names may have 108 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def watched(code: str, folder: Path, timeout: int = 300) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """Code run in folder/work, with homes and temporary files of its own beside it, and what was noted of it."""
    for name in ("work", "home", "temporary"):
        (folder / name).mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_", "MPL", "TORCH"))}
    env |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary"), "OFB_WATCH": str(folder / "log")}
    env |= {"PYTHONPATH": os.pathsep.join([str(WATCH), str(ROOT)]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=folder / "work", capture_output=True, text=True, timeout=timeout
    )
    return done, [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def digits(folder: Path) -> None:
    """Images in folders of their classes, each of which a worker process reads."""
    images, classes = load_digits(return_X_y=True)
    for part, start in (("train", 0), ("val", 400)):
        for i in range(start, start + 80):
            path = folder / part / str(classes[i]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((images[i].reshape(8, 8) * 15).astype("uint8")).save(path)


def test_no_network_and_nothing_elsewhere(place, evidence):
    digits(place / "work" / "images")
    done, notes = watched(IMPORTS + COMMANDS, place)
    assert done.returncode == 0, done.stderr[-3000:]
    processes = {note["process"] for note in notes}
    assert len(processes) > 4, "no worker process was watched"
    assert [note["what"] for note in notes if note["kind"] == "network"] == []

    written = {Path(note["what"]) for note in notes if note["kind"] == "write"}
    places = ("work/dense", "work/found", "home/.cache", "home/.config/matplotlib", "temporary")
    usual = [place / each for each in places] + [Path("/dev/null"), Path("/dev/shm")]
    elsewhere = [path for path in written if not any(each in (path, *path.parents) for each in usual)]
    assert set(elsewhere) <= {place / "home" / ".config"}
    kept = [path for path in (place / "home").rglob("*") if path.is_file()]
    assert all("matplotlib" in path.parts for path in kept), "native code writes without Python's knowledge"
    assert not [path for path in (place / "temporary").rglob("*") if path.is_file()]
    evidence("modules imported", int(done.stdout.partition("modules ")[2].split()[0]))
    evidence("processes watched", len(processes))
    evidence("connections and look-ups", 0)
    evidence("files and folders written, all in their place", len(written))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("import urllib.request; urllib.request.urlopen('http://example.com')", "network"),
        ("import socket; socket.gethostbyname('example.com')", "network"),
        ("import socket; socket.socket(socket.AF_UNIX).connect('nobody')", None),
        ("import os; os.mkdir('/nowhere/at/all')", "write"),
        ("open('/nowhere/at/all', 'w')", "write"),
        ("import multiprocessing as m; m.get_context('spawn').Pool(1).apply(open, ('/nowhere', 'x'))", "write"),
    ],
)
def test_the_watch_sees(code, kind, place):
    """Also in processes that are started anew: two of them then noted something."""
    done, notes = watched(code, place)
    assert done.returncode == 1
    assert kind is None or kind in {note["kind"] for note in notes}
    assert kind is not None or {note["kind"] for note in notes} == {"process"}


@pytest.mark.skipif(not KERNEL_GUARDS, reason="needs seccomp on a machine whose system calls the test knows")
@pytest.mark.parametrize(("family", "allowed"), [("AF_INET", False), ("AF_INET6", False), ("AF_UNIX", True)])
def test_the_kernel_ends_native_code_that_asks_for_a_socket(family, allowed, place):
    code = f"import ctypes, socket; ctypes.CDLL(None).socket(socket.{family}, 1, 0)"
    done, _ = watched(code, place)
    assert done.returncode == (0 if allowed else -signal.SIGSYS)
