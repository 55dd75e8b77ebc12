"""Saved networks: weights as safetensors, sizes as JSON, in timm's own form. Loading executes nothing from files."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save as save_tensors
from torch import nn

from ofb.engine.checkpoint import write_atomically, write_text
from ofb.engine.data import data_config, pretrained_cfg
from ofb.engine.untrusted import parse_json
from ofb.export.entry_point import NAME, weights_cfg
from ofb.export.sizes import WEIGHTS, count_params, on_meta
from ofb.supernet.families import count_macs, describe

ARCHITECTURE = "config.json"
FORMAT = 2
LABELS = ("label_names", "label_descriptions")  # which timm and transformers look for beside pretrained_cfg


def save(model: nn.Module, folder: str | Path) -> None:
    """Save a plain timm model: model.safetensors, and config.json with its sizes, cost, preprocessing and class names.

    `ofb.load(folder)` gives it back, and so does `timm.create_model("local-dir:FOLDER", pretrained=True)` where ofb is
    imported. Each file is written whole or not at all; config.json comes last.

    Args:
        model: a timm Vision Transformer, pruned or not.
        folder: made if it does not exist.

    Raises:
        ValueError: no family of this package knows the model.
    """
    network = describe(model)
    cfg = weights_cfg(model, pretrained_cfg(model) | data_config(model))
    labels = {key: cfg.pop(key) for key in LABELS if key in cfg}
    config = {
        "architecture": NAME,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {"network": network},
        **labels,
        "pretrained_cfg": cfg,
        "macs": count_macs(model),
        "params": count_params(model),
        "format": FORMAT,
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(Path(folder) / WEIGHTS, lambda file: file.write(save_tensors(weights)))
    write_text(Path(folder) / ARCHITECTURE, json.dumps(config, indent=2) + "\n")


def load(folder: str | Path) -> nn.Module:
    """Load what `save` saved: a plain timm model on the CPU, in eval mode.

    Raises:
        FileNotFoundError: the folder holds no saved network.
        ValueError: a file is damaged, or the two do not belong together.
    """
    folder = Path(folder)
    for name in (ARCHITECTURE, WEIGHTS):
        if not (folder / name).is_file():
            inside = ", ".join(sorted(str(path.parent) for path in folder.glob(f"*/{ARCHITECTURE}")))
            hint = f"; there are networks in {inside}" if inside else ""
            raise FileNotFoundError(f"folder: expected {WEIGHTS} and {ARCHITECTURE} in {folder}, found no {name}{hint}")
    try:
        network, known = _read(parse_json((folder / ARCHITECTURE).read_text()))
        described = on_meta(network)
        cfg = weights_cfg(described, known)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{folder / ARCHITECTURE} is damaged or was not written by ofb.save: {error}") from error
    here = {"source": "local-dir", "file": str(folder)}
    return timm.create_model(NAME, pretrained=True, network=network, pretrained_cfg=cfg | here).eval()


def _read(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes, and what is known of images and labels; earlier versions called them architecture and data."""
    if isinstance(config["architecture"], dict):
        return config["architecture"], config["data"]
    if config["architecture"] != NAME:
        raise ValueError(f"expected architecture {NAME}, got {config['architecture']!r}")
    return config["model_args"]["network"], config["pretrained_cfg"] | {k: config[k] for k in LABELS if k in config}
