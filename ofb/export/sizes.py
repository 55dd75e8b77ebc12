"""How large a network is, and whether one may be made: checked before memory is taken for it."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ofb.supernet.families import build

WEIGHTS = "model.safetensors"
LARGEST_TABLES = 2**28  # numbers a network computes when it is made, such as attention masks; Swin-L has 2**22


def count_params(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(network: dict) -> nn.Module:
    """A described network on the meta device, where it takes no memory.

    Args:
        network: as `families.describe` gives it; may come from a stranger's file.

    Raises:
        ValueError: no network has these sizes, or what it would compute when it is made fills the memory.
    """
    try:
        with torch.device("meta"):
            model = build(network)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ValueError(f"network: expected sizes as ofb.save writes them, got others: {error!r}") from error
    saved = model.state_dict().keys()
    tables = sum(buffer.numel() for name, buffer in model.named_buffers() if name not in saved)
    if tables > LARGEST_TABLES:
        raise ValueError(f"network: expected tables of at most {LARGEST_TABLES:,} numbers in all, got {tables:,}")
    return model


def check_weights(model: nn.Module, path: Path) -> None:
    """Raise ValueError where saved weights are not those of a model; only their header is read.

    Args:
        model: may be on the meta device.
        path: of the safetensors file.

    Raises:
        ValueError: the weights are damaged, or their names and shapes are others.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            raise ValueError(
                f"{path} does not belong to its config.json: {name}: expected {expected.get(name, 'none')}, "
                f"got {shapes.get(name, 'none')}"
            )
