"""Published recipes as options of a search: `--preset NAME`, over which the command line has the last word."""

from types import MappingProxyType
from typing import Any

# OFB (CVPR 2024), section 4.1, for ImageNet-1K at an effective batch of 1,024 images. Every value is written out, also
# where it is the option's default: a preset must not change when a default does.
_DEIT_IMAGENET = {
    "pretrained": True,
    "data": "",
    "batch_size": 1024,
    "epochs": 100,
    "warmup_epochs": 20.0,
    "cosine_epochs": 100,
    "opt": "adamw",
    "lr": 2.5e-4 * 1024 / 256,
    "architecture_lr": 2.5e-4 * 1024 / 256,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "weight_decay": 1e-3,
    "drop_path": 0.1,
    "smoothing": 0.1,
    "distillation": None,
    "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 0.25,
    "aug_repeats": 3,
    "round_to": 1,
    "residual_mask": "stream",
    "architecture_init": "random",
    "score_init": "random",
    "score_mean": 0.0,
    "score_lr": 2.5e-4 * 1024 / 256,
    "pace": 0.0,
    "settling": 0.0,
    "lam_start": 0.99,
    "lam_end": 0.1,
    "mask_ratio_start": 0.05,
    "mask_ratio_end": 0.25,
    "one_hot_weight": 0.5,
    "one_hot_delay": 0.0,
    "macs_weight": 5.0,
    "prunes_per_epoch": 3,
    "prune_threshold": 0.2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "finetune_epochs": 300,
    "finetune_lr": 1.5e-4 * 1024 / 256,
    "finetune_warmup_epochs": 5.0,
    "finetune_weight_decay": 0.05,
    "layer_decay": 0.95,
    "model_ema": True,
}

PRESETS = MappingProxyType(
    {
        f"deit-{size}-imagenet": _DEIT_IMAGENET | {"model": f"deit_{size}_patch16_224"}
        for size in ("tiny", "small", "base")
    }
)


def preset(name: str) -> dict[str, Any]:
    """The options of a preset.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return dict(PRESETS[name])
