"""How large a network is, and whether one may be made: checked before memory is taken for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ofb.supernet.families import build

WEIGHTS = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
MOST_ENTRIES = 2000  # of a description; a network of 64 blocks has 300
LARGEST_TABLES = 2**28  # numbers a network computes when it is made, such as attention masks; Swin-L has 2**22
LARGEST_UNSAVED = 2**29  # numbers that no file of weights holds


def count_params(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(network: Mapping[str, Any], runs: bool = True) -> nn.Module:
    """A described network on the meta device, where it takes no memory.

    Args:
        network: as `families.describe` gives it; may come from a stranger's file.
        runs: whether it has to take images there.

    Raises:
        ValueError: no network has these sizes, or what it would compute when it is made fills the memory.
    """
    _check_entries(network)
    try:
        with torch.device("meta"), torch.no_grad():
            model = build(network)
            if runs:
                model.eval()(torch.empty(1, network["in_chans"], *network["img_size"]))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ValueError(f"network: expected sizes as ofb.save writes them, got others: {error!r}") from error
    saved = model.state_dict().keys()
    tables = sum(buffer.numel() for name, buffer in model.named_buffers() if name not in saved)
    if tables > LARGEST_TABLES:
        raise ValueError(f"network: expected tables of at most {LARGEST_TABLES:,} numbers in all, got {tables:,}")
    return model


def check_unsaved(numbers: int) -> None:
    """Raise ValueError where a network has too many parameters that no file of weights holds."""
    if numbers > LARGEST_UNSAVED:
        raise ValueError(
            f"network: expected at most {LARGEST_UNSAVED:,} parameters beyond those in {WEIGHTS}, got {numbers:,}"
        )


def check_weights(model: nn.Module, path: Path) -> None:
    """Raise ValueError where saved weights are not those of a model; only their header is read.

    Args:
        model: may be on the meta device.
        path: of the safetensors file.

    Raises:
        ValueError: the weights are damaged, or their names, shapes and kinds of numbers are others.
    """
    expected = {name: (tuple(t.shape), t.is_floating_point()) for name, t in model.state_dict().items()}
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (tuple(each.get_shape()), each.get_dtype() in FLOATS) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{path} does not belong to its config.json: {name}: expected {_described(expected.get(name))}, "
                f"got {_described(found.get(name))}"
            )


def _described(tensor: tuple[tuple[int, ...], bool] | None) -> str:
    return "none" if tensor is None else f"{tensor[0]}" if tensor[1] else f"{tensor[0]} of whole numbers"


def _check_entries(network: Mapping[str, Any]) -> None:
    """Raise ValueError where a description is too long, or has numbers that are not finite or past 64 bits."""
    waiting, entries = [network], 0
    while waiting:
        entry = waiting.pop()
        entries += 1
        if entries > MOST_ENTRIES:
            raise ValueError(f"network: expected a description of at most {MOST_ENTRIES} entries, got more")
        if isinstance(entry, int | float) and not abs(entry) < 2**63:
            raise ValueError("network: expected finite numbers of at most 64 bits, got others")
        waiting += entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, list | tuple) else ()
