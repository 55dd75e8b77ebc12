"""What can be reached within which budgets, and which sizes meet them at the greatest likelihood."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise

import numpy as np

from ofb.supernet.cost import Cost
from ofb.supernet.search_space import TOKENS, Size
from ofb.supernet.targets import UNITS, Limits, describe_amount, describe_limits
from ofb.supernet.token_costs import TokenCosts

TOLERANCE = 0.02  # a found network costs at most the target, and no less than 98 % of at least one of its limits
BINS_PER_SUBMODULE = 400  # costs are rounded up to bins, at most one bin too much for each submodule
LEAST_PROBABILITY = 1e-300  # has a logarithm
MIXTURE_PARTS = 4  # several budgets are weighed against each other in quarters

Options = Mapping[str, Mapping[Size, float]]  # for each submodule its sizes (heads, channels) and their probabilities
Costs = Mapping[str, Cost | TokenCosts]  # of each kind


def reachable(cost: Cost | TokenCosts, options: Options) -> tuple[float, float]:
    """Least and greatest cost that the sizes allow."""
    if isinstance(cost, TokenCosts):
        reach = [reachable(cost.at[number], options) for _, number in options[TOKENS]]
        return min(least for least, _ in reach), max(most for _, most in reach)
    return _extreme(cost, options, min), _extreme(cost, options, max)


def choose_sizes(costs: Costs, options: Options, limits: Limits) -> dict[str, Size] | None:
    """The combination of sizes of greatest Σ log p that meets a target.

    It meets it if no cost exceeds its limit and at least one lies within the tolerance below; more would ask for the
    impossible, since a network at its limit of MACs has the parameters it has. A knapsack that walks through the
    network, once for each size of the residual width it is on: with the width fixed, every submodule has a cost of its
    own. A later width is entered from the best size of the one before.

    Several budgets are scalarized (Lagrange): the knapsack is filled with Σ w · cost / limit, for each of a few w, and
    of what fits best at each filling, the exact costs decide. That is exact where one budget alone binds, and may miss
    the likeliest combination, though none of its limits, where several bind at once. Where the number of patches is
    searched, there is a knapsack for each.

    Returns:
        (heads, channels) for each submodule, or None where no combination meets the target.
    """
    candidates = list(_candidates(costs, options, limits))
    return max(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def meets(costs: Costs, options: Options, targets: Iterable[Limits]) -> bool:
    """Whether every target has a combination of sizes to meet it."""
    return all(next(_candidates(costs, options, limits), None) is not None for limits in targets)


def check_targets(costs: Costs, options: Options, targets: Sequence[Limits]) -> None:
    """Raise ValueError, saying what to change, where the sizes do not allow the targets, largest first."""
    for limits in targets:
        for kind, limit in limits.items():
            _check_reach(kind, costs[kind], options, limit)
        if not meets(costs, options, [limits]):
            change = "choose a slightly different target" if len(limits) == 1 else "relax or leave out one of them"
            together = "" if len(limits) == 1 else "all of "
            raise ValueError(
                f"target: no combination of candidate sizes costs within {TOLERANCE:.0%} below "
                f"{together}{describe_limits(limits)}; {change}"
            )
    for larger, smaller in pairwise(targets):
        if larger.keys() != smaller.keys():
            expected, got = (", ".join(each) for each in (larger, smaller))
            raise ValueError(f"later_targets: expected the target's kinds of cost {expected} in each, got {got}")
        for kind, limit in smaller.items():
            if limit >= larger[kind] * (1 - TOLERANCE):
                raise ValueError(
                    f"later_targets: expected each at least {TOLERANCE:.0%} below the one before, got "
                    f"{describe_amount(kind, limit)} after {describe_amount(kind, larger[kind])}; give the largest "
                    "first"
                )


def _check_reach(kind: str, cost: Cost, options: Options, limit: float) -> None:
    least, most = reachable(cost, options)
    if not least <= limit <= most:
        amounts = (describe_amount(kind, amount).removesuffix(f" {UNITS[kind]}") for amount in (least, most, limit))
        low, high, got = amounts
        dense = cost.total({name: max(sizes, key=lambda size: size[0] * size[1]) for name, sizes in options.items()})
        raise ValueError(
            f"target: expected between {low} and {high} {UNITS[kind]} ({least / dense:.1%} to {most / dense:.0%} of "
            f"dense), got {got} ({limit / dense:.1%}); choose one within"
        )


def _extreme(cost: Cost, options: Options, pick: Callable) -> float:
    """The cost of the cheapest (`min`) or dearest (`max`) combination."""
    before = {(1, 0): cost.constant}
    for width, members in cost.stages().items():
        before = {
            size: pick(spent + cost.part(width, size, last[1]) for last, spent in before.items())
            + sum(pick(cost.part(name, each, size[1]) for each in options[name]) for name in members)
            for size in options[width]
        }
    return pick(before.values())


def _candidates(costs: Costs, options: Options, limits: Limits) -> Iterator[tuple[float, dict[str, Size]]]:
    """(Σ log p, sizes) of the best combination that meets the target, for each number of patches and each mixture of
    budgets that has one."""
    if any(isinstance(cost, TokenCosts) for cost in costs.values()):
        for size, probability in options[TOKENS].items():
            there = {kind: cost.at[size[1]] for kind, cost in costs.items()}
            for value, sizes in _candidates(there, options, limits):
                yield value + math.log(max(probability, LEAST_PROBABILITY)), sizes | {TOKENS: size}
        return
    settled = {name: next(iter(sizes)) for name, sizes in options.items() if len(sizes) == 1}
    ceilings = np.array(list(limits.values()), dtype=float)[:, None]
    for weights in _mixtures(len(limits)):
        best = None
        for ways in _fillings([costs[kind] for kind in limits], options, list(limits.values()), weights):
            meets_it = (ways.spent <= ceilings).all(0) & (ways.spent >= (1 - TOLERANCE) * ceilings).any(0)
            value = np.where(meets_it, ways.value, -np.inf)
            position = int(value.argmax())
            if np.isfinite(value[position]) and (best is None or value[position] > best[0]):
                best = value[position], ways, position
        if best is not None:
            value, ways, position = best
            yield float(value), settled | ways.sizes(position)


def _mixtures(count: int) -> list[list[float]]:
    """Weights of a number of budgets, that add up to 1: each alone first, then ever more of them together."""
    if count == 1:
        return [[1.0]]
    picks = combinations_with_replacement(range(count), MIXTURE_PARTS)
    mixtures = [[pick.count(index) / MIXTURE_PARTS for index in range(count)] for pick in picks]
    return sorted(mixtures, key=lambda weights: -max(weights))


def _fillings(
    costs: Sequence[Cost], options: Options, limits: Sequence[float], weights: Sequence[float]
) -> Iterable["_Ways"]:
    """The best ways to choose all sizes, for each size of the last residual width and each cost in bins."""
    bins = BINS_PER_SUBMODULE * (len(options) + 1)
    length = bins + len(options) + 2  # rounding up may take what just fits beyond the last bin

    def parts(name: str, size: Size, width: int) -> tuple[int, np.ndarray]:
        return _binned([cost.part(name, size, width) for cost in costs], limits, weights, bins)

    cost, constant = _binned([cost.constant for cost in costs], limits, weights, bins)
    start = _Ways(np.where(np.arange(length) == cost, 0.0, -np.inf), np.repeat(constant[:, None], length, axis=1))
    width_before = {(1, 0): start}
    for width, members in costs[0].stages().items():
        ways_to = {}
        for size, probability in options[width].items():
            ways = _choose(
                width,
                [
                    (before, size, probability, *parts(width, size, size_before[1]))
                    for size_before, before in width_before.items()
                ],
            )
            for name in members:
                ways = _choose(
                    name, [(ways, each, p, *parts(name, each, size[1])) for each, p in options[name].items()]
                )
            ways_to[size] = ways
        width_before = ways_to
    return width_before.values()


@dataclass
class _Ways:
    """The best ways to choose the sizes of some submodules, one for each cost in bins.

    Attributes:
        value: greatest Σ log p, −inf where no choice costs that.
        spent: (budgets, bins), the exact costs of that choice.
        name: the submodule chosen last, None at the start.
        taken: which of the alternatives for it.
        alternatives: (ways before, size, probability, cost in bins, exact costs).
    """

    value: np.ndarray
    spent: np.ndarray
    name: str | None = None
    taken: np.ndarray | None = None
    alternatives: Sequence[tuple["_Ways", Size, float, int, np.ndarray]] = ()

    def sizes(self, position: int) -> dict[str, Size]:
        """The choices behind the value at a cost."""
        sizes, ways = {}, self
        while ways.name is not None:
            before, sizes[ways.name], _, cost, _ = ways.alternatives[ways.taken[position]]
            ways, position = before, position - cost
        return sizes


def _choose(name: str, alternatives: Sequence[tuple[_Ways, Size, float, int, np.ndarray]]) -> _Ways:
    """The ways that end with one of the alternatives for a submodule."""
    value = np.full_like(alternatives[0][0].value, -np.inf)
    spent = np.full_like(alternatives[0][0].spent, np.inf)
    taken = np.zeros(len(value), dtype=np.int16)
    for index, (before, _, probability, cost, exact) in enumerate(alternatives):
        if cost >= len(value):
            continue
        candidate = before.value[: len(value) - cost] + np.log(max(probability, LEAST_PROBABILITY))
        better = candidate > value[cost:]
        value[cost:][better] = candidate[better]
        taken[cost:][better] = index
        spent[:, cost:][:, better] = before.spent[:, : len(value) - cost][:, better] + exact[:, None]
    return _Ways(value, spent, name, taken, alternatives)


def _binned(
    amounts: Sequence[float], limits: Sequence[float], weights: Sequence[float], bins: int
) -> tuple[int, np.ndarray]:
    """Costs weighed and in bins, of which the limits have so many, rounded up; and as they are."""
    shares = sum(weight * amount / limit for weight, amount, limit in zip(weights, amounts, limits, strict=True))
    return math.ceil(shares * bins), np.array(amounts, dtype=float)
