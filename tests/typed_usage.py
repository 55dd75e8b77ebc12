"""What a user's own code looks like to a type checker: tests/test_typing.py runs mypy over this file."""

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import ofb
from ofb.supernet.losses import Losses
from ofb_kernels import masked_attention, masked_layer_norm, masked_linear, masked_mlp, use_backend


def search(model: nn.Module, loader: list[tuple[Tensor, Tensor]], folder: Path) -> nn.Module:
    space = ofb.SearchSpace(round_to=8, freeze=("embed",), bounds={"mlp*": (0.5, 1.0)})
    supernet = ofb.Supernet(model, {"macs": "50%", "params": 5e6}, space=space, epochs=1, steps_per_epoch=len(loader))
    optimizer = torch.optim.AdamW(supernet.parameter_groups(), lr=1e-3)
    for images, targets in loader:
        losses = supernet.loss(images, targets)
        assert_type(losses, Losses)
        losses.total.backward()
        supernet.step(optimizer)
    found = supernet.extract()
    ofb.save(found, folder)
    assert_type(ofb.load(folder), nn.Module)
    assert_type(ofb.evaluate(found, loader), dict[str, float])
    return found


def train(model: nn.Module, loader: list[tuple[Tensor, Tensor]]) -> None:
    config = ofb.SearchConfig(target="30%", epochs=3, output=None)
    supernet = ofb.Supernet(model, "30%", epochs=3, steps_per_epoch=len(loader))
    assert_type(ofb.search(supernet, loader, loader, config), nn.Module)
    assert_type(ofb.train(model, loader, loader, ofb.TrainConfig(epochs=2)), nn.Module)
    assert_type(ofb.adaptive_one_hot_loss(torch.randn(7)), Tensor)
    support = ofb.supports(model)
    assert_type(support.reason, str)


def ops(x: Tensor, qkv: Tensor, weight: Tensor, mask: Tensor) -> None:
    with use_backend("eager"):
        assert_type(masked_linear(x, weight, None, mask, activation="gelu"), Tensor)
        assert_type(masked_mlp(x, weight, None, mask, weight.T, None), Tensor)
    assert_type(masked_attention(qkv, mask, scale=0.125, backend="reference"), Tensor)
    assert_type(masked_layer_norm(x, mask, None, mask), Tensor)
