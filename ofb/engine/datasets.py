"""timm's data sets as three parts with the same classes, no image in two of them."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from timm.data import ImageDataset, create_dataset
from timm.data.readers import add_img_extensions, get_img_extensions
from torch.utils.data import Dataset, IterableDataset, Subset

from ofb.engine.config import DataConfig
from ofb.engine.readable import ReadableImages
from ofb.engine.splits import (
    check_classes,
    class_indices,
    content_keys,
    hold_out,
    image_files,
    is_flat,
    missing_classes,
    nested_split,
    other_files,
    real_paths,
    shown,
    split_folder,
    subfolders,
    synonyms,
)

# What Pillow reads besides timm's .png, .jpg and .jpeg; torchvision's ImageFolder takes the same.
add_img_extensions([".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp"])

Chosen = dict[str, tuple[str, list[int]]]  # for each part, the split its images come from and which they are


def open_parts(config: DataConfig, channels: int) -> tuple[dict[str, Dataset], list[str]]:
    """The images of train, val and test, and what a user should know about them.

    Class indices are those of the training split. A part without a split of its own is held out of the training split.

    Raises:
        ValueError: a split is not there or cannot be read, has classes of its own, or has files of another split.
    """
    config = with_splits(config)
    train = open_split(config, "train_split", channels)
    check_classes(train, config.train_split)
    splits, notes = {"train": train}, []
    for part in ("val", "test"):
        option = f"{part}_split"
        if getattr(config, option) is not None and not _is_flat(config):
            splits[part], missing = _with_classes_of(train, config, option, channels)
            if missing:
                notes.append(f"{getattr(config, option)!r} has no images of {shown(missing)}, as training has")
    notes += [*_other_files(config, splits), *_check_apart(config, splits)]
    if isinstance(train, IterableDataset):
        if "val" not in splits:
            raise ValueError(f"val_split: expected a split of {config.data}, whose images cannot be held out, got None")
        return splits, notes
    chosen, left_out = _without_twins(*_hold_out(config, splits), splits)
    if "test" not in splits:
        notes.append(_shares(config, chosen))
    return {part: _subset(splits[split], indices) for part, (split, indices) in chosen.items()}, notes + left_out


def with_splits(config: DataConfig) -> DataConfig:
    """The config with a name for the test split, and one for the validation split where a folder has both; those of a
    folder of classes without splits have none."""
    if config.test_split is not None or _is_flat(config):
        return config
    folders = config.is_image_folder and {name: split_folder(config.data_dir, name) for name in ("validation", "test")}
    if not folders or not folders["test"]:
        return replace(config, test_split="validation")
    validation = "validation" if config.val_split is None and folders["validation"] else config.val_split
    return replace(config, val_split=validation, test_split="test")


def open_split(config: DataConfig, option: str, channels: int, class_map: Mapping[str, int] | None = None) -> Dataset:
    """The images of the split that an option names.

    Args:
        config: which data set.
        option: train_split, val_split or test_split.
        channels: of the images, 1 for grey ones.
        class_map: class indices by class name; those of the split's own classes in order if not given.

    Raises:
        ValueError: it is not there, or cannot be read.
    """
    split = getattr(config, option)
    root = _folder(config, option) if config.is_image_folder else config.data_dir
    mode = {"input_img_mode": "L"} if channels == 1 and not config.data.startswith("torch/") else {}
    try:
        dataset = create_dataset(
            config.data,
            root=root,
            split=split,
            search_split=False,
            class_map=class_map,
            is_training=option == "train_split",
            batch_size=config.batch_size,
            seed=config.seed,
            **mode,
        )
    except (OSError, RuntimeError, AssertionError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data: cannot read split {split!r} of {config.data!r} in {config.data_dir}: {error}"
        ) from error
    return ReadableImages(dataset, config.skip_broken) if type(dataset) is ImageDataset else dataset


def has_training_images(config: DataConfig) -> bool:
    """Whether there is a training split; folders alone may lack one, other data sets say so when they are opened."""
    return not config.is_image_folder or _is_flat(config) or bool(split_folder(config.data_dir, config.train_split))


class Part(Subset):
    """Some images of a data set, whose transform is that one's: timm's loader sets it on the outer one."""

    @property
    def transform(self) -> Callable | None:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        self.dataset.transform = transform


def _is_flat(config: DataConfig) -> bool:
    """Whether the data is a folder of classes without splits, and no split is asked for."""
    defaults = {"train_split": ("train",), "val_split": (None,), "test_split": (None, "validation")}
    unasked = all(getattr(config, option) in values for option, values in defaults.items())
    return unasked and config.is_image_folder and is_flat(config.data_dir)


def _folder(config: DataConfig, option: str) -> str:
    """The folder of a split's images; that of all, where it holds classes without splits."""
    root, split = config.data_dir, getattr(config, option)
    if not os.path.exists(root):
        raise ValueError(f"data_dir: expected a folder of images, got {root}, which is not there")
    if _is_flat(config):
        if nested := nested_split(root):
            raise ValueError(
                f"data_dir: expected a folder of splits or of classes, got {root}, where {nested} looks like a split; "
                "give the folder that holds the splits"
            )
        return root
    folder = split_folder(root, split)
    if folder is None and not subfolders(root):
        raise ValueError(
            f"data_dir: expected folders of splits, or of classes, in {root}, got none; lay the images out so"
        )
    if folder is None:
        hint = f"name the one to use with --{option.replace('_', '-')}"
        if option == "test_split" and (train := split_folder(root, config.train_split)):
            hint += f", or split the training images by --test-share: --data-dir {train}"
        raise ValueError(f"{option}: expected a folder {split!r} in {root}, got {shown(subfolders(root))}; {hint}")
    return folder


