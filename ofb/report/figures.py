"""Networks side by side: accuracy, costs and latency."""

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from ofb.engine.data import data_config
from ofb.export import count_params
from ofb.supernet.cost import readable
from ofb.supernet.families import count_macs
from ofb.supernet.latency import time_calls


def figures(
    networks: Mapping[str, nn.Module], accuracies: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Each network's figures: top1 and top5 in percent and whatever else is given of it, macs, params, and latency_ms
    on the CPU."""
    latency = cpu_latency(networks)
    return {
        name: {**accuracies[name], "macs": count_macs(n), "params": count_params(n), "latency_ms": latency[name]}
        for name, n in networks.items()
    }


def cpu_latency(networks: Mapping[str, nn.Module]) -> dict[str, float]:
    """Median milliseconds of each network for one image on the CPU, with torch's present number of threads.

    The networks take turns, so that whatever else the machine does slows all of them alike.
    """
    copies = {name: copy.deepcopy(network).cpu().eval() for name, network in networks.items()}
    images = {name: torch.randn(1, *data_config(network)["input_size"]) for name, network in copies.items()}
    calls = {name: partial(network, images[name]) for name, network in copies.items()}
    return time_calls(calls, torch.device("cpu"))


def comparison_table(networks: Mapping[str, Mapping[str, float]]) -> str:
    """A table of networks' figures, the first one being what the others are compared with."""
    first = next(iter(networks.values()))
    rows = [("", "top-1 %", "MACs", "params", "CPU ms")]
    for name, network in networks.items():
        shares = (f"{readable(network[key])} ({network[key] / first[key]:.0%})" for key in ("macs", "params"))
        latency = f"{network['latency_ms']:.2f} ({network['latency_ms'] / first['latency_ms']:.0%})"
        rows.append((name, f"{network['top1']:.2f}", *shares, latency))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
