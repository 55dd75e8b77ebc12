"""Charts as data: what is drawn, in the units of its axes. `svg` draws it for the page, `png` as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from ofb.supernet.cost import readable

# Okabe and Ito's colours, which those who see few colours can tell apart; the page has lighter ones for dark windows.
PALETTE = {
    "blue": "#0072b2",
    "orange": "#c65f00",
    "green": "#00805f",
    "pink": "#b3548e",
    "gray": "#77777f",
}
TICKS = 5


@dataclass(frozen=True)
class Line:
    """A line through points, or the points alone."""

    x: Sequence[float]
    y: Sequence[float]
    color: str
    label: str = ""
    dashed: bool = False
    dots_only: bool = False


@dataclass(frozen=True)
class Band:
    """The area between two lines."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    color: str
    label: str = ""
    opacity: float = 1.0


@dataclass(frozen=True)
class Box:
    """A rectangle from (x0, y0) to (x1, y1), with words on what it stands for; hollow ones are outlines."""

    x0: float
    y0: float
    x1: float
    y1: float
    color: str
    words: str
    label: str = ""
    hollow: bool = False


Mark = Line | Band | Box


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: what it shows.
        summary: what there is to see, in a sentence.
        marks: drawn one over the other.
        x_label, y_label: the axes.
        x_ticks, y_ticks: words at positions; numbers if None.
        x_range, y_range: of the axes; those of the marks if None.
        height: in pixels of a chart 360 wide.
        legend: label and colour of what it explains; the labels of the marks if empty.
    """

    title: str
    summary: str
    marks: Sequence[Mark]
    x_label: str
    y_label: str
    x_ticks: Mapping[float, str] | None = None
    y_ticks: Mapping[float, str] | None = None
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    height: int = 210
    legend: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def x_axis(self) -> tuple[tuple[float, float], dict[float, str]]:
        """Range and ticks of the x axis; an axis of epochs has whole numbers."""
        ends = self.x_range or _ends(value for mark in self.marks for value in _xs(mark))
        return ends, dict(self.x_ticks) if self.x_ticks is not None else _ticks(ends, whole=self.x_label == "epoch")

    @cached_property
    def y_axis(self) -> tuple[tuple[float, float], dict[float, str]]:
        """Range and ticks of the y axis."""
        if self.y_range is not None:
            ends = self.y_range
        else:
            low, high = _ends(value for mark in self.marks for value in _ys(mark))
            margin = 0.05 * (high - low)
            ends = low - margin * (low != 0), high + margin
        return ends, dict(self.y_ticks) if self.y_ticks is not None else _ticks(ends)

    @cached_property
    def labels(self) -> dict[str, Mark | str]:
        """What the legend explains: a mark, or a colour, for each label."""
        return dict(self.legend) or {mark.label: mark for mark in self.marks if mark.label}


def ramp(share: float) -> str:
    """A colour from dark for 0 to bright for 1, visible on black and on white."""
    return to_hex(colormaps["viridis"](0.15 + 0.8 * min(1.0, max(0.0, share))))


def shown(value: float) -> str:
    """A number as people read it."""
    return readable(value) if abs(value) >= 1000 else f"{value:.4g}"


def _xs(mark: Mark) -> Sequence[float]:
    return (mark.x0, mark.x1) if isinstance(mark, Box) else mark.x


def _ys(mark: Mark) -> Sequence[float]:
    if isinstance(mark, Box):
        return mark.y0, mark.y1
    return mark.y if isinstance(mark, Line) else (*mark.low, *mark.high)


def _ends(values) -> tuple[float, float]:
    """Least and greatest; apart from each other, whatever they are."""
    values = list(values)
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _ticks(ends: tuple[float, float], whole: bool = False) -> dict[float, str]:
    low, high = ends
    values = MaxNLocator(TICKS, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return {float(value): shown(round(float(value), 12)) for value in values if low - slack <= value <= high + slack}
