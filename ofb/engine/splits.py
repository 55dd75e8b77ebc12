"""Splits of image folders: which there are, their classes, which images are the same, and which to hold out."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, Subset

SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test", "testing"))
MOST_FILES, MOST_BYTES = 100_000, 2**30  # beyond these, files are compared by path only


def split_folder(root: str, split: str) -> str | None:
    """The folder of a split below `root`: of its name, or else of one that means the same."""
    names = (split, *synonyms(split))
    return next((path for name in names if os.path.isdir(path := os.path.join(root, name))), None)


def synonyms(split: str) -> tuple[str, ...]:
    """All names of a split that mean the same."""
    return next((names for names in SYNONYMS if split in names), (split,))


def is_flat(root: str) -> bool:
    """Whether a folder holds classes instead of splits; so does a tar file."""
    folders = {name.lower() for name in subfolders(root)}
    return os.path.isfile(root) or bool(folders) and folders.isdisjoint(name for names in SYNONYMS for name in names)


def subfolders(root: str) -> list[str]:
    """Names of the folders in a folder, without hidden ones."""
    if not os.path.isdir(root):
        return []
    return sorted(each.name for each in os.scandir(root) if each.is_dir() and not each.name.startswith("."))


def nested_split(root: str) -> str | None:
    """A folder named like a split that is further down than directly in `root`; None if there is none."""
    below = (
        os.path.join(root, outer, inner)
        for outer in subfolders(root)
        for inner in subfolders(os.path.join(root, outer))
    )
    return next((path for path in below if any(os.path.basename(path).lower() in names for names in SYNONYMS)), None)


def other_files(root: str, images: Collection[str]) -> Counter[str]:
    """How many files below a folder, hidden ones aside, have an ending that none of the `images` has."""
    names = (name for _, _, names in os.walk(root, followlinks=True) for name in names if not name.startswith("."))
    endings = (os.path.splitext(name)[1].lower() for name in names)
    return Counter(ending for ending in endings if ending not in images)


def shown(names: Iterable[str], most: int = 10) -> str:
    """Some names, in one line."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def class_indices(dataset: Dataset) -> dict[str, int]:
    """Class indices by class name; empty where a data set does not tell."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    found = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or getattr(dataset, "class_to_idx", None)
    return dict(found or {})


def count_classes(dataset: Dataset) -> int:
    """How many classes there are, some of which may have several names; 0 where a data set does not tell."""
    return len(set(class_indices(dataset).values()) or getattr(dataset, "classes", ()))


def check_classes(train: Dataset, split: str) -> None:
    """Raise ValueError where a training split has no two classes, or images outside of the folders of its classes."""
    classes, files = class_indices(train), image_files(train)
    if "" in classes and files is not None:
        outside = next(file for file, index in train.reader.samples if index == classes[""])
        raise ValueError(f"data: expected each image in the folder of its class, got {outside}; move or remove it")
    if len(classes) == 1:
        raise ValueError(f"data: expected two classes or more in {split!r}, got {shown(classes)} alone")


def missing_classes(train: Dataset, other: Dataset, option: str, split: str) -> list[str]:
    """Training classes of which another split has no images.

    Raises:
        ValueError: the split has classes that the training split lacks.
    """
    known, found = class_indices(train), class_indices(other)
    unknown = [name for name in found if name not in known]
    if known and unknown:
        raise ValueError(
            f"{option}: expected the {len(known)} classes of the training split, got also {shown(unknown)} in "
            f"{split!r}; add training images of them, or remove them there"
        )
    return [name for name in known if found and name not in found]


def hold_out(keys: Sequence[Hashable], share: float, seed: int, option: str) -> tuple[list[int], list[int]]:
    """Split images at random into (kept, held out), images of the same key together.

    Args:
        keys: for each image what tells it from others.
        share: how much to hold out.
        seed: of the choice.
        option: what to name in an error.

    Raises:
        ValueError: nothing would be held out, or nothing kept.
    """
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    order = np.random.default_rng(seed).permutation(len(number))
    held_out = {int(i) for i in order[: round(len(number) * share)]}
    parts = [], []
    for i, key in enumerate(keys):
        parts[number[key] in held_out].append(i)
    if not all(parts):
        raise ValueError(f"{option}: expected to hold out at least one of {len(keys)} images, got {share}")
    return parts


def image_files(dataset: Dataset) -> list[str] | None:
    """The files of a folder's images; None for other data sets."""
    reader = getattr(dataset, "reader", None)
    samples = reader.samples if isinstance(reader, ReaderImageFolder) else getattr(dataset, "samples", None)
    return None if samples is None else [path for path, _ in samples]


def real_paths(files: Iterable[str]) -> list[str]:
    """Paths with links between folders resolved, one look-up for each folder."""
    folders: dict[str, str] = {}
    found = []
    for folder, name in map(os.path.split, files):
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        found.append(os.path.join(folders[folder], name))
    return found


def content_keys(files: Sequence[str]) -> list[Hashable]:
    """For each image file what it shares with those of the same content: a digest, or its path where it has no twin.

    Only files of the same size are read; where those are too many, all have their paths.
    """
    paths = real_paths(files)
    if len(files) > MOST_FILES:
        return list(paths)
    sizes = [_size(file) for file in files]
    times = Counter(sizes)
    if sum(size for size in sizes if times[size] > 1) > MOST_BYTES:
        return list(paths)
    keys = [_digest(file) if times[size] > 1 else path for file, size, path in zip(files, sizes, paths, strict=True)]
    times = Counter(keys)
    return [
        key if times[key] > 1 and _is_image(file) else path for file, key, path in zip(files, keys, paths, strict=True)
    ]


def _size(file: str) -> int:
    try:
        return os.path.getsize(file)
    except OSError:  # told when the image is read
        return 0


def _digest(file: str) -> bytes:
    try:
        return hashlib.blake2b(Path(file).read_bytes()).digest()
    except OSError:
        return file.encode(errors="surrogateescape")


def _is_image(file: str) -> bool:
    """Whether a file begins as an image does: broken files may be all the same."""
    try:
        with Image.open(file):
            return True
    except Exception:  # Pillow raises almost anything on a damaged file; what it says is told when the image is read
        return False
