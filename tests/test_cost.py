"""The cost model against torch's flop counter, which counts two operations for a multiply-accumulate."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from ofb.supernet.cost import Cost, readable
from ofb.supernet.families import build, count_macs, describe


def counted_by_torch(model) -> int:
    height, width = model.patch_embed.img_size
    images = torch.empty(1, model.patch_embed.proj.in_channels, height, width, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.eval()(images)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "published"),
    [("deit_tiny_patch16_224", 1.26e9), ("deit_small_patch16_224", 4.6e9), ("deit_base_patch16_224", 17.5e9)],
)
def test_published_figures(name, published):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count_macs(model) == pytest.approx(published, rel=0.01)
    assert count_macs(model) == counted_by_torch(model)


def test_distilled_and_uneven_blocks():
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224")
        description = describe(model)
        description["embed_dim"] = 150
        for i, block in enumerate(description["blocks"]):
            block |= {"heads": 1 + i % 3, "head_dim": 16 + 8 * (i % 4), "hidden": 200 + 10 * i}
        model = build(description)
    assert count_macs(model) == counted_by_torch(model)


def test_expected_costs_are_differentiable_and_exact():
    cost = Cost(
        ("embed0", "embed1"),
        {"embed0": 100, "attn0": 32, "embed1": 3},
        {("attn0", "embed0"): 8, ("mlp0", "embed0"): 4, ("embed1", "embed0"): 7},
        {"attn0": 9},
        11,
    )
    sizes = {"embed0": (1, 10), "attn0": (3, 2), "mlp0": (1, 20), "embed1": (1, 5)}
    assert cost.total(sizes) == 11 + 1000 + 3 * 9 + 6 * 112 + 20 * 40 + 5 * 73
    p = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)  # of (1, 2) and (3, 2)
    fixed = p.new_tensor([10.0, 20.0, 5.0])
    heads = torch.cat([(p * p.new_tensor([1.0, 3.0])).sum()[None], torch.ones_like(fixed)])
    units = torch.cat([(p * p.new_tensor([2.0, 6.0])).sum()[None], fixed])
    expected = cost.expectation(["attn0", "embed0", "mlp0", "embed1"], dtype=torch.float64)(heads, units)
    expected.backward()
    totals = [cost.total(sizes | {"attn0": size}) for size in ((1, 2), (3, 2))]
    assert expected.item() == 0.25 * totals[0] + 0.75 * totals[1]
    assert p.grad.tolist() == [9 + 2 * 112, 3 * 9 + 6 * 112]


def test_expected_costs_are_not_rounded_under_autocast(device):
    cost = Cost(("embed",), {"embed": 3001}, {("mlp0", "embed"): 1001})
    expectation = cost.expectation(["embed", "mlp0"], device=device, dtype=torch.float32)
    heads, units = torch.ones(2, device=device), torch.tensor([385.0, 1537.0], device=device)
    with torch.autocast(device, torch.bfloat16):
        assert expectation(heads, units).item() == pytest.approx(cost.total({"embed": (1, 385), "mlp0": (1, 1537)}))


def test_readable_amounts():
    amounts = {1e9: "1 G", 999.9e6: "1e+03 M", 4.6e9: "4.6 G", 1e6: "1 M", 86.57e6: "86.6 M", 1e3: "1 K", 999: "999"}
    assert {amount: readable(amount) for amount in amounts} == amounts
