"""Checkpoints: written whole or not at all, made of tensors and plain values only."""

import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ofb.engine.distributed import is_main


def write_atomically(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it there: whoever reads sees the old or the new file.

    The bytes are on the disk before the name changes, so a power cut cannot leave an empty file either. Of the
    processes of a job, which all have the same to say, the first one writes.
    """
    if not is_main():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Atomically write a text file."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Atomically save a state of tensors, numbers, strings, lists and dicts."""
    write_atomically(path, lambda file: torch.save(dict(state), file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged or no checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint: {path} is damaged or was not written by this package ({reason})") from error
