"""Broken images: an error that names the file, or left out and counted; from worker processes too."""

import pytest
import torch

from ofb.cli import main
from ofb.engine.config import TrainConfig
from ofb.engine.data import create_loaders, create_model
from tests.test_data import CPU, image_folder  # noqa: F401

MODEL = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": ("img_size=16", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"),
}


def loaders_of(folder, **options):
    sizes = dict(val_share=0.25, batch_size=4, mixup=0.0, cutmix=0.0, aa=None, reprob=0.0)
    config = TrainConfig(data="", data_dir=str(folder), **MODEL, **(sizes | options))
    return create_loaders(config, create_model(config), CPU)


def break_images(folder) -> list[str]:
    """One that is no image, one cut short."""
    text, short = folder / "train/cat/3.png", folder / "train/dog/5.png"
    text.write_text("no image")
    short.write_bytes(short.read_bytes()[:200])
    return [str(text), str(short)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_image_is_named(image_folder, workers, broken):  # noqa: F811
    files = break_images(image_folder)
    (image_folder / files[1 - broken]).unlink()
    loaders = loaders_of(image_folder, workers=workers)
    with pytest.raises(
        ValueError, match=f"expected an image in .*{files[broken][-9:]}, got a file that cannot be read"
    ):
        list(loaders.train) + list(loaders.val)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_and_counted_once(image_folder, workers):  # noqa: F811
    loaders = loaders_of(image_folder, workers=workers, skip_broken=True)
    files = break_images(image_folder)
    gone = image_folder / "validation/cat/1.png"
    gone.unlink()
    for _ in range(6):  # epochs: training batches are dropped at the end
        batches = [*loaders.train, *loaders.val, *loaders.test]
    assert sum(len(images) for images, _ in batches) == 16 + 6 + 8  # in full batches, all of val and test
    assert all(torch.isfinite(images).all() for images, _ in batches)
    assert loaders.skipped() == sorted([*files, str(gone)])


def test_nothing_readable(image_folder):  # noqa: F811
    for path in image_folder.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(ValueError, match="data: expected images, got 24 files of which none can be read"):
        list(loaders_of(image_folder, workers=0, skip_broken=True).train)


@pytest.mark.parametrize("workers", ["2"])
def test_the_command_line_tells_in_one_line(image_folder, workers, tmp_path, capsys):  # noqa: F811
    files = break_images(image_folder)
    command = ["train", "--data", "", "--data-dir", str(image_folder), "--model", MODEL["model"], "--workers", workers]
    command += ["--model-kwargs", *MODEL["model_kwargs"], "--val-share", "0.25", "--batch-size", "4", "--aa", "None"]
    command += ["--epochs", "6", "--mixup", "0", "--cutmix", "0", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("ofb: data: expected an image in ") and error.count("\n") == 1 and "Traceback" not in error
    assert main([*command[:-1], str(tmp_path / "again"), "--skip-broken"]) == 0
    assert f"skipped 2 image files that cannot be read, such as {files[0]}" in capsys.readouterr().out
