"""Charts of losses, accuracy and costs over the epochs."""

from collections.abc import Mapping, Sequence
from typing import Any

from ofb.report.chart import Chart, Line, shown
from ofb.report.run import Run
from ofb.supernet.targets import UNITS

LOSSES = {
    "loss": "Total loss",
    "one_hot": "One-hot loss",
    "macs": "Loss of the budgets",
    "reconstruction": "Reconstruction loss",
}

Entries = Sequence[Mapping[str, Any]]


def accuracy_charts(run: Run) -> list[Chart]:
    """Validation accuracy, a chart for each stage."""
    charts = []
    for stage, entries in run.stages.items():
        lines = [
            _line(entries, "val_top1", "blue", "top-1"),
            _line(entries, "val_top5", "gray", "top-5", dashed=True),
        ]
        best = max(entries, key=lambda entry: entry["val_top1"])
        summary = f"Best top-1 {best['val_top1']:.2f} % in epoch {best['epoch'] + 1} of {len(entries)}."
        title = f"Accuracy on validation images, {stage}"
        charts.append(Chart(title, summary, lines, "epoch", "%"))
    return charts


def loss_charts(run: Run) -> list[Chart]:
    """Losses, some charts for each stage."""
    return [chart for stage, entries in run.stages.items() for chart in _stage_losses(stage, entries)]


def cost_charts(run: Run) -> list[Chart]:
    """Expected cost of each kind against its target."""
    kinds = run.history[0]["costs"] if run.history else {}
    return [_cost_chart(run.history, kind) for kind in kinds]


def _stage_losses(stage: str, entries: Entries) -> list[Chart]:
    training = "classification" if "classification" in entries[0] else "loss"
    lines = [
        _line(entries, training, "blue", "training"),
        _line(entries, "val_loss", "orange", "validation", dashed=True),
    ]
    first, last = entries[0], entries[-1]
    summary = (
        f"Training {shown(first[training])} to {shown(last[training])}, validation {shown(first['val_loss'])} to "
        f"{shown(last['val_loss'])}."
    )
    charts = [Chart(f"Classification loss, {stage}", summary, lines, "epoch", "loss")]
    for key, title in LOSSES.items() if training == "classification" else ():
        if any(entry.get(key) for entry in entries):
            summary = f"{shown(first[key])} in the first epoch, {shown(last[key])} in the last one."
            line = [_line(entries, key, "blue")]
            charts.append(Chart(f"{title}, {stage}", summary, line, "epoch", "loss"))
    return charts


def _cost_chart(history: Entries, kind: str) -> Chart:
    epochs = [entry["epoch"] + 1 for entry in history]
    costs = [entry["costs"][kind] for entry in history]
    lines = [
        Line(epochs, [cost["expected"] for cost in costs], "blue", "expected"),
        Line(epochs, [cost["dense"] for cost in costs], "gray", "dense", dashed=True),
    ]
    target, last = costs[-1]["target"], costs[-1]
    summary = f"{_share(last['expected'], last['dense'])} of the dense network's at the end"
    if target is not None:
        lines.append(Line(epochs, [cost["target"] for cost in costs], "orange", "target", dashed=True))
        summary += f", the target is {_share(target, last['dense'])}"
    title = f"Expected {UNITS.get(kind, kind)}" + (" (latency)" if kind == "latency_ms" else "")
    top = 1.05 * max(*(cost["dense"] for cost in costs), *(cost["expected"] for cost in costs))
    return Chart(title, f"{summary}.", lines, "epoch", UNITS.get(kind, kind), y_range=(0, top))


def _share(amount: float, dense: float) -> str:
    return f"{shown(amount)} ({amount / dense:.0%})"


def _line(entries: Entries, key: str, color: str, label: str = "", dashed: bool = False) -> Line:
    found = [entry for entry in entries if key in entry]
    return Line([entry["epoch"] + 1 for entry in found], [entry[key] for entry in found], color, label, dashed)
