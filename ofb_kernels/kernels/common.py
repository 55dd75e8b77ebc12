"""What every kernel file needs: how a launch is made, and the activations with their derivatives."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which on a second GPU is not the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def accumulator_dtype(tensor: Tensor) -> tl.dtype:
    """float32 for everything but float64 (interpreter only)."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def dot_precision() -> str:
    """A float32 product uses TF32 only where the user has allowed it to torch as well."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x), elementwise, in x's own (accumulator) precision."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(2.0 * _gelu_tanh_argument(x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # NaN passes through, as in torch
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def activation_backward(grad, x, ACTIVATION: tl.constexpr):
    """grad ⊙ act'(x)."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return grad * (cdf + x * density)
    elif ACTIVATION == "gelu_tanh":
        gate = tl.sigmoid(2.0 * _gelu_tanh_argument(x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return grad * (gate + x * gate * (1.0 - gate) * slope)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, grad)  # as in torch NaN passes through, but nothing past an x ≤ 0
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        return grad * (gate * (1.0 + x * (1.0 - gate)))
    else:
        return grad


@triton.jit
def _gelu_tanh_argument(x):
    """√(2/π)·(x + 0.044715·x³); ½(1 + tanh u) = sigmoid(2u)."""
    return 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
