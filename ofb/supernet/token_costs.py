"""What a network costs whose number of patches is searched: for each number a cost model of its own."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ofb.supernet.cost import Cost, Sizes
from ofb.supernet.families import family_of
from ofb.supernet.pruning import keep_units
from ofb.supernet.search_space import TOKENS


@dataclass(frozen=True)
class TokenCosts:
    """Cost models by the number of patches, ascending."""

    at: Mapping[int, Cost]

    @classmethod
    def measure(cls, model: nn.Module, numbers: Sequence[int], cost_of: Callable[[nn.Module], Cost]) -> "TokenCosts":
        """The cost models of a dense model with each of some numbers of patches."""
        return cls({number: cost_of(_with_patches(model, number)) for number in numbers})

    def total(self, sizes: Sizes) -> float:
        """Cost of a network of these sizes."""
        return self.at[sizes[TOKENS][1]].total(sizes)

    def expectation(self, names: Sequence[str], **like) -> nn.Module:
        """Expected cost as a module, for submodules in the order of the names."""
        return ExpectedTokenCost([cost.expectation(names, **like) for cost in self.at.values()])


class ExpectedTokenCost(nn.Module):
    """Expected cost (0-d) over the number of patches, differentiable; exact, as submodules are independent.

    Args:
        expectations: expected cost at each number, ascending.
    """

    def __init__(self, expectations: Sequence[nn.Module]) -> None:
        super().__init__()
        self.expectations = nn.ModuleList(expectations)

    def forward(self, heads: Tensor, units: Tensor, probabilities: Tensor) -> Tensor:
        """Of expected heads (S,), expected units (S,), and probabilities (K,) of the numbers, largest ones left out."""
        costs = [expectation(heads, units) for expectation in self.expectations[: len(probabilities)]]
        return (probabilities * torch.stack(costs)).sum()


@torch.no_grad()
def _with_patches(model: nn.Module, number: int) -> nn.Module:
    """A copy of a model with the first of its patches."""
    model = copy.deepcopy(model)
    submodule = family_of(model).submodules(model)[TOKENS]
    index = torch.arange(number, device=next(model.parameters()).device)
    keep_units(model, submodule.couplings, index, submodule.candidates.full, optimizer=None)
    return model
