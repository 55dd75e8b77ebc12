"""A user's own images: which folder, which classes, which images in which part; nothing in two of them."""

import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ofb.cli import main
from ofb.engine.config import SearchConfig, TrainConfig
from ofb.engine.data import create_loaders, create_model
from ofb.engine.datasets import Part
from ofb.engine.tool_config import EvaluateConfig
from tests.test_augmentation import MODEL, write_classes
from tests.test_data import CPU

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def folder(tmp_path):
    """train/ and validation/ of four classes, one image of each kind in a class."""
    write_classes(tmp_path / "images/train", CLASSES)
    write_classes(tmp_path / "images/validation", CLASSES, count=6, seed=7)
    return tmp_path / "images"


def config_of(folder, **options) -> TrainConfig:
    return TrainConfig(data_dir=str(folder), **(dict(val_share=0.25, batch_size=4, workers=0) | MODEL | options))


def loaders_of(folder, **options):
    config = config_of(folder, **options)
    return create_loaders(config, create_model(config), CPU)


def files_of(loader) -> dict[str, int]:
    """The class index of each image of a loader, by file."""
    dataset, indices = loader.dataset, range(len(loader.dataset))
    if isinstance(dataset, Part):
        dataset, indices = dataset.dataset, dataset.indices
    return dict(dataset.reader.samples[i] for i in indices)


def parts_of(loaders) -> list[set[str]]:
    return [set(files_of(loader)) for loader in (loaders.train, loaders.val, loaders.test)]


def test_a_folder_alone_is_the_data(folder):
    loaders = loaders_of(folder)
    train, val, test = parts_of(loaders)
    assert [len(train), len(val), len(test)] == [36, 12, 24]
    assert all(file.startswith(str(folder / "train")) for file in train | val) and not train & val
    assert all(file.startswith(str(folder / "validation")) for file in test)
    assert loaders.notes == ()
    assert config_of(folder) == config_of(folder, data="")


def test_without_a_folder_it_is_the_digits():
    assert (TrainConfig().data, SearchConfig().data, EvaluateConfig(checkpoint="x").data) == ("digits",) * 3


@pytest.mark.parametrize("data", ["digits", "foo/bar", "torch/image_folder"])
def test_contradictions(data):
    folder = {"data_dir": "/images"} if data == "digits" else {}
    message = (
        "digits` without a folder, got data_dir /images as well" if folder else f"got '{data}' alone; add --data-dir"
    )
    with pytest.raises(ValueError, match=f"data: expected .*{message}"):
        TrainConfig(data=data, **folder)


def test_class_indices_are_those_of_training(folder):
    shutil.rmtree(folder / "validation/ant")
    for directory in ("train/bee", "validation/dog"):  # other orders of folders and files change nothing
        (folder / directory).rename(folder / f"{directory}_"), (folder / f"{directory}_").rename(folder / directory)
    loaders = loaders_of(folder, val_split=None)
    for loader in (loaders.train, loaders.val, loaders.test):
        assert all(CLASSES[index] == file.split("/")[-2] for file, index in files_of(loader).items())
    assert loaders.notes == ("'validation' has no images of ant, as training has",)
    assert sorted(set(torch.cat([targets for _, targets in loaders.test]).tolist())) == [1, 2, 3]


@pytest.mark.parametrize("option", ["val_split", "test_split"])
def test_a_class_that_training_lacks(folder, option):
    write_classes(folder / "other", (*CLASSES, "eel"), count=2, seed=99)
    with pytest.raises(
        ValueError, match=f"{option}: expected the 4 classes of the training split, got also eel in 'other'"
    ):
        loaders_of(folder, **{option: "other"})


def test_torchvisions_folders_cannot_be_renumbered(folder):
    loaders_of(folder, data="torch/image_folder")
    shutil.rmtree(folder / "validation/ant")
    with pytest.raises(ValueError, match="test_split: expected all classes of the training split, got none of ant"):
        loaders_of(folder, data="torch/image_folder")
    shutil.rmtree(folder / "validation")
    with pytest.raises(ValueError, match="test_split: expected a folder 'validation'"):
        loaders_of(folder, data="torch/image_folder")


def test_images_outside_of_class_folders(folder):
    Image.new("RGB", (9, 9)).save(folder / "train/cover.png")
    with pytest.raises(ValueError, match="expected each image in the folder of its class, got .*train/cover.png; move"):
        loaders_of(folder)


def test_one_class(folder):
    for name in CLASSES[1:]:
        shutil.rmtree(folder / "train" / name)
    with pytest.raises(ValueError, match="data: expected two classes or more in 'train', got ant alone"):
        loaders_of(folder)


def test_a_model_for_fewer_classes(folder):
    with pytest.raises(ValueError, match=r"expected at most the 2 classes of the model, got 4 \(ant, bee, cat, dog\)"):
        loaders_of(folder, model_kwargs=(*MODEL["model_kwargs"], "num_classes=2"))


