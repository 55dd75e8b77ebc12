"""timm's way to a saved network: `timm.create_model("local-dir:FOLDER", pretrained=True)` after `import ofb`.

timm reads the folder's config.json and calls the function it names with the sizes that stand there. timm brings the
rest: the weights, another classifier, other input channels, feature extraction.
"""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import nn

from ofb.engine.train import set_drop_path
from ofb.export.sizes import WEIGHTS, check_unsaved, check_weights, count_params, on_meta
from ofb.supernet.families import build
from ofb.supernet.families.tokens import kept_patches

NAME = "ofb_network"
CLASSIFIERS = ("head", "head.fc", "head_dist")
SOURCE = ("source", "file", "hf_hub_id")  # where timm finds the weights
MOST_CHANNELS = 2**16
LARGEST = 1e30  # far more than any mean or rate; whole numbers of JSON may be too large for a float
# What a saved network keeps of its pretrained_cfg; the rest is about the weights that it came from.
KEPT = {
    "mean": lambda value: _numbers(value),
    "std": lambda value: _numbers(value) and min(value) > 0,
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random").__contains__,
    "crop_pct": lambda value: _numbers([value]) and 0 < value <= 8,
    "crop_mode": ("center", "squash", "border").__contains__,
    "label_names": lambda value: _words(value),
    "label_descriptions": lambda value: _words([*value, *value.values()] if isinstance(value, Mapping) else value),
}
# What timm hands on of what a user, or a config.json, asks for; the rest would say how weights are found and loaded.
OPTIONS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "features_only", "out_indices"}
OPTIONS |= {"pretrained_cfg_overlay", "pretrained_model_args"}


