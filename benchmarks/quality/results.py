"""The rows of finished runs: written, read, and summed up over seeds."""

import csv
import io
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ofb.engine.checkpoint import write_text

FOLDER = Path(__file__).parent / "results"
NETWORK_KEY = ("method", "distillation", "target")  # tells networks apart, seeds aside

Row = dict[str, str]


@dataclass(frozen=True)
class Mean:
    """A figure over seeds: mean, standard deviation (0 for one seed), and how many."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.deviation:.2f}" if self.count > 1 else f"{self.mean:.2f}"


def difference(a: Mean, b: Mean) -> tuple[float, float]:
    """a − b and its standard error, the seeds of both being independent."""
    error = math.sqrt(a.deviation**2 / a.count + b.deviation**2 / b.count)
    return a.mean - b.mean, error


def csv_path(data: str) -> Path:
    return FOLDER / f"{data.replace('/', '-')}.csv"


def latency_path(data: str) -> Path:
    return csv_path(data).with_suffix(".latency.csv")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, values as text; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[dict], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
