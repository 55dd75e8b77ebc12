"""Where and in which precision a run computes."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from ofb.engine.config import RunConfig
from ofb.engine.distributed import check_device


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


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager:
    """The config's mixed precision."""
    return torch.autocast(device.type, getattr(torch, config.amp_dtype), enabled=config.amp)


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