def test_a_missing_split_is_an_error_that_lists_what_is_there(folder):
    (folder / "validation").rename(folder / "exam")
    with pytest.raises(
        ValueError, match="test_split: expected a folder 'validation' in .*, got exam, train; name .*--test-split"
    ):
        loaders_of(folder)
    assert len(parts_of(loaders_of(folder, test_split="exam"))[2]) == 24
    with pytest.raises(
        ValueError, match="val_split: expected a folder 'holdout' in .*, got exam, train; name .*--val-split"
    ):
        loaders_of(folder, test_split="exam", val_split="holdout")
    (folder / "train").rename(folder / "Train")
    with pytest.raises(
        ValueError, match="train_split: expected a folder 'train' in .*, got Train, exam; name .*--train-split"
    ):
        loaders_of(folder, test_split="exam")
    assert len(parts_of(loaders_of(folder, train_split="Train", test_split="exam"))[0]) == 36


def test_a_folder_is_used_as_its_splits_are_meant(folder):
    """validation/ alone reports; beside test/ it chooses, and test/ reports; test/ alone reports."""

    def holders(**options) -> list[set[str]]:
        return [{file.split("/")[-3] for file in part} for part in parts_of(loaders_of(folder, **options))]

    assert holders() == [{"train"}, {"train"}, {"validation"}]
    write_classes(folder / "test", CLASSES, count=2, seed=31)
    assert holders() == [{"train"}, {"validation"}, {"test"}]
    assert holders(test_split="validation") == [{"train"}, {"train"}, {"validation"}]
    assert holders(val_split="validation") == [{"train"}, {"validation"}, {"test"}]
    shutil.rmtree(folder / "validation")
    assert holders() == [{"train"}, {"train"}, {"test"}]


def test_training_images_alone_may_be_split(folder):
    shutil.rmtree(folder / "validation")
    with pytest.raises(ValueError, match=f"or split the training images by --test-share: --data-dir {folder}/train"):
        loaders_of(folder)
    assert [len(part) for part in parts_of(loaders_of(folder / "train", test_share=0.25))] == [27, 9, 12]


def test_images_without_folders(folder):
    with pytest.raises(
        ValueError, match="data_dir: expected folders of splits, or of classes, in .*cat, got none; lay"
    ):
        loaders_of(folder / "train/cat")


def test_other_names_of_splits(folder):
    (folder / "train").rename(folder / "training"), (folder / "validation").rename(folder / "val")
    assert [len(part) for part in parts_of(loaders_of(folder))] == [36, 12, 24]


@pytest.mark.parametrize("tar", [False, True])
def test_classes_without_splits_are_split(tmp_path, tar, capsys):
    write_classes(tmp_path / "images", CLASSES, count=25)
    root = tmp_path / "images"
    if tar:
        root = tmp_path / "images.tar"
        with tarfile.open(root, "w") as archive:
            archive.add(tmp_path / "images", "images")
    loaders, again = loaders_of(root, test_share=0.2), loaders_of(root, test_share=0.2, seed=1)
    indices = [set(loader.dataset.indices) for loader in (loaders.train, loaders.val, loaders.test)]
    assert [len(part) for part in indices] == [60, 20, 20] and set.union(*indices) == set(range(100))
    assert set(again.test.dataset.indices) == indices[2] and set(again.val.dataset.indices) != indices[1]
    assert (
        "has no splits: 60 of its images train, 20 choose the best epoch (--val-share 0.25), 20 only"
        in loaders.notes[0]
    )
    for loader in (loaders.train, loaders.val, loaders.test):
        assert all(len(images) == len(targets) for images, targets in loader)


@pytest.mark.parametrize("options", [{"val_split": "dog"}, {"test_split": "cat"}, {"train_split": "other"}])
def test_classes_without_splits_but_a_split_asked_for(tmp_path, options):
    write_classes(tmp_path, CLASSES, count=4)
    with pytest.raises(ValueError, match="_split: expected a folder .*, got ant, bee, cat, dog; name the one to use"):
        loaders_of(tmp_path, **options)


def test_splits_further_down(folder, tmp_path):
    with pytest.raises(
        ValueError, match="data_dir: expected a folder of splits or of classes, got .*images/train looks like"
    ):
        loaders_of(tmp_path)


def test_the_same_images_twice_in_a_folder_of_classes_stay_together(tmp_path):
    write_classes(tmp_path / "images", CLASSES, count=10)
    for name in CLASSES:
        for file in list((tmp_path / "images" / name).iterdir()):
            shutil.copy(file, file.with_stem(f"{file.stem}-copy"))
    parts = parts_of(loaders_of(tmp_path / "images", test_share=0.25))
    assert sum(map(len, parts)) == 80
    contents = [{open(file, "rb").read() for file in part} for part in parts]
    assert not contents[0] & contents[1] and not contents[0] & contents[2] and not contents[1] & contents[2]


