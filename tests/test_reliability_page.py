"""docs/RELIABILITY.md is made of what the reliability tests say and count."""

import json

from tests.reliability.__main__ import FOLDER, page


def test_docstrings_and_counts_make_the_page():
    figures = [{"module": "tests.reliability.test_kill", "what": "kills", "figure": number} for number in (600, 900)]
    results = '<testsuites><testsuite><testcase classname="tests.reliability.test_kill"/></testsuite></testsuites>'
    text = page("".join(json.dumps(each) + "\n" for each in figures), results)
    kill = text.partition("## Kill it anywhere\n")[2].partition("\n## ")[0]
    assert "A search that is killed" in kill and "| kills | 1,500 |" in kill
    assert "| tests passed (`tests/reliability/test_kill.py`) | 1 |" in kill
    assert text.count("\n## ") == len(list(FOLDER.glob("test_*.py")))
