"""What a report says of a run, part by part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ofb.engine.history import describe_size
from ofb.network_latency import NetworkLatency, latency_note
from ofb.report import search_charts, training_charts
from ofb.report.chart import Chart, shown
from ofb.report.dense_training import dense_training_note
from ofb.report.figures import latencies_of
from ofb.report.run import Run
from ofb.supernet.cost import readable

ACCURACIES = {"top1": "top-1 %", "top5": "top-5 %"}
COSTS = {"macs": "MACs", "params": "parameters", "latency_ms": "latency, ms", "latency": "20 to 80 % quantiles, ms"}
FIGURES = ACCURACIES | COSTS
MOST_ROWS = 12  # of a table that is not folded


@dataclass(frozen=True)
class Table:
    """A table; a folded one opens at a click."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: of its anchor and its PNG.
        title, text: what it shows.
        charts: of each group, by its title; "" for those of no group.
        tables: shown after the charts.
        picture: a PNG, or b"".
    """

    name: str
    title: str
    text: str
    charts: Mapping[str, Sequence[Chart]] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    picture: bytes = b""

    @property
    def all_charts(self) -> list[Chart]:
        return [chart for group in self.charts.values() for chart in group]


def sections(run: Run) -> list[Section]:
    """The parts for which the run has something to show."""
    parts = [
        Section(
            "networks",
            "Networks",
            _about_networks(run),
            tables=_networks(run),
        ),
        Section(
            "architecture",
            "Architecture",
            "How much of each submodule is kept, from the images to the classifier. The size of attention is its heads "
            "times the channels of a head.",
            {"": search_charts.architecture_charts(run)},
            _architecture(run),
        ),
        Section(
            "evolution",
            "How it came about",
            "Bright is the size in the dense network, dark a small one. It shrinks when the largest candidate dies.",
            {"": search_charts.evolution_charts(run) + training_charts.cost_charts(run)},
            _pruned(run),
        ),
        Section("accuracy", "Accuracy", "", {"": training_charts.accuracy_charts(run)}),
        Section("losses", "Losses", "Means over an epoch.", {"": training_charts.loss_charts(run)}),
        Section(
            "candidates",
            "Candidate probabilities",
            "p = softmax(α) over the candidates alive, one upon the other, together 1. A dead candidate has no band.",
            _grouped(run, lambda name: search_charts.probability_charts(run, name)),
        ),
        _distributions(
            run,
            "importance",
            "S = sigmoid(s) of a submodule's units: the median, and the middle 40 %, 80 % and all of them.",
        ),
        _distributions(
            run,
            "sparsity",
            "V of a submodule's units: how likely the rank of a unit is kept; 1 for all once the size is final.",
        ),
        Section(
            "left-out",
            "Is importance right?",
            "A sample of the found network's units: learned importance, and how the loss changes without the unit.",
            {"": search_charts.importance_charts(run)},
        ),
        Section(
            "reconstruction",
            "Reconstructions",
            "Masked image modelling in the last epoch with an open size. From above: the locally normalized image, "
            "what is left of it, and what was rebuilt.",
            picture=run.reconstruction,
        ),
        Section("options", "Options", "", tables=_options(run)),
    ]
    return [part for part in parts if part.all_charts or part.tables or part.picture]


def _grouped(run: Run, charts_of) -> dict[str, list[Chart]]:
    """Charts of all submodules by kind."""
    names = list(run.history[0]["submodules"]) if run.history else []
    groups = {
        kind: [chart for name in each for chart in charts_of(name)]
        for kind, each in search_charts.by_kind(names).items()
    }
    return {kind: charts for kind, charts in groups.items() if charts}


def _distributions(run: Run, score: str, text: str) -> Section:
    charts = search_charts.distribution_charts(run, score)
    return Section(
        score, score.capitalize(), text, _grouped(run, lambda name: [charts[name]] if name in charts else [])
    )


def _about_networks(run: Run) -> str:
    latencies = latencies_of(run.figures)
    about = "Accuracy on the test images; MACs of one image"
    about = f"{about}; {latency_note(latencies)}." if latencies else f"{about}."
    note = dense_training_note(run.figures)
    return f"{about} Note: {note}." if note else about


def _networks(run: Run) -> list[Table]:
    """Figures of the networks; of those that are only found, their costs. The names of their classes."""
    if run.figures:
        networks = {name: dict(network) for name, network in run.figures.items()}
    elif run.found:
        networks = {f"found, {target}": network["costs"] for target, network in run.found["networks"].items()}
        networks = {"dense": {kind: cost["dense"] for kind, cost in run.history[-1]["costs"].items()}} | networks
    else:
        return []
    rows = [[title, *_row(networks, key)] for key, title in FIGURES.items() if any(key in n for n in networks.values())]
    return [Table("Networks", ["", *networks], rows), *_classes(run)]


def _classes(run: Run) -> list[Table]:
    rows = [[str(index), name] for index, name in enumerate(run.label_names)]
    return [Table("Classes", ["index", "name"], rows, folded=True)] if rows else []


def _row(networks: Mapping[str, Mapping[str, Any]], key: str) -> list[str]:
    """A figure of each network, costs with their share of the first one's."""
    first = next(iter(networks.values()))
    return [_cell(network, first, key) if key in network else "–" for network in networks.values()]


def _cell(network: Mapping[str, Any], first: Mapping[str, Any], key: str) -> str:
    if key == "latency":
        return NetworkLatency(**network[key]).quantiles
    if key == "latency_ms" and "latency" in network and "latency" in first:
        return NetworkLatency(**network["latency"]).beside(NetworkLatency(**first["latency"]))
    amount = readable(network[key]) if key in ("macs", "params") else f"{network[key]:.2f}"
    is_share = key not in ACCURACIES and network is not first and key in first
    return f"{amount} ({network[key] / first[key]:.0%})" if is_share else amount


def _architecture(run: Run) -> list[Table]:
    networks = {"dense": run.dense_sizes} | run.found_sizes if run.found_sizes else {"size": run.dense_sizes}
    rows = [
        [name, *(describe_size(name, sizes[name]) for sizes in networks.values())]
        for kind in search_charts.by_kind(list(run.dense_sizes)).values()
        for name in kind
    ]
    return [Table("Sizes", ["submodule", *networks], rows, folded=len(rows) > MOST_ROWS)] if rows else []


def _pruned(run: Run) -> list[Table]:
    rows = [
        [
            str(entry["epoch"] + 1),
            shown(event["step"]),
            event["submodule"],
            *(describe_size(event["submodule"], event[end]) for end in ("from", "to")),
            str(event["alive"]),
        ]
        for entry in run.history
        for event in entry["pruned"]
    ]
    head = ["epoch", "step", "submodule", "largest before", "after", "candidates left"]
    return [Table("What was pruned when", head, rows, folded=True)] if rows else []


def _options(run: Run) -> list[Table]:
    rows = [[str(key), _value(value)] for key, value in run.config.items()]
    return [Table("All options of this run", ["option", "value"], rows, folded=True)] if rows else []


def _value(value: object) -> str:
    return " ".join(map(str, value)) or "–" if isinstance(value, list) else str(value)
