"""Run the reliability tests at night length and write docs/RELIABILITY.md: python -m tests.reliability."""

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.reliability.conftest import EVIDENCE, NIGHT

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "RELIABILITY.md"
INTRODUCTION = """# Reliability

Written by `python -m tests.reliability` from the docstrings of [tests/reliability](../tests/reliability) and what their
tests counted, at night length; `make test` runs the same tests with fewer cases.
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        figures, results = Path(folder) / "figures.jsonl", Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={results}", str(FOLDER)]
        code = subprocess.run(command, env=os.environ | {EVIDENCE: str(figures), NIGHT: "1"}).returncode
        if code:
            print("a test failed: the page stays as it was", file=sys.stderr)
            return code
        PAGE.write_text(page(figures.read_text()))
    print(PAGE)
    return 0


def page(figures: str) -> str:
    """The page of what was noted: JSON lines of the `evidence` fixture."""
    entries = [json.loads(line) for line in figures.splitlines()]
    where = f"Python {platform.python_version()}, torch {torch.__version__}, {_commit()}"
    sections = [_section(path.stem, entries) for path in sorted(FOLDER.glob("test_*.py"))]
    return "\n".join([INTRODUCTION, f"Last run: {where}, {_device()}.\n", *sections])


def _section(module: str, entries: list[dict]) -> str:
    name = f"{__package__}.{module}"
    title, _, text = importlib.import_module(name).__doc__.partition("\n")
    lines = [f"## {title.rstrip('.')}", "", text.strip(), ""] if text.strip() else [f"## {title.rstrip('.')}", ""]
    figures: dict[str, object] = {}
    for entry in entries:
        if entry["module"] == name:
            what, figure = entry["what"], entry["figure"]
            figures[what] = figures[what] + figure if what in figures and isinstance(figure, int) else figure
    rows = [
        f"| {what} | {figure:,} |" if isinstance(figure, int) else f"| {what} | {figure} |"
        for what, figure in figures.items()
    ]
    table = ["| | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join([*lines, *table, f"(`tests/reliability/{module}.py`)", ""])


def _commit() -> str:
    return (
        "commit "
        + subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    )


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, no GPU"


if __name__ == "__main__":
    sys.exit(main())
