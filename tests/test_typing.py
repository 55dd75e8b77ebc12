"""Types of the public API, as a user's type checker sees them."""

import subprocess
import sys
from pathlib import Path

import pytest

USAGE = Path(__file__).with_name("typed_usage.py")
MISTAKES = "import ofb\nofb.SearchSpace(round_too=8)\nofb.load(3)\nmodel: int = ofb.load('x')\n"
# torch's own backward() has no types.
OPTIONS = "--strict --allow-untyped-calls --follow-imports silent --ignore-missing-imports --cache-dir"


def test_usage_is_typed_and_mistakes_are_seen(tmp_path):
    pytest.importorskip("mypy")
    wrong = tmp_path / "mistakes.py"
    wrong.write_text(MISTAKES)
    command = [sys.executable, "-m", "mypy", *OPTIONS.split(), str(tmp_path / "cache"), str(USAGE), str(wrong)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=USAGE.parents[1]).stdout
    assert USAGE.name not in found, found
    assert all(f"mistakes.py:{line}: error" in found for line in (2, 3, 4)), found
