"""What a search asks of its expected costs, step by step on the way from the dense network to its targets."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ofb.supernet.cost import Cost
from ofb.supernet.losses import budget_loss
from ofb.supernet.schedules import ramp
from ofb.supernet.targets import Limits


class Goals(nn.Module):
    """The expected costs of the kinds that a target limits, their present goals, and the loss between the two.

    Args:
        costs: cost model of each kind.
        dense: costs of the dense network.
        targets: the limits to pass, each of the same kinds.
        names: the submodules, in the order of the expected sizes.
        device: where the loss is computed.
    """

    def __init__(
        self,
        costs: Mapping[str, Cost],
        dense: Mapping[str, float],
        targets: Sequence[Limits],
        names: Sequence[str],
        device: torch.device,
    ) -> None:
        super().__init__()
        like = {"device": device, "dtype": torch.float32}
        self.limits = [dict(dense)] + [dict(limits) for limits in targets]
        self.kinds = tuple(targets[0])
        self.expectations = nn.ModuleDict({kind: cost.expectation(names, **like) for kind, cost in costs.items()})
        self.register_buffer("dense", torch.tensor([dense[kind] for kind in self.kinds], **like), persistent=False)
        self.register_buffer("goals", self.dense.clone(), persistent=False)

    def forward(self, *sizes: Tensor) -> Tensor:
        """The loss (0-d) of expected sizes: heads (S,), units (S,), and what else the cost models take."""
        expected = self.expected(*sizes)
        expected = [expected[kind] for kind in self.kinds]
        expected = torch.stack(expected) if len(expected) > 1 else expected[0][None]
        return budget_loss(expected, self.goals, self.dense)

    def expected(self, *sizes: Tensor) -> dict[str, Tensor]:
        """Expected cost (0-d) of each kind, of those no target limits too."""
        sizes = [each.to(self.dense.dtype) for each in sizes]
        return {kind: module(*sizes) for kind, module in self.expectations.items()}

    def set(self, targets_passed: int, way: float) -> None:
        """The goals on the way (0 to 1) from the limits before to those of the next target."""
        before, limits = self.limits[targets_passed], self.limits[targets_passed + 1]
        for goal, kind in zip(self.goals, self.kinds, strict=True):
            goal.fill_(ramp(way, 1.0, before[kind], limits[kind]))
