"""Run the reliability tests at night length and write docs/RELIABILITY.md: python -m tests.reliability."""

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import torch

from ofb.engine.checkpoint import write_text
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
        write_text(PAGE, page(figures.read_text(), results.read_text()))
    print(PAGE)
    return 0


def page(figures: str, results: str) -> str:
    """The page of what was noted and of how many tests passed.

    Args:
        figures: JSON lines of the `evidence` fixture.
        results: pytest's JUnit XML.
    """
    entries = [json.loads(line) for line in figures.splitlines()]
    cases = ElementTree.fromstring(results).iter("testcase")
    passed = Counter(case.get("classname") for case in cases if case.find("skipped") is None)
    where = f"Python {platform.python_version()}, torch {torch.__version__}, {_commit()}, {_device()}"
    sections = [_section(path.stem, entries, passed) for path in sorted(FOLDER.glob("test_*.py"))]
    return "\n".join([INTRODUCTION, f"Last run: {where}.\n", *sections])


def _section(module: str, entries: list[dict], passed: Mapping[str, int]) -> str:
    name = f"{__package__}.{module}"
    title, _, text = importlib.import_module(name).__doc__.partition("\n")
    figures: dict[str, object] = {}
    for what, figure in ((entry["what"], entry["figure"]) for entry in entries if entry["module"] == name):
        figures[what] = figures[what] + figure if what in figures and isinstance(figure, int) else figure
    rows = [f"| {what} | {_shown(figure)} |" for what, figure in figures.items()]
    rows.append(f"| tests passed (`tests/reliability/{module}.py`) | {passed[name]:,} |")
    heading = [f"## {title.rstrip('.')}", "", *([text.strip(), ""] if text.strip() else [])]
    return "\n".join([*heading, "| | |", "|---|---|", *rows, ""])


def _shown(figure: object) -> str:
    return f"{figure:,}" if isinstance(figure, int) else str(figure)


def _commit() -> str:
    return (
        "commit "
        + subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    )


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, no GPU"


if __name__ == "__main__":
    sys.exit(main())
