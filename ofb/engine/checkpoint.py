"""Files that are written whole or not at all, and checkpoints: tensors and plain values, nothing that is executed.

A checkpoint is one safetensors file, its structure as JSON in the header, and the beginning of its SHA-256 in its name
(as torch.hub names weights), so that a damaged one is told from a good one.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ofb.engine.distributed import is_main

TEMPORARY = ".tmp"
DIGEST_DIGITS = 16
STRUCTURE = "structure"  # entry of the header


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it there: whoever reads sees the old or the new file.

    The bytes are on the disk before the name changes, and the name before this returns, so a power cut cannot leave an
    empty file either. Of the processes of a job, which all have the same to say, the first one writes.

    Raises:
        OSError: the file cannot be written; what was there before is still there.
    """
    if not is_main():
        return
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_names(path.parent)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            advice = "make room or make it writable; the files before it are intact"
            raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno or 0)}; {advice}") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Atomically write a text file."""
    write_atomically(path, lambda file: file.write(text.encode()))


def is_temporary(path: Path) -> bool:
    """Whether a file is one that `write_atomically` is writing, or was."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY)


def remove_temporaries(folder: str | Path) -> None:
    """Remove what writers that were killed have left in a folder and below. Only for whom the folder is locked."""
    for path in filter(is_temporary, Path(folder).rglob("*")):
        path.unlink(missing_ok=True)


# ---- checkpoints ----


def save_checkpoint(folder: str | Path, stage: str, step: int, state: Mapping[str, Any], keep: int) -> None:
    """Atomically save a state, and remove the oldest checkpoints of its stage so that `keep` are left.

    Args:
        folder: made if it does not exist.
        stage: what the state belongs to, part of the file's name.
        step: the larger, the newer; no two states have the same.
        state: of tensors, numbers, strings, None, and lists and dicts of them; tuples come back as lists.
        keep: checkpoints of this stage to keep, at least 1.

    Raises:
        OSError: it cannot be written; the checkpoints before it are intact.
    """
    if not is_main():
        return
    tensors = _Tensors()
    structure = json.dumps(_plain(state, tensors))
    content = save_tensors(tensors.all, {STRUCTURE: structure})
    name = f"{stage}-{step:09d}-{_digest(content)}.safetensors"
    write_atomically(Path(folder) / name, lambda file: file.write(content))
    for _, path in list(_newest_first(folder, stage))[keep:]:
        path.unlink(missing_ok=True)


def load_checkpoint(folder: str | Path, stage: str) -> dict[str, Any] | None:
    """The newest undamaged state of a stage, on the CPU; None if there has never been one.

    A damaged file is told on standard error, and the one before it is taken.

    Raises:
        ValueError: all are damaged.
    """
    damaged = []
    for digest, path in _newest_first(folder, stage):
        content = path.read_bytes()
        if _digest(content) == digest:
            return _state(content, path)
        damaged.append(path.name)
        print(f"note: {path} is damaged (its SHA-256 is not {digest}…); trying the one before it", file=sys.stderr)
    if damaged:
        raise ValueError(f"resume: expected an undamaged checkpoint in {folder}, got {', '.join(damaged)}; start anew")
    return None


def newest_step(folder: str | Path, stage: str) -> int | None:
    """The step of a stage's newest checkpoint, by its name alone; None if there is none."""
    newest = next(_newest_first(folder, stage), None)
    return None if newest is None else int(newest[1].name.split("-")[-2])


def _newest_first(folder: str | Path, stage: str) -> Iterator[tuple[str, Path]]:
    """Digest and path of the checkpoints of a stage."""
    pattern = re.compile(rf"{re.escape(stage)}-(\d{{9,}})-([0-9a-f]{{{DIGEST_DIGITS}}})\.safetensors")
    names = os.listdir(folder) if Path(folder).is_dir() else []
    found = [match for match in map(pattern.fullmatch, names) if match]
    for match in sorted(found, key=lambda match: (int(match[1]), match[0]), reverse=True):
        yield match[2], Path(folder) / match[0]


def _state(content: bytes, path: Path) -> dict[str, Any]:
    try:
        tensors = load_tensors(content)  # checks names, sizes and the file's length before it takes memory
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        return _filled(json.loads(header["__metadata__"][STRUCTURE]), tensors)
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"resume: expected a checkpoint that ofb wrote, got {path}: {error!r}") from error


class _Tensors:
    """Tensors under names: one that is met again keeps its name, and no two share memory."""

    def __init__(self) -> None:
        self.all: dict[str, Tensor] = {}
        self.names: dict[tuple, str] = {}
        self.storages: set[int] = set()

    def name_of(self, tensor: Tensor, name: str) -> str:
        """The name of a tensor, which is `name` if it is new."""
        place = tensor.data_ptr() if tensor.numel() else name
        identity = (place, tensor.dtype, tensor.shape, tensor.stride())
        if identity not in self.names:
            self.names[identity] = name
            storage = tensor.untyped_storage().data_ptr()
            saved = tensor.detach().cpu().contiguous()
            self.all[name] = saved.clone() if storage in self.storages else saved
            self.storages.add(storage)
        return self.names[identity]


def _plain(value: Any, tensors: _Tensors, name: str = "") -> Any:
    """A value as JSON, its tensors by name."""
    if isinstance(value, Tensor):
        return {"tensor": tensors.name_of(value, name)}
    if isinstance(value, Mapping):  # as pairs: keys may be numbers
        return {"dict": [[key, _plain(each, tensors, f"{name}/{key}")] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(each, tensors, f"{name}/{index}") for index, each in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state: expected tensors and plain values, got {type(value).__name__} at {name or 'the top'}")


def _filled(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_filled(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _filled(each, tensors) for key, each in value["dict"]}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS]


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
