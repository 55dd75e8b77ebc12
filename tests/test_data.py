"""The digits: disjoint, stratified, the same every time; and timm's data sets by folder and by shard."""

import dataclasses
import io
import json
import random
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import ofb
from ofb.engine.config import TrainConfig
from ofb.engine.data import DIGITS_PARTS, Digits, RepeatedAugmentation, _check_kind, create_loaders, create_model
from ofb.engine.seeding import seed_everything
from ofb.engine.tool_config import EvaluateConfig
from ofb.supernet.families import EXAMPLES

CPU = torch.device("cpu")
DIGITS_MODEL = {"model": "vit_tiny_patch16_224", "model_kwargs": ("embed_dim=16", "depth=1", "num_heads=2")}


def parts() -> dict[str, Digits]:
    return {part: Digits(part, transform=lambda image: image) for part in DIGITS_PARTS}


def test_parts_are_disjoint_and_stratified():
    from sklearn.datasets import load_digits

    images = load_digits().data
    repeats = len(images) - len({image.tobytes() for image in images})  # identical scans, if the data holds any
    found = parts()
    assert {name: len(part) for name, part in found.items()} == DIGITS_PARTS
    distinct = {image.numpy().tobytes() for part in found.values() for image in part.images}
    assert len(distinct) == len(images) - repeats
    for part in found.values():
        shares = np.bincount(part.targets) / len(part)
        assert abs(shares - 0.1).max() < 0.01


def test_values_and_repeatability():
    for first, second in zip(parts().values(), parts().values(), strict=True):
        assert torch.equal(first.images, second.images)
        assert first.images.min() == 0 and first.images.max() == 1


def test_an_epoch_depends_on_its_seed_alone():
    config = TrainConfig(batch_size=64, **DIGITS_MODEL)
    model = create_model(config)

    def epoch(number, epochs_before):
        loaders = create_loaders(config, model, CPU)
        for before in range(epochs_before):
            seed_everything(0, "train", before)
            list(loaders.train)
        seed_everything(0, "train", number)
        return torch.cat([images for images, _ in loaders.train])

    assert torch.equal(epoch(2, 0), epoch(2, 2))
    assert not torch.equal(epoch(2, 0), epoch(1, 0))


def test_model_follows_the_digits():
    model = create_model(TrainConfig(**DIGITS_MODEL))
    assert model.patch_embed.img_size == (8, 8)
    assert (model.num_classes, model.patch_embed.proj.in_channels, model.embed_dim) == (10, 1, 16)


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in {"train": 12, "validation": 4}.items():
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_image_folder(image_folder):
    config = TrainConfig(
        data="",
        data_dir=str(image_folder),
        val_share=0.25,
        batch_size=4,
        workers=0,
        model="vit_tiny_patch16_224",
        model_kwargs=("img_size=16", "patch_size=4", "embed_dim=16", "depth=1", "num_heads=2"),
    )
    model = create_model(config)
    assert model.num_classes == 2
    loaders = create_loaders(config, model, CPU)
    assert [len(loader.dataset) for loader in (loaders.train, loaders.val, loaders.test)] == [18, 6, 8]
    for loader in (loaders.train, loaders.val, loaders.test):
        images, targets = next(iter(loader))
        assert images.shape[1:] == (3, 16, 16) and images.is_floating_point()
        assert set(targets.tolist()) <= {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_tinny_patch16_224"}, "expected a timm model name, got 'vit_tinny_patch16_224'; did you mean"),
        ({"model": "resnet18"}, r"Swin family, .* got resnet18 \(ResNet\); take for example deit_small_patch16_224, "),
        ({"model_kwargs": ("colour=3",)}, "cannot be made with"),
        (
            {"data": "", "data_dir": "/no/such/folder"},
            "data_dir: expected a folder of images, got .*, which is not there",
        ),
    ],
)
def test_bad_model_or_data(options, message):
    with pytest.raises(ValueError, match=message):
        create_model(TrainConfig(**(DIGITS_MODEL | options)))


def test_models_to_take_instead_can_be_searched():
    with torch.device("meta"):
        assert all(ofb.supports(timm.create_model(name)) for name in EXAMPLES)


def test_looking_at_the_kind_of_a_model_draws_nothing():
    """Its weights are those that the seed gave before there was such a look."""
    seed_everything(0, "model", 0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    _check_kind("vit_tiny_patch16_224")
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_model_and_digits_must_fit():
    config = TrainConfig(model="vit_tiny_patch16_224", model_kwargs=("img_size=16", "patch_size=4", "depth=1"))
    with pytest.raises(ValueError, match="digits are images of 1 × 8 × 8 in 10 classes"):
        create_loaders(config, create_model(config), CPU)


def test_batch_larger_than_the_data():
    config = TrainConfig(batch_size=4096, **DIGITS_MODEL)
    with pytest.raises(ValueError, match="the 1197 training images, got 4096; give a smaller --batch-size"):
        create_loaders(config, create_model(config), CPU)
    assert len(create_loaders(EvaluateConfig(checkpoint="x", batch_size=4096), create_model(config), CPU).test) == 1


def test_repeated_augmentation():
    torch.manual_seed(3)
    sampler = RepeatedAugmentation(10, repeats=3)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == 9
    assert first[::3] == first[1::3] == first[2::3] and len(set(first)) == 3
    assert first != second
    torch.manual_seed(3)
    assert list(sampler) == first


def write_shard(path, images: int) -> None:
    """A tar file of random images of two classes, as webdataset names them."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as shard:
        for i in range(images):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(picture, "PNG")
            for extension, data in (("png", picture.getvalue()), ("cls", str(i % 2).encode())):
                entry = tarfile.TarInfo(f"{i:04d}.{extension}")
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))


def test_webdataset_shards(tmp_path):
    splits = {}
    for split, images in {"train": 24, "validation": 8}.items():
        write_shard(tmp_path / f"{split}-0000.tar", images)
        shards = {"filenames": [f"{split}-0000.tar"], "shard_lengths": [images]}
        splits[split] = {"name": split, "num_samples": images, **shards}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    options = dict(data="wds/toy", data_dir=str(tmp_path), batch_size=8, workers=1)
    kwargs = ("img_size=16", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2", "num_classes=2")
    config = TrainConfig(**options, model="vit_tiny_patch16_224", model_kwargs=kwargs, val_split="validation")
    loaders = create_loaders(config, create_model(config), CPU)
    assert [len(images) for images, _ in loaders.train] == [8, 8, 8]
    assert sorted(torch.cat([targets for _, targets in loaders.test]).tolist()) == [0] * 4 + [1] * 4
    assert loaders.notes == ("'validation' both chooses the best epoch and reports: its figures are too good",)
    with pytest.raises(ValueError, match="val_split: expected images that are in no other split, got 'train'"):
        create_loaders(dataclasses.replace(config, val_split="train"), create_model(config), CPU)
    with pytest.raises(ValueError, match="val_split: expected a split of wds/toy, whose images cannot be held out"):
        create_loaders(TrainConfig(**options, model=config.model, model_kwargs=kwargs), create_model(config), CPU)
