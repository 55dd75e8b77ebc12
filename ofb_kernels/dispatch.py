"""Which backend runs, and why.

Order of decision: the call's own `backend=`, the innermost `use_backend(...)`, the environment's
`OFB_KERNELS_BACKEND`, and without any of them, on a CUDA device, the faster of triton and eager by measurement
(`measured`), triton where nothing was measured and it supports the call; else eager.
A backend asked for by name either serves the call or raises; it is never replaced silently. `explain_backend` says
which backend serves a call and why.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ofb_kernels.measured import TABLE, capability_of, nearest, sizes_of

BACKENDS = ("reference", "eager", "triton")
BACKEND_VARIABLE = "OFB_KERNELS_BACKEND"  # in the environment
MOST_ROWS = 2**31 - 2**12  # the kernels count rows in 32 bits, a tile past the last one
_CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED_DTYPES = (torch.float32, torch.float16, torch.float64)  # Triton's interpreter computes garbage in bf16

# Triton reads this when a kernel is decorated, so it cannot change after import.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_requested: list[str] = []


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend.

    Args:
        backend: "reference", "eager" or "triton".

    Raises:
        ValueError: `backend` is none of these.
    """
    _check_name(backend, "backend")
    _requested.append(backend)
    try:
        yield
    finally:
        _requested.pop()


def choose_backend(op: str, backend: str | None, inputs: dict[str, Tensor], limits: str | None = None) -> str:
    """Name of the backend that serves this call.

    Args:
        op: name of the public op, for messages.
        backend: what the caller asked for, or None.
        inputs: the op's floating-point tensors by argument name.
        limits: why the Triton kernel of this op cannot take these sizes, or None where it can.

    Raises:
        ValueError: the name is unknown, or the backend asked for cannot serve the call.
    """
    return explain_backend(op, inputs, backend, limits)[0]


def explain_backend(
    op: str, inputs: dict[str, Tensor], backend: str | None = None, limits: str | None = None
) -> tuple[str, str]:
    """The backend that `choose_backend` names for these arguments, and in a few words why."""
    requested, source = _request(backend)
    if requested is None:
        return _automatic(op, inputs, limits)
    _check_name(requested, source)
    if requested == "triton":
        refusal = triton_refusal(inputs, limits)
        if refusal is not None:
            raise ValueError(
                f"{op}: {source}='triton' cannot serve this call: {refusal}. "
                "Use backend='eager', or leave the choice to the package."
            )
    return requested, f"asked for by {source}"


def triton_refusal(inputs: dict[str, Tensor], limits: str | None = None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None where they can."""
    if not has_triton():
        return "expected the package triton to be installed, got no such package"
    supported = _INTERPRETED_DTYPES if INTERPRETED else _CUDA_DTYPES
    for name, tensor in inputs.items():
        if not INTERPRETED and not tensor.is_cuda:
            return f"expected {name} on a CUDA device, got {tensor.device} (TRITON_INTERPRET=1 interprets on a CPU)"
        rows = tensor.shape[:-1].numel()
        if rows > MOST_ROWS:
            return f"expected {name} of at most {MOST_ROWS} rows, got {rows}"
        if tensor.dtype not in supported:
            return f"expected {name} as one of {', '.join(map(_short, supported))}, got {_short(tensor.dtype)}"
    return limits


def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _automatic(op: str, inputs: dict[str, Tensor], limits: str | None) -> tuple[str, str]:
    first = next(iter(inputs.values()))
    if not first.is_cuda:
        return "eager", "no CUDA device"
    refusal = triton_refusal(inputs, limits)
    if refusal is not None:
        return "eager", f"triton cannot serve it: {refusal}"
    if not TABLE:
        return "triton", "nothing was measured"
    capability = capability_of(first.device.index)
    backends = TABLE.get(capability, {}).get("backends", {})
    fastest = nearest(backends.get(op, ()), sizes_of(inputs))
    if fastest is None:
        return "triton", f"not measured on capability {capability}"
    return fastest, "measured faster at the nearest sizes"


def _request(backend: str | None) -> tuple[str | None, str]:
    if backend is not None:
        return backend, "backend"
    if _requested:
        return _requested[-1], "use_backend"
    return os.environ.get(BACKEND_VARIABLE) or None, BACKEND_VARIABLE


def _check_name(backend: str, source: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
