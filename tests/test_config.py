"""Options: defaults of the paper's recipe, round trips, errors that name the option."""

import json
import os

import numpy as np
import pytest

from ofb.engine.config import DataConfig, SearchConfig, TrainConfig
from ofb.engine.options import from_dict, to_dict
from ofb.engine.tool_config import EvaluateConfig, ProfileConfig


def test_defaults_are_the_recipe():
    search = SearchConfig()
    assert (search.epochs, search.batch_size, search.weight_decay, search.min_lr) == (100, 1024, 1e-3, 1e-5)
    assert (search.drop_path, search.aa, search.reprob) == (0.1, "rand-m9-mstd0.5-inc1", 0.25)
    finetune = search.finetune()
    assert (finetune.epochs, finetune.weight_decay, finetune.layer_decay, finetune.model_ema) == (300, 0.05, 0.95, True)
    assert (finetune.mixup, finetune.cutmix) == (0.8, 1.0)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(model_kwargs=("img_size=8", "act_layer=gelu"), lr=1e-3),
        SearchConfig(target="1.1G", finetune_epochs=0),
        SearchConfig(round_to=4, freeze=("embed",), candidates=("attn*=2,4x16,32",), bounds=("mlp*=0.5:1",)),
        EvaluateConfig(checkpoint="runs/x"),
    ],
)
def test_round_trip_through_json(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_model_kwargs_are_literals_or_strings():
    config = TrainConfig(model_kwargs=("img_size=(8,8)", "qkv_bias=False", "global_pool=token", "a=b=c"))
    assert config.model_options() == {"img_size": (8, 8), "qkv_bias": False, "global_pool": "token", "a": "b=c"}


def test_learning_rate_scales_with_the_batch():
    assert TrainConfig(batch_size=512).scaled_lr(1e-4) == 2e-4
    assert TrainConfig(batch_size=512, lr=0.5).scaled_lr(1e-4) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 33}, "batch_size: expected an even number"),
        ({"lr": -1.0}, "lr: expected a positive number, got -1.0"),
        ({"smoothing": 1.0}, "smoothing: expected at least 0 and less than 1, got 1.0"),
        ({"drop_path": float("nan")}, "drop_path: expected"),
        ({"warmup_epochs": 1e9}, "warmup_epochs: expected 0 to"),
        ({"epochs": 10.0}, r"epochs: expected a whole number, got 10.0; round it, such as with int\(...\)"),
        ({"seed": 0.5}, "seed: expected a whole number, got 0.5"),
        ({"lr": "fast"}, "lr: expected a finite number, got 'fast'"),
        *(
            ({name: float("inf")}, f"{name}: expected a finite number, got inf")
            for name in ("lr", "min_lr", "warmup_lr", "weight_decay", "clip_grad", "mixup", "distillation_tau")
        ),
        ({"model_kwargs": ("img_size",)}, "model_kwargs: expected key=value, got 'img_size'"),
        (
            {"model_kwargs": ("checkpoint_path=/x",)},
            "model_kwargs: expected sizes and parts of the model, got checkpoint",
        ),
        (
            {"model_kwargs": ("pretrained_cfg={}",)},
            "model_kwargs: expected sizes and parts of the model, got pretrained",
        ),
        ({"resume": True}, "resume: expected the run folder as well; add --output FOLDER"),
        ({"data": "cifar10"}, "data: expected `digits`, a timm data set"),
    ],
)
@pytest.mark.parametrize("config_class", [TrainConfig, SearchConfig])
def test_bad_values(config_class, options, message):
    with pytest.raises(ValueError, match=message):
        config_class(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"one_hot_weight": -0.1}, "one_hot_weight: expected at least 0, got -0.1"),
        ({"score_mean": float("nan")}, "score_mean: expected a finite number, got nan"),
        ({"prune_threshold": 1.0}, "prune_threshold: expected at least 0 and less than 1, got 1.0"),
        ({"cosine_epochs": -1}, "cosine_epochs: expected a positive number, got -1"),
        ({"finetune_lr": 0.0}, "finetune_lr: expected a positive number, got 0.0"),
        ({"finetune_epochs": 3, "finetune_warmup_epochs": 5.0}, "finetune_warmup_epochs: expected 0 to 3, got 5.0"),
    ],
)
def test_bad_values_of_a_search(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SearchConfig(**options)


def test_numbers_become_pythons_own():
    """As a file of options can hold them."""
    config = TrainConfig(epochs=np.int64(4), lr=np.float64(1e-3))
    assert config == TrainConfig(epochs=4, lr=1e-3) and (type(config.epochs), type(config.lr)) == (int, float)


def test_a_batch_size_to_profile_with():
    with pytest.raises(ValueError, match="batch_size: expected a whole number, got 1.5"):
        ProfileConfig(network="runs/x", batch_size=1.5)


def test_unknown_option():
    with pytest.raises(ValueError, match="DataConfig has no option colour, size; remove it"):
        from_dict(DataConfig, {"size": 3, "colour": 1, "batch_size": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 0}, "round_to: expected at least 1, got 0"),
        ({"candidates": ("mlp0:4",)}, "candidates: expected PATTERN=64,96,128 or PATTERN=2,4x32,64, got 'mlp0:4'"),
        ({"bounds": ("mlp0=half",)}, "bounds: expected PATTERN=LOW:HIGH"),
        ({"bounds": ("mlp0=0.9:0.5",)}, "bounds: expected 0 <= low <= high <= 1"),
    ],
)
def test_bad_wishes_for_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**options)


def test_as_many_workers_as_processors(monkeypatch):
    """Shared among the processes of a job on the same machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    assert TrainConfig().worker_count == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert TrainConfig().worker_count == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    assert TrainConfig().worker_count == 8
    assert TrainConfig(workers=0).worker_count == 0
