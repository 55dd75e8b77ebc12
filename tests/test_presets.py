"""Presets hold the paper's recipe, and the command line has the last word."""

import pytest

from ofb.cli import parse
from ofb.engine.presets import PRESETS, preset

# OFB (CVPR 2024), section 4.1; learning rates at 1,024 images a step.
PAPER_SEARCH = {
    "epochs": 100, "batch_size": 1024, "opt": "adamw", "lr": 1e-3, "architecture_lr": 1e-3, "weight_decay": 1e-3,
    "min_lr": 1e-5, "warmup_epochs": 20, "warmup_lr": 1e-6, "cosine_epochs": 100, "drop_path": 0.1,
    "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "aug_repeats": 3, "pretrained": True, "smoothing": 0.1,
    "lam_start": 0.99, "lam_end": 0.1, "mask_ratio_start": 0.05, "mask_ratio_end": 0.25, "macs_weight": 5.0,
    "one_hot_weight": 0.5, "one_hot_delay": 0.0, "architecture_init": "random", "score_init": "random",
    "score_mean": 0.0, "score_lr": 1e-3, "pace": 0.0, "settling": 0.0, "prunes_per_epoch": 3,
    "prune_threshold": 0.2, "distillation": None, "round_to": 1, "freeze": (), "candidates": (), "bounds": (),
}  # fmt: skip
PAPER_FINETUNE = {
    "epochs": 300, "lr": 6e-4, "weight_decay": 0.05, "layer_decay": 0.95, "warmup_epochs": 5, "model_ema": True,
    "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_papers_recipe(name):
    config = parse("search", ["--preset", name, "--data-dir", "/imagenet"])
    finetune = config.finetune()
    assert {key: getattr(config, key) for key in PAPER_SEARCH} == PAPER_SEARCH
    assert {key: getattr(finetune, key) for key in PAPER_FINETUNE} == PAPER_FINETUNE
    assert config.model == f"deit_{name.split('-')[1]}_patch16_224"
    assert (config.data, config.data_dir) == ("", "/imagenet")


def test_given_options_come_last():
    arguments = "--preset deit-small-imagenet --data hfds/imagenet-1k --epochs 5 --warmup-epochs 1 --target 30%"
    config = parse("search", arguments.split())
    assert (config.data, config.data_dir, config.epochs, config.target) == ("hfds/imagenet-1k", None, 5, "30%")
    assert config.batch_size == 1024


def test_the_data_is_missing():
    with pytest.raises(ValueError, match="add --data-dir FOLDER"):
        parse("search", ["--preset", "deit-small-imagenet"])


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of deit-tiny-imagenet.*got 'vit'"):
        parse("search", ["--preset", "vit"])
    with pytest.raises(ValueError, match="preset"):
        preset("")
