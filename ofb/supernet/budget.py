"""What a target means, what can be reached, and which sizes meet it at the greatest likelihood."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from ofb.supernet.macs import Macs, readable

TOLERANCE = 0.02  # a found network costs between 98 % of the target and the target
BINS_PER_SUBMODULE = 400  # costs are rounded up to bins, at most one bin too much for each submodule

Size = tuple[int, int]
Options = Mapping[str, Mapping[Size, float]]  # for each submodule its sizes (heads, channels) and their probabilities


def parse_target(target: str | float | Mapping[str, str | float], dense: int) -> int:
    """Target in MACs: "50%" of the dense network, "1.1G" or "300M", a number of MACs, or {"macs": any of these}.

    Raises:
        ValueError: the target cannot be read, or is no cost this package can search for.
    """
    if isinstance(target, Mapping):
        if list(target) != ["macs"]:
            raise ValueError(f'target: expected {{"macs": …}}, got {dict(target)!r}')
        return parse_target(target["macs"], dense)
    units = {"%": dense / 100, "G": 1e9, "M": 1e6, "K": 1e3}
    try:
        text = str(target).strip()
        value = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f'target: expected MACs such as "50%", "1.1G", "300M" or a positive number, got {target!r}')
    return round(value)


def reachable(macs: Macs, options: Options) -> tuple[int, int]:
    """Fewest and most MACs that the sizes allow."""
    smallest = {name: min(heads * channels for heads, channels in sizes) for name, sizes in options.items()}
    largest = {name: max(heads * channels for heads, channels in sizes) for name, sizes in options.items()}
    return macs.total(smallest), macs.total(largest)


def choose_sizes(macs: Macs, options: Options, target: int) -> dict[str, Size] | None:
    """The combination of sizes of greatest Σ log p whose exact cost lies within the tolerance below the target.

    A knapsack for each residual width: the cost is linear in the other submodules' units once the width is fixed.

    Returns:
        (heads, channels) for each submodule, or None where no combination meets the target.
    """
    names = [name for name in options if name != "embed"]
    best_value, best = -np.inf, None
    for width, probability in options["embed"].items():
        room = target - width[1] * macs.fixed
        costs = {name: _unit_cost(macs, name, width[1]) for name in names}
        solution = _knapsack([options[name] for name in names], [costs[name] for name in names], room, target)
        if solution is not None and solution[0] + np.log(probability) > best_value:
            best_value = solution[0] + np.log(probability)
            best = {"embed": width, **dict(zip(names, solution[1], strict=True))}
    return best


def meets(macs: Macs, options: Options, targets: Iterable[int]) -> bool:
    """Whether every target has a combination of sizes to meet it."""
    return all(choose_sizes(macs, options, target) is not None for target in targets)


def check_targets(macs: Macs, options: Options, targets: Sequence[int]) -> None:
    """Raise ValueError, saying what to change, where the sizes do not allow the targets, largest first."""
    least, most = reachable(macs, options)
    for target in targets:
        if not least <= target <= most:
            raise ValueError(
                f"target: expected between {readable(least)} and {readable(most)} MACs "
                f"({least / most:.1%} to 100% of dense), got {readable(target)} ({target / most:.1%}); "
                "choose one within"
            )
        if not meets(macs, options, [target]):
            raise ValueError(
                f"target: no combination of candidate sizes costs within {TOLERANCE:.0%} below "
                f"{readable(target)} MACs; choose a slightly different target"
            )
    for larger, smaller in pairwise(targets):
        if smaller >= larger * (1 - TOLERANCE):
            raise ValueError(
                f"later_targets: expected each at least {TOLERANCE:.0%} below the one before, got "
                f"{readable(smaller)} MACs after {readable(larger)}; give the largest first"
            )


def _unit_cost(macs: Macs, name: str, width: int) -> int:
    per_width, constant = macs.per_unit[name]
    return width * per_width + constant


def _knapsack(
    options: list[Mapping[Size, float]], unit_costs: list[int], room: int, target: int
) -> tuple[float, list[Size]] | None:
    """Greatest Σ log p with target · (1 − TOLERANCE) ≤ total cost ≤ target, where `room` of the target is left."""
    smallest = [cost * min(h * c for h, c in sizes) for sizes, cost in zip(options, unit_costs, strict=True)]
    if sum(smallest) > room:
        return None
    bins = BINS_PER_SUBMODULE * (len(options) + 1)
    width_of_bin = target / bins
    capacity = int(room // width_of_bin)
    value = np.full(capacity + 1, -np.inf)  # greatest Σ log p for each cost so far, in bins
    value[0] = 0.0
    choices = []
    for sizes, unit_cost in zip(options, unit_costs, strict=True):
        following, choice = np.full_like(value, -np.inf), np.zeros(capacity + 1, dtype=np.int16)
        for k, ((heads, channels), probability) in enumerate(sizes.items()):
            cost = int(np.ceil(heads * channels * unit_cost / width_of_bin))
            if cost > capacity:
                continue
            candidate = value[: capacity + 1 - cost] + np.log(max(probability, 1e-300))
            better = candidate > following[cost:]
            following[cost:][better] = candidate[better]
            choice[cost:][better] = k
        value = following
        choices.append(choice)
    # Rounding up overstates the cost by up to one bin a submodule, so the lower limit moves up by as much.
    lowest = max(0, int(np.ceil((room - TOLERANCE * target) / width_of_bin)) + len(options))
    if lowest > capacity or not np.isfinite(value[lowest:]).any():
        return None
    position = lowest + int(np.argmax(value[lowest:]))
    total, chosen = float(value[position]), []
    for sizes, unit_cost, choice in zip(reversed(options), reversed(unit_costs), reversed(choices), strict=True):
        heads, channels = list(sizes)[choice[position]]
        chosen.append((heads, channels))
        position -= int(np.ceil(heads * channels * unit_cost / width_of_bin))
    return total, chosen[::-1]