@register_model
def ofb_network(
    pretrained: bool = False,
    network: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    img_size: int | tuple[int, int] | None = None,
    global_pool: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """A network whose blocks have sizes of their own.

    Args:
        pretrained: whether to load its weights.
        network: its sizes, as `families.describe` gives them and config.json holds them.
        pretrained_cfg: timm's, of the weights.
        img_size: another size of images; the position embedding is resampled.
        global_pool: the network's own; nothing else can be asked for.
        cache_dir: where what comes from the hub is kept.
        options: num_classes, in_chans, drop_rate (before the classifier), drop_path_rate, features_only, out_indices.

    Raises:
        FileNotFoundError: the weights are asked for, and are not there.
        ValueError: no sizes are given, no network has these, or the weights are damaged or of others.
    """
    if not isinstance(network, Mapping):
        raise ValueError(
            f"network: expected the sizes of a saved network, got {network!r}; load it from the folder that ofb.save "
            'wrote: timm.create_model("local-dir:FOLDER", pretrained=True)'
        )
    if not options.keys() <= OPTIONS:
        raise ValueError(f"{NAME}: expected options of {sorted(OPTIONS)}, got {sorted(options.keys() - OPTIONS)}")
    described = on_meta(network)
    if global_pool not in (None, described.global_pool):
        raise ValueError(f"global_pool: expected {described.global_pool!r}, the network's own, got {global_pool!r}")
    given = pretrained_cfg or {}
    cfg = weights_cfg(described, given) | {key: given[key] for key in SOURCE if key in given}
    weights = _weights(cfg, pretrained, cache_dir)
    if weights is not None:
        check_weights(described, weights)
        # Named as a file: timm 1.0.23 finds no safetensors in a folder, and from the hub timm takes pickles, too.
        cfg |= {"source": "", "file": str(weights)}
    shape = {"num_classes": described.num_classes, "in_chans": network["in_chans"]}
    shape |= {key: options[key] for key in shape if key in options}
    size = _image_size(network["img_size"] if img_size is None else img_size)
    wanted = on_meta({**network, **shape, "img_size": size}, runs=False)
    check_unsaved(count_params(wanted) - (0 if weights is None else count_params(described)))
    levels = len(described.feature_info)
    _check_options(options, levels)
    model = build_model_with_cfg(
        _build,
        NAME,
        pretrained,
        pretrained_cfg=cfg,
        feature_cfg={"feature_cls": "getter", "out_indices": min(3, levels)},
        kwargs_filter=("img_size",),
        cache_dir=cache_dir,
        network=network,
        **options | shape,
    )
    if img_size is not None:
        _set_image_size(getattr(model, "model", model), size)  # features_only wraps the network
    return model


def weights_cfg(model: nn.Module, known: Mapping[str, Any]) -> dict[str, Any]:
    """timm's pretrained_cfg of a network: what it expects of images, and what timm needs to know of its weights.

    Args:
        model: may be on the meta device.
        known: a pretrained_cfg to take the rest from.

    Raises:
        ValueError: what it says of images or labels makes no sense.
    """
    kept = {key: tuple(v) if isinstance(v := known[key], list) else v for key in KEPT if known.get(key) is not None}
    for key, value in kept.items():
        if not KEPT[key](value):
            raise ValueError(f"pretrained_cfg: expected {key} as ofb.save writes it, got {reprlib.repr(value)}")
    if len(kept.get("label_names") or ()) != model.num_classes:
        kept.pop("label_names", None)
        kept.pop("label_descriptions", None)
    layers = dict(model.named_modules())
    classifiers = tuple(name for name in CLASSIFIERS if name in layers and not next(layers[name].children(), None))
    return kept | {
        "architecture": NAME,
        "input_size": (model.patch_embed.proj.in_channels, *model.patch_embed.img_size),
        "fixed_input_size": not getattr(model, "dynamic_img_size", False),
        "num_classes": model.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": classifiers,
    }


def _build(
    network: Mapping[str, Any], num_classes: int, in_chans: int, drop_rate: float = 0.0, drop_path_rate: float = 0.0
) -> nn.Module:
    model = build({**network, "num_classes": num_classes, "in_chans": in_chans})
    set_drop_path(model, drop_path_rate)
    for name, module in model.named_modules():
        if name in ("head_drop", "head.drop"):
            module.p = drop_rate
    return model


def _weights(cfg: Mapping[str, Any], pretrained: bool, cache_dir: str | Path | None) -> Path | None:
    """The file of weights that belongs to the sizes, None where there is none or none is asked for."""
    if cfg.get("source") == "local-dir":
        path = Path(cfg["file"]) / WEIGHTS
        if pretrained and not path.is_file():
            raise FileNotFoundError(f"expected {WEIGHTS} beside config.json, found none in {cfg['file']}")
        return path if path.is_file() else None
    if cfg.get("source") != "hf-hub" or not pretrained:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = cfg["hf_hub_id"].partition("@")
    try:
        return Path(hf_hub_download(repository, WEIGHTS, revision=revision or None, cache_dir=cache_dir))
    except EntryNotFoundError as error:
        raise ValueError(f"{repository}: expected a {WEIGHTS}, got none; nothing else is loaded") from error


def _check_options(options: Mapping[str, Any], levels: int) -> None:
    for name in ("drop_rate", "drop_path_rate"):
        rate = options.get(name, 0.0)
        if not (_numbers([rate]) and 0 <= rate < 1):
            raise ValueError(f"{name}: expected at least 0 and less than 1, got {reprlib.repr(rate)}")
    indices = options.get("out_indices", 1)
    chosen = [indices] if isinstance(indices, int) else indices
    if not isinstance(chosen, list | tuple) or not all(isinstance(i, int) and -levels <= i <= levels for i in chosen):
        raise ValueError(f"out_indices: expected levels below {levels}, got {reprlib.repr(indices)}")


def _image_size(size: int | Sequence[int]) -> list[int]:
    sizes = [size, size] if isinstance(size, int) else list(size)
    if len(sizes) != 2 or not all(isinstance(each, int) and each > 0 for each in sizes):
        raise ValueError(f"img_size: expected a number of pixels or (height, width), got {size!r}")
    return sizes


def _set_image_size(model: nn.Module, img_size: Sequence[int]) -> None:
    size = tuple(img_size)
    if size == tuple(model.patch_embed.img_size):
        return
    if kept_patches(model) is not None:
        expected = tuple(model.patch_embed.img_size)
        raise ValueError(f"img_size: expected {expected}, because the network looks at chosen positions, got {size}")
    model.set_input_size(size)


def _numbers(value: Any) -> bool:
    """Whether it is a few finite numbers."""
    return (
        isinstance(value, list | tuple)
        and 0 < len(value) <= MOST_CHANNELS
        and all(isinstance(each, int | float) and abs(each) <= LARGEST for each in value)
    )


def _words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
