"""Latency of a network as a function of its sizes: a table measured once on the device that matters, interpolated."""

import copy
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ofb.supernet.cost import Sizes, total
from ofb.supernet.families import family_of
from ofb.supernet.params import cut_to
from ofb.supernet.search_space import Size
from ofb.supernet.timing import STABLE, device_name, time_calls

POINTS = 3  # of each axis of the table
FACTORS = (0.5, 2.0)  # of what a part takes among others to what it takes by itself


@dataclass(frozen=True)
class Grid:
    """Milliseconds of a submodule at each of some numbers of heads, of channels and of the residual width.

    Attributes:
        heads, channels, widths: the points of each axis, ascending.
        ms: (heads, channels, widths), nested lists.
    """

    heads: Sequence[int]
    channels: Sequence[int]
    widths: Sequence[int]
    ms: Sequence[Sequence[Sequence[float]]]

    def at(self, size: Size, width: int) -> float:
        """Interpolated between the points, linear along each axis."""
        amount = np.asarray(self.ms)
        for points, value in zip((self.heads, self.channels, self.widths), (*size, width), strict=True):
            position = np.interp(value, points, range(len(points)))
            amount = np.tensordot(np.maximum(0, 1 - abs(np.arange(len(points)) - position)), amount, 1)
        return float(amount)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of each submodule; a cost model like `ofb.supernet.cost.Cost`.

    Attention and MLP are measured by themselves, where they take another time than among others: one factor, fitted to
    the whole networks, makes up for it. What is left of these, norms and residual additions among it, is shared out
    evenly to the residual widths.

    Attributes:
        device: where it was measured.
        batch_size: images at once.
        members: the submodules of each residual width, from the images to the classifier.
        grids: of each submodule.
        noise: of the networks that were timed for it (`ofb.supernet.timing.Timing.noise`), the median.
    """

    device: str
    batch_size: int
    members: Mapping[str, Sequence[str]]
    grids: Mapping[str, Grid]
    noise: float = 0.0

    constant = 0.0

    @property
    def stable(self) -> bool:
        """The machine was quiet enough for the table to be trusted."""
        return self.noise <= STABLE

    def total(self, sizes: Sizes) -> float:
        """Milliseconds of a network of these sizes."""
        return total(self, sizes)

    def stages(self) -> Mapping[str, Sequence[str]]:
        """The submodules of each residual width."""
        return self.members

    def part(self, name: str, size: Size, width: int) -> float:
        """What a submodule adds, given the size of its residual width."""
        return self.grids[name].at(size, width)

    def expectation(self, names: Sequence[str], **like) -> nn.Module:
        """Expected latency as a module, for submodules in the order of the names."""
        return ExpectedLatency(self, names, **like)

    def to_dict(self) -> dict:
        """As numbers, strings and lists, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping, model: nn.Module) -> "LatencyTable":
        """What `to_dict` made.

        Raises:
            ValueError: it is damaged, or was measured for other sizes than this model's.
        """
        try:
            grids = {name: Grid(**grid) for name, grid in values["grids"].items()}
            table = cls(**{**values, "grids": grids})
            points = {name: (list(grid.heads), list(grid.channels)) for name, grid in grids.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"latency_table: expected what ofb wrote, got a damaged one ({error!r})") from error
        expected = {name: tuple(map(list, axes)) for name, axes in _axes(model).items()}
        if points != expected:
            wrong = next(name for name in {**expected, **points} if expected.get(name) != points.get(name))
            raise ValueError(
                f"latency_table: expected one of this model, with (heads, channels) {expected.get(wrong)} for {wrong}, "
                f"got {points.get(wrong)}; leave it out to measure anew"
            )
        return table


class ExpectedLatency(nn.Module):
    """Latency (0-d) at expected heads (S,) and units (S,): the table's interpolation there, differentiable.

    Args:
        table: the latency table.
        names: the submodules in their order.
        like: device and dtype.
    """

    def __init__(self, table: LatencyTable, names: Sequence[str], **like) -> None:
        super().__init__()
        width_of = {name: width for width, members in table.members.items() for name in (width, *members)}
        self.register_buffer(
            "width_of", torch.tensor([names.index(width_of[name]) for name in names], device=like["device"]), False
        )
        grids = [table.grids[name] for name in names]
        ms = torch.zeros(len(names), POINTS, POINTS, POINTS, **like)
        for filled, grid in zip(ms, grids, strict=True):
            measured = torch.tensor(grid.ms)
            filled[tuple(slice(length) for length in measured.shape)] = measured
        self.register_buffer("ms", ms, persistent=False)
        for axis in ("heads", "channels", "widths"):
            starts = torch.zeros(len(names), POINTS - 1, **like)
            lengths = torch.full_like(starts, torch.inf)  # an interval that is none adds nothing to a position
            for index, grid in enumerate(grids):
                points = torch.tensor(getattr(grid, axis), **like)
                starts[index, : len(points) - 1], lengths[index, : len(points) - 1] = points[:-1], points.diff()
            self.register_buffer(f"{axis}_starts", starts, persistent=False)
            self.register_buffer(f"{axis}_lengths", lengths, persistent=False)
        self.register_buffer("points", torch.arange(POINTS, **like), persistent=False)

    def forward(self, heads: Tensor, units: Tensor) -> Tensor:
        weights = (
            self._weights("heads", heads)[:, :, None, None]
            * self._weights("channels", units / heads)[:, None, :, None]
            * self._weights("widths", units.index_select(0, self.width_of))[:, None, None, :]
        )
        return (weights * self.ms).sum()

    def _weights(self, axis: str, values: Tensor) -> Tensor:
        """(S, POINTS): the share of each point of an axis in the interpolation at the values (S,)."""
        starts, lengths = getattr(self, f"{axis}_starts"), getattr(self, f"{axis}_lengths")
        position = ((values[:, None] - starts) / lengths).clamp(0, 1).sum(1)
        return (1 - (self.points - position[:, None]).abs()).clamp(min=0)


