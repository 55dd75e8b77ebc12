"""Lines as wide as the terminal."""

import pytest

from ofb.engine.terminal import in_lines, items_in_lines


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")


def test_text_breaks_between_words():
    assert in_lines("one line\nthe second --val-share is too long for it") == (
        "one line\nthe second --val-share\n  is too long for it"
    )


def test_items_stay_whole():
    shown = items_in_lines("sizes: ", ["embed 32", "attn0 2×16", "mlp0 128", "a/path/that/is/wider/than/all"])
    assert shown.splitlines() == ["sizes: embed 32", "  attn0 2×16  mlp0 128", "  a/path/that/is/wider/than/all"]


def test_marks_between_items_stay_on_the_line_before():
    shown = items_in_lines("pruned: ", ["embed 32", "mlp0 8", "a b", "cc"], ", ")
    assert shown.splitlines() == ["pruned: embed 32,", "  mlp0 8, a b, cc"]
    assert items_in_lines("none:", []) == "none:"
