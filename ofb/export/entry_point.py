"""timm's way to a saved network: `timm.create_model("local-dir:FOLDER", pretrained=True)` after `import ofb`.

timm reads the folder's config.json and calls the function it names with the sizes that stand there. timm brings the
rest: the weights, another classifier, other input channels, feature extraction.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import nn

from ofb.engine.train import set_drop_path
from ofb.export.sizes import WEIGHTS, check_weights, on_meta
from ofb.supernet.families import build
from ofb.supernet.families.tokens import kept_patches

NAME = "ofb_network"
CLASSIFIERS = ("head", "head.fc", "head_dist")
SOURCE = ("source", "file", "hf_hub_id")  # where timm finds the weights
# What a saved network keeps of its pretrained_cfg; the rest is about the weights that it came from.
KEPT = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names", "label_descriptions")


@register_model
def ofb_network(
    pretrained: bool = False,
    network: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    img_size: int | tuple[int, int] | None = None,
    global_pool: str | None = None,
    **options: Any,
) -> nn.Module:
    """A network whose blocks have sizes of their own.

    Args:
        pretrained: whether to load its weights.
        network: its sizes, as `families.describe` gives them and config.json holds them.
        pretrained_cfg: timm's, of the weights.
        img_size: another size of images; the position embedding is resampled.
        global_pool: the network's own; nothing else can be asked for.
        options: num_classes, in_chans, drop_rate (before the classifier), drop_path_rate, features_only, out_indices.

    Raises:
        ValueError: no sizes are given, no network has these, or the weights are of others.
    """
    if not isinstance(network, Mapping):
        raise ValueError(
            f"network: expected the sizes of a saved network, got {network!r}; load it from the folder that ofb.save "
            'wrote: timm.create_model("local-dir:FOLDER", pretrained=True)'
        )
    described = on_meta(network)
    if global_pool not in (None, described.global_pool):
        raise ValueError(f"global_pool: expected {described.global_pool!r}, the network's own, got {global_pool!r}")
    given = pretrained_cfg or {}
    cfg = weights_cfg(described, given) | {key: given[key] for key in SOURCE if key in given}
    if pretrained and cfg.get("source") == "local-dir":
        # Named as a file: timm 1.0.23 finds no safetensors in a folder.
        weights = Path(cfg["file"]) / WEIGHTS
        check_weights(described, weights)
        cfg |= {"source": "", "file": str(weights)}
    model = build_model_with_cfg(
        _build,
        NAME,
        pretrained,
        pretrained_cfg=cfg,
        feature_cfg={"feature_cls": "getter", "out_indices": min(3, len(described.feature_info))},
        kwargs_filter=("img_size",),
        network=network,
        **{"num_classes": described.num_classes, "in_chans": network["in_chans"]} | options,
    )
    if img_size is not None:
        _set_image_size(getattr(model, "model", model), img_size)  # features_only wraps the network
    return model


def weights_cfg(model: nn.Module, known: Mapping[str, Any]) -> dict[str, Any]:
    """timm's pretrained_cfg of a network: what it expects of images, and what timm needs to know of its weights.

    Args:
        model: may be on the meta device.
        known: a pretrained_cfg to take the rest from.
    """
    kept = {key: tuple(known[key]) if isinstance(known[key], list) else known[key] for key in KEPT if key in known}
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


def _set_image_size(model: nn.Module, img_size: int | tuple[int, int]) -> None:
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if size == tuple(model.patch_embed.img_size):
        return
    if kept_patches(model) is not None:
        expected = tuple(model.patch_embed.img_size)
        raise ValueError(f"img_size: expected {expected}, because the network looks at chosen positions, got {size}")
    model.set_input_size(size)
