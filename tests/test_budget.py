"""What can be reached, and the knapsack against brute force."""

import math
import random
from itertools import pairwise, product

import numpy as np
import pytest

from ofb.supernet import budget
from ofb.supernet.budget import BINS_PER_SUBMODULE, TOLERANCE, check_targets, choose_sizes, meets, reachable
from ofb.supernet.cost import Cost
from ofb.supernet.token_costs import TokenCosts


def make_options(widths, attention, hidden, probability):
    return {
        "embed": {(1, w): probability for w in widths},
        "attn0": {size: probability for size in attention},
        "mlp0": {(1, h): probability for h in hidden},
    }


MACS = Cost(("embed",), {"embed": 100, "attn0": 50}, {("attn0", "embed"): 20, ("mlp0", "embed"): 10})


PARAMS = Cost(("embed",), {"embed": 60, "mlp0": 1}, {("attn0", "embed"): 4, ("mlp0", "embed"): 6}, {"attn0": 30}, 500)


def test_reachable():
    options = make_options([8, 16], [(2, 4), (2, 8), (4, 4)], [16, 64], 0.5)
    least = 8 * 100 + 8 * (8 * 20 + 50) + 16 * 80
    most = 16 * 100 + 16 * (16 * 20 + 50) + 64 * 160
    assert reachable(MACS, options) == (least, most)


def random_network(rng, kinds):
    """Costs of some kinds, and options, of a small network: up to three residual widths, up to four submodules."""
    widths = [f"embed{i}" for i in range(rng.choice([1, 1, 2, 3]))]
    others = [f"{rng.choice(['attn', 'mlp'])}{i}" for i in range(rng.randint(1, 4 - len(widths)))]
    pairs = [*((name, rng.choice(widths)) for name in others), *((later, one) for one, later in pairwise(widths))]
    pools = {
        "embed": [(1, width) for width in range(8, 200, rng.choice([1, 8]))],
        "attn": list(product((1, 2, 3, 4, 6), range(4, 65, 4))),
        "mlp": [(1, hidden) for hidden in range(8, 400, 8)],
    }
    spread = rng.choice([1, 5, 50])
    options = {}
    for name in [*widths, *others]:
        sizes = sorted(rng.sample(pools[name.rstrip("0123456789")], rng.randint(1, 5)))
        options[name] = {size: math.exp(-spread * rng.random()) for size in sizes}

    def amounts(names):
        return {name: rng.randint(1, rng.choice([1, 10, 1000])) for name in names}

    constants = [0, 10**5, 10**8]  # before the largest, all else is small: many combinations share a bin
    heads = [name for name in others if name.startswith("attn")]
    return {
        kind: Cost(tuple(widths), amounts(options), amounts(pairs), amounts(heads), rng.choice(constants))
        for kind in kinds
    }, options


def random_case(seed, kinds):
    """Costs, options and limits of a random network, and Σ log p of every combination that meets them."""
    rng = random.Random(seed)
    costs, options = random_network(rng, kinds)
    combinations = list(product(*options.values()))
    totals = np.array(
        [[cost.total(dict(zip(options, each, strict=True))) for each in combinations] for cost in costs.values()]
    )
    if rng.random() < 0.5:  # as much as some combination costs, or a little more
        limits = totals[:, rng.randrange(len(combinations))] * [rng.choice([1, 1.001, 1.0199]) for _ in kinds]
    else:
        limits = totals.min(1) + rng.random() * np.ptp(totals, axis=1)
    shares = (totals / limits[:, None]).max(0)
    met = {
        each: sum(math.log(options[name][size]) for name, size in zip(options, each, strict=True))
        for each, share in zip(combinations, shares, strict=True)
        if 1 - TOLERANCE <= share <= 1
    }
    return costs, options, dict(zip(kinds, limits.tolist(), strict=True)), met


