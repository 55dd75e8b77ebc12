"""Images: timm's data sets and loaders, and a small real data set that needs no download.

Three parts with one job each: `train` trains, `val` chooses the best epoch, `test` only reports.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_loader, resolve_data_config
from timm.data.loader import PrefetchLoader
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset
from torchvision.transforms import Compose, Normalize, RandomApply, RandomCrop

from ofb.engine.augmentation import Augmentation, check_policy
from ofb.engine.config import DataConfig, TrainingConfig
from ofb.engine.datasets import has_training_images, open_parts, open_split, with_splits
from ofb.engine.readable import ReadableImages
from ofb.engine.shards import loader_batch_size
from ofb.engine.splits import class_indices, count_classes, shown
from ofb.supernet.families import EXAMPLES, KINDS, family_of

# Mean and standard deviation of the training digits' pixels, 0 to 1.
DIGITS_CFG = {"input_size": (1, 8, 8), "mean": (0.305,), "std": (0.377,), "crop_pct": 1.0, "num_classes": 10}
DIGITS_OPTIONS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
DIGITS_PARTS = {"train": 1197, "val": 300, "test": 300}


@dataclass(frozen=True)
class Loaders:
    """Loaders of (images, class indices) for the three parts, and notes: what a user should know about the data.

    Where a folder has test images alone, these are all that there is to evaluate.
    """

    train: DataLoader | None
    val: DataLoader | None
    test: DataLoader
    notes: tuple[str, ...] = ()

    def skipped(self) -> list[str]:
        """Image files that could not be read so far, and were left out."""
        loaders = (loader for loader in (self.train, self.val, self.test) if loader is not None)
        return sorted({name for loader in loaders for name in _skipped(loader.dataset)})


class Digits(Dataset):
    """One part of scikit-learn's digits: 1,797 scans of handwritten digits, (1, 8, 8) in 0 to 1.

    The parts are disjoint, stratified by class and always the same.

    Args:
        part: train (1,197 scans), val (300) or test (300).
        transform: applied to each image.
    """

    def __init__(self, part: str, transform: Callable[[Tensor], Tensor]) -> None:
        if part not in DIGITS_PARTS:
            raise ValueError(f"part: expected one of {', '.join(DIGITS_PARTS)}, got {part!r}")
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, targets = load_digits(return_X_y=True)
        indices = np.arange(len(targets))
        rest, test = train_test_split(indices, test_size=DIGITS_PARTS["test"], stratify=targets, random_state=0)
        train, val = train_test_split(rest, test_size=DIGITS_PARTS["val"], stratify=targets[rest], random_state=0)
        chosen = {"train": train, "val": val, "test": test}[part]
        self.images = torch.from_numpy(images[chosen]).float().div(16).view(-1, 1, 8, 8)
        self.targets = targets[chosen].tolist()
        self.class_to_idx = {str(digit): digit for digit in range(10)}
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def create_model(config: TrainingConfig) -> nn.Module:
    """The timm model of a config, fitted to its data: classes, and for `digits` image size, patch size and channels.

    What `model_kwargs` says comes first.

    Raises:
        ValueError: no such model, it does not take these arguments, or no family of this package knows it.
    """
    if not timm.is_model(config.model.split(".")[0]):
        close = difflib.get_close_matches(config.model, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() lists them"
        raise ValueError(f"model: expected a timm model name, got {config.model!r}{hint}")
    _check_kind(config.model)
    options = _options_of_data(config) | config.model_options()
    try:
        model = timm.create_model(config.model, pretrained=config.pretrained, **options)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"model: {config.model} cannot be made with {options}: {error}") from error
    family_of(model)
    return model


def _check_kind(name: str) -> None:
    """Raise ValueError where a timm model is of no family that this package knows; nothing is loaded for that."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            kind = type(timm.create_model(name))
    except RuntimeError:  # made with tensors that hold something; `create_model` sees what it is
        return
    if not issubclass(kind, KINDS):
        raise ValueError(
            f"model: expected a Vision Transformer of timm's ViT, EVA or Swin family, which can be searched, got "
            f"{name} ({kind.__name__}); take for example {', '.join(EXAMPLES)}"
        )


