"""Charts as pictures."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ofb.engine.checkpoint import write_atomically
from ofb.report.chart import PALETTE, Band, Box, Chart, Line, Mark

COLUMNS, INCH = 3, 85  # pixels of a chart that make an inch
LEGEND_LABELS = 9


def save(path: str | Path, charts: Sequence[Chart]) -> None:
    """Draw charts side by side into one PNG; a $ in a word is a $."""
    with rc_context({"text.parse_math": False}):
        _save(path, charts)


def _save(path: str | Path, charts: Sequence[Chart]) -> None:
    columns = min(COLUMNS, len(charts))
    rows = [charts[start : start + columns] for start in range(0, len(charts), columns)]
    heights = [max(chart.height for chart in row) for row in rows]
    figure = Figure((360 / INCH * columns, 1.25 * sum(heights) / INCH), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes, chart in zip(grid.flat, charts, strict=False):
        _draw(axes, chart)
    for axes in grid.flat[len(charts) :]:
        axes.set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _draw(axes: Axes, chart: Chart) -> None:
    for mark in chart.marks:
        _mark(axes, mark)
    for (ends, ticks), set_ends, set_ticks in (
        (chart.x_axis, axes.set_xlim, axes.set_xticks),
        (chart.y_axis, axes.set_ylim, axes.set_yticks),
    ):
        set_ends(*ends)
        set_ticks(list(ticks), labels=list(ticks.values()), fontsize=7)
    axes.set_title(chart.title, fontsize=9, loc="left")
    axes.set_xlabel(chart.x_label, fontsize=8)
    axes.set_ylabel(chart.y_label, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [_handle(label, mark) for label, mark in chart.labels.items()]
    if handles:
        axes.legend(handles=handles[-LEGEND_LABELS:], fontsize=6, loc="best", framealpha=0.7)


def _mark(axes: Axes, mark: Mark) -> None:
    color = PALETTE.get(mark.color, mark.color)
    if isinstance(mark, Box):
        style = {"facecolor": "none", "edgecolor": color} if mark.hollow else {"color": color, "linewidth": 0}
        axes.bar(mark.x0, mark.y1 - mark.y0, mark.x1 - mark.x0, mark.y0, align="edge", **style)
    elif isinstance(mark, Band):
        axes.fill_between(mark.x, mark.low, mark.high, color=color, alpha=mark.opacity, linewidth=0)
    elif mark.dots_only:
        axes.plot(mark.x, mark.y, "o", color=color, markersize=3)
    else:
        axes.plot(mark.x, mark.y, "--" if mark.dashed else "-", color=color)


def _handle(label: str, mark: Mark | str) -> Patch | Line2D:
    color = mark if isinstance(mark, str) else mark.color
    color = PALETTE.get(color, color)
    if isinstance(mark, Line):
        return Line2D([], [], color=color, linestyle="--" if mark.dashed else "-", label=label)
    if isinstance(mark, Box) and mark.hollow:
        return Patch(facecolor="none", edgecolor=color, label=label)
    return Patch(color=color, alpha=getattr(mark, "opacity", 1.0), label=label)