@pytest.mark.parametrize(("kinds", "cases"), [(("macs",), 1500), (("macs", "params"), 600)])
def test_the_likeliest_combination_is_chosen(kinds, cases):
    """Against brute force, without any slack; two budgets as well, where the networks are as small as here."""
    for seed in range(cases):
        costs, options, limits, met = random_case(seed, kinds)
        found = choose_sizes(costs, options, limits)
        assert (found is not None) == bool(met) == meets(costs, options, [limits]), seed
        if found is not None:
            assert met[tuple(found[name] for name in options)] >= max(met.values()) - 1e-8, seed


@pytest.mark.parametrize("kinds", [("macs",), ("macs", "params")], ids=len)
def test_without_steps_for_the_search(kinds, monkeypatch):
    """What is chosen meets the target; with one budget it is no less likely than any well inside the band."""
    monkeypatch.setattr(budget, "STEPS", 0)
    edge = 1 / BINS_PER_SUBMODULE
    for seed in range(400):
        costs, options, limits, met = random_case(seed, kinds)
        found = choose_sizes(costs, options, limits)
        value = -math.inf if found is None else met[tuple(found[name] for name in options)]
        if len(kinds) == 1:
            for combination, likelihood in met.items():
                share = costs["macs"].total(dict(zip(options, combination, strict=True))) / limits["macs"]
                assert value >= likelihood - 1e-8 or not 1 - TOLERANCE + edge <= share <= 1 - edge, seed


def test_one_binding_budget_among_several():
    """A budget that does not bind changes nothing."""
    options = make_options(range(8, 33, 4), [(2, 4), (2, 8), (4, 4)], range(16, 65, 8), 0.5)
    costs, limit = {"macs": MACS, "params": PARAMS}, MACS.total({"embed": (1, 16), "attn0": (2, 8), "mlp0": (1, 32)})
    loose = reachable(PARAMS, options)[1]
    assert MACS.total(choose_sizes(costs, options, {"macs": limit, "params": loose})) >= (1 - TOLERANCE) * limit


WIDTHS = {"embed": {(1, width): 0.5 for width in range(50, 101)}}
WIDTH = {"macs": Cost(("embed",), {"embed": 1}, {})}


def test_the_number_of_patches_counts_with_its_probability():
    """The likelier width needs the unlikelier number of patches."""
    costs = {"macs": TokenCosts({9: Cost(("embed",), {"embed": 10}, {}), 16: Cost(("embed",), {"embed": 5}, {})})}
    options = {"tokens": {(1, 9): 0.9, (1, 16): 0.1}, "embed": {(1, 10): 0.4, (1, 20): 0.6}}
    assert choose_sizes(costs, options, {"macs": 100}) == {"tokens": (1, 9), "embed": (1, 10)}
    options["tokens"] = {(1, 9): 0.5, (1, 16): 0.5}
    assert choose_sizes(costs, options, {"macs": 100}) == {"tokens": (1, 16), "embed": (1, 20)}


def test_both_edges_of_the_band_are_in_it():
    for width, is_met in ((97, False), (98, True), (100, True), (101, False)):
        assert meets(WIDTH, {"embed": {(1, width): 1.0}}, [{"macs": 100}]) == is_met


def test_a_target_at_the_end_of_what_is_reachable():
    check_targets(WIDTH, WIDTHS, [{"macs": 100}, {"macs": 50}])
    for limit in (101, 49):
        with pytest.raises(ValueError, match=f"target: expected between 50 and 100 MACs .*, got {limit}"):
            check_targets(WIDTH, WIDTHS, [{"macs": limit}])


def test_a_later_target_lies_below_the_band_of_the_one_before():
    check_targets(WIDTH, WIDTHS, [{"macs": 100}, {"macs": 97}])
    for limit in (100, 99, 98):
        with pytest.raises(ValueError, match=f"later_targets: expected each at least 2% below .*, got {limit} MACs"):
            check_targets(WIDTH, WIDTHS, [{"macs": 100}, {"macs": limit}])
