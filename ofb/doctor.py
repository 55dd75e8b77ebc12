"""What of the stack is here, which backend each op takes and why, and whether it computes what it should."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterator

import torch

import ofb_kernels
from ofb.engine.config import TrainingConfig
from ofb.engine.device import describe_precision, no_cuda_graph
from ofb_kernels.dispatch import BACKEND_VARIABLE, choose_backend, triton_refusal
from ofb_kernels.testing import check_op

PACKAGE = "ofb-kernels"
EXTRAS = ("cli", "export", "transformers")  # what a user may leave out
UNITS, WIDTH, TOKENS = 48, 32, 17  # of the sizes that are checked


def diagnose(device: torch.device) -> tuple[str, bool]:
    """What there is to know, as text, and whether all of it is well.

    Args:
        device: where the ops are checked.
    """
    lines = [f"python {platform.python_version()}   " + "   ".join(_versions("torch", "triton", "timm"))]
    lines += [f"device  {_described(device)}", f"steps   {_steps(device)}", *_extras()]
    lines.append(f"ops     {_reason(device)}")
    well = True
    for op, backend, error in _checks(device):
        well = well and error is None
        lines.append(f"        {op:20} {backend:9} " + ("agrees with float64" if error is None else error))
    lines.append("all is well" if well else "something is wrong: see above")
    return "\n".join(lines), well


def _reason(device: torch.device) -> str:
    """Why the ops take the backend they do."""
    if os.environ.get(BACKEND_VARIABLE):
        return f"run on the backend that {BACKEND_VARIABLE} names"
    refusal = triton_refusal({"the tensors": torch.empty(1, device=device)})
    if refusal is not None:
        return f"do not run on triton: {refusal}"
    if device.type != "cuda":
        return "run on triton where backend='triton' asks for it, interpreted"
    return "run on triton, or on what was measured to be faster on this card (ofb_kernels/measured.json)"


def _steps(device: torch.device) -> str:
    """How training steps run here where no option says otherwise."""
    config = TrainingConfig(device=str(device))
    reason = no_cuda_graph(config, device)
    graph = "as a CUDA graph" if reason is None else f"without a CUDA graph: {reason}"
    return f"by default in {describe_precision(config, device)}, {graph}"


def _versions(*packages: str) -> Iterator[str]:
    for package in packages:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package} not installed"


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        reason = "" if torch.cuda.is_available() else "; torch sees no GPU (torch.cuda.is_available() is False)"
        return f"{device}, {torch.get_num_threads()} threads{reason}"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{device}, {properties.name}, capability {properties.major}.{properties.minor}, {memory:.0f} GiB"


def _extras() -> Iterator[str]:
    """A line for each extra of this package: what of it is installed, and how to get the rest."""
    requirements = importlib.metadata.requires(PACKAGE) or []
    for extra in EXTRAS:
        names = [
            re.match(r"[\w.-]+", each).group() for each in requirements if re.search(f"extra == .{extra}\\W", each)
        ]
        found = list(_versions(*names))
        missing = any(each.endswith("not installed") for each in found)
        advice = f'   (pip install "{PACKAGE}[{extra}]")' if missing else ""
        yield f"extra   {extra}: {', '.join(found)}{advice}"


def _checks(device: torch.device) -> Iterator[tuple[str, str, str | None]]:
    """Each op with the backend that serves it here, forward and backward against float64: what was wrong, or None."""
    for op, inputs, options, reduction in _examples(device):
        backend = choose_backend(op.__name__, None, inputs)
        try:
            check_op(op, inputs, options, backend, reduction)
            yield op.__name__, backend, None
        except Exception as error:  # whatever it is, it is what the user wants to know
            yield op.__name__, backend, f"failed: {str(error).splitlines()[0]}"


def _examples(device: torch.device) -> Iterator[tuple[Callable, dict, dict, int]]:
    """An op, small random inputs, options, and the length of its longest reduction."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def mask(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    x, hidden, rows = random(2, TOKENS, WIDTH), UNITS, 2 * TOKENS
    fc1 = {"weight": random(hidden, WIDTH), "bias": random(hidden), "mask": mask(hidden)}
    yield ofb_kernels.masked_linear, {"x": x, **fc1}, {"activation": "gelu"}, rows
    mlp = {"fc1_weight": fc1["weight"], "fc1_bias": fc1["bias"], "mask": fc1["mask"]}
    mlp |= {"fc2_weight": random(WIDTH, hidden), "fc2_bias": random(WIDTH)}
    yield ofb_kernels.masked_mlp, {"x": x, **mlp}, {}, hidden
    attention = {"qkv": random(2, TOKENS, 3, 2, 16), "mask": mask(2, 16)}
    yield ofb_kernels.masked_attention, attention, {}, 3 * rows
    norm = {"weight": random(WIDTH), "bias": random(WIDTH), "mask": mask(WIDTH)}
    yield ofb_kernels.masked_layer_norm, {"x": x, **norm}, {}, rows
