"""What a target means, what can be reached, and which sizes meet it at the greatest likelihood."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ofb.supernet.macs import Macs, readable
from ofb.supernet.search_space import Size

TOLERANCE = 0.02  # a found network costs between 98 % of the target and the target
BINS_PER_SUBMODULE = 400  # costs are rounded up to bins, at most one bin too much for each submodule

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

    A knapsack that walks through the network, once for each size of the residual width it is on: with the width fixed,
    every submodule has a cost of its own. A later width is entered from the best size of the one before.

    Returns:
        (heads, channels) for each submodule, or None where no combination meets the target.
    """
    bins = BINS_PER_SUBMODULE * (len(options) + 1)
    start = _Ways(np.where(np.arange(bins + 1) == 0, 0.0, -np.inf))
    width_before = {(1, 0): start}
    for width, members in macs.stages().items():
        ways_to = {}
        for size, probability in options[width].items():
            ways = _choose(
                width,
                [
                    (before, size, probability, _bins(macs.part(width, size[1], size_before[1]), target, bins))
                    for size_before, before in width_before.items()
                ],
            )
            for name in members:
                ways = _choose(
                    name,
                    [
                        (ways, each, p, _bins(macs.part(name, each[0] * each[1], size[1]), target, bins))
                        for each, p in options[name].items()
                    ],
                )
            ways_to[size] = ways
        width_before = ways_to
    # Rounding up overstates the cost by up to one bin a submodule, so the lower limit moves up by as much.
    lowest = int(np.ceil((1 - TOLERANCE) * bins)) + len(options)
    best = max(width_before.values(), key=lambda ways: ways.value[lowest:].max())
    position = lowest + int(best.value[lowest:].argmax())
    return best.sizes(position) if np.isfinite(best.value[position]) else None


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


@dataclass
class _Ways:
    """The best ways to choose the sizes of some submodules, one for each cost in bins.

    Attributes:
        value: greatest Σ log p, −inf where no choice costs that.
        name: the submodule chosen last, None at the start.
        taken: which of the alternatives for it.
        alternatives: (ways before, size, probability, cost in bins).
    """

    value: np.ndarray
    name: str | None = None
    taken: np.ndarray | None = None
    alternatives: Sequence[tuple["_Ways", Size, float, int]] = ()

    def sizes(self, position: int) -> dict[str, Size]:
        """The choices behind the value at a cost."""
        sizes, ways = {}, self
        while ways.name is not None:
            before, sizes[ways.name], _, cost = ways.alternatives[ways.taken[position]]
            ways, position = before, position - cost
        return sizes


def _choose(name: str, alternatives: Sequence[tuple[_Ways, Size, float, int]]) -> _Ways:
    """The ways that end with one of the alternatives for a submodule."""
    value = np.full_like(alternatives[0][0].value, -np.inf)
    taken = np.zeros(len(value), dtype=np.int16)
    for index, (before, _, probability, cost) in enumerate(alternatives):
        if cost >= len(value):
            continue
        candidate = before.value[: len(value) - cost] + np.log(max(probability, 1e-300))
        better = candidate > value[cost:]
        value[cost:][better] = candidate[better]
        taken[cost:][better] = index
    return _Ways(value, name, taken, alternatives)


def _bins(macs: int, target: int, bins: int) -> int:
    """A cost in bins, of which the target has so many; rounded up."""
    return -(-macs * bins // target)
