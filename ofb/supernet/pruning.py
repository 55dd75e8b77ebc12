"""Physical removal of units: parameters and optimizer moments shrink alike, and parameters stay the same objects."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Number
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

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
    couplings = list(couplings)
    parameters = [attrgetter(coupling.parameter)(module) for coupling in couplings]
    check_moments(parameters, optimizer)
    for parameter, coupling in zip(parameters, couplings, strict=True):
        _select(parameter, coupling.dim, coupling.index(index, size), _moments(optimizer).get(parameter, {}))


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
    keeper = _keeper(optimizer)
    if keeper is not None and keeper.state.pop(parameter, None) and isinstance(keeper, Adagrad):
        # Others make what they keep when they first need it, Adagrad when it is made itself.
        group = next(each for each in keeper.param_groups if any(p is parameter for p in each["params"]))
        start = keeper.defaults["initial_accumulator_value"]
        keeper.state |= type(keeper)([group | {"params": [parameter]}], initial_accumulator_value=start).state


def check_moments(parameters: Iterable[Tensor], optimizer: Optimizer | None) -> None:
    """Make sure that whatever an optimizer keeps of these parameters can follow them to another shape.

    Raises:
        ValueError: it keeps more than numbers and tensors of the parameter's own shape.
    """
    if getattr(optimizer, "is_second_order", False):
        raise _cannot_follow(optimizer, "a parameter's Hessian beside it")
    moments = _moments(optimizer)
    for parameter in parameters:
        for key, value in moments.get(parameter, {}).items():
            if not _follows(value, parameter):
                kept = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise _cannot_follow(optimizer, f"{key}, {kept}, of a parameter of shape {tuple(parameter.shape)}")


def _cannot_follow(optimizer: Optimizer, kept: str) -> ValueError:
    return ValueError(
        "optimizer: expected one that keeps numbers, and tensors of a parameter's shape, which are pruned with it, got "
        f"{type(optimizer).__name__}, which keeps {kept}; take another, such as torch.optim.AdamW"
    )


def _keeper(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer that keeps the moments: timm's Lookahead leaves them to the one that it wraps."""
    return getattr(optimizer, "_base_optimizer", optimizer)


def _moments(optimizer: Optimizer | None) -> Mapping:
    """What an optimizer keeps, of each parameter."""
    return {} if optimizer is None else _keeper(optimizer).state


def _follows(value: object, parameter: Tensor) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 or value.shape == parameter.shape
    return value is None or isinstance(value, Number)
