"""Physical removal of units: parameters and optimizer moments shrink alike, and parameters stay the same objects."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ofb.supernet.search_space import Size


@dataclass(frozen=True)
class Coupling:
    """A parameter dimension that belongs to a submodule's units.

    Attributes:
        parameter: its name in the supernet; that of a buffer of integers for what tells units apart.
        dim: the dimension that holds the units.
        repeats: how many times the units stand there one after the other (3 for q, k and v).
        heads: whether it holds heads, each standing for all its channels.
    """

    parameter: str
    dim: int
    repeats: int = 1
    heads: bool = False

    def index(self, units: Tensor, size: Size) -> Tensor:
        """Where some units (ascending) of a submodule of heads × channels stand in the dimension."""
        heads, channels = size
        if self.heads:
            return (units // channels).unique()
        return torch.cat([units + repeat * heads * channels for repeat in range(self.repeats)])


def keep_units(
    module: nn.Module, couplings: Iterable[Coupling], index: Tensor, size: Size, optimizer: Optimizer | None
) -> None:
    """Keep the units at `index` (ascending) of a submodule of heads × channels units in every coupled parameter.

    Raises:
        ValueError: the optimizer's moments cannot follow; nothing has been changed then.
    """
    selections = []
    for coupling in couplings:
        parameter = attrgetter(coupling.parameter)(module)
        selections.append((parameter, coupling.dim, coupling.index(index, size), _moments(parameter, optimizer)))
    for parameter, dim, repeated, moments in selections:
        _select(parameter, dim, repeated, moments)


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape; its gradient is dropped.

    While the last step's graph is alive (the loop still holds its loss), autograd keeps an accumulator that expects
    the old shape. It lets go of it when the data changes dtype, so the data goes through another dtype.
    """
    parameter.grad = None
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data


def _select(parameter: nn.Parameter, dim: int, index: Tensor, moments: dict) -> None:
    """Keep the entries at `index` along `dim` of a parameter, its gradient and its moments."""
    grad = parameter.grad
    replace_data(parameter, parameter.data.index_select(dim, index))
    if grad is not None:
        parameter.grad = grad.index_select(dim, index)
    for key, value in moments.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            moments[key] = value.index_select(dim, index)


def reset_moments(parameter: nn.Parameter, optimizer: Optimizer | None) -> None:
    """The optimizer starts this parameter afresh."""
    if optimizer is not None:
        optimizer.state.pop(parameter, None)


def _moments(parameter: nn.Parameter, optimizer: Optimizer | None) -> dict:
    """The optimizer's state of a parameter; its tensors, step counters aside, must have the parameter's shape."""
    state = optimizer.state[parameter] if optimizer is not None and parameter in optimizer.state else {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer: expected {type(optimizer).__name__} to keep tensors of the parameter's shape "
                f"{tuple(parameter.shape)}, got {key} of shape {tuple(value.shape)}; "
                "use an optimizer with per-parameter moments, such as torch.optim.AdamW"
            )
    return state
