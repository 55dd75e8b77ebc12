"""Networks side by side: accuracy, costs and latency."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from shutil import get_terminal_size
from typing import Any

import torch
from torch import nn

from ofb.engine.terminal import in_lines
from ofb.export import count_params
from ofb.network_latency import NetworkLatency, latency_note, measure_network_latency
from ofb.supernet.cost import readable
from ofb.supernet.families import count_macs


def figures(
    networks: Mapping[str, nn.Module],
    accuracies: Mapping[str, Mapping[str, float]],
    batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Each network's figures: top1 and top5 in percent and whatever else is given of it, macs and params of one image,
    latency_ms on the device with so many images at once, and in `latency` how sure that is."""
    latencies = measure_network_latency(networks, batch_size, device)
    return {
        name: {
            **accuracies[name],
            "macs": count_macs(network),
            "params": count_params(network),
            "latency_ms": latencies[name].ms,
            "latency": asdict(latencies[name]),
        }
        for name, network in networks.items()
    }


def latencies_of(networks: Mapping[str, Mapping[str, Any]]) -> dict[str, NetworkLatency]:
    """What figures say of latency; of figures that an earlier version wrote, nothing."""
    return {name: NetworkLatency(**network["latency"]) for name, network in networks.items() if "latency" in network}


def comparison_table(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of networks' figures, the first one being what the others are compared with, and how they were timed."""
    first, latencies = next(iter(networks.values())), latencies_of(networks)
    rows = [("", "top-1 %", "MACs", "params", "latency ms", "20 to 80 %")]
    for name, network in networks.items():
        shares = (f"{readable(network[key])} ({network[key] / first[key]:.0%})" for key in ("macs", "params"))
        latency = latencies[name].beside(next(iter(latencies.values())))
        rows.append((name, f"{network['top1']:.2f}", *shares, latency, latencies[name].quantiles))
    return "\n".join([*_table(rows), in_lines(latency_note(latencies))])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; where the terminal is too narrow, columns go on below, beside the first one again."""
    first, *others = ([cell.rjust(max(map(len, column))) for cell in column] for column in zip(*rows, strict=True))
    parts = [first]
    for column in others:
        beside = [f"{line}  {cell}" for line, cell in zip(parts[-1], column, strict=True)]
        if len(beside[0]) <= get_terminal_size().columns or parts[-1] is first:
            parts[-1] = beside
        else:
            parts.append([f"{name}  {cell}" for name, cell in zip(first, column, strict=True)])
    return [line.rstrip() for part in parts for line in part]
