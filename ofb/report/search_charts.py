"""Charts of what a search did: sizes, candidate probabilities, importance and sparsity."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ofb.engine.history import describe_size
from ofb.report.chart import Band, Box, Chart, Line, ramp, shown
from ofb.report.run import SO_FAR, Run, Sizes

KINDS = {"embed": "Residual width", "attn": "Attention", "mlp": "MLP", "pool": "Pooling", "tokens": "Patches"}
KIND_COLORS = {"embed": "green", "attn": "blue", "mlp": "orange", "pool": "gray", "tokens": "pink"}
MOST_EPOCHS = 60  # drawn of a longer search, evenly chosen
MOST_SAMPLES = 8  # of candidates in a legend
ROW = 13  # pixels of a submodule's row
FANS = ((0, 10, 0.15), (1, 9, 0.3), (3, 7, 0.45))  # deciles from, to, and opacity between them

Entries = Sequence[Mapping[str, Any]]


def kind_of(name: str) -> str:
    """The kind of a submodule: attn of attn12."""
    return name.rstrip("0123456789")


def by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    """Submodules of each kind that there is, in the order of `KINDS`, by the kind's title."""
    return {title: each for kind, title in KINDS.items() if (each := [n for n in names if kind_of(n) == kind])}


def units(size: Sequence[int]) -> int:
    return size[0] * size[1]


def architecture_charts(run: Run) -> list[Chart]:
    """Each found network against the dense one: what is kept of every submodule."""
    return [_kept_chart(target, sizes, run.dense_sizes) for target, sizes in run.found_sizes.items()]


def evolution_charts(run: Run) -> list[Chart]:
    """Sizes of all submodules, and the candidates left, over the epochs."""
    return [_evolution_chart(run), _alive_chart(run.history)] if run.history else []


def probability_charts(run: Run, name: str) -> list[Chart]:
    """Candidate probabilities of a submodule over the epochs; of attention, of its heads and of their channels."""
    history = _thinned(run.history)
    grids = [entry["submodules"][name] for entry in history]
    epochs = [entry["epoch"] + 1 for entry in history]
    axes = {"heads": "heads", "channels": "channels of a head"} if kind_of(name) == "attn" else {"channels": "size"}
    return [
        _probability_chart(name, axis, words, grids, epochs) for axis, words in axes.items() if len(grids[0][axis]) > 1
    ]


def distribution_charts(run: Run, score: str) -> dict[str, Chart]:
    """Deciles of "importance" or "sparsity" over the epochs, a chart for each submodule that was searched."""
    history = _thinned(run.history)
    names = history[0]["submodules"] if history else ()
    return {name: _fan_chart(name, score, history) for name in names if is_searched(history[0]["submodules"][name])}


def importance_charts(run: Run) -> list[Chart]:
    """Learned importance against what the loss says when a unit is left out."""
    return [
        Chart(
            f"{name}: importance and loss",
            f"Rank correlation {entry['rank_correlation']:.2f} over {len(entry['importance'])} units.",
            [Line(entry["importance"], entry["loss_change"], KIND_COLORS.get(kind_of(name), "blue"), dots_only=True)],
            "importance S",
            "loss change without the unit",
        )
        for name, entry in run.importance.items()
    ]


def is_searched(submodule: Mapping[str, Any]) -> bool:
    """Whether it has more than one candidate."""
    return sum(p is not None for row in submodule["probabilities"] for p in row) > 1


def _kept_chart(target: str, sizes: Sizes, dense: Sizes) -> Chart:
    marks, labelled = [], set()
    for i, (name, size) in enumerate(sizes.items()):
        kind = kind_of(name)
        share = units(size) / units(dense[name])
        words = f"{name}: {describe_size(name, size)} of {describe_size(name, dense[name])} ({share:.0%})"
        marks.append(Box(i - 0.4, 0, i + 0.4, 1, "gray", words, "dense" if i == 0 else "", hollow=True))
        label = KINDS[kind] if kind not in labelled else ""
        marks.append(Box(i - 0.4, 0, i + 0.4, share, KIND_COLORS[kind], words, label))
        labelled.add(kind)
    shares = {name: units(size) / units(dense[name]) for name, size in sizes.items()}
    least, most = min(shares, key=shares.get), max(shares, key=shares.get)
    return Chart(
        f"What is kept of the dense network, {target}" if target == SO_FAR else f"What is kept, target {target}",
        f"Least of {least} ({shares[least]:.0%}), most of {most} ({shares[most]:.0%}).",
        marks,
        "block",
        "units kept",
        x_ticks=_block_ticks(list(sizes)),
        y_ticks={share / 4: f"{share / 4:.0%}" for share in range(5)},
        x_range=(-0.7, len(sizes) - 0.3),
        y_range=(0, 1.02),
    )


