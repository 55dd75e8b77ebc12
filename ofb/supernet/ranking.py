"""Which units matter before anything is learned of them: by the size of their weights, or by the loss."""

import math
from collections.abc import Callable, Iterable
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofb.supernet.families import family_of
from ofb.supernet.families.layers import Submodule

Figure = Callable[[nn.Parameter], Tensor]  # of each weight, in the parameter's shape


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """Σ w² of the weights of each unit, (units,), of every submodule."""
    return _sums(model, lambda parameter: parameter.detach().square())


def taylor(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    average: Callable[[nn.Module], None] = lambda model: None,
) -> dict[str, Tensor]:
    """Σ (w · ∂L/∂w)² over the weights of each unit and over batches, (units,), L the cross entropy.

    To first order the square of what the loss would change by without the weight (Molchanov et al., Importance
    Estimation for Neural Network Pruning, CVPR 2019, eq. 8). Weights and mode of the model stay as they are.

    Args:
        model: a timm model that `ofb.supports`.
        batches: images (B, C, H, W) and targets, class indices (B,) or probabilities (B, classes).
        average: where each of several processes sees a share of a batch, makes the model's gradients those of the
            whole batch.
    """
    training, totals = model.training, {}
    model.eval()
    for images, targets in batches:
        model.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        average(model)
        for name, importance in _sums(model, _squared_taylor).items():
            totals[name] = totals.get(name, 0.0) + importance
    model.zero_grad()
    model.train(training)
    return totals


def _squared_taylor(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else (parameter.detach() * parameter.grad).square()


def _sums(model: nn.Module, figure: Figure) -> dict[str, Tensor]:
    """A figure summed over each unit of every submodule."""
    submodules = family_of(model).submodules(model)
    return {name: _unit_sums(model, submodule, figure) for name, submodule in submodules.items()}


@torch.no_grad()
def _unit_sums(model: nn.Module, submodule: Submodule, figure: Figure) -> Tensor:
    """(units,); what belongs to a whole head says nothing of its channels and does not count."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for coupling in submodule.couplings:
        parameter = attrgetter(coupling.parameter)(model)
        if not coupling.heads and parameter.is_floating_point():
            figures = figure(parameter).movedim(coupling.dim, 0)
            total = total + figures.reshape(coupling.repeats, math.prod(submodule.candidates.full), -1).sum((0, 2))
    return total
