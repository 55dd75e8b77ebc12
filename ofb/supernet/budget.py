"""What can be reached within which budgets, and which sizes meet them at the greatest likelihood."""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, count, pairwise

import numpy as np

from ofb.supernet.cost import Cost
from ofb.supernet.search_space import TOKENS, Size
from ofb.supernet.targets import UNITS, Limits, describe_amount, describe_limits
from ofb.supernet.token_costs import TokenCosts

TOLERANCE = 0.02  # a found network costs at most the target, and no less than 98 % of at least one of its limits
BINS_PER_SUBMODULE = 400  # costs are rounded to bins, at most half a bin off for each submodule
STEPS = 1000  # most of a search for a likelier combination than the bins keep
ROUNDING = 1e-9  # of a sum of logarithms
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
    impossible, since a network at its limit of MACs has the parameters it has.

    A knapsack walks through the network, once for each size of the residual width it is on: with the width fixed, every
    submodule has a cost of its own. Its costs are in bins, and of the ways to a bin it keeps the likeliest. Those of
    them that meet the target by their exact costs give a first answer. A best-first search (A*) then looks for a
    likelier one among all combinations that rounding to bins may have moved across an edge of the band, with the
    knapsack's values as its bound. Where the number of patches is searched, there is a knapsack for each.

    Whatever is returned meets the target. With one budget it is the likeliest combination. Only if the search needs
    more than `STEPS` steps, there may be a likelier one whose cost lies
    within 1 / `BINS_PER_SUBMODULE` of the limit from an edge of the band, and none further inside.

    Several budgets are scalarized (Lagrange): the knapsack is filled with Σ w · cost / limit, for each of a few w in
    turn, until a search ends within its steps. Then it is the likeliest combination here, too. This is the rule for
    small networks and where one of the budgets binds. Where several bind and no search ends, a likelier combination may
    be missed, or the only one.

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
    """(Σ log p, sizes) of combinations that meet the target, for each number of patches ever likelier ones."""
    if any(isinstance(cost, TokenCosts) for cost in costs.values()):
        for size, probability in options[TOKENS].items():
            there = {kind: cost.at[size[1]] for kind, cost in costs.items()}
            for value, sizes in _candidates(there, options, limits):
                yield value + _log(probability), sizes | {TOKENS: size}
        return
    settled = {name: next(iter(sizes)) for name, sizes in options.items() if len(sizes) == 1}
    ceilings = np.array(list(limits.values()), dtype=float)[:, None]
    best = -math.inf
    for weights in _mixtures(len(limits)):
        fillings = _fillings([costs[kind] for kind in limits], options, list(limits.values()), weights)
        for ways in fillings:
            value = np.where(_in_band(ways.spent, ceilings), ways.value, -np.inf)
            position = int(value.argmax())
            if value[position] > best:
                best = float(value[position])
                yield best, settled | ways.sizes(position)
        better, is_over = _search(fillings, _bins_of_the_band(len(options), weights), best, ceilings)
        for best, sizes in better:
            yield best, settled | sizes
        if is_over:
            return


def _in_band(spent: np.ndarray, ceilings: np.ndarray) -> np.ndarray:
    """Which exact costs (budgets, N) keep all limits and use up one."""
    return (spent <= ceilings).all(0) & (spent >= (1 - TOLERANCE) * ceilings).any(0)


def _log(probability: float) -> float:
    return math.log(max(probability, LEAST_PROBABILITY))


def _mixtures(count: int) -> list[list[float]]:
    """Weights of a number of budgets, that add up to 1: each alone first, then ever more of them together."""
    if count == 1:
        return [[1.0]]
    picks = combinations_with_replacement(range(count), MIXTURE_PARTS)
    mixtures = [[pick.count(index) / MIXTURE_PARTS for index in range(count)] for pick in picks]
    return sorted(mixtures, key=lambda weights: -max(weights))


def _bins(submodules: int) -> int:
    """How many bins the limits have: a constant is rounded as well."""
    return BINS_PER_SUBMODULE * (submodules + 1)


def _bins_of_the_band(submodules: int, weights: Sequence[float]) -> slice:
    """The bins where combinations that meet the target may lie: half a bin off for each part, and one to spare."""
    bins, drift = _bins(submodules), submodules / 2 + 2
    return slice(max(0, math.floor(bins * (1 - TOLERANCE) * min(weights) - drift)), math.floor(bins + drift))


def _search(
    fillings: Sequence["_Ways"], band: slice, least: float, ceilings: np.ndarray
) -> tuple[list[tuple[float, dict[str, Size]]], bool]:
    """Look for the likeliest combination that meets the target, if it is likelier than `least`.

    A combination is put together from the last submodule to the first. The next step is always at the one with the
    greatest bound: Σ log p of what is chosen and of the best ways to the rest. So the first one complete is the best.

    Returns:
        (Σ log p, sizes) of it, or nothing; and whether the search ended within `STEPS`, so that there is none likelier.
    """
    order = count(0, -1)  # of equal bounds the newest first: it is the closest to its end
    queue = []

    def add(ways: _Ways, position: int, value: float, spent: np.ndarray, sizes: dict[str, Size]) -> None:
        bound = value + ways.value[position]
        if bound > least + ROUNDING and (spent <= ceilings[:, 0]).all():
            heapq.heappush(queue, (-bound, next(order), ways, position, value, spent, sizes))

    ends = np.stack([ways.value[band] for ways in fillings])
    likeliest = np.argsort(-ends, axis=None)[:STEPS]  # there is no step for more
    for filling, position in zip(*np.unravel_index(likeliest, ends.shape), strict=True):
        add(fillings[filling], band.start + int(position), 0.0, np.zeros(len(ceilings)), {})
    for _ in range(STEPS):
        if not queue:
            return [], True
        _, _, ways, position, value, spent, sizes = heapq.heappop(queue)
        if ways.name is None and _in_band((spent + ways.spent[:, position])[:, None], ceilings)[0]:
            return [(value, sizes)], True
        for before, size, probability, cost, exact in ways.alternatives:
            if cost <= position:
                add(before, position - cost, value + _log(probability), spent + exact, sizes | {ways.name: size})
    return [], False


def _fillings(
    costs: Sequence[Cost], options: Options, limits: Sequence[float], weights: Sequence[float]
) -> list["_Ways"]:
    """The best ways to choose all sizes, for each size of the last residual width and each cost in bins."""
    bins = _bins(len(options))
    length = bins + len(options) + 2  # rounding may take what just fits beyond the last bin

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
    return list(width_before.values())


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
        candidate = before.value[: len(value) - cost] + _log(probability)
        better = candidate > value[cost:]
        value[cost:][better] = candidate[better]
        taken[cost:][better] = index
        spent[:, cost:][:, better] = before.spent[:, : len(value) - cost][:, better] + exact[:, None]
    return _Ways(value, spent, name, taken, alternatives)


def _binned(
    amounts: Sequence[float], limits: Sequence[float], weights: Sequence[float], bins: int
) -> tuple[int, np.ndarray]:
    """Costs weighed and in bins, of which the limits have so many; and as they are."""
    shares = sum(weight * amount / limit for weight, amount, limit in zip(weights, amounts, limits, strict=True))
    return round(shares * bins), np.array(amounts, dtype=float)
