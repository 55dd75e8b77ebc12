"""Does the learned importance mean something? Beside it stands what the loss says when a unit is left out."""

import torch
from torch import Tensor

from ofb.supernet.search_space import TOKENS
from ofb.supernet.supernet import Supernet


@torch.no_grad()
def leave_one_out(
    supernet: Supernet, images: Tensor, targets: Tensor, units: int = 16
) -> dict[str, tuple[list[float], list[float]]]:
    """Importance S of a sample of each submodule's units, and how much the loss grows without each of them.

    The network is the found one, all masks folded in; a unit is left out by setting its row of the weights to zero.

    Args:
        supernet: a finished one; it stays as it is.
        images: (B, C, H, W).
        targets: class indices (B,).
        units: at most so many of each submodule, drawn from torch's generator.

    Returns:
        For each submodule that was searched and has at least three units, patches aside, importances and loss changes,
        both in the order drawn.
    """
    model = supernet.extract().eval()
    submodules = supernet.family.submodules(model)
    searched = {choice["submodule"] for choice in supernet.choices}

    def loss() -> float:
        return float(torch.nn.functional.cross_entropy(model(images).float(), targets).double())

    whole, found = loss(), {}
    for name, submodule in submodules.items():
        importance = supernet.bimasks[name].score.sigmoid()
        drawn = torch.randperm(submodule.candidates.units)[:units].tolist()
        if len(drawn) < 3 or name not in searched or name == TOKENS:
            continue
        changes = []
        for unit in drawn:
            with _without(model, submodule, unit):
                changes.append(loss() - whole)
        found[name] = (importance[drawn].tolist(), changes)
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's ρ; 0 where one of them is constant. Equal values share their mean rank."""
    ranks = torch.stack([_ranks(torch.tensor(values, dtype=torch.float64)) for values in (a, b)])
    centered = ranks - ranks.mean(1, keepdim=True)
    norms = centered.norm(dim=1)
    return float(centered[0] @ centered[1] / norms.prod()) if norms.all() else 0.0


def _ranks(values: Tensor) -> Tensor:
    below, equal = values[:, None] > values, values[:, None] == values
    return below.sum(1) + (equal.sum(1) - 1) / 2


class _without:
    """Within the block, a unit's coupled weights are zero."""

    def __init__(self, model: torch.nn.Module, submodule, unit: int) -> None:
        self.slices = [
            model.get_parameter(coupling.parameter).data.narrow(
                coupling.dim, unit + repeat * submodule.candidates.units, 1
            )
            for coupling in submodule.couplings
            if not coupling.heads
            for repeat in range(coupling.repeats)
        ]

    def __enter__(self) -> None:
        self.saved = [part.clone() for part in self.slices]
        for part in self.slices:
            part.zero_()

    def __exit__(self, *error: object) -> None:
        for part, saved in zip(self.slices, self.saved, strict=True):
            part.copy_(saved)