def measure_latency(model: nn.Module, batch_size: int = 1, device: torch.device | str | None = None) -> LatencyTable:
    """The latency table of a dense model.

    Args:
        model: a timm model that `ofb.supports`; it stays as it is.
        batch_size: images at once.
        device: where to measure, with torch's present number of threads; the model's if None.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    device = next(model.parameters()).device if device is None else torch.device(device)
    axes, members = _axes(model), family_of(model).macs(model).stages()
    dense = copy.deepcopy(model).to(device).eval()
    images = torch.randn(batch_size, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, device=device)
    measured = {}
    for h, c, w in itertools.product(range(POINTS), repeat=3):
        places = {name: (0, w) if name in members else (h, c) for name in axes}
        sizes = {name: (_point(axes[name][0], at[0]), _point(axes[name][1], at[1])) for name, at in places.items()}
        measured[h, c, w] = _measure(cut_to(model, sizes).to(device).eval(), dense, images)
    dense_ms = statistics.median(each.dense_ms for each in measured.values())
    factor, rest = _fitted(measured)
    grids = {}
    for width, names in members.items():
        heads, widths = axes[width]
        grids[width] = Grid(heads, widths, (0,), [[[dense_ms * rest[w] / len(members)] for w in range(len(widths))]])
        for name in names:
            heads, channels = axes[name]
            cells = np.zeros((len(heads), len(channels), len(widths)))
            for place in np.ndindex(cells.shape):
                cells[place] = dense_ms * factor * measured[place].parts.get(name, 0.0)
            grids[name] = Grid(heads, channels, widths, cells.tolist())
    noise = statistics.median(each.noise for each in measured.values())
    return LatencyTable(device_name(device), batch_size, members, grids, noise)


def _axes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The points of heads and of channels at which each submodule is measured."""
    return {
        name: (_spread(submodule.candidates.heads), _spread(submodule.candidates.channels))
        for name, submodule in family_of(model).submodules(model).items()
    }


def _spread(sizes: Sequence[int]) -> tuple[int, ...]:
    """The smallest, a middle and the largest size."""
    return tuple(sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}))


def _point(axis: Sequence[int], at: int) -> int:
    return axis[min(at, len(axis) - 1)]


@dataclass(frozen=True)
class _Measured:
    """One network, in terms of the dense network's time at that moment: what else the machine does cancels out.

    Attributes:
        dense_ms: the dense network's milliseconds.
        network: the whole network.
        parts: each block's attention and MLP, by themselves.
        noise: of the two networks' timings, the greater.
    """

    dense_ms: float
    network: float
    parts: Mapping[str, float]
    noise: float = 0.0


@torch.inference_mode()
def _measure(network: nn.Module, dense: nn.Module, images: Tensor) -> _Measured:
    """Time a network and its parts; of those that are alike, one."""
    inputs, hooks = {}, []
    for i, block in enumerate(family_of(network).blocks(network)):
        for kind in ("attn", "mlp"):
            hook = _remember(inputs, f"{kind}{i}")
            hooks.append(getattr(block, kind).register_forward_pre_hook(hook, with_kwargs=True))
    network(images)
    for hook in hooks:
        hook.remove()
    alike = {name: _shapes(*called) for name, called in inputs.items()}
    calls = {"dense": lambda: dense(images), "network": lambda: network(images)}
    calls |= {alike[name]: partial(module, *args, **kwargs) for name, (module, args, kwargs) in inputs.items()}
    networks = ("dense", "network")
    times = time_calls(calls, images.device, judged=networks, trial_seconds=0)
    dense_ms = times["dense"].ms
    parts = {name: times[key].ms / dense_ms for name, key in alike.items()}
    noise = max(times[name].noise for name in networks)
    return _Measured(dense_ms, times["network"].ms / dense_ms, parts, noise)


def _fitted(measured: Mapping[tuple[int, int, int], _Measured]) -> tuple[float, np.ndarray]:
    """The factor and the rest of each width, of least relative error: network ≈ factor · Σ parts + rest[width].

    The factor stays within `FACTORS`, beyond which noise speaks, and no rest is negative: a cost is none.
    """
    columns = np.zeros((len(measured), 1 + POINTS))
    for row, ((_, _, w), each) in zip(columns, measured.items(), strict=True):
        row[0], row[1 + w] = sum(each.parts.values()) / each.network, 1 / each.network
    parts, rests, ones = columns[:, 0], columns[:, 1:], np.ones(len(columns))
    factor = float(np.clip(np.linalg.lstsq(columns, ones, rcond=None)[0][0], *FACTORS))
    rest = np.linalg.lstsq(rests, ones - factor * parts, rcond=None)[0]
    return factor, np.maximum(rest, 0.0)


def _remember(inputs: dict, name: str) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs[name] = (module, args, kwargs)

    return hook


def _shapes(module: nn.Module, args: tuple, kwargs: dict) -> str:
    """Modules and arguments that look the same take the same time."""
    parameters = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else None for each in (*args, *kwargs.values())]
    return f"{parameters} {getattr(module, 'num_heads', None)} {shapes}"
