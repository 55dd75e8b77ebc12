"""Keeping autocast away from what must be computed in float32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Context in which operations on the tensor's device keep their dtypes; the meta device knows no autocast."""
    device = tensor.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
