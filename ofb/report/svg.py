"""Charts as SVG for a page: colours are the page's, so that they follow its light and dark."""

from collections.abc import Sequence
from html import escape

from ofb.report.chart import PALETTE, Band, Box, Chart, Line, Mark, shown

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360, 46, 10, 22, 34
CHARACTER = 6.2  # width of a character of a tick label
MOST_DOTS = 40  # a line of more points is drawn without dots on them


def draw(chart: Chart) -> str:
    """The chart as an `svg` element; its text alternative is title and summary."""
    plane = Plane(chart)
    label = escape(f"{chart.title}. {chart.summary}", quote=True)
    parts = [
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {chart.height}" aria-label="{label}">',
        *plane.axes(),
        '<g class="marks">',
        *(_mark(plane, mark) for mark in chart.marks),
        "</g></svg>",
    ]
    return "".join(parts)


def swatch(mark: Mark | str) -> str:
    """A small sample of a mark, or of a colour, for a legend."""
    if isinstance(mark, Line) and not mark.dots_only:
        shape = f'<line x1="0" x2="18" y1="6" y2="6" {_stroke(mark)}/>'
    else:
        color, hollow = (mark, False) if isinstance(mark, str) else (mark.color, getattr(mark, "hollow", False))
        opacity = getattr(mark, "opacity", 1.0)
        shape = f'<rect x="1" y="1" width="16" height="10" {_fill(color, hollow, opacity)}/>'
    return f'<svg class="swatch" viewBox="0 0 18 12" aria-hidden="true">{shape}</svg>'


class Plane:
    """Where a chart's numbers lie in its picture."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        (self.x_low, self.x_high), self.x_ticks = chart.x_axis
        (self.y_low, self.y_high), self.y_ticks = chart.y_axis
        self.left = max(LEFT, 10 + CHARACTER * max(map(len, self.y_ticks.values()), default=0))
        self.bottom = chart.height - BOTTOM

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(self.left + share * (WIDTH - RIGHT - self.left), 1)

    def word_center(self, value: float, word: str) -> float:
        """Where a tick's word is centred below the x axis: at the tick, unless it would stick out at the right."""
        return min(self.x(value), round(WIDTH - CHARACTER * len(word) / 2, 1))

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(self.bottom - share * (self.bottom - TOP), 1)

    def axes(self) -> list[str]:
        """Grid, ticks, and the names of the axes."""
        right, center = WIDTH - RIGHT, (self.left + WIDTH - RIGHT) / 2
        grid = [
            f'<line class="grid" x1="{self.left}" x2="{right}" y1="{self.y(at)}" y2="{self.y(at)}"/>'
            for at in (self.y_ticks if self.chart.y_ticks is None else ())
        ]
        y_words = [
            f'<text x="{self.left - 5}" y="{self.y(at) + 3.5:.1f}" text-anchor="end">{escape(word)}</text>'
            for at, word in self.y_ticks.items()
        ]
        x_words = [
            f'<text x="{self.word_center(at, word)}" y="{self.bottom + 14}" text-anchor="middle">{escape(word)}</text>'
            for at, word in self.x_ticks.items()
        ]
        frame = f'<line class="axis" x1="{self.left}" x2="{right}" y1="{self.bottom}" y2="{self.bottom}"/>'
        names = [
            f'<text class="name" x="{self.left - 5}" y="12">{escape(self.chart.y_label)}</text>',
            f'<text class="name" x="{center:.1f}" y="{self.bottom + 29}" text-anchor="middle">'
            f"{escape(self.chart.x_label)}</text>",
        ]
        return [*grid, *y_words, *x_words, frame, *names]

    def path(self, x: Sequence[float], y: Sequence[float]) -> str:
        return " ".join(f"{self.x(a):g},{self.y(b):g}" for a, b in zip(x, y, strict=True))


def _mark(plane: Plane, mark: Mark) -> str:
    if isinstance(mark, Box):
        return _box(plane, mark)
    if isinstance(mark, Band):
        outline = f"{plane.path(mark.x, mark.high)} {plane.path(mark.x[::-1], mark.low[::-1])}"
        fill = _fill(mark.color, False, mark.opacity)
        return f'<polygon class="band" points="{outline}" {fill}>{_title(mark.label)}</polygon>'
    dots = ""
    if mark.dots_only or len(mark.x) <= MOST_DOTS and not mark.dashed:
        dots = "".join(_dot(plane, mark, x, y) for x, y in zip(mark.x, mark.y, strict=True))
    if mark.dots_only:
        return dots
    line = (
        f'<polyline points="{plane.path(mark.x, mark.y)}" fill="none" {_stroke(mark)}>{_title(mark.label)}</polyline>'
    )
    return line + dots


def _dot(plane: Plane, line: Line, x: float, y: float) -> str:
    words = f"{line.label or plane.chart.y_label}: {shown(y)} at {plane.chart.x_label} {shown(x)}"
    radius = 3 if line.dots_only else 1.8
    return f'<circle cx="{plane.x(x)}" cy="{plane.y(y)}" r="{radius}" {_fill(line.color)}>{_title(words)}</circle>'


def _box(plane: Plane, box: Box) -> str:
    left, right = plane.x(box.x0), plane.x(box.x1)
    bottom, top = plane.y(box.y0), plane.y(box.y1)
    place = f'x="{left}" y="{top}" width="{max(0, right - left):.1f}" height="{max(0, bottom - top):.1f}"'
    return f"<rect {place} {_fill(box.color, box.hollow)}>{_title(box.words)}</rect>"


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""


def _stroke(line: Line) -> str:
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'style="stroke:{_color(line.color)}" stroke-width="2"{dashes}'


def _fill(color: str, hollow: bool = False, opacity: float = 1.0) -> str:
    if hollow:
        return f'fill="none" style="stroke:{_color(color)}"'
    faint = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
    return f'style="fill:{_color(color)}"{faint}'


def _color(color: str) -> str:
    return f"var(--{color})" if color in PALETTE else color
