"""Which images are the same, by path and by content, and what is held out."""

import os

import numpy as np
import pytest

from ofb.engine import splits
from ofb.engine.splits import content_keys, hold_out, is_flat, nested_split, split_folder
from tests.test_augmentation import write_classes, write_images


def test_same_content_has_the_same_key(tmp_path):
    write_images(tmp_path / "a")
    names = sorted(os.listdir(tmp_path / "a"))
    files = [str(tmp_path / "a" / name) for name in names]
    copied, linked = tmp_path / "copied.jpg", tmp_path / "linked.jpg"
    copied.write_bytes((tmp_path / "a/0.jpg").read_bytes())
    linked.symlink_to(tmp_path / "a/0.jpg")
    keys = content_keys([*files, str(copied), str(linked)])
    first = keys[files.index(str(tmp_path / "a/0.jpg"))]
    assert keys[-2:] == [first, first] and len(set(keys)) == len(files)


def test_files_of_the_same_size_are_read(tmp_path):
    bitmaps = [bytes(rng) for rng in np.random.default_rng(0).integers(0, 255, (3, 200), dtype=np.uint8)]
    header = b"P5 20 10 255\n"
    for i, bitmap in enumerate([*bitmaps, bitmaps[0]]):
        (tmp_path / f"{i}.png").write_bytes(header + bitmap)
    keys = content_keys([str(tmp_path / f"{i}.png") for i in range(4)])
    assert keys[0] == keys[3] and len(set(keys)) == 3


def test_broken_and_missing_files_are_no_twins(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_text("no image" if name != "c" else "")
    (tmp_path / "d.png").symlink_to("nowhere")
    assert len(set(content_keys([str(tmp_path / f"{name}.png") for name in "abcde"]))) == 5


@pytest.mark.parametrize("limit", ["MOST_FILES", "MOST_BYTES"])
def test_too_much_to_read_is_compared_by_path(tmp_path, monkeypatch, limit):
    write_images(tmp_path / "a", count=1)
    files = [str(tmp_path / "a" / "0.jpg"), str(tmp_path / "b" / "0.jpg")]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/0.jpg").write_bytes((tmp_path / "a/0.jpg").read_bytes())
    assert len(set(content_keys(files))) == 1
    monkeypatch.setattr(splits, limit, 1)
    assert content_keys(files) == [os.path.realpath(file) for file in files]


def test_hold_out():
    keys = [i // 2 for i in range(200)]  # pairs
    kept, held_out = hold_out(keys, 0.25, 0, "val_share")
    assert sorted(kept + held_out) == list(range(200)) and len(held_out) == 50
    assert {keys[i] for i in kept}.isdisjoint(keys[i] for i in held_out)
    assert hold_out(keys, 0.25, 0, "val_share") == (kept, held_out) != hold_out(keys, 0.25, 1, "val_share")
    for share in (0.0, 0.001):
        with pytest.raises(
            ValueError, match=f"test_share: expected to hold out at least one of 200 images, got {share}"
        ):
            hold_out(keys, share, 0, "test_share")


def test_folders_of_splits(tmp_path):
    for name in ("training", "val", "test", ".cache"):
        write_classes(tmp_path / name, count=1)
    assert split_folder(str(tmp_path), "train") == str(tmp_path / "training")
    assert split_folder(str(tmp_path), "validation") == str(tmp_path / "val")
    assert split_folder(str(tmp_path), "other") is None
    assert not is_flat(str(tmp_path)) and not is_flat(str(tmp_path / "nowhere")) and is_flat(str(tmp_path / "val"))
    assert nested_split(str(tmp_path.parent)) and nested_split(str(tmp_path)) is None
