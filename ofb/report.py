"""What a run achieved: dense and compressed side by side."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn

from ofb.engine.data import data_config
from ofb.export import count_params
from ofb.supernet.families import count_macs

WARMUP_RUNS, TIMED_RUNS = 10, 50


def figures(model: nn.Module, top1: float) -> dict[str, float]:
    """A network's figures: top1 in percent as given, macs, params, and latency_ms on the CPU."""
    return {"top1": top1, "macs": count_macs(model), "params": count_params(model), "latency_ms": cpu_latency(model)}


@torch.inference_mode()
def cpu_latency(model: nn.Module) -> float:
    """Median milliseconds for one image on the CPU, with torch's present number of threads."""
    device = next(model.parameters()).device
    model = model.cpu().eval()
    image = torch.randn(1, *data_config(model)["input_size"])
    times = []
    for _ in range(WARMUP_RUNS + TIMED_RUNS):
        start = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - start)
    model.to(device)
    return 1e3 * statistics.median(times[WARMUP_RUNS:])


def comparison_table(networks: Mapping[str, Mapping[str, float]]) -> str:
    """A table of networks' figures, the first one being what the others are compared with."""
    first = next(iter(networks.values()))
    rows = [("", "top-1 %", "MACs", "params", "CPU ms")]
    for name, network in networks.items():
        shares = (f"{_amount(network[key])} ({network[key] / first[key]:.0%})" for key in ("macs", "params"))
        latency = f"{network['latency_ms']:.2f} ({network['latency_ms'] / first['latency_ms']:.0%})"
        rows.append((name, f"{network['top1']:.2f}", *shares, latency))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _amount(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:g}"