def create_teacher(config: TrainingConfig, model: nn.Module) -> nn.Module:
    """The timm model that `config.teacher` names, with its pretrained weights and the classes of `model`.

    It sees the images that the student sees: normalized for the student, at the student's size.

    Raises:
        ValueError: no such model, or it does not take these images.
    """
    if not timm.is_model(config.teacher.split(".")[0]):
        raise ValueError(f"teacher: expected a run folder or a timm model name, got {config.teacher!r}")
    expected = data_config(model)["input_size"]
    try:
        teacher = timm.create_model(
            config.teacher, pretrained=True, num_classes=model.num_classes, in_chans=expected[0]
        ).eval()
        with torch.no_grad():
            teacher(torch.zeros(1, *expected))
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"teacher: {config.teacher} does not serve images of {expected}: {error}") from error
    return teacher


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """What timm knows of a model's weights, images and labels; empty where it knows nothing."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.to_dict() if isinstance(cfg, PretrainedCfg) else dict(cfg)


def data_config(model: nn.Module) -> dict[str, Any]:
    """What a model expects of its images: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode."""
    patch_embed = model.patch_embed
    channels = patch_embed.proj.in_channels
    resolved = resolve_data_config({"input_size": (channels, *patch_embed.img_size)}, pretrained_cfg(model))
    if len(resolved["mean"]) != channels:
        for key in ("mean", "std"):
            resolved[key] = (sum(resolved[key]) / len(resolved[key]),) * channels
    return resolved


def create_loaders(config: DataConfig, model: nn.Module, device: torch.device) -> Loaders:
    """Loaders of the three parts, preprocessed as the model expects.

    Augmentation and order follow torch's, NumPy's and Python's global generators: seed these for each epoch, and an
    epoch is the same whether the epochs before it ran in this process or another. `device` is where timm's loader
    normalizes images if it is a GPU.

    Raises:
        ValueError: the data and the model do not fit, or the data set cannot be read.
    """
    make = _digits_loaders if config.data == "digits" else _timm_loaders
    loaders = make(config, model, device)
    if isinstance(config, TrainingConfig) and len(loaders.train) == 0:
        images = len(loaders.train.dataset)
        raise ValueError(
            f"batch_size: expected no more than the {images} training images, got {config.batch_size}; "
            "give a smaller --batch-size"
        )
    return loaders


def _digits_loaders(config: DataConfig, model: nn.Module, device: torch.device) -> Loaders:
    expected = data_config(model)
    if expected["input_size"] != DIGITS_CFG["input_size"] or model.num_classes < 10:
        raise ValueError(
            f"data: digits are images of 1 × 8 × 8 in 10 classes, got a model for {expected['input_size']} in "
            f"{model.num_classes} classes; make it with --model-kwargs img_size=8 patch_size=2 in_chans=1 "
            "num_classes=10"
        )
    normalize = Normalize(expected["mean"], expected["std"])
    shift = RandomApply([RandomCrop(8, padding=1)])  # every other scan, by up to a pixel each way
    transforms = {"train": Compose([shift, normalize]), "val": normalize, "test": normalize}
    return Loaders(
        **{
            part: DataLoader(
                Digits(part, transform),
                config.batch_size,
                shuffle=part == "train",
                drop_last=part == "train",
                pin_memory=device.type == "cuda",
            )
            for part, transform in transforms.items()
        }
    )


def _timm_loaders(config: DataConfig, model: nn.Module, device: torch.device) -> Loaders:
    expected = data_config(model)
    channels, trains = expected["input_size"][0], isinstance(config, TrainingConfig)
    if trains:
        check_policy(config.aa, expected["input_size"])

    def loader(dataset: Dataset, **options: Any) -> DataLoader:
        return create_loader(
            dataset,
            **expected,
            batch_size=loader_batch_size(config.batch_size, dataset),
            num_workers=config.worker_count,
            use_prefetcher=device.type == "cuda",
            device=device,
            # New workers are seeded from torch's generator each epoch, old ones would carry on where they were.
            persistent_workers=False,
            pin_memory=device.type == "cuda",
            **options,
        )

    if not trains and getattr(config, "split", None) == "test" and not has_training_images(config):
        test = open_split(with_splits(config), "test_split", channels)
        note = _check_classes_of_test(model, test, config)
        return Loaders(None, None, loader(test), (note,))
    parts, notes = open_parts(config, channels)
    _check_classes_of_model(model, parts["train"])
    augmentation = {"auto_augment": config.aa, "re_prob": config.reprob, "re_mode": "pixel"} if trains else {}
    train = loader(parts["train"], is_training=True, **augmentation)
    if trains:
        parts["train"].transform = Augmentation(parts["train"].transform, config.aa)
        if config.aug_repeats > 1:
            train = _repeating(train, config.aug_repeats)
    return Loaders(train, loader(parts["val"]), loader(parts["test"]), tuple(notes))


def _check_classes_of_model(model: nn.Module, train: Dataset) -> None:
    classes = count_classes(train)
    if classes > model.num_classes:
        raise ValueError(
            f"data: expected at most the {model.num_classes} classes of the model, got {classes} "
            f"({shown(class_indices(train), 5)}); leave num_classes out of --model-kwargs, or start from a model for "
            "these classes"
        )


def _check_classes_of_test(model: nn.Module, test: Dataset, config: DataConfig) -> str:
    """A note that there is no training split, whose class indices are thus taken to be those of the test split."""
    classes = count_classes(test)
    if classes != model.num_classes:
        raise ValueError(
            f"train_split: expected a folder {config.train_split!r} in {config.data_dir}, whose classes say which is "
            f"which, or test images of all {model.num_classes} classes of the model, got {classes}; add the folder"
        )
    return f"{config.data_dir} has no training images: class indices are the order of the classes of the test images"


class RepeatedAugmentation(Sampler):
    """Each of a random part of the images several times in a row (Hoffer et al. 2020, as DeiT uses it).

    timm's sampler of this kind needs a distributed job and an order of its own for each epoch; this one follows torch's
    global generator.
    """

    def __init__(self, images: int, repeats: int) -> None:
        self.drawn, self.images, self.repeats = images // repeats, images, repeats

    def __len__(self) -> int:
        return self.drawn * self.repeats

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.images)[: self.drawn].repeat_interleave(self.repeats).tolist())


def _repeating(loader: DataLoader | PrefetchLoader, repeats: int) -> DataLoader | PrefetchLoader:
    """timm's training loader with repeated augmentation."""
    plain = loader.loader if isinstance(loader, PrefetchLoader) else loader
    if isinstance(plain.dataset, IterableDataset):
        raise ValueError("aug_repeats: expected 0 for a data set that is read as a stream; leave it out")
    repeating = DataLoader(
        plain.dataset,
        plain.batch_size,
        sampler=RepeatedAugmentation(len(plain.dataset), repeats),
        num_workers=plain.num_workers,
        collate_fn=plain.collate_fn,
        pin_memory=plain.pin_memory,
        drop_last=True,
        worker_init_fn=plain.worker_init_fn,
    )
    if plain is loader:
        return repeating
    loader.loader = repeating
    return loader


def _skipped(dataset: Dataset) -> list[str]:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset.skipped() if isinstance(dataset, ReadableImages) else []


def _options_of_data(config: DataConfig) -> dict[str, Any]:
    """What a data set asks of a model."""
    if config.data == "digits":
        return {**DIGITS_OPTIONS, "pretrained_cfg_overlay": DIGITS_CFG}
    if "num_classes" in config.model_options():  # without a look at the images, which a run may have outlived
        return {}
    classes = count_classes(open_split(config, "train_split", channels=3))
    return {"num_classes": classes} if classes else {}
