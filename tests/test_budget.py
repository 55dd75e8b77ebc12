"""Targets, what can be reached, and the knapsack against brute force."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofb.supernet.budget import TOLERANCE, choose_sizes, parse_target, reachable
from ofb.supernet.macs import Macs


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("50%", 2_000_000_000),
        ("1.1G", 1_100_000_000),
        ("300M", 300_000_000),
        (5e8, 500_000_000),
        ({"macs": "25%"}, 10**9),
    ],
)
def test_parse_target(target, expected):
    assert parse_target(target, dense=4_000_000_000) == expected


@pytest.mark.parametrize(
    "target", ["half", "", "-5%", "0", "1.1T", None, "nan", {"params": "5M"}, {}, {"latency_ms": 3}]
)
def test_unreadable_target(target):
    with pytest.raises(ValueError, match="target: expected"):
        parse_target(target, dense=100)


def make_options(widths, attention, hidden, probability):
    return {
        "embed": {(1, w): probability for w in widths},
        "attn0": {size: probability for size in attention},
        "mlp0": {(1, h): probability for h in hidden},
    }


MACS = Macs(("embed",), {"embed": 100, "attn0": 50}, {("attn0", "embed"): 20, ("mlp0", "embed"): 10})


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
    found = choose_sizes(MACS, options, target)
    # Rounding costs up to bins may only lose combinations within this much of the band's edges.
    slack = TOLERANCE * 0.5 * target
    best_inside = -math.inf
    for combination in itertools.product(*options.values()):
        total = MACS.total({n: h * c for n, (h, c) in zip(options, combination, strict=True)})
        likelihood = sum(math.log(options[n][size]) for n, size in zip(options, combination, strict=True))
        if target * (1 - TOLERANCE) + slack <= total <= target - slack:
            best_inside = max(best_inside, likelihood)
    if found is None:
        assert best_inside == -math.inf
        return
    total = MACS.total({n: h * c for n, (h, c) in found.items()})
    assert target * (1 - TOLERANCE) <= total <= target
    assert sum(math.log(options[n][size]) for n, size in found.items()) >= best_inside - 1e-9
