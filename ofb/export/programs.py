"""A network as one file that runs without this package and without timm: ONNX, or a torch.export program.

Each file is read back and compared with the network before it takes its place.
"""

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ofb.engine.checkpoint import write_atomically
from ofb.engine.class_names import label_names
from ofb.engine.data import data_config
from ofb.export.sizes import count_params

ONNX_FILE, PROGRAM_FILE = "model.onnx", "model.pt2"  # beside the network
LARGEST_BATCH = 2**20
TOLERANCE = 1e-4  # of logits, relative where they are greater than 1
CHECKED_BATCHES = (1, 3)
LABEL_NAMES = "label_names"  # in the metadata of ONNX
ONNX_LIMIT = 2**31  # bytes in a protobuf message


def export_onnx(model: nn.Module, path: str | Path) -> float:
    """Write a plain model as ONNX: input "images" (batch, C, H, W) of any batch size, output "logits".

    Where the names of the classes are known, they stand in the file's metadata as `label_names`, a JSON list.

    Args:
        model: a timm model.
        path: file to write, whole or not at all.

    Returns:
        The largest difference between onnxruntime's logits and the model's.

    Raises:
        ModuleNotFoundError: the package's extra [export] is not installed.
        ValueError: the model is too large for a file of ONNX, or onnxruntime computes something else.
    """
    onnxruntime = _import_onnxruntime()
    if count_params(model) * next(model.parameters()).element_size() >= ONNX_LIMIT:
        raise ValueError("onnx: expected weights below 2 GiB, the most that a file holds; export a program instead")
    with _in_eval(model), warnings.catch_warnings():  # of what torch does to itself
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.onnx.export(
            model,
            (_images(model, 2),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_any_batch(),
            dynamo=True,
            verbose=False,
        )
        names = label_names(model)
        if names:
            exported.model.metadata_props[LABEL_NAMES] = json.dumps(names, ensure_ascii=False)
        data = exported.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        difference = _difference(
            model, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])
        )
    write_atomically(path, lambda file: file.write(data))
    return difference


def export_program(model: nn.Module, path: str | Path) -> float:
    """Write a plain model as a torch program, which torch alone runs, on the device the model is on now.

    `torch.export.load(path).module()` takes images (batch, C, H, W) of any batch size and gives logits.

    Args:
        model: a timm model.
        path: file to write, whole or not at all; by custom it ends in .pt2.

    Returns:
        The largest difference between the program's logits and the model's.

    Raises:
        ValueError: the program computes something else.
    """
    with _in_eval(model):
        program = torch.export.export(model, (_images(model, 2),), dynamic_shapes=_any_batch())
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names this machine's folders
        data = io.BytesIO()
        torch.export.save(program, data)
        with warnings.catch_warnings():  # of tensors that lie in a read-only buffer, which nobody writes to
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            difference = _difference(model, torch.export.load(io.BytesIO(data.getvalue())).module())
    write_atomically(path, lambda file: file.write(data.getbuffer()))
    return difference


def _import_onnxruntime() -> ModuleType:
    """onnxruntime, which from its import on tells its makers of the machine, unless it is told not to."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: ONNX needs the extra [export]: pip install 'ofb-kernels[export]'", name=error.name
        ) from error
    return onnxruntime


@torch.no_grad()
def _difference(model: nn.Module, run: Callable[[Tensor], Tensor]) -> float:
    """The largest difference from the model's logits, relative where these are greater than 1.

    Raises:
        ValueError: it is too large.
    """
    worst = 0.0
    for batch in CHECKED_BATCHES:
        images = _images(model, batch)
        expected = model(images)
        difference = (run(images).to(expected) - expected).abs() / expected.abs().clamp(min=1)
        worst = max(worst, float(difference.max()))
    if not worst <= TOLERANCE:
        raise ValueError(f"export: expected the network's logits within {TOLERANCE}, got a difference of {worst:.2g}")
    return worst


def _images(model: nn.Module, batch: int) -> Tensor:
    """(batch, C, H, W) of noise, as normalized images have it; the global generators stay as they are."""
    weight = next(model.parameters())
    noise = torch.randn(batch, *data_config(model)["input_size"], generator=torch.Generator().manual_seed(batch))
    return noise.to(weight)


def _any_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch", max=LARGEST_BATCH)},)


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
