"""The final comparison: exact figures, and shares of the first network's."""

import torch

from ofb.export import count_params
from ofb.report import comparison_table, cpu_latency, figures
from ofb.supernet.families import count_macs
from tests.common import tiny_vit


def test_table():
    dense = {"top1": 98.0, "macs": 4_600_000_000, "params": 22_000_000, "latency_ms": 40.0}
    compressed = {"top1": 97.25, "macs": 2_300_000_000, "params": 5_500, "latency_ms": 10.0}
    lines = comparison_table({"dense": dense, "compressed": compressed}).splitlines()
    assert lines[0].split("  ")[-1] == "CPU ms"
    assert "98.00" in lines[1] and lines[1].count("(100%)") == 3
    for cell in ("97.25", "2.3 G (50%)", "5.5 K (0%)", "10.00 (25%)"):
        assert cell in lines[2]


def test_figures_of_networks():
    networks = {"large": tiny_vit(depth=3), "small": tiny_vit(depth=1)}
    found = figures(networks, {"large": {"top1": 2.0, "top5": 9.0}, "small": {"top1": 1.0, "top5": 9.0}})
    assert found["large"]["top1"] == 2.0 and found["small"]["top5"] == 9.0
    for name, network in networks.items():
        assert found[name]["macs"] == count_macs(network)
        assert found[name]["params"] == count_params(network)
    assert found["large"]["latency_ms"] > found["small"]["latency_ms"] > 0


def test_measuring_leaves_a_network_as_it_was():
    network = tiny_vit().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cpu_latency({"network": network})
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
