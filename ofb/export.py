"""Saved networks: weights as safetensors, architecture as JSON; and ONNX. Loading executes nothing from the files."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from ofb.engine.checkpoint import write_atomically, write_text
from ofb.engine.data import data_config
from ofb.supernet.families import build, count_macs, describe

WEIGHTS, ARCHITECTURE = "model.safetensors", "config.json"
FORMAT = 1


def save(model: nn.Module, folder: str | Path) -> None:
    """Save a plain timm model: model.safetensors, and config.json with its architecture, cost and preprocessing.

    Each file is written whole or not at all; config.json comes last.

    Args:
        model: a timm Vision Transformer, pruned or not.
        folder: made if it does not exist.

    Raises:
        ValueError: no family of this package knows the model.
    """
    config = {
        "format": FORMAT,
        "architecture": describe(model),
        "macs": count_macs(model),
        "params": count_params(model),
        "data": data_config(model),
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
            raise FileNotFoundError(f"folder: expected {WEIGHTS} and {ARCHITECTURE} in {folder}, found no {name}")
    try:
        config = json.loads((folder / ARCHITECTURE).read_text())
        model = build(config["architecture"])
        data = {key: tuple(value) if isinstance(value, list) else value for key, value in config["data"].items()}
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{folder / ARCHITECTURE} is damaged or was not written by ofb.save: {error!r}") from error
    try:
        model.load_state_dict(load_tensors((folder / WEIGHTS).read_bytes()))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged or does not belong to its {ARCHITECTURE}: {str(error).splitlines()[0]}"
        ) from error
    model.pretrained_cfg = model.default_cfg = data
    return model.eval()


def export_onnx(model: nn.Module, path: str | Path) -> None:
    """Write a plain model as ONNX: input "images" (batch, C, H, W) of any batch size, output "logits".

    Args:
        model: a timm model.
        path: file to write, whole or not at all.

    Raises:
        ModuleNotFoundError: the package's extra [export] is not installed.
    """
    device = next(model.parameters()).device
    images = torch.zeros(2, *data_config(model)["input_size"], device=device)
    was_training = model.training
    program = torch.onnx.export(
        model.eval(),
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", max=2**20)},),
        dynamo=True,
        verbose=False,
    )
    model.train(was_training)
    write_atomically(path, lambda file: file.write(program.model_proto.SerializeToString()))


def count_params(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