def _block_ticks(names: Sequence[str]) -> dict[float, str]:
    """Numbers of the blocks below their attention and MLP, not too many."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if kind_of(name) in ("attn", "mlp"):
            places.setdefault(name.lstrip("atnmlp"), []).append(i)
    step = -(-len(places) // 12)
    return {sum(at) / len(at): number for number, at in list(places.items())[::step]}


def _evolution_chart(run: Run) -> Chart:
    names = list(run.dense_sizes)
    marks = []
    for row, name in enumerate(names):
        full = units(run.dense_sizes[name])
        sizes = [
            (entry["epoch"] + 1, (each["heads"][-1], each["channels"][-1]))
            for entry in run.history
            for each in [entry["submodules"][name]]
        ]
        for size, group in groupby(sizes, key=lambda pair: pair[1]):
            epochs = [epoch for epoch, _ in group]
            words = f"{name}, after epochs {epochs[0]} to {epochs[-1]}: at most {describe_size(name, size)}"
            y = len(names) - row
            color = ramp(units(size) / full)
            marks.append(Box(epochs[0] - 0.5, y - 0.92, epochs[-1] + 0.5, y - 0.08, color, words))
    pruned = sum(len(entry["pruned"]) for entry in run.history)
    return Chart(
        "Largest size still possible",
        f"{len(names)} submodules; pruning took candidates from one of them {pruned} times.",
        marks,
        "epoch",
        "",
        y_ticks={len(names) - row - 0.5: name for row, name in enumerate(names)},
        y_range=(0, len(names)),
        height=ROW * len(names) + 60,
        legend={f"{share:.0%}": ramp(share) for share in (0.25, 0.5, 0.75, 1.0)},
    )


def _alive_chart(history: Entries) -> Chart:
    epochs = [entry["epoch"] + 1 for entry in history]
    alive = {kind: [0] * len(history) for kind in KINDS}
    for i, entry in enumerate(history):
        for name, each in entry["submodules"].items():
            alive[kind_of(name)][i] += sum(p is not None for row in each["probabilities"] for p in row)
    lines = [Line(epochs, counts, KIND_COLORS[kind], KINDS[kind]) for kind, counts in alive.items() if any(counts)]
    totals = [sum(counts) for counts in zip(*alive.values(), strict=True)]
    submodules = len(history[0]["submodules"])
    summary = f"{totals[0]} at the start, {totals[-1]} in the end, for {submodules} submodules."
    top = 1.05 * max(max(line.y) for line in lines)
    return Chart("Candidates alive", summary, lines, "epoch", "candidates", y_range=(0, top))


def _probability_chart(name: str, axis: str, words: str, grids: list[Mapping], epochs: list[int]) -> Chart:
    """A stack of bands: how probable each size is, the smallest at the bottom."""
    sizes = grids[0][axis]
    colors = {size: ramp((size - sizes[0]) / (sizes[-1] - sizes[0])) for size in sizes}
    probabilities = [_marginal(grid, axis) for grid in grids]
    marks, low = [], [0.0] * len(grids)
    for size in sizes:
        high = [below + p.get(size, 0.0) for below, p in zip(low, probabilities, strict=True)]
        marks.append(Band(epochs, low, high, colors[size], f"{size} {words}"))
        low = high
    likeliest = max(probabilities[-1], key=probabilities[-1].get)
    step = -(-len(sizes) // MOST_SAMPLES)
    samples = sizes[::-step][::-1]
    return Chart(
        f"{name}: {words}",
        f"Likeliest in the end: {likeliest}, with {probabilities[-1][likeliest]:.0%}.",
        [mark for mark in marks if any(h > b for b, h in zip(mark.low, mark.high, strict=True))],
        "epoch",
        "probability",
        y_range=(0, 1),
        legend={str(size): colors[size] for size in samples},
    )


def _marginal(grid: Mapping[str, Any], axis: str) -> dict[int, float]:
    """Probability of each head count, or of each channel count."""
    rows = grid["probabilities"] if axis == "heads" else zip(*grid["probabilities"], strict=True)
    return {size: sum(p or 0.0 for p in row) for size, row in zip(grid[axis], rows, strict=True)}


def _fan_chart(name: str, score: str, history: Entries) -> Chart:
    epochs = [entry["epoch"] + 1 for entry in history]
    deciles = [entry["submodules"][name][score] for entry in history]
    color = KIND_COLORS[kind_of(name)]
    bands = [
        Band(epochs, [d[low] for d in deciles], [d[high] for d in deciles], color, opacity=opacity)
        for low, high, opacity in FANS
    ]
    median = Line(epochs, [d[5] for d in deciles], color)
    last = deciles[-1]
    letter = "S" if score == "importance" else "V"
    summary = f"In the end from {shown(last[0])} to {shown(last[10])}, median {shown(last[5])}."
    return Chart(f"{name}: {score}", summary, [*bands, median], "epoch", f"{score} {letter}")


def _thinned(history: Entries) -> Entries:
    """At most MOST_EPOCHS entries, the first and the last among them."""
    if len(history) <= MOST_EPOCHS:
        return history
    last = len(history) - 1
    return [history[round(i * last / (MOST_EPOCHS - 1))] for i in range(MOST_EPOCHS)]
