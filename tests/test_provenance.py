"""A checkpoint knows the code that wrote it: every file by its name and content."""

import timm
import torch

from ofb.engine import provenance


def test_whatever_changes_in_the_sources_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", (tmp_path,))
    digests = []
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("deep/b.py", ""), ("notes.txt", "no code")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        digests.append(provenance.code_versions.__wrapped__()["ofb"])
    assert len(set(digests)) == 3 and digests[-2] == digests[-1]


def test_versions():
    versions = provenance.code_versions()
    assert versions.keys() == {"ofb", "torch", "timm"} and len(versions["ofb"]) == 12
    assert (versions["torch"], versions["timm"]) == (torch.__version__, timm.__version__)
