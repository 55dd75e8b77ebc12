"""Checkpoints: whole or not at all, tensors and plain values, the newest undamaged one, nothing executed."""

import errno
import hashlib
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from ofb.engine.checkpoint import (
    DIGEST_DIGITS,
    load_checkpoint,
    remove_temporaries,
    save_checkpoint,
    write_atomically,
    write_text,
)


def save(folder, step=1, keep=3, stage="search", **state):
    save_checkpoint(folder, stage, step, {"step": step, **state}, keep)


def files(folder):
    return sorted(os.listdir(folder))


def test_round_trip(tmp_path):
    shared, numbers = torch.randn(6), {3: [1, 2.5, None, True, "x"], "nan": float("inf")}
    tensors = {dtype: torch.randn(2, 3).to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool)}
    state = {"tensors": list(tensors.values()), "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    state |= {"again": shared, "view": shared[2:4], "transposed": torch.randn(2, 3).T, "plain": numbers, "pair": (1, 2)}
    save(tmp_path, shared=shared, **state)
    loaded = load_checkpoint(tmp_path, "search")
    assert loaded["plain"] == numbers and loaded["pair"] == [1, 2] and loaded["step"] == 1
    for name in ("scalar", "empty", "again", "view", "transposed"):
        assert torch.equal(loaded[name], state[name]), name
    for got, expected in zip(loaded["tensors"], tensors.values(), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_a_tensor_is_saved_once(tmp_path):
    weights = torch.randn(100_000)
    save(tmp_path, model=weights, average=weights)
    assert os.path.getsize(tmp_path / files(tmp_path)[0]) < 1.1 * weights.nbytes


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(1)])
def test_what_is_not_plain(tmp_path, value):
    with pytest.raises(TypeError, match="state: expected tensors and plain values, got (object|set|float32) at /a/b"):
        save(tmp_path, a={"b": value})


def test_the_newest_ones_of_each_stage_are_kept(tmp_path):
    save(tmp_path, 5, stage="finetune-50%")
    for step in (1, 2, 30, 4):
        save(tmp_path, step, keep=2)
    assert [name[:16] for name in files(tmp_path)] == ["finetune-50%-000", "search-000000004", "search-000000030"]
    assert load_checkpoint(tmp_path, "search")["step"] == 30
    assert load_checkpoint(tmp_path, "finetune-50%")["step"] == 5
    assert load_checkpoint(tmp_path, "finetune") is None


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_told_and_the_one_before_it_taken(tmp_path, capsys, damage):
    for step in (1, 2):
        save(tmp_path, step, weights=torch.randn(100))
    newest = tmp_path / files(tmp_path)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert load_checkpoint(tmp_path, "search")["step"] == 1
    assert f"note: {newest} is damaged (its SHA-256 is not" in capsys.readouterr().err
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="resume: expected an undamaged checkpoint in .*, got search-000000002"):
        load_checkpoint(tmp_path, "search")


class Executes:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def header(content: dict, promised: int | None = None) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if promised is None else promised) + text


def tensor(shape, offsets):
    return {"t": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}


STRUCTURE = {"__metadata__": {"structure": json.dumps({"dict": [["a", {"tensor": "t"}]]})}}
HOSTILE = {
    "pickle": pickle.dumps({"a": Executes()}),
    "ten bytes that promise a terabyte": struct.pack("<Q", 2**40) + b"{}",
    "a terabyte of weights": header(tensor([2**38], [0, 2**40])),
    "weights beyond the end": header(STRUCTURE | tensor([4], [0, 16])),
    "weights before the beginning": header(STRUCTURE | tensor([4], [-16, 0])) + bytes(16),
    "no structure": header(tensor([4], [0, 16])) + bytes(16),
    "a structure that is none": header({"__metadata__": {"structure": "[" * 100_000}}),
    "a tensor that is not there": header({"__metadata__": {"structure": '{"dict": [["a", {"tensor": "x"}]]}'}}),
    "not even a header": b"no checkpoint",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_executes_and_takes_nothing(tmp_path, monkeypatch, content):
    """Its name carries its own digest, as a stranger would see to."""
    monkeypatch.chdir(tmp_path)
    digest = hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS]
    (tmp_path / f"search-000000001-{digest}.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="resume: expected a checkpoint that ofb wrote, got .*search-000000001"):
        load_checkpoint(tmp_path, "search")
    assert not (tmp_path / "executed").exists()


def test_nothing_there(tmp_path):
    assert load_checkpoint(tmp_path, "search") is None
    assert load_checkpoint(tmp_path / "none", "search") is None


# ---- files of any kind ----


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "state.json"
    write_text(path, "old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert files(tmp_path) == ["state.json"]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    """For a power cut: what is synced at which point, the file by its number and then its folder."""
    done, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        place = os.fstat(descriptor)
        done.append("folder" if place.st_ino == tmp_path.stat().st_ino else (place.st_ino, place.st_size))
        fsync(descriptor)

    def noted_replace(source, target):
        done.append(("renamed", os.stat(source).st_ino, os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_text(tmp_path / "state.json", "whole")
    file = (tmp_path / "state.json").stat().st_ino
    assert done == [(file, len("whole")), ("renamed", file, "state.json"), "folder"]


def test_an_error_of_the_file_system_names_the_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*file/state.json: .*; make room or make it writable") as raised:
        write_text(tmp_path / "file" / "state.json", "new")
    assert raised.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_what_a_killed_writer_left(tmp_path):
    write_text(tmp_path / "export" / "config.json", "{}")
    (tmp_path / "export" / ".config.json.abcd.tmp").write_text("half")
    (tmp_path / "notes.tmp").write_text("the user's own")
    remove_temporaries(tmp_path)
    assert files(tmp_path) == ["export", "notes.tmp"] and files(tmp_path / "export") == ["config.json"]
