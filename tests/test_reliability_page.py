"""docs/RELIABILITY.md is made of what the reliability tests say and count."""

import json
import os
import subprocess
import sys

from tests.reliability.__main__ import FOLDER, MODULES, page
from tests.reliability.conftest import EVIDENCE


def written(before: str, modules: list[str], kills: int, failed: str = "") -> str:
    figures = [{"module": "tests.reliability.test_kill", "what": "kills", "figure": number} for number in (kills, 900)]
    cases = "".join(
        f'<testcase classname="tests.reliability.{each}">{"<failure/>" if each == failed else ""}</testcase>'
        for each in modules
    )
    return page(before, modules, "".join(json.dumps(each) + "\n" for each in figures), f"<a><b>{cases}</b></a>")


def section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_docstrings_and_counts_make_the_page():
    text = written("", MODULES, kills=600)
    kill = section(text, "Kill it anywhere")
    assert "A search that is killed" in kill and "| kills | 1,500 |" in kill
    assert "| tests passed (`tests/reliability/test_kill.py`) | 1 |" in kill
    assert text.count("\n## ") == len(MODULES)


def test_what_did_not_run_or_failed_stays():
    first = written("", MODULES, kills=600)
    again = written(first, ["test_kill", "test_faults"], kills=700, failed="test_faults")
    assert "| kills | 1,600 |" in section(again, "Kill it anywhere")
    assert again.replace("1,600", "1,500") == first
    assert "Kill it anywhere" not in written("", ["test_kill"], kills=1, failed="test_kill")


def test_what_tests_count_comes_to_the_page(tmp_path):
    figures, results = tmp_path / "figures.jsonl", tmp_path / "results.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", str(FOLDER / "test_supply_chain.py")]
    subprocess.run(command, env=os.environ | {EVIDENCE: str(figures)}, check=True, capture_output=True)
    installed = section(page("", ["test_supply_chain"], figures.read_text(), results.read_text()), "What is installed")
    assert (
        "\n| packages pinned | 1" in installed
        and "\n| tests passed (`tests/reliability/test_supply_chain.py`) | 1" in installed
    )
