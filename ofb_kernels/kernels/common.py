"""What every kernel file needs: how a launch is made, and the activations with their derivatives."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which on a second GPU is not the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. triton.cdiv, made to run in kernels too, takes the host 2 µs."""
    return -(-a // b)


def unit_rows(matrix: Tensor) -> Tensor:
    """The matrix with neighbours of a row side by side in memory; a copy only where they are not."""
    return matrix if matrix.stride(1) == 1 or matrix.numel() == 0 else matrix.contiguous()


def hidden_multiple(*sizes: int) -> int:
    """8, 4 or 2 if it divides all sizes and strides, but 1 if 16 does: a compiler that knows it reads 16 bytes at once.

    Triton itself tells multiples of 16 from others, and nothing between.
    """
    return 1 if all(size % 16 == 0 for size in sizes) else math.gcd(8, *sizes)


def accumulator_dtype(tensor: Tensor) -> tl.dtype:
    """float32 for everything but float64 (interpreter only)."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def dot_precision() -> str:
    """A float32 product uses TF32 only where the user has allowed it to torch as well."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def known_multiple(size, MULTIPLE: tl.constexpr):
    """The size or stride, seen by the compiler to be a multiple of what `hidden_multiple` has found."""
    return size // MULTIPLE * MULTIPLE


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x), elementwise, in x's own (accumulator) precision."""
    if ACTIVATION == "gelu":
        return x * _normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(2.0 * _gelu_tanh_argument(x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # NaN passes through, as in torch
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """act'(x)."""
    if ACTIVATION == "gelu":
        density = tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361593)  # exp(−x²/2) / √(2π)
        return _normal_cdf(x) + x * density
    elif ACTIVATION == "gelu_tanh":
        gate = tl.sigmoid(2.0 * _gelu_tanh_argument(x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return gate + x * gate * (1.0 - gate) * slope
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)  # NaN lets everything through, as in torch
    else:  # silu
        gate = tl.sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def _normal_cdf(x):
    """Φ(x) = ½(1 + erf(x / √2)).

    Outside float64 from 1 − Φ(|x|) = 2^q(|x|): q has degree 10, fitted to the least absolute error on [0, 6.5]. That is
    6·10⁻⁸, as much as float32 rounds, and takes fewer registers than erf, so that more blocks are resident.
    """
    if x.dtype == tl.float64:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        a = tl.abs(x)
        q = -2.07667692e-8 * a + 6.67497037e-7
        q = q * a - 9.09753117e-6
        q = q * a + 6.66861336e-5
        q = q * a - 2.49939562e-4
        q = q * a - 5.38329653e-5
        q = q * a + 7.00387529e-3
        q = q * a - 0.052474362
        q = q * a - 0.459211658
        q = q * a - 1.15110505
        tail = tl.exp2(q * a - 1.0)
        return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def _gelu_tanh_argument(x):
    """√(2/π)·(x + 0.044715·x³); ½(1 + tanh u) = sigmoid(2u)."""
    return 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
