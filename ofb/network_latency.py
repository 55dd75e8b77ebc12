"""Latency of whole networks: measured and told the same way wherever it is shown."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from ofb.engine.data import data_config
from ofb.engine.terminal import in_lines
from ofb.supernet.timing import Timing, device_name, time_calls


@dataclass(frozen=True, kw_only=True)
class NetworkLatency(Timing):
    """Milliseconds of a network's forward pass in float32.

    Attributes:
        on: device, threads and batch size.
    """

    on: str

    @property
    def quantiles(self) -> str:
        """The 20 and 80 % quantiles in words."""
        return f"{self.low:.2f} to {self.high:.2f}"

    def beside(self, first: "NetworkLatency") -> str:
        """The milliseconds, and their share of the first network's; "unstable" where one of the two is."""
        return f"{self.ms:.2f} ({self.share_of(first)})"

    def share_of(self, first: "NetworkLatency") -> str:
        """The share in percent, or "unstable"."""
        return f"{self.ms / first.ms:.0%}" if self.stable and first.stable else "unstable"


def measure_network_latency(
    networks: Mapping[str, nn.Module], batch_size: int = 1, device: torch.device | str = "cpu"
) -> dict[str, NetworkLatency]:
    """Latency of networks with torch's present number of threads.

    The networks take turns, until all times are stable four trials or ten seconds are over. They stay as they are.

    Args:
        networks: timm models by name.
        batch_size: images at once.
        device: where to measure.
    """
    device, calls = torch.device(device), {}
    for name, network in networks.items():
        moved = copy.deepcopy(network).to(device).eval()
        calls[name] = partial(moved, torch.randn(batch_size, *data_config(network)["input_size"], device=device))
    on = f"{device_name(device)}, batch size {batch_size}"
    return {name: NetworkLatency(**asdict(timing), on=on) for name, timing in time_calls(calls, device).items()}


def latency_note(latencies: Mapping[str, NetworkLatency]) -> str:
    """How the latencies were measured, and in a second line, where they are unstable, why and what to do."""
    first, *_ = latencies.values()
    note = f"latency: {first.on}; median and 20 to 80 % quantiles of {first.rounds} rounds in turns"
    if all(each.stable for each in latencies.values()):
        return note
    spread, waiting = (max(getattr(each, name) for each in latencies.values()) for name in ("spread", "waiting"))
    fewer = ", or with OMP_NUM_THREADS=1" if " threads, " in first.on else ""
    return (
        f"{note}\nunstable: quantiles lie up to {spread:.0%} of the median apart, threads waited {waiting:.0%} of the "
        f"time for a core; measure again by `ofb profile RUN` when the machine is idle{fewer}"
    )


def latency_targets_note(
    latencies: Mapping[str, NetworkLatency], targets: Sequence[Mapping[str, float]], table_ms: float | None
) -> str:
    """What targets of latency asked for beside what was measured, as shares of the dense network: a line each.

    The table says milliseconds of another moment; shares hold while the machine is faster or slower.

    Args:
        latencies: of the dense network and of the network of each target, in their order.
        targets: of the search, each with what it limits.
        table_ms: of the dense network in the latency table, None where latency was no target.
    """
    (_, dense), *found = latencies.items()
    lines = []
    for (name, latency), limits in zip(found, targets, strict=True):
        if "latency_ms" in limits:
            limit = limits["latency_ms"]
            lines.append(
                f"{name}: asked for {limit / table_ms:.0%} of the dense network's latency ({limit:.3g} of "
                f"{table_ms:.3g} ms in the table), measured {latency.share_of(dense)}"
            )
    return in_lines("\n".join(lines))
