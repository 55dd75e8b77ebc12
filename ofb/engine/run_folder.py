"""A run folder: what its files are called, where it is, how to go on, and that one run at a time writes to it."""

import os
import shlex
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ofb.engine.checkpoint import is_temporary, remove_temporaries, write_text
from ofb.engine.distributed import is_main
from ofb.engine.untrusted import parse_json

CONFIG_FILE = "config.yaml"  # the options it was started with
METRICS_FILE = "metrics.jsonl"  # an entry for each epoch
HISTORY_FILE = "history.jsonl"  # how a search stood after each epoch, and what it pruned
FOUND_FILE = "found.json"  # sizes found, and how they were chosen
IMPORTANCE_FILE = "importance.json"  # learned importance beside the loss without a unit
LATENCY_FILE = "latency.json"  # the table behind a target of latency
FIGURES_FILE = "figures.json"  # accuracy and costs of its networks
RECONSTRUCTION_FILE = "reconstruction.png"  # what was rebuilt of masked images
CHECKPOINT_FOLDER = "checkpoints"  # where each stage stood
EXPORT_FOLDER = "export"  # the network
REPORT_FOLDER = "report"
LOCK_FILE = ".lock"  # held by the run that writes here
HOLDER_FILE = ".running"  # who that is


def run_of(path: str | Path) -> Path | None:
    """The run folder that a path is, or that it is the export folder of, or a network in there; None if it is none."""
    for place in (Path(path), Path(path).resolve()):
        above = (each.parent for each in (place, place.parent) if each.name == EXPORT_FOLDER)
        for folder in (place, *above):
            if (folder / CONFIG_FILE).is_file():
                return folder
    return None


def command_of(options: Mapping[str, Any]) -> str:
    """Which command a run is of, by the options in its config file."""
    return "search" if "target" in options else "train"


def resume_command(command: str, folder: str | Path) -> str:
    """The command line that goes on with a run of `ofb train` or `ofb search`."""
    return f"ofb {command} --resume --output {shlex.quote(str(folder))}"


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines, each of a stage's epoch; none where there is no file.

    A last line that breaks off, as a copy may, is left out.

    Raises:
        ValueError: the file is damaged; the message names the line.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"run: {path} is damaged: {error}; remove it") from error
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries += [_entry(line)] if line.strip() else []
        except ValueError as error:
            if number == len(lines) and line.startswith("{"):
                break
            reason = getattr(error, "msg", error)  # JSON's own would call each line the first one
            raise ValueError(f"run: {path} is damaged: line {number}: {reason}; remove this line") from error
    return entries


@contextmanager
def locked(folder: str | Path | None) -> Iterator[None]:
    """Keep other runs out of a folder while inside, on this machine and, where its file system can, on others.

    The lock ends with the process, however it ends. What an earlier process left half written is removed. A run that
    holds the folder may lock it again; None locks nothing.

    Raises:
        ValueError: another run is writing there.
        OSError: the folder cannot be made or written to.
    """
    if folder is None or not is_main():
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock((folder / LOCK_FILE).resolve(), is_singleton=True), folder / HOLDER_FILE
    first = not lock.is_locked
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"output: expected a folder that no other run is writing to, got {folder} ({_text(holder)} is); "
            "wait for that run, stop it, or choose another folder"
        ) from None
    try:
        if first:
            remove_temporaries(folder)
            write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")  # and learn if there is room
        yield
    finally:
        if first:
            with suppress(OSError):  # what went wrong before says more
                holder.unlink()
        lock.release()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run that never began left."""
    left = (LOCK_FILE, HOLDER_FILE)
    return folder.is_dir() and all(path.name in left or is_temporary(path) for path in folder.iterdir())


def _entry(line: str) -> dict[str, Any]:
    entry = parse_json(line)
    if not isinstance(entry, dict) or (type(entry.get("stage")), type(entry.get("epoch"))) != (str, int):
        raise ValueError("expected the entry of a stage's epoch")
    return entry


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else "another process"
