"""A tensor as the matrix of its rows, which is what the kernels take."""

import math

from torch import Tensor


def count_rows(tensor: Tensor) -> int:
    """M of (..., K) as (M, K), also while compiling for any M, which `Size.numel()` would fix."""
    return math.prod(tensor.shape[:-1])


def as_rows(tensor: Tensor) -> Tensor:
    """(..., K) as (M, K), where either may be 0; a copy only where strides leave no other way."""
    return tensor.reshape(count_rows(tensor), tensor.shape[-1])


def few_rows(x: Tensor) -> bool:
    """Whether a linear layer of x (..., K) has its mask on the output (M, N) and not folded into the weight (N, K).

    Both read and write what they mask, forward and backward alike: the output is the smaller one if M < K.
    """
    return count_rows(x) < x.shape[-1]
