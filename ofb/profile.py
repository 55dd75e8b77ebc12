"""Where a network spends its operations, parameters and time, layer by layer; several networks side by side."""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ofb.engine.data import data_config
from ofb.supernet.cost import readable

LAYERS = ("patch_embed", "attn", "mlp", "downsample", "attn_pool", "head", "head_dist")
REST, TOTAL = "the rest", "total"
WARMUP_RUNS, TIMED_RUNS = 3, 20


@dataclass
class LayerCost:
    """What a layer costs.

    Attributes:
        macs: multiply-accumulates of one image.
        params: parameters.
        ms: milliseconds of a forward pass of the batch.
    """

    macs: int = 0
    params: int = 0
    ms: float = 0.0


def profile(model: nn.Module, batch_size: int = 1, device: torch.device | str = "cpu") -> dict[str, LayerCost]:
    """Costs of a model's layers, of the rest of it (norms, residuals, pooling), and in total.

    MACs are torch's count of what runs (`torch.utils.flop_counter`), times are medians of forward passes in eval mode
    with the layers timed one by one; on a GPU each waits for the one before, so that their sum exceeds the total.

    Args:
        model: a timm model; moved to the device.
        batch_size: images at once.
        device: where it runs.
    """
    model = model.to(device).eval()
    images = torch.randn(batch_size, *data_config(model)["input_size"], device=device)
    layers = _layers(model)
    macs, ms = _macs(model, images), _milliseconds(model, layers, images)
    costs = {
        name: LayerCost(macs.get(f"{type(model).__name__}.{name}", 0), _params(layer), ms[name])
        for name, layer in layers.items()
    }
    total = LayerCost(macs["Global"], _params(model), ms[TOTAL])
    spent = {each.name: sum(getattr(cost, each.name) for cost in costs.values()) for each in fields(LayerCost)}
    rest = LayerCost(total.macs - spent["macs"], total.params - spent["params"], max(0.0, total.ms - spent["ms"]))
    return costs | {REST: rest, TOTAL: total}


def profile_table(networks: Mapping[str, Mapping[str, LayerCost]]) -> str:
    """A table of the networks' layers; from the second network on with shares of the first one's cost."""
    first, *others = networks.values()
    names = list(dict.fromkeys(name for layers in (*others, first) for name in layers if name not in (REST, TOTAL)))
    header, rows = ["layer"], defaultdict(list)
    for index, (network, layers) in enumerate(networks.items()):
        header += [f"{network}: MACs", "params", "ms"]
        for name in (*names, REST, TOTAL):
            cost, before = layers.get(name), first.get(name) if index else None
            rows[name] += ["", "", ""] if cost is None else _cells(cost, before)
    return "\n".join(_aligned([header, *([name, *cells] for name, cells in rows.items())]))


def _cells(cost: LayerCost, before: LayerCost | None) -> list[str]:
    def cell(key: str, show: Callable[[float], str]) -> str:
        amount, whole = getattr(cost, key), 0 if before is None else getattr(before, key)
        return f"{show(amount)} ({amount / whole:.0%})" if whole else show(amount)

    return [cell("macs", readable), cell("params", readable), cell("ms", lambda ms: f"{ms:.3f}")]


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
def _milliseconds(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Median milliseconds of each layer and, without timing those, in total."""
    times, starts = defaultdict(list), {}

    def now() -> float:
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter()

    def started(name: str) -> Callable:
        return lambda *_: starts.__setitem__(name, now())

    def ended(name: str) -> Callable:
        return lambda *_: times[name].append(now() - starts[name])

    hooks = [layer.register_forward_pre_hook(started(name)) for name, layer in layers.items()]
    hooks += [layer.register_forward_hook(ended(name)) for name, layer in layers.items()]
    for _ in range(WARMUP_RUNS + TIMED_RUNS):
        model(images)
    for hook in hooks:
        hook.remove()
    for _ in range(WARMUP_RUNS + TIMED_RUNS):
        start = now()
        model(images)
        times[TOTAL].append(now() - start)
    return {name: 1e3 * statistics.median(each[WARMUP_RUNS:]) for name, each in times.items()}


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
