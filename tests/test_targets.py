"""How a target is written, and what it means."""

import pytest

from ofb.supernet.targets import amounts, describe_limits, parse_target

DENSE = {"macs": 4_000_000_000, "params": 20_000_000, "latency_ms": 8.0}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("50%", {"macs": 2_000_000_000}),
        ("1.1G", {"macs": 1_100_000_000}),
        ("300M", {"macs": 300_000_000}),
        (5e8, {"macs": 500_000_000}),
        ({"macs": "25%"}, {"macs": 10**9}),
        ({"params": "40%"}, {"params": 8_000_000}),
        ({"params": "5M"}, {"params": 5_000_000}),
        ({"params": 5_000_000}, {"params": 5_000_000}),
        ({"latency_ms": 2.5}, {"latency_ms": 2.5}),
        ("latency_ms=50%", {"latency_ms": 4.0}),
        ({"macs": "50%", "params": "40%"}, {"macs": 2_000_000_000, "params": 8_000_000}),
        ("macs=50%, params=40%", {"macs": 2_000_000_000, "params": 8_000_000}),
        ("0.5", {"macs": 2_000_000_000}),
        (0.5, {"macs": 2_000_000_000}),
        (1, {"macs": 4_000_000_000}),
        ("macs=0.5,params=0.4", {"macs": 2_000_000_000, "params": 8_000_000}),
        ({"latency_ms": 0.5}, {"latency_ms": 0.5}),
        ("1000", {"macs": 1000}),
    ],
)
def test_parse_target(target, expected):
    assert parse_target(target, DENSE) == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        *((text, "target: expected MACs such as") for text in ("half", "", "-5%", "0", "1.1T", None, "nan", "50%,30%")),
        ("30", r"target: expected MACs such as .* or a number from 1,000 on, got 30; did you mean 30%\?"),
        (1.1, r"got 1.1; did you mean 1.1%\?"),
        ("params=40", r"target: expected parameters .* got 40; did you mean 40%\?"),
        (300, r"got 300; did you mean 300M\?"),
        ({"params": "-1"}, "target: expected parameters such as"),
        ({"latency_ms": "5G"}, "target: expected ms such as"),
        ({}, "target: expected at least one of macs, params, latency_ms, got an empty mapping; name a cost"),
        ({"flops": 3}, "target: expected costs among macs, params, latency_ms, got 'flops'; rename or remove it"),
        ("macs=50%,40%", "target: expected KIND=AMOUNT"),
        ("macs=50%,macs=40%", "target: expected KIND=AMOUNT, each kind once"),
    ],
)
def test_unreadable_target(target, message):
    with pytest.raises(ValueError, match=message):
        parse_target(target, DENSE)


def test_amounts_and_description():
    assert amounts("params=40%") == {"params": "40%"}
    shown = describe_limits({"macs": 2.3e9, "params": 5.5e6, "latency_ms": 2.5})
    assert shown == "2.3 G MACs and 5.5 M parameters and 2.5 ms"
