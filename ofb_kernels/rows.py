"""A tensor as the matrix of its rows, which is what the kernels take."""

from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """(..., K) as (M, K), where either may be 0; a copy only where strides leave no other way."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