def _with_classes_of(train: Dataset, config: DataConfig, option: str, channels: int) -> tuple[Dataset, list[str]]:
    """A split with the class indices of the training split, and the classes of which it has no images."""
    dataset, classes = open_split(config, option, channels), class_indices(train)
    missing = missing_classes(train, dataset, option, getattr(config, option))
    if class_indices(dataset) not in ({}, classes):
        dataset = open_split(config, option, channels, class_map=classes)
        if class_indices(dataset) != classes:
            raise ValueError(
                f"{option}: expected all classes of the training split, got none of {shown(missing)} in "
                f"{getattr(config, option)!r}; add images of them, or leave --data out"
            )
    return dataset, missing


def _other_files(config: DataConfig, splits: Mapping[str, Dataset]) -> Iterator[str]:
    """A note where a folder of images holds files that are none by their endings."""
    for part in splits if config.is_image_folder else ():
        if os.path.isdir(folder := _folder(config, f"{part}_split")):
            found = other_files(folder, get_img_extensions(as_set=True))
            if found:
                endings = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in found.most_common())
                yield f"{folder} holds files that are no images by their endings, which are left out: {endings}"


def _check_apart(config: DataConfig, splits: Mapping[str, Dataset]) -> list[str]:
    """Check that no two parts have a split or a file in common; a note where a stream's have and must."""
    notes = []
    for first, second in combinations(splits, 2):
        shared = _shared(config, splits, first, second)
        if shared and first == "val" and isinstance(splits[first], IterableDataset):
            notes.append(f"{shared} both chooses the best epoch and reports: its figures are too good")
        elif shared:
            hint = "; leave --val-split out to hold out training images" if first == "val" else ""
            raise ValueError(
                f"{second}_split: expected images that are in no other split, got {shared} as for {first}_split; name "
                f"another split{hint}"
            )
    return notes


def _shared(config: DataConfig, splits: Mapping[str, Dataset], first: str, second: str) -> str:
    """What two parts have in common, in words; nothing if they are apart."""
    files = [image_files(splits[part]) for part in (first, second)]
    names = [getattr(config, f"{part}_split") for part in (first, second)]
    if None not in files:
        paths = sorted(set(real_paths(files[0])) & set(real_paths(files[1])))
        return f"{len(paths)} images of {names[1]!r} such as {paths[0]}" if paths else ""
    same = _meaning(splits[first], names[0]) == _meaning(splits[second], names[1])
    return f"{names[1]!r}" if same else ""


def _meaning(dataset: Dataset, split: str) -> str:
    """One name for all names of a split of a data set that is no folder."""
    if isinstance(is_train := getattr(dataset, "train", None), bool):  # torchvision's that have two splits
        return "train" if is_train else "test"
    return synonyms(split)[0]


def _hold_out(config: DataConfig, splits: Mapping[str, Dataset]) -> tuple[Chosen, dict[str, Sequence]]:
    """The images of each part, and the keys of each split's images: the same for images of the same content."""
    keys = _keys(splits)
    chosen = {part: (part, list(range(len(dataset)))) for part, dataset in splits.items()}
    # The test images do not depend on --seed: runs with other seeds are compared on them.
    for part, share, seed in (("test", config.test_share, 0), ("val", config.val_share, config.seed)):
        if part not in splits:
            indices = chosen["train"][1]
            kept, held_out = hold_out([keys["train"][i] for i in indices], share, seed, f"{part}_share")
            chosen["train"], chosen[part] = (("train", [indices[i] for i in each]) for each in (kept, held_out))
    return chosen, keys


def _keys(splits: Mapping[str, Dataset]) -> dict[str, Sequence]:
    files = {part: image_files(dataset) for part, dataset in splits.items()}
    if None in files.values():
        return {part: [(part, i) for i in range(len(dataset))] for part, dataset in splits.items()}
    keys = iter(content_keys([file for each in files.values() for file in each]))
    return {part: [next(keys) for _ in each] for part, each in files.items()}


def _without_twins(
    chosen: Chosen, keys: Mapping[str, Sequence], splits: Mapping[str, Dataset]
) -> tuple[Chosen, list[str]]:
    """The parts without images whose content is in another part, test images first; notes about those left out."""
    seen, notes, apart = set(), [], {}
    for part in ("test", "val", "train"):
        split, indices = chosen[part]
        kept = [i for i in indices if keys[split][i] not in seen]
        twins = [i for i in indices if keys[split][i] in seen]
        if twins:
            notes.append(
                f"left out of {part}: {len(twins)} of {len(indices)} images, which another split has as well, such as "
                f"{image_files(splits[split])[twins[0]]}"
            )
        if not kept:
            raise ValueError(
                f"data: expected images for {part} that no other split has, got {len(twins)} that are there"
            )
        seen.update(keys[split][i] for i in kept)
        apart[part] = split, kept
    return apart, notes


def _shares(config: DataConfig, chosen: Chosen) -> str:
    train, val, test = (len(chosen[part][1]) for part in ("train", "val", "test"))
    return (
        f"{config.data_dir} has no splits: {train} of its images train, {val} choose the best epoch (--val-share "
        f"{config.val_share}), {test} only report (--test-share {config.test_share})"
    )


def _subset(dataset: Dataset, indices: list[int]) -> Dataset:
    """Some images of a data set, with a transform of their own."""
    dataset = copy.copy(dataset)
    return dataset if len(indices) == len(dataset) else Part(dataset, indices)
