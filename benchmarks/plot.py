"""Pictures of results: time over the baseline, and on a GPU peak memory, one row of bars for each variant.

python -m benchmarks.plot CSV [CSV ...] --output speed.png
"""

import argparse
from itertools import groupby
from pathlib import Path

from benchmarks.measure import read_csv

MEASURES = {"over_base": "time over {base}", "peak_bytes": "peak memory over {base}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("speed.png"))
    arguments = parser.parse_args()
    path = draw([row for path in arguments.csv for row in read_csv(path)], arguments.output)
    print(f"written to {path}")


def draw(rows: list[dict[str, str]], path: Path) -> Path:
    """One panel for each case and measure; error bars from 20 to 80 %."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [list(group) for _, group in groupby(rows, key=_title)]
    measures = [name for name in MEASURES if any(row[name] for row in rows)]
    heights = [0.8 + 0.28 * len(case) for case in cases]
    size, ratios = (7.5 * len(measures), sum(heights)), {"height_ratios": heights}
    figure, panels = plt.subplots(len(cases), len(measures), figsize=size, squeeze=False, gridspec_kw=ratios)
    for case, row_of_panels in zip(cases, panels, strict=True):
        for measure, panel in zip(measures, row_of_panels, strict=True):
            _bars(panel, case, measure)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _bars(panel, case: list[dict[str, str]], measure: str) -> None:
    case = [row for row in case if row[measure]]  # a graph has no memory of its own
    if not case:
        panel.set_axis_off()
        return
    base = next((row for row in case if row["variant"] == row["base"]), case[0])
    names = [row["variant"] + (" (graph)" if row["graph"] == "True" else "") for row in case]
    unit = 1.0 if measure == "over_base" else float(base[measure]) or 1.0
    values = [float(row[measure]) / unit for row in case]
    spread = None
    if measure == "over_base":
        low = [max(0.0, v - float(row["over_base_20"])) for v, row in zip(values, case, strict=True)]
        high = [max(0.0, float(row["over_base_80"]) - v) for v, row in zip(values, case, strict=True)]
        spread = [low, high]
    bars = panel.barh(names, values, xerr=spread, height=0.6, color="#4c78a8", ecolor="#222222", capsize=2)
    panel.bar_label(bars, [f"{value:.2f}" for value in values], padding=12, fontsize=8)
    panel.axvline(1.0, color="#888888", linewidth=0.8, linestyle="--")
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_title(_title(case[0]), fontsize=9, loc="left")
    panel.set_xlabel(MEASURES[measure].format(base=base["base"]), fontsize=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _title(row: dict[str, str]) -> str:
    return f"{row['subject']}, batch {row['batch_size']}, {row['size']} size, {row['pass']}"


if __name__ == "__main__":
    main()
