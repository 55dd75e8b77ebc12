"""The page of results: benchmarks/QUALITY.md and its pictures, from the CSVs under benchmarks/quality/results.

python -m benchmarks.quality.page
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.measure import ROOT
from benchmarks.quality.grid import COMPARED, ONE_SEARCH
from benchmarks.quality.results import FOLDER, NETWORK_KEY, Mean, Row, csv_path, difference, latency_path, read_rows

PATH = ROOT / "QUALITY.md"
TRAIL = FOLDER / "tried.csv"
COSTS = {"macs": "MACs (M)", "params": "parameters (K)", "latency_ms": "CPU latency, one image, one thread (ms)"}
UNITS = {"macs": 1e6, "params": 1e3, "latency_ms": 1.0}

TRIAL = ("data", "method", "target", "distillation", "options")
TAUGHT = " + teacher, "  # between a method and its kind of distillation
KINDS = {"": "no teacher", f"{TAUGHT}soft": "with a teacher"}  # of distillation, that the pictures show

Series = dict[tuple[str, str], list[Row]]  # (method, target) → its runs


def main() -> None:
    for data in data_sets():
        draw(series(data), dense_of(data), FOLDER / f"{csv_path(data).stem}.png")
        draw_curve(dense_of(data), FOLDER / f"{csv_path(data).stem}-dense.png")
    PATH.write_text(page())
    print(f"written to {PATH}")


def data_sets() -> list[str]:
    return sorted({row["data"] for path in FOLDER.glob("*.csv") if path != TRAIL for row in read_rows(path)})


def series(data: str) -> Series:
    """Runs with the defaults, by method (distillation named with it) and target; with latencies where there are any."""
    found: Series = {}
    latency = {tuple(row[name] for name in NETWORK_KEY): row for row in read_rows(latency_path(data))}
    for row in read_rows(csv_path(data)):
        if not row["options"]:
            row |= latency.get(tuple(row[name] for name in NETWORK_KEY), {})
            found.setdefault((row["method"] + _taught(row), row["target"]), []).append(row)
    return found


def _taught(row: Row) -> str:
    return f"{TAUGHT}{row['distillation']}" if row["distillation"] else ""


def dense_of(data: str) -> dict:
    return json.loads(csv_path(data).with_suffix(".dense.json").read_text())


def page() -> str:
    parts = [(FOLDER / "header.md").read_text()]
    for data in data_sets():
        parts += ["\n", *(f"{line}\n" for line in section(data))]
    parts += ["\n", (FOLDER / "trail.md").read_text(), "\n", *(f"{line}\n" for line in trail())]
    return "".join(parts)


def section(data: str) -> Iterator[str]:
    """One data set: the dense network, a table for each target, the pictures."""
    found, dense, stem = series(data), dense_of(data), csv_path(data).stem
    rows = [row for runs in found.values() for row in runs]
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    yield f"## {data}"
    yield ""
    yield (
        f"Dense network: {dense['macs'] / 1e6:.2f} M MACs, {dense['params'] / 1e3:.0f} K parameters, test top-1 "
        f"**{dense['test_top1']:.2f} %** after {len(dense['val_top1'])} epochs. {len(rows)} runs, {hours:.1f} core "
        f"hours, torch {rows[0]['torch']}, commit {', '.join(sorted({row['commit'] for row in rows}))}."
    )
    yield ""
    yield f"![accuracy against cost](quality/results/{stem}.png)"
    yield f"![the dense network's training](quality/results/{stem}-dense.png)"
    for target in sorted({target for _, target in found}, key=lambda text: -float(text.rstrip("%"))):
        yield from _table(found, target)
    yield from _one_search(found)


def _table(found: Series, target: str) -> Iterator[str]:
    methods = {method: runs for (method, its), runs in found.items() if its == target}
    test = {method: Mean.of(float(row["test_top1"]) for row in runs) for method, runs in methods.items()}
    yield ""
    yield f"### {target} of the MACs"
    yield ""
    yield "| method | test top-1 % | OFB's lead ± standard error | runs | epochs | open at the end | s a run |"
    yield "|---|---|---|---|---|---|---|"
    for method in sorted(methods, key=lambda name: -test[name].mean):
        runs, lead, ofb = methods[method], "", "ofb" + method[len(method.split(TAUGHT)[0]) :]
        if method != ofb and ofb in test:  # like with like: a method that has a teacher with OFB that has one
            ahead, error = difference(test[ofb], test[method])
            known = min(test[ofb].count, test[method].count) > 1  # a single seed has no spread
            lead = f"{ahead:+.2f} ± {error:.2f}" if known else f"{ahead:+.2f}"
        left = [int(row["left_open"]) for row in runs if row["left_open"]]
        left_open = f"{sum(left) / len(left):.1f}" if left else ""
        epochs, seconds = _mean(_epochs(row) for row in runs), _mean(float(row["seconds"]) for row in runs)
        yield f"| {method} | {test[method]} | {lead} | {len(runs)} | {epochs:g} | {left_open} | {seconds:.0f} |"


def _one_search(found: Series) -> Iterator[str]:
    """What one search for all targets saves, and what it costs in accuracy."""
    targets = [target for method, target in found if method == ONE_SEARCH and ("ofb", target) in found]
    if not targets:
        return
    yield ""
    yield f"### One search for {len(targets)} networks"
    yield ""
    yield "| | epochs of search | epochs of fine-tuning | core minutes | test top-1 % |"
    yield "|---|---|---|---|---|"
    for method, name in ((ONE_SEARCH, "one search"), ("ofb", "separate searches")):
        runs = [found[method, target] for target in targets]
        search, finetuning, seconds = (
            sum(_mean(float(row[column]) for row in rows) for rows in runs)
            for column in ("search_epochs", "finetune_epochs", "seconds")
        )
        top1 = ", ".join(
            f"{Mean.of(float(row['test_top1']) for row in rows)} at {target}"
            for target, rows in zip(targets, runs, strict=True)
        )
        yield f"| {name} | {search:g} | {finetuning:g} | {seconds / 60:.1f} | {top1} |"


def _epochs(row: Row) -> float:
    return float(row["search_epochs"]) + float(row["finetune_epochs"])


def _mean(values: Iterable[float]) -> float:
    return Mean.of(values).mean


def trail() -> Iterator[str]:
    """What was tried, one line for all seeds of a trial, in the order of the file."""
    trials: dict[tuple[str, ...], list[Row]] = {}
    for row in read_rows(TRAIL):
        trials.setdefault(tuple(row[name] for name in TRIAL), []).append(row)
    yield f"| {' | '.join(TRIAL)} | runs | val top-1 % | test top-1 % | open at the end |"
    yield "|" + "---|" * (len(TRIAL) + 4)
    for trial, rows in trials.items():
        val, test = (Mean.of(float(row[name]) for row in rows) for name in ("val_top1", "test_top1"))
        left = [int(row["left_open"]) for row in rows if row["left_open"]]
        left_open = f"{_mean(left):.1f}" if left else ""
        yield f"| {' | '.join(trial)} | {len(rows)} | {val} | {test} | {left_open} |"


def draw(found: Series, dense: dict, path: Path) -> None:
    """Accuracy against each cost: a row of panels without a teacher and one with, a line for each method."""
    plt = _pyplot()
    lines = {kind: names for kind in KINDS if (names := _lines(found, kind))}
    costs = {cost: label for cost, label in COSTS.items() if any(cost in runs[0] for runs in found.values())}
    shape = dict(figsize=(5 * len(costs), 4.5 * len(lines)), sharex="col", sharey=True, squeeze=False)
    figure, rows = plt.subplots(len(lines), len(costs), **shape)
    for panels, (kind, methods) in zip(rows, lines.items(), strict=True):
        for panel, (cost, label) in zip(panels, costs.items(), strict=True):
            for method in methods:
                _line(panel, found, method + kind, cost, method, color=plt.get_cmap("tab10")(COMPARED.index(method)))
            panel.axhline(dense["test_top1"], color="#888888", linewidth=0.8, linestyle="--")
            panel.set_xlabel(label)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"test top-1 %, {KINDS[kind]} (dashed: dense)")
        panels[-1].legend(fontsize=8, loc="lower right")
    _save(plt, figure, path)


def _lines(found: Series, kind: str) -> list[str]:
    """The methods to draw with a kind of distillation: those with several targets."""
    targets = Counter(method for method, _ in found)
    return [method for method in COMPARED if targets[method + kind] > 1]


def _line(panel, found: Series, method: str, cost: str, label: str, color) -> None:
    """Means of a method at its targets, error bars of one standard deviation over seeds."""
    points = []
    for (its, _), runs in found.items():
        if its == method and cost in runs[0]:
            top1 = Mean.of(float(row["test_top1"]) for row in runs)
            points.append((_mean(float(row[cost]) for row in runs) / UNITS[cost], top1))
    points.sort(key=lambda point: point[0])
    panel.errorbar(
        [x for x, _ in points],
        [top1.mean for _, top1 in points],
        [top1.deviation for _, top1 in points],
        marker="o" if label == "ofb" else ".",
        linewidth=2.2 if label == "ofb" else 1,
        color="black" if label == "ofb" else color,
        capsize=2,
        label=label,
    )


def draw_curve(dense: dict, path: Path) -> None:
    plt = _pyplot()
    figure, panel = plt.subplots(figsize=(5, 3))
    panel.plot(range(1, len(dense["val_top1"]) + 1), dense["val_top1"], color="#4c78a8")
    panel.set_xlabel("epoch")
    panel.set_ylabel("dense network, validation top-1 %")
    panel.spines[["top", "right"]].set_visible(False)
    _save(plt, figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt, figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