@pytest.mark.parametrize("linked", [False, True])
def test_one_folder_is_not_two_splits(folder, linked):
    if linked:
        (folder / "holdout").symlink_to(folder / "validation")
    name = "holdout" if linked else "val"
    with pytest.raises(
        ValueError, match="test_split: expected images that are in no other split, got 24 images of 'vali"
    ):
        loaders_of(folder, val_split=name)
    with pytest.raises(
        ValueError, match="test_split: expected images that are in no other split, got 48 images of 'train'"
    ):
        loaders_of(folder, test_split="train")


def test_copies_of_test_images_leave_the_others(folder):
    test = sorted((folder / "validation/ant").iterdir())
    shutil.copy(test[0], folder / "train/ant/copied.jpg")
    (folder / "train/ant/linked.png").symlink_to(test[1])
    write_classes(folder / "holdout", CLASSES, count=3, seed=50)
    shutil.copy(test[2], folder / "holdout/ant")
    shutil.copy(folder / "holdout/bee/0.jpg", folder / "train/bee/from-holdout.jpg")
    loaders = loaders_of(folder, val_split="holdout")
    train, val, test = parts_of(loaders)
    assert [len(train), len(val), len(test)] == [48, 11, 24]
    assert [note.partition(", which another split has as well, such as ")[0] for note in loaders.notes] == [
        "left out of val: 1 of 12 images",
        "left out of train: 3 of 51 images",
    ]


def test_nothing_is_left(folder):
    shutil.rmtree(folder / "train"), shutil.copytree(folder / "validation", folder / "train")
    with pytest.raises(ValueError, match="data: expected images for (val|train) that no other split has, got"):
        loaders_of(folder)


@pytest.mark.parametrize("names", [("validation", "test"), ("train", "validation"), ("val", "validation")])
def test_torchvisions_sets_of_two_splits(tmp_path, names):
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 40), ("t10k", 20)):
        images, targets = np.random.randint(0, 255, count * 784), np.arange(count) % 10
        header = b"".join(each.to_bytes(4, "big") for each in (2051, count, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.astype(np.uint8).tobytes())
        header = b"".join(each.to_bytes(4, "big") for each in (2049, count))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + targets.astype(np.uint8).tobytes())
    assert len(FashionMNIST(str(tmp_path), train=True)) == 40
    options = dict(data="torch/fashion_mnist", model_kwargs=(*MODEL["model_kwargs"], "in_chans=1"))
    assert [len(each.dataset) for each in _three(loaders_of(tmp_path, **options))] == [30, 10, 20]
    with pytest.raises(ValueError, match="_split: expected images that are in no other split"):
        loaders_of(tmp_path, **options, val_split=names[0], test_split=names[1])


def _three(loaders):
    return loaders.train, loaders.val, loaders.test


def test_evaluation_where_there_are_test_images_alone(folder):
    model = create_model(config_of(folder))
    shutil.rmtree(folder / "train")
    options = dict(checkpoint="x", data_dir=str(folder), batch_size=8, workers=0)
    loaders = create_loaders(EvaluateConfig(**options), model, CPU)
    assert sum(len(images) for images, _ in loaders.test) == 24 and loaders.skipped() == []
    assert "has no training images" in loaders.notes[0]
    with pytest.raises(ValueError, match="train_split: expected a folder 'train' in .*, got validation"):
        create_loaders(EvaluateConfig(**options, split="val"), model, CPU)
    shutil.rmtree(folder / "validation/ant")
    with pytest.raises(ValueError, match="train_split: .* or test images of all 4 classes of the model, got 3"):
        create_loaders(EvaluateConfig(**options), model, CPU)


def test_training_on_a_folder_says_how_it_is_split(tmp_path, capsys):
    write_classes(tmp_path / "images", CLASSES, count=25)
    command = ["train", "--data-dir", str(tmp_path / "images"), "--model", MODEL["model"], "--device", "cpu"]
    command += ["--model-kwargs", *MODEL["model_kwargs"], "--batch-size", "8", "--epochs", "1", "--workers", "2"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    note = " ".join(printed.split())  # it goes on in the next line where the terminal ends
    assert f"note: {tmp_path}/images has no splits: 88 of its images train, 2 choose" in note and "10 only" in note
    assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]) == 0
    evaluated = capsys.readouterr().out.replace("trained  test  10 images", "test")
    assert "has no splits" in " ".join(evaluated.split())
    assert evaluated.splitlines()[-1] in printed


def test_files_with_other_endings(folder):
    """What Pillow reads is an image; what is none by its ending is left out, and told."""
    cat = folder / "train/cat"
    image = Image.new("RGB", (9, 9), (1, 2, 3))
    for number, ending in enumerate(("webp", "bmp", "TIFF", "ppm")):
        image.putpixel((0, 0), (number, 0, 0))
        image.save(cat / f"other.{ending}")
    for name in ("labels.txt", "notes.txt", "film.mp4", "README", ".DS_Store"):
        (cat / name).write_text("no image")
    loaders = loaders_of(folder)
    train, val, _ = parts_of(loaders)
    assert len(train | val) == 48 + 4
    (note,) = loaders.notes
    assert note.startswith(f"{folder / 'train'} holds files that are no images") and "2 .txt" in note
    assert "1 .mp4" in note and "1 without an ending" in note
