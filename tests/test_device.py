"""Determinism is asked of torch where a config asks for it, and only there."""

import pytest
import torch

import ofb
from ofb.engine.config import TrainConfig
from ofb.engine.device import determinism
from tests.test_train import OPTIONS, fresh_model, loaders  # noqa: F401


@pytest.mark.parametrize("asked", [False, True])
def test_determinism_ends_with_the_block(asked):
    with pytest.raises(KeyboardInterrupt), determinism(TrainConfig(deterministic=asked)):
        assert torch.are_deterministic_algorithms_enabled() == asked
        raise KeyboardInterrupt
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_is_within_it(loaders, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr("ofb.engine.train.evaluate", lambda *_: asked.append(_asked()) or {"top1": 0.0, "loss": 0.0})
    for deterministic in (True, False):
        ofb.train(fresh_model(), *loaders, TrainConfig(**OPTIONS | {"epochs": 1}, deterministic=deterministic))
    assert asked == [True, False]


def _asked() -> bool:
    return torch.are_deterministic_algorithms_enabled()
