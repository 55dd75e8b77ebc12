"""Where and in which precision a run computes, and whether its steps become a CUDA graph."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from ofb.engine.config import RunConfig, TrainingConfig
from ofb.engine.distributed import check_device, in_job

Config = TypeVar("Config", bound=RunConfig)


def pick_device(config: RunConfig) -> torch.device:
    """The device of a config; the GPU where there is one if it names none.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected one of this machine such as cpu, got {config.device!r} ({reason})"
        ) from error
    check_device(device)
    return device


def uses_amp(config: RunConfig, device: torch.device) -> bool:
    """Whether precision is mixed: as `amp` says, or else on a GPU that computes in `amp_dtype`."""
    if config.amp is not None:
        return config.amp
    return device.type == "cuda" and (config.amp_dtype != "bfloat16" or _has_bfloat16(device))


def with_precision(config: Config) -> Config:
    """The config with `amp` decided, so that a run that is resumed elsewhere keeps its precision."""
    return config if config.amp is not None else replace(config, amp=uses_amp(config, pick_device(config)))


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager:
    """The config's mixed precision."""
    return torch.autocast(device.type, getattr(torch, config.amp_dtype), enabled=uses_amp(config, device))


def describe_precision(config: RunConfig, device: torch.device) -> str:
    """bf16, fp16 or fp32, and why not bf16 where a GPU lacks it."""
    if uses_amp(config, device):
        return {"bfloat16": "bf16", "float16": "fp16"}[config.amp_dtype]
    lacks_it = config.amp is None and device.type == "cuda"
    return "fp32 (this GPU has no bfloat16: capability 8.0 or above has)" if lacks_it else "fp32"


def no_cuda_graph(config: TrainingConfig, device: torch.device) -> str | None:
    """Why training steps do not run as a CUDA graph; None where they do: as `cuda_graph` says, or else where they can.

    With `deterministic` they do only where `cuda_graph` asks for it.
    """
    if config.cuda_graph is False:
        return "--no-cuda-graph"
    reasons = {
        f"the device is {device.type}": device.type != "cuda",
        "float16 loss scaling decides on the host": uses_amp(config, device) and config.amp_dtype == "float16",
        f"only adamw can be captured, not {config.opt}": config.opt != "adamw",
        "the processes of a job exchange gradients": in_job(),
        "--deterministic": config.deterministic and config.cuda_graph is None,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 itself; older ones emulate it, slowly."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def determinism(config: RunConfig) -> Iterator[None]:
    """Within the block the same call gives the same bits, if the config asks for it; an op that cannot raises."""
    if not config.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
