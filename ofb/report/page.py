"""The page of a report: one HTML file that needs no other. Whatever comes from a file of the run is escaped."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from ofb.report.chart import PALETTE, Band, Chart, Line, shown
from ofb.report.run import Run
from ofb.report.sections import Section, Table
from ofb.report.svg import draw, swatch

OPEN_CHARTS = 12  # a group of more is folded
MOST_ROWS = 12  # of a chart's numbers
FACTS = {"model": "model", "checkpoint": "started from", "target": "target", "targets": "targets", "data": "data"}


def page(run: Run, sections: Sequence[Section]) -> str:
    """The whole page."""
    style = files("ofb.report").joinpath("page.css").read_text()
    colors = "".join(f"--{name}:{color};" for name, color in PALETTE.items())
    title = f"ofb: {run.name}"
    links = "".join(f'<li><a href="#{part.name}">{escape(part.title)}</a></li>' for part in sections)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title><style>:root{{{colors}}}\n{style}</style></head><body>",
            '<a class="skip" href="#report">Skip to the report</a>',
            f"<header><h1>{escape(run.name)}</h1>{_facts(run)}</header>",
            f'<nav aria-label="Parts of the report"><ul>{links}</ul></nav><main id="report">',
            *map(_section, sections),
            "</main></body></html>\n",
        ]
    )


def _facts(run: Run) -> str:
    facts = {"state": run.state}
    for key, word in FACTS.items():
        value = run.config.get(key)
        if value and not (key == "model" and run.config.get("checkpoint")):
            facts[word] = str(value)
    if run.config.get("targets"):
        facts.pop("target", None)
    rows = (f"<div><dt>{escape(word)}</dt><dd>{escape(value)}</dd></div>" for word, value in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def _section(section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    groups = "".join(_group(title, charts) for title, charts in section.charts.items() if charts)
    tables = "".join(map(_table, section.tables))
    return (
        f'<section id="{section.name}" aria-labelledby="{section.name}-title">'
        f'<h2 id="{section.name}-title">{escape(section.title)}</h2>{text}{groups}{tables}{_picture(section)}</section>'
    )


def _group(title: str, charts: Sequence[Chart]) -> str:
    drawn = f'<div class="charts">{"".join(map(_figure, charts))}</div>'
    if not title:
        return drawn
    is_open = " open" if len(charts) <= OPEN_CHARTS else ""
    return f"<details{is_open}><summary>{escape(title)} ({len(charts)})</summary>{drawn}</details>"


def _figure(chart: Chart) -> str:
    samples = "".join(f"<li>{swatch(mark)}{escape(label)}</li>" for label, mark in chart.labels.items())
    legend = f'<ul class="legend">{samples}</ul>' if samples else ""
    return (
        f"<figure><figcaption><h3>{escape(chart.title)}</h3>{escape(chart.summary)}</figcaption>"
        f"{legend}{draw(chart)}{_numbers(chart)}</figure>"
    )


def _numbers(chart: Chart) -> str:
    """A chart's lines as a table, not every row of a long one."""
    lines = [mark for mark in chart.marks if isinstance(mark, Line) and not mark.dots_only]
    if not lines or any(isinstance(mark, Band) for mark in chart.marks):
        return ""
    values = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    xs = sorted(set().union(*values))
    step = -(-len(xs) // MOST_ROWS)
    kept = xs[::-step][::-1]
    rows = [[shown(x), *(shown(each[x]) if x in each else "–" for each in values)] for x in kept]
    return _table(
        Table("Numbers", [chart.x_label, *(line.label or chart.y_label for line in lines)], rows, folded=True),
        chart.title,
    )


def _table(table: Table, of: str = "") -> str:
    name = f"{table.title}: {of}" if of else table.title
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    # A region that scrolls must be reachable by keyboard.
    shown_table = (
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(name, quote=True)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if not table.folded:
        return shown_table
    return f"<details><summary>{escape(table.title)}</summary>{shown_table}</details>"


def _picture(section: Section) -> str:
    if not section.picture:
        return ""
    data = base64.b64encode(section.picture).decode()
    words = escape(section.text, quote=True)
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{escape(section.title)}">'
        f'<img src="data:image/png;base64,{data}" alt="{words}"></div>'
    )
