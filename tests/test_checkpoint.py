"""Checkpoints: whole or not at all, tensors and plain values, nothing executed."""

import os
import pickle

import pytest
import torch

from ofb.engine.checkpoint import load_checkpoint, save_checkpoint, write_atomically, write_text


def test_round_trip(tmp_path):
    state = {"weights": {"a": torch.randn(3)}, "steps": 7, "name": "x", "list": [1, 2.5, None, True]}
    save_checkpoint(tmp_path / "new" / "state.pt", state)
    loaded = load_checkpoint(tmp_path / "new" / "state.pt")
    assert torch.equal(loaded.pop("weights")["a"], state.pop("weights")["a"])
    assert loaded == state


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "state.pt"
    write_text(path, "old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint" * 99])
def test_damaged_file(tmp_path, damage):
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"a": torch.randn(100)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="state.pt is damaged or was not written by this package"):
        load_checkpoint(path)


class Executes:
    def __reduce__(self):
        return os.mkdir, (os.environ["OFB_TEST_FOLDER"],)


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, write):
    monkeypatch.setenv("OFB_TEST_FOLDER", str(tmp_path / "executed"))
    write({"a": Executes()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is damaged or was not written by this package"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt")
