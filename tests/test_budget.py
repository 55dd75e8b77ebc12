"""What can be reached, and the knapsack against brute force."""

import itertools
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ofb.supernet.budget import TOLERANCE, choose_sizes, meets, reachable
from ofb.supernet.cost import Cost


def make_options(widths, attention, hidden, probability):
    return {
        "embed": {(1, w): probability for w in widths},
        "attn0": {size: probability for size in attention},
        "mlp0": {(1, h): probability for h in hidden},
    }


MACS = Cost(("embed",), {"embed": 100, "attn0": 50}, {("attn0", "embed"): 20, ("mlp0", "embed"): 10})


def test_reachable():
    options = make_options([8, 16], [(2, 4), (2, 8), (4, 4)], [16, 64], 0.5)
    least = 8 * 100 + 8 * (8 * 20 + 50) + 16 * 80
    most = 16 * 100 + 16 * (16 * 20 + 50) + 64 * 160
    assert reachable(MACS, options) == (least, most)


@given(st.data())
def test_greatest_likelihood_within_the_band(data):
    def sizes(pool):
        return {
            s: data.draw(st.floats(1e-6, 1))
            for s in data.draw(st.lists(st.sampled_from(pool), min_size=1, unique=True))
        }

    options = {
        "embed": sizes([(1, w) for w in range(32, 65, 2)]),
        "attn0": sizes([(h, c) for h in (2, 4) for c in (8, 12, 16)]),
        "mlp0": sizes([(1, h) for h in range(16, 129, 16)]),
    }
    least, most = reachable(MACS, options)
    target = data.draw(st.integers(least, int(most * 1.1)))
    found = choose_sizes({"macs": MACS}, options, {"macs": target})
    # Rounding costs up to bins may only lose combinations within this much of the band's edges.
    slack = TOLERANCE * 0.5 * target
    best_inside = -math.inf
    for combination in itertools.product(*options.values()):
        total = MACS.total(dict(zip(options, combination, strict=True)))
        likelihood = sum(math.log(options[n][size]) for n, size in zip(options, combination, strict=True))
        if target * (1 - TOLERANCE) + slack <= total <= target - slack:
            best_inside = max(best_inside, likelihood)
    if found is None:
        assert best_inside == -math.inf
        return
    total = MACS.total(found)
    assert target * (1 - TOLERANCE) <= total <= target
    assert sum(math.log(options[n][size]) for n, size in found.items()) >= best_inside - 1e-9


PARAMS = Cost(("embed",), {"embed": 60, "mlp0": 1}, {("attn0", "embed"): 4, ("mlp0", "embed"): 6}, {"attn0": 30}, 500)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_several_budgets_against_brute_force(data):
    """What is chosen keeps within all budgets and uses up one; it is found wherever there is something to find."""
    costs = {"macs": MACS, "params": PARAMS}
    seed = data.draw(st.integers(0, 2**16))
    generator = random.Random(seed)
    options = {
        "embed": {(1, w): generator.random() for w in range(32, 65, 4)},
        "attn0": {(h, c): generator.random() for h in (2, 4) for c in (8, 12, 16)},
        "mlp0": {(1, h): generator.random() for h in range(16, 129, 16)},
    }
    limits = {}
    for kind, cost in costs.items():
        least, most = reachable(cost, options)
        limits[kind] = round(least + data.draw(st.floats(0.05, 1)) * (most - least))
    met = {}
    for combination in itertools.product(*options.values()):
        sizes = dict(zip(options, combination, strict=True))
        used = [costs[kind].total(sizes) / limit for kind, limit in limits.items()]
        if max(used) <= 1 and max(used) >= 1 - TOLERANCE:
            met[combination] = sum(math.log(options[name][size]) for name, size in sizes.items())
    found = choose_sizes(costs, options, limits)
    assert (found is not None) == bool(met) == meets(costs, options, [limits])
    if found is not None:
        # Several that bind at once may cost likelihood.
        assert met[tuple(found[name] for name in options)] >= max(met.values()) - 0.5


def test_one_binding_budget_among_several():
    """A budget that does not bind changes nothing."""
    options = make_options(range(8, 33, 4), [(2, 4), (2, 8), (4, 4)], range(16, 65, 8), 0.5)
    costs, limit = {"macs": MACS, "params": PARAMS}, MACS.total({"embed": (1, 16), "attn0": (2, 8), "mlp0": (1, 32)})
    loose = reachable(PARAMS, options)[1]
    assert MACS.total(choose_sizes(costs, options, {"macs": limit, "params": loose})) >= (1 - TOLERANCE) * limit
