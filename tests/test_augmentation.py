"""Augmentation: no policy of --aa asks Pillow for what it refuses; files of every mode; errors name the policy."""

import pickle
import random
from functools import partial

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image, ImageOps
from timm.data import create_transform

from ofb.cli import main
from ofb.engine.augmentation import AUGMIX_OF_ANY_SHAPE, Augmentation, check_policy
from ofb.engine.config import TrainConfig
from ofb.engine.data import create_loaders, create_model
from tests.test_data import CPU

POLICIES = [
    "rand-m9-mstd0.5-inc1",  # the default
    "rand-m9-mstd0.5",
    "rand-m10-n3-p1-mstd101-inc1",
    "rand-m15-mmax20-mstd2-inc1",  # fewer than 0 bits
    "rand-m9-mstd0.5-inc1-tweights",
    "rand-m9-inc1-t3a",
    "rand-m9-inc1-t3aw",
    "original-mstd0.5",
    "originalr-mstd2",
    "v0-mstd2",
    "v0r-mstd2",
    "3a",
    "augmix-m10",
    "augmix-m10-w4-d2-b1",
]
MODEL = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": ("img_size=16", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"),
}
MODES = [("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("LA", "png"), ("L", "jpeg")]


def write_images(folder, count: int = 12, seed: int = 0) -> None:
    """Image files as users have them, all different: PNG and JPEG, several sizes, each mode, one turned by its EXIF."""
    folder.mkdir(parents=True)
    pixels, exif = np.random.default_rng(seed), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    for i in range(count):
        mode, suffix = MODES[i % len(MODES)]
        size = [(24, 20, 3), (20, 31, 3), (7, 9, 3)][i % 3]
        image = Image.fromarray(pixels.integers(0, 255, size, dtype=np.uint8)).convert(mode)
        image.save(folder / f"{i}.{suffix}", **({"exif": exif} if suffix != "png" else {}))


def write_classes(folder, classes=("cat", "dog"), count: int = 12, seed: int = 0) -> None:
    for i, name in enumerate(classes):
        write_images(folder / name, count, seed + 1000 * i)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("policy", POLICIES)
def test_thousands_of_draws(policy, mode):
    channels = {"RGB": 3, "L": 1}[mode]
    if policy.startswith("augmix") and Version(timm.__version__) < AUGMIX_OF_ANY_SHAPE and channels == 1:
        with pytest.raises(ValueError, match="aa: expected timm 1.0.30 or newer for augmix"):
            check_policy(policy, (channels, 8, 8))
        return
    check_policy(policy, (channels, 8, 8))
    mean = (0.485, 0.456, 0.406) if mode == "RGB" else (0.45,)
    std = tuple(0.2 for _ in mean)
    transform = create_transform(8, is_training=True, auto_augment=policy, mean=mean, std=std)
    augment = Augmentation(transform, policy)
    random.seed(0), np.random.seed(0)
    image = Image.fromarray(np.random.randint(0, 255, (8, 9, 3), dtype=np.uint8)).convert(mode)
    for _ in range(2000):
        assert torch.isfinite(augment(image)).all()


def test_the_draws_are_enough_to_find_zero_bits(monkeypatch):
    """Without the mending the default fails in 2,000 draws, where Pillow refuses 0 bits as it does since 13."""
    posterize = ImageOps.posterize

    def strict(image, bits):
        if not 1 <= bits <= 8:
            raise ValueError("bits must be between or equal to 1 and 8")
        return posterize(image, bits)

    monkeypatch.setattr(ImageOps, "posterize", strict)
    transform = create_transform(8, is_training=True, auto_augment=POLICIES[0])
    image = Image.new("RGB", (8, 8), (90, 160, 250))
    random.seed(0), np.random.seed(0)
    with pytest.raises(ValueError, match="bits must be between"):
        for _ in range(2000):
            transform(image)
    augment = Augmentation(transform, POLICIES[0])
    for _ in range(2000):
        augment(image)


def test_bits_are_kept_as_asked_but_for_the_last(monkeypatch):
    asked = []
    monkeypatch.setattr(ImageOps, "posterize", lambda image, bits: asked.append(bits) or image)
    augment = Augmentation(create_transform(8, is_training=True, auto_augment="v0r-mstd9"), "v0r-mstd9")
    random.seed(0)
    for _ in range(3000):
        augment(Image.new("RGB", (8, 8)))
    assert set(asked) == {1, 2, 3, 4}


def test_it_goes_to_worker_processes_that_are_not_forked():
    augment = Augmentation(create_transform(8, is_training=True, auto_augment="v0r"), "v0r")
    assert pickle.loads(pickle.dumps(augment))(Image.new("RGB", (8, 8))).shape == (3, 8, 8)


@pytest.mark.parametrize("channels", [3, 1])
def test_files_of_every_kind(tmp_path, channels):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "validation", seed=1)
    kwargs = (*MODEL["model_kwargs"], f"in_chans={channels}")
    config = TrainConfig(
        data_dir=str(tmp_path), val_share=0.25, batch_size=6, workers=0, model=MODEL["model"], model_kwargs=kwargs
    )
    loaders = create_loaders(config, create_model(config), CPU)
    for _ in range(10):
        for loader in (loaders.train, loaders.val, loaders.test):
            for images, _ in loader:
                assert images.shape[1:] == (channels, 16, 16) and torch.isfinite(images).all()


@pytest.mark.parametrize("policy", ["rnd-m9", "rand-q3", "v1", "augmix-x2", "rand-mstdhalf1"])
def test_unknown_policies(policy, tmp_path):
    with pytest.raises(ValueError, match=f"aa: expected a policy of timm .*got '{policy}'.*--aa None for none"):
        check_policy(policy, (3, 8, 8))


def test_an_unknown_policy_is_told_before_training(tmp_path, capsys):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "validation", seed=1)
    command = ["train", "--data-dir", str(tmp_path), "--model", MODEL["model"], "--aa", "rnd-m9", "--device", "cpu"]
    command += ["--model-kwargs", *MODEL["model_kwargs"], "--batch-size", "4", "--val-share", "0.2"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("ofb: aa: expected a policy of timm")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unexpected_error_names_file_and_policy_with_its_traceback(tmp_path, monkeypatch, workers):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "validation", seed=1)
    monkeypatch.setattr(ImageOps, "posterize", partial(_fails, "no such filter"))
    options = dict(batch_size=4, val_share=0.2, workers=workers, aa="v0r", **MODEL)
    config = TrainConfig(data_dir=str(tmp_path), **options)
    loaders = create_loaders(config, create_model(config), CPU)
    random.seed(0)
    with pytest.raises(RuntimeError) as raised:
        for _ in range(50):
            list(loaders.train)
    last = str(raised.value).strip().splitlines()[-1]
    assert f"data: {tmp_path}/train/" in last and "aa: v0r cannot augment this image (ZeroDivisionError: no" in last
    causes = str(raised.value) if workers else str(type(raised.value.__cause__.__cause__))
    assert "ZeroDivisionError" in causes
    if workers:
        assert "in _fails" in causes  # the traceback, down to where it happened


def test_the_command_line_shows_the_traceback(tmp_path, monkeypatch):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "validation", seed=1)
    for name in ("posterize", "equalize", "autocontrast", "solarize", "invert"):
        monkeypatch.setattr(ImageOps, name, partial(_fails, "no such filter"))
    command = ["train", "--data-dir", str(tmp_path), "--model", MODEL["model"], "--workers", "2", "--device", "cpu"]
    command += ["--model-kwargs", *MODEL["model_kwargs"], "--batch-size", "4", "--val-share", "0.2", "--epochs", "50"]
    with pytest.raises(RuntimeError, match=r"in _fails(.|\n)*data: .*train/.*aa: rand-m9-mstd0.5-inc1 cannot"):
        main([*command, "--output", str(tmp_path / "run")])


def _fails(message, *_):
    raise ZeroDivisionError(message)
