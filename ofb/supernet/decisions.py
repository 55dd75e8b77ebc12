"""Which candidates die at a pruning event: the unlikely ones, and towards the end of the search all but one."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ofb.supernet.bimask import BiMask
from ofb.supernet.budget import Costs, Options, choose_sizes, meets
from ofb.supernet.search_space import Size
from ofb.supernet.targets import Limits

BiMasks = Mapping[str, BiMask]
Alive = Mapping[str, Tensor]  # (A, B) bool of each submodule


def check_finite(bimasks: BiMasks) -> None:
    """Raise ValueError where scores, or logits of living candidates, of an open submodule decide nothing.

    Minus infinity does: it is the least important unit, or a candidate of probability 0.
    """
    for name, bimask in bimasks.items():
        if bimask.final:
            continue
        is_sound = {
            ("score", "score_lr"): (bimask.score < torch.inf).all(),  # NaN is not
            ("alpha", "architecture_lr"): bimask.probabilities().isfinite().all(),
        }
        for (tensor, rate), sound in is_sound.items():
            if not sound:
                raise ValueError(
                    f"{tensor}: expected finite numbers in submodule {name}, got NaN or infinity; go back to a state "
                    f"before it, and lower {rate} or clip the gradient"
                )


def survivors(
    bimasks: BiMasks, costs: Costs, targets: Sequence[Limits], threshold: float, events_left: int | None
) -> dict[str, Tensor]:
    """The candidates that live on after a pruning event.

    A submodule keeps its candidates where dropping them would leave some target without a combination to meet it.

    Args:
        bimasks: the submodules.
        costs: of their sizes, each kind.
        targets: limits that have to stay within reach; the first is the one the search is on its way to.
        threshold: a candidate dies at p ≤ threshold / n, with n candidates alive.
        events_left: for a search that settles, how many pruning events are left, this one counted: the last one leaves
            one candidate, those before it step by step fewer; None before.
    """
    likely = {name: bimask.survivors(threshold) for name, bimask in bimasks.items()}
    if not meets(costs, options(bimasks, likely), targets):
        kept = {name: bimask.alive for name, bimask in bimasks.items()}
        for name in likely:
            if meets(costs, options(bimasks, kept | {name: likely[name]}), targets):
                kept[name] = likely[name]
        likely = kept
    if events_left is None:
        return likely
    chosen = choose(bimasks, costs, targets[0], likely)
    return {
        name: bimasks[name].likeliest(grid, math.ceil(int(grid.sum()) ** (1 - 1 / events_left)), chosen[name])
        for name, grid in likely.items()
    }


def choose(bimasks: BiMasks, costs: Costs, limits: Limits, alive: Alive | None = None) -> dict[str, Size] | None:
    """The combination of greatest Σ log p, over what is alive, that meets the target; None where none does."""
    return choose_sizes(costs, options(bimasks, alive), limits)


def options(bimasks: BiMasks, alive: Alive | None = None) -> Options:
    """Probability of each size that is alive, or that is in `alive`, over these alone."""
    return {name: bimask.sizes(bimask.alive if alive is None else alive[name]) for name, bimask in bimasks.items()}
