"""What of the stack is here, which backend each op takes and why, and whether it computes what it should."""

import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterator

import torch

import ofb_kernels
from ofb.engine.config import TrainingConfig
from ofb.engine.device import describe_precision, no_cuda_graph
from ofb_kernels.dispatch import explain_backend
from ofb_kernels.testing import check_op

PACKAGE = "ofb-kernels"
EXTRAS = ("cli", "export", "transformers")  # what a user may leave out
UNITS, WIDTH, TOKENS, WINDOW = 48, 32, 17, 5  # of the sizes that are checked


def diagnose(device: torch.device) -> tuple[str, bool]:
    """What there is to know, as text, and whether all of it is well.

    Args:
        device: where the ops are checked.
    """
    lines = [f"python {platform.python_version()}   " + "   ".join(_versions("torch", "triton", "timm"))]
    lines += [f"device  {_described(device)}", f"steps   {_steps(device)}", *_extras()]
    lines.append("ops     the backend that each takes by default, here for small inputs, and why")
    well = True
    for op, chosen, error in _checks(device):
        well = well and error is None
        lines.append(f"        {op:26} {chosen}" + ("" if error is None else f"; {error}"))
    lines += ["        each agrees with float64, forward and backward"] if well else []
    lines.append("all is well" if well else "something is wrong: see above")
    return "\n".join(lines), well


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
    """Each op, which backend serves it here and why, and what was wrong with it forward or backward, or None."""
    for op, inputs, options, reduction in _examples(device):
        backend, reason = explain_backend(op.__name__, inputs)
        chosen = f"{backend}: {reason}"
        try:
            check_op(op, inputs, options, backend, reduction)
            yield op.__name__, chosen, None
        except Exception as error:  # whatever it is, it is what the user wants to know
            yield op.__name__, chosen, f"failed: {str(error).splitlines()[0]}"


def _examples(device: torch.device) -> Iterator[tuple[Callable, dict, dict, int]]:
    """An op, small random inputs, options, and the length of its longest reduction."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def mask(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    x, hidden, rows = random(2, TOKENS, WIDTH), UNITS, 2 * TOKENS
    score = {"score": random(2, 16), "alpha": random(2, 3)}
    yield ofb_kernels.bimask, score, {"counts": ([1, 2], [4, 8, 16]), "lam": 0.5}, score["score"].numel()
    sizes = torch.tensor([[4, 8, 16]] * 2, device=device)
    options = {"alive": torch.ones_like(sizes, dtype=torch.bool), "heads": sizes // 4, "units": sizes}
    yield ofb_kernels.candidate_statistics, {"alpha": random(2, 3)}, options, sizes.shape[1]
    fc1 = {"weight": random(hidden, WIDTH), "bias": random(hidden), "mask": mask(hidden)}
    yield ofb_kernels.masked_linear, {"x": x, **fc1}, {"activation": "gelu"}, rows
    mlp = {"fc1_weight": fc1["weight"], "fc1_bias": fc1["bias"], "mask": fc1["mask"]}
    mlp |= {"fc2_weight": random(WIDTH, hidden), "fc2_bias": random(WIDTH)}
    yield ofb_kernels.masked_mlp, {"x": x, **mlp}, {}, hidden
    attention = {"qkv": random(2, TOKENS, 3, 2, 16), "mask": mask(2, 16)}
    yield ofb_kernels.masked_attention, attention, {}, 3 * rows
    projection = {"weight": random(3 * 2 * 16, WIDTH) / WIDTH**0.5, "bias": random(3 * 2 * 16), "mask": mask(2, 16)}
    yield ofb_kernels.masked_qkv_attention, {"x": x, **projection}, {}, 3 * rows
    norm = {"weight": random(WIDTH), "bias": random(WIDTH), "mask": mask(WIDTH)}
    yield ofb_kernels.masked_layer_norm, {"x": x, **norm}, {}, rows
    branch = {"branch": random(2, TOKENS, WIDTH), "branch_mask": mask(WIDTH)}
    yield ofb_kernels.masked_add_layer_norm, {"x": x, **branch, **norm}, {}, rows
    yield ofb_kernels.local_norm, {"images": random(2, 3, 16, 16)}, {"window": WINDOW}, WINDOW**2
    options = {"images": random(2, 3, 16, 24), "areas": torch.tensor([[0, 5], [3, 1]], device=device)}
    options |= {"masked": torch.tensor([True, False], device=device), "pixels": (8, 8), "window": WINDOW}
    yield ofb_kernels.masked_reconstruction_loss, {"decoded": random(2, 2, 3 * 8 * 8)}, options, 2 * 3 * 8 * 8
