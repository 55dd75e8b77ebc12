"""The cost model against torch's flop counter, which counts two operations for a multiply-accumulate."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from ofb.supernet.families import build, count_macs, describe
from ofb.supernet.macs import Macs, expected_macs


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


def test_expected_macs_are_differentiable_and_exact():
    macs = Macs(
        ("embed0", "embed1"),
        {"embed0": 100, "attn0": 32, "embed1": 3},
        {("attn0", "embed0"): 8, ("mlp0", "embed0"): 4, ("embed1", "embed0"): 7},
    )
    sizes = {"embed0": 10, "attn0": 6, "mlp0": 20, "embed1": 5}
    assert macs.total(sizes) == 1000 + 6 * 112 + 20 * 40 + 5 * 73
    assert macs.total(sizes) == sum(macs.part(name, units, 10 * (name != "embed0")) for name, units in sizes.items())
    p = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)
    fixed = p.new_tensor([10.0, 20.0, 5.0])
    units = torch.cat([(p * torch.tensor([2.0, 6.0])).sum()[None], fixed])
    form = macs.form(["attn0", "embed0", "mlp0", "embed1"], dtype=torch.float64)
    expected = expected_macs(units, *form)
    assert expected.item() == 1000 + (0.25 * 2 + 0.75 * 6) * 112 + 800 + 365
    expected.backward()
    assert p.grad.tolist() == [2 * 112, 6 * 112]
