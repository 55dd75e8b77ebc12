"""Argument checks shared by the public ops. Each message names the argument, what was expected and what was got."""

import torch
from torch import Tensor

MOST_CANDIDATES = 4096  # the kernels hold all of a submodule's at once
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def present(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that were given."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Every argument is a dense floating-point tensor, all on one device; only a bias may be None."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None and name.endswith("bias"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} as a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{op}: expected {name} as a floating-point tensor, got {tensor.dtype}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"{op}: expected {name} as a dense tensor, got {tensor.layout}; use to_dense()")
        if device is not None and tensor.device != device:
            raise ValueError(f"{op}: expected every tensor on {device}, got {name} on {tensor.device}; move it there")
        device = tensor.device


def check_shape(op: str, name: str, tensor: Tensor | None, *expected: int | str) -> None:
    """The shape is `expected`; a string stands for a dimension of any size, "..." for any leading dimensions."""
    if tensor is None or tensor.shape == expected:
        return
    sizes = expected[1:] if expected and expected[0] == "..." else expected
    tail = tensor.shape[tensor.dim() - len(sizes) :] if len(sizes) else ()
    right_rank = tensor.dim() >= len(sizes) if sizes is not expected else tensor.dim() == len(sizes)
    if not right_rank or any(isinstance(e, int) and e != got for e, got in zip(sizes, tail, strict=True)):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{op}: expected {name} of shape ({wanted}), got {tuple(tensor.shape)}")


def check_choice(op: str, name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{op}: expected {name} as one of {', '.join(map(repr, choices))}, got {value!r}")


def check_alive(op: str, alive: Tensor, alpha: Tensor, leading: int) -> None:
    """A bool for each candidate, and one that is alive in each submodule, of which alpha's leading dimensions tell."""
    if not isinstance(alive, Tensor) or alive.dtype != torch.bool:
        raise TypeError(f"{op}: expected alive as a bool tensor, got {getattr(alive, 'dtype', type(alive).__name__)}")
    check_shape(op, "alive", alive, *alpha.shape)
    if alive.device != alpha.device:
        raise ValueError(f"{op}: expected alive on {alpha.device}, got {alive.device}; move it there")
    if on_host(alive) and not alive.flatten(leading).any(-1).all():
        raise ValueError(f"{op}: expected alive with at least one candidate of each submodule, got none")


def candidate_limit(candidates: int) -> str | None:
    """Why the kernels cannot take a submodule of so many candidates, or None where they can."""
    too_many = f"expected at most {MOST_CANDIDATES} candidates, got {candidates}"
    return too_many if candidates > MOST_CANDIDATES else None


def on_host(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device, or for a compiler that has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_eps(op: str, eps: float) -> None:
    if not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: expected eps as a float, got {type(eps).__name__}")
    if not eps >= 0:  # NaN is not
        raise ValueError(f"{op}: expected eps >= 0, got {eps}")


def check_window(op: str, window: int) -> None:
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"{op}: expected window as an odd positive int, got {window!r}")


def compute_dtype(op: str, x: Tensor, **weights: Tensor | None) -> torch.dtype:
    """The dtype the op computes in and returns: autocast's where it is on, else x's, which the weights must share.

    The mask may have any floating dtype: it is multiplied in at accumulator precision.
    """
    knows_autocast = x.device.type != "meta" and x.dtype != torch.float64
    if knows_autocast and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    for name, weight in weights.items():
        if weight is not None and weight.dtype != x.dtype:
            raise TypeError(
                f"{op}: expected {name} of x's dtype {x.dtype}, got {weight.dtype}; convert it, or use torch.autocast"
            )
    return x.dtype


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward can follow, so that the forward has to keep what it needs."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
