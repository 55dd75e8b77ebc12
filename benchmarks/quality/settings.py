"""What is compared on: data sets, the dense network of each, and how long things take."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import timm
from torch import nn

import ofb
from benchmarks.quality.images import small_images
from benchmarks.quality.results import FOLDER
from ofb.engine.config import TrainConfig
from ofb.engine.data import Loaders, create_loaders, create_model
from ofb.engine.device import pick_device
from ofb.engine.seeding import seed_everything
from ofb.export import count_params
from ofb.supernet.families import count_macs


@dataclass(frozen=True)
class Setting:
    """A data set, the dense network for it, and how long things take.

    Attributes:
        data: as timm names it, or `digits`.
        model: arguments of the timm model.
        dense_epochs: training of the dense network; 0 takes timm's pretrained weights.
        search_epochs, finetune_epochs: OFB's; the rivals have the sum.
        train_images, val_images: so many are held in memory; 0 reads an image folder as `ofb search` does.
        architecture: timm's name of the model.
    """

    data: str
    model: dict
    dense_epochs: int
    search_epochs: int
    finetune_epochs: int
    train_images: int = 0
    val_images: int = 0
    batch_size: int = 128
    dense_lr: float = 1e-3
    lr: float = 1e-3
    architecture: str = "vit_tiny_patch16_224"


def _cifar(classes: int) -> Setting:
    return Setting(
        f"torch/cifar{classes}",
        dict(img_size=32, patch_size=4, num_classes=classes, embed_dim=192, depth=8, num_heads=6),
        dense_epochs=200,
        search_epochs=40,
        finetune_epochs=60,
        train_images=45_000,
        val_images=5_000,
    )


SETTINGS = {
    "digits": Setting(
        "digits",
        dict(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=4),
        dense_epochs=100,
        search_epochs=40,
        finetune_epochs=40,
        batch_size=64,
        dense_lr=2e-3,
    ),
    # Reduced: what two CPU cores can do. Narrow, so that what is taken away is missed; few images, so that search and
    # fine-tuning may take a fifth of the dense network's epochs.
    "fashion_mnist-reduced": Setting(
        "torch/fashion_mnist",
        dict(img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4),
        dense_epochs=200,
        dense_lr=2e-3,
        search_epochs=16,
        finetune_epochs=24,
        train_images=10_000,
        val_images=5_000,
    ),
    "fashion_mnist": Setting(
        "torch/fashion_mnist",
        dict(img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=128, depth=6, num_heads=4),
        dense_epochs=200,
        search_epochs=40,
        finetune_epochs=60,
        train_images=55_000,
        val_images=5_000,
    ),
    "cifar10": _cifar(10),
    "cifar100": _cifar(100),
    "imagenet": Setting(
        "",
        {},
        dense_epochs=0,
        search_epochs=30,
        finetune_epochs=70,
        batch_size=256,
        lr=2.5e-4,
        architecture="deit_small_patch16_224",
    ),
}


def images(name: str, data_dir: str) -> Loaders:
    """The images of a setting."""
    setting = SETTINGS[name]
    if setting.train_images:
        return small_images(setting.data, data_dir, setting.batch_size, setting.train_images, setting.val_images)
    config = _data_config(setting, data_dir)
    return create_loaders(config, create_model(config), pick_device(config))


def dense_folder(name: str) -> Path:
    """Where the dense network of a setting lies: beside its results, or else where `train_dense` puts it."""
    kept = FOLDER / f"{name}.dense"
    return kept if kept.exists() else Path("runs/quality") / name


def train_dense(name: str, data_dir: str) -> dict:
    """Train the dense network of a setting, unless it is there; what is known of it, its validation curve included."""
    folder, setting, loaders = dense_folder(name), SETTINGS[name], images(name, data_dir)
    config = _data_config(setting, data_dir)
    if not (folder / "config.json").exists():
        ofb.save(_trained(setting, config, loaders, folder) if setting.dense_epochs else create_model(config), folder)
    model, metrics = ofb.load(folder), folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return {
        "macs": count_macs(model),
        "params": count_params(model),
        "test_top1": ofb.evaluate(model, loaders.test, config)["top1"],
        "val_top1": [json.loads(line)["val_top1"] for line in lines],
    }


def _trained(setting: Setting, config: TrainConfig, loaders: Loaders, folder: Path) -> nn.Module:
    seed_everything(0, "dense", 0)
    model = timm.create_model(setting.architecture, **setting.model)
    shape = tuple(next(iter(loaders.val))[0].shape[1:])
    model.pretrained_cfg = model.default_cfg = {"input_size": shape, "num_classes": model.num_classes}
    options = {"epochs": setting.dense_epochs, "lr": setting.dense_lr, "drop_path": 0.1, "clip_grad": 1.0}
    config = replace(config, **options, warmup_epochs=0.0, mixup=0.0, cutmix=0.0, output=str(folder), resume=True)
    return ofb.train(model, loaders.train, loaders.val, config)


def _data_config(setting: Setting, data_dir: str) -> TrainConfig:
    return TrainConfig(
        data=setting.data,
        data_dir=None if setting.data == "digits" else data_dir,
        batch_size=setting.batch_size,
        model=setting.architecture,
        model_kwargs=tuple(f"{key}={value}" for key, value in setting.model.items()),
        pretrained=not setting.dense_epochs,
    )
