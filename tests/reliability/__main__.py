"""Run the reliability tests at night length and write docs/RELIABILITY.md: python -m tests.reliability [MODULE ...].

A module's section is replaced if all its tests passed; those of others stay as they are.
"""

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import torch

from ofb.engine.checkpoint import write_text
from tests.reliability.conftest import EVIDENCE, NIGHT

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "RELIABILITY.md"
MODULES = sorted(path.stem for path in FOLDER.glob("test_*.py"))
INTRODUCTION = """# Reliability

Written by `make reliability` of the docstrings of [tests/reliability](../tests/reliability) and of what their tests
counted at night length; `make test` runs the same tests with fewer cases.
"""


def main(modules: list[str]) -> int:
    modules = [module.removesuffix(".py") for module in modules] or MODULES
    files = [str(FOLDER / f"{module}.py") for module in modules]
    with tempfile.TemporaryDirectory() as folder:
        figures, results = Path(folder) / "figures.jsonl", Path(folder) / "results.xml"
        figures.touch()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "--dist",
            "loadfile",
            f"--junitxml={results}",
            *files,
        ]
        code = subprocess.run(command, env=os.environ | {EVIDENCE: str(figures), NIGHT: "1"}).returncode
        if results.exists():
            before = PAGE.read_text() if PAGE.exists() else ""
            write_text(PAGE, page(before, modules, figures.read_text(), results.read_text()))
    print(PAGE)
    return code


def page(before: str, modules: Iterable[str], figures: str, results: str) -> str:
    """The page after a run.

    Args:
        before: the page as it was.
        modules: that ran.
        figures: what they noted, JSON lines of the `evidence` fixture.
        results: which tests passed, pytest's JUnit XML.
    """
    entries = [json.loads(line) for line in figures.splitlines()]
    cases = list(ElementTree.fromstring(results).iter("testcase"))
    failed = {
        case.get("classname") for case in cases if case.find("failure") is not None or case.find("error") is not None
    }
    passed = Counter(case.get("classname") for case in cases if case.find("skipped") is None)
    old = {section.partition("\n")[0]: section for section in before.split("\n## ")[1:]}
    sections = []
    for module in MODULES:
        name = f"{__package__}.{module}"
        heading = importlib.import_module(name).__doc__.partition("\n")[0].rstrip(".")
        if module in modules and name not in failed:
            noted = [(entry["what"], entry["figure"]) for entry in entries if entry["module"] == name]
            sections.append(_section(heading, module, noted, passed[name]))
        elif heading in old:
            sections.append(old[heading].rstrip() + "\n")
    return "\n## ".join([INTRODUCTION, *sections])


def _section(heading: str, module: str, noted: list[tuple[str, object]], passed: int) -> str:
    text = importlib.import_module(f"{__package__}.{module}").__doc__.partition("\n")[2].strip()
    figures: dict[str, object] = {}
    for what, figure in noted:
        figures[what] = figures[what] + figure if what in figures and isinstance(figure, int) else figure
    rows = [f"| {what} | {_shown(figure)} |" for what, figure in figures.items()]
    rows.append(f"| tests passed (`tests/reliability/{module}.py`) | {passed:,} |")
    rows.append(f"| run | {_where()} |")
    return "\n".join([heading, "", *([text, ""] if text else []), "| | |", "|---|---|", *rows, ""])


def _shown(figure: object) -> str:
    return f"{figure:,}" if isinstance(figure, int) else str(figure)


def _where() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, no GPU"
    return f"commit {git.stdout.strip()}, Python {platform.python_version()}, torch {torch.__version__}, {device}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
