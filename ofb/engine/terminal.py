"""What a run prints keeps to the width of the terminal: a line ends between items, or between words."""

import textwrap
from collections.abc import Iterable
from shutil import get_terminal_size

INDENT = "  "  # of what a line goes on with


def in_lines(text: str) -> str:
    """Text as wide as the terminal, broken between words; its own line breaks stay."""
    width = get_terminal_size().columns
    options = {"subsequent_indent": INDENT, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join("\n".join(textwrap.wrap(line, width, **options)) for line in text.splitlines())


def items_in_lines(head: str, items: Iterable[str], between: str = "  ", indent: str = INDENT) -> str:
    """Items behind a head, as wide as the terminal; none is broken, unless it is wider by itself.

    Args:
        head: what the first line starts with, up to the first item.
        items: what is listed.
        between: parts the items.
        indent: of the lines after the first.
    """
    mark = between.rstrip()
    gap, items, lines = between[len(mark) :], list(items), [head]
    for number, item in enumerate(items, 1):
        item += mark if number < len(items) else ""
        line = lines[-1] + (gap if number > 1 else "") + item
        if len(line) <= get_terminal_size().columns:
            lines[-1] = line
        else:
            lines.append(indent + item)
    return "\n".join(line.rstrip() for line in lines)
