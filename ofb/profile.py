"""Where a network spends its operations, parameters and time, layer by layer; several networks side by side."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ofb.engine.data import data_config
from ofb.network_latency import NetworkLatency, measure_network_latency
from ofb.supernet.cost import readable
from ofb.supernet.timing import time_calls

LAYERS = ("patch_embed", "attn", "mlp", "downsample", "attn_pool", "head", "head_dist")
REST, TOTAL = "the rest", "total"


@dataclass
class LayerCost:
    """What a layer costs.

    Attributes:
        macs: multiply-accumulates of one image.
        params: parameters.
        ms: milliseconds of a forward pass of the batch.
        latency: of the total: how sure that is.
    """

    macs: int = 0
    params: int = 0
    ms: float = 0.0
    latency: NetworkLatency | None = None


def profile(model: nn.Module, batch_size: int = 1, device: torch.device | str = "cpu") -> dict[str, LayerCost]:
    """Costs of one model's layers: `profile_networks` says of what and how."""
    return profile_networks({"": model}, batch_size, device)[""]


def profile_networks(
    networks: Mapping[str, nn.Module], batch_size: int = 1, device: torch.device | str = "cpu"
) -> dict[str, dict[str, LayerCost]]:
    """Costs of each network's layers, of the rest of it (norms, residuals, pooling), and in total.

    MACs are torch's count of what runs (`torch.utils.flop_counter`). Times are medians in eval mode: the whole networks
    in turns, then all their layers in turns, each by itself. On a GPU a layer by itself waits for the host, so that the
    sum of the layers exceeds the total.

    Args:
        networks: timm models by name; moved to the device.
        batch_size: images at once.
        device: where they run.
    """
    device = torch.device(device)
    latencies, layers, calls, images = measure_network_latency(networks, batch_size, device), {}, {}, {}
    for network, model in networks.items():
        layers[network] = _layers(model.to(device).eval())
        images[network] = torch.randn(batch_size, *data_config(model)["input_size"], device=device)
        called = _calls(model, layers[network], images[network])
        calls |= {(network, layer): call for layer, call in called.items()}
    timings = time_calls(calls, device, judged=())
    return {
        network: _costs(
            model,
            {name: (layer, timings[network, name].ms) for name, layer in layers[network].items()},
            _macs(model, images[network]),
            latencies[network],
        )
        for network, model in networks.items()
    }


def profile_table(networks: Mapping[str, Mapping[str, LayerCost]]) -> str:
    """A table of the networks' layers; from the second network on with shares of the first one's cost.

    Milliseconds of a network that is unstable, or stands beside an unstable one, have no shares, and the total says so.
    """
    first, *others = networks.values()
    names = list(dict.fromkeys(name for layers in (*others, first) for name in layers if name not in (REST, TOTAL)))
    header, rows = ["layer"], defaultdict(list)
    for index, (network, layers) in enumerate(networks.items()):
        header += [f"{network}: MACs", "params", "ms"]
        stable = layers[TOTAL].latency.stable and first[TOTAL].latency.stable
        for name in (*names, REST, TOTAL):
            cost, before = layers.get(name), first.get(name) if index else None
            rows[name] += ["", "", ""] if cost is None else _cells(cost, before, stable)
    return "\n".join(_aligned([header, *([name, *cells] for name, cells in rows.items())]))


def _cells(cost: LayerCost, before: LayerCost | None, stable: bool) -> list[str]:
    def cell(key: str, show: Callable[[float], str]) -> str:
        amount, whole = getattr(cost, key), 0 if before is None else getattr(before, key)
        return f"{show(amount)} ({amount / whole:.0%})" if whole else show(amount)

    ms = cell("ms", "{:.3f}".format) if stable else f"{cost.ms:.3f}{' (unstable)' if cost.latency else ''}"
    return [cell("macs", readable), cell("params", readable), ms]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table, its first column to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are shown, by name; none lies inside another, as the MLP of an attention pooling would."""
    named = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in LAYERS}
    return {
        name: module
        for name, module in named.items()
        if not isinstance(module, nn.Identity) and not any(name.startswith(f"{outer}.") for outer in named)
    }


def _macs(model: nn.Module, images: Tensor) -> dict[str, int]:
    """MACs of one image by module, the class's name in front; "Global" for all."""
    # On the meta device: the counter does not know what attention runs as on a CPU.
    model, image = copy.deepcopy(model).to("meta").requires_grad_(False), images[:1].to("meta")
    with FlopCounterMode(display=False) as counter:
        model(image)
    return {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()} | {
        "Global": counter.get_total_flops() // 2
    }


@torch.inference_mode()
def _calls(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, Callable[[], object]]:
    """Each layer on what it gets in a forward pass of the images."""
    calls, hooks = {}, []
    for name, layer in layers.items():

        def remember(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            calls[name] = partial(module, *args, **kwargs)

        hooks.append(layer.register_forward_pre_hook(remember, with_kwargs=True))
    model(images)
    for hook in hooks:
        hook.remove()
    return calls


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _costs(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, float]], macs: Mapping[str, int], latency: NetworkLatency
) -> dict[str, LayerCost]:
    """Costs of a model of these layers and their milliseconds."""
    costs = {
        name: LayerCost(macs.get(f"{type(model).__name__}.{name}", 0), _params(layer), ms)
        for name, (layer, ms) in layers.items()
    }
    total = LayerCost(macs["Global"], _params(model), latency.ms, latency)
    spent = {figure: sum(getattr(cost, figure) for cost in costs.values()) for figure in ("macs", "params", "ms")}
    rest = LayerCost(total.macs - spent["macs"], total.params - spent["params"], max(0.0, total.ms - spent["ms"]))
    return costs | {REST: rest, TOTAL: total}
