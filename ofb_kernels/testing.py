"""Tolerances derived from errors, for tests of these ops and of whatever is built on them.

A result is accurate when its error against float64 is explained by three things: twice the error that plain PyTorch
makes in the same dtype on the same inputs, what rounding the inputs again would change, and the rounding of a
reduction of that length. No tolerance is set by hand.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PERTURBATIONS = 4  # one draw can leave a small result unchanged by luck
ROUNDINGS = 4  # product, bias, mask and activation each round once, any of them as badly as an input was rounded


def error_bound(exact: Tensor, same_dtype: Tensor, perturbed: list[Tensor], reduction: int) -> float:
    """Largest absolute error that counts as accurate.

    Args:
        exact: the float64 result.
        same_dtype: plain PyTorch's result in the dtype under test.
        perturbed: float64 results for inputs moved by up to one eps of that dtype.
        reduction: number of terms added up for one element of the result.

    Returns:
        2·max|same_dtype − exact| + ROUNDINGS·max|perturbed − exact| + eps·√reduction·max|exact|.
    """
    if exact.numel() == 0:
        return 0.0
    made_by_torch = _distance(same_dtype, exact)
    made_by_inputs = max(_distance(other, exact) for other in perturbed)
    rounding = torch.finfo(same_dtype.dtype).eps * reduction**0.5 * exact.abs().max().item()
    return 2 * made_by_torch + ROUNDINGS * made_by_inputs + rounding


def assert_accurate(name: str, actual: Tensor, exact: Tensor, dtype: torch.dtype, bound: float) -> float:
    """Assert shape and dtype, and that `actual` lies within `bound` of `exact`; NaN and infinities never pass.

    Returns:
        The error as a share of the bound.

    Raises:
        AssertionError: names the result, what was expected and what was got.
    """
    assert actual.shape == exact.shape, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == dtype, f"{name}: expected dtype {dtype}, got {actual.dtype}"
    if actual.numel() == 0:
        return 0.0
    error = _distance(actual, exact)
    assert error <= bound, f"{name}: error {error:.3e} against float64 exceeds the bound {bound:.3e}"
    return error / bound if error else 0.0


def check_op(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    options: dict,
    backend: str,
    reduction: int,
    cotangent: Tensor | None = None,
) -> float:
    """Check an op's result and all its gradients on one backend against the float64 reference.

    Args:
        op: a public op of this package. Several results count as one, joined along their last dimension; of an op
            without gradients the result alone is checked.
        inputs: its tensor arguments in the dtype, strides and on the device under test; floating-point ones are
            differentiated. The float64 run takes the same rounded values, so input rounding is no error.
        options: its other arguments.
        backend: the backend under test.
        reduction: terms added up for one element of any result (rows for weight gradients); the longest counts.
        cotangent: the gradient of the op's result, random where None.

    Returns:
        The largest error, as a share of its bound.

    Raises:
        AssertionError: a result or gradient is not accurate.
    """
    dtype = next(tensor.dtype for tensor in inputs.values() if tensor.is_floating_point())
    if cotangent is None:
        with torch.no_grad():
            shape = _joined(op(**inputs, **options, backend="reference")).shape
        cotangent = torch.randn(shape, device=next(iter(inputs.values())).device).to(dtype)

    def run(run_backend: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
        result = _joined(op(**leaves, **options, backend=run_backend))
        if not result.requires_grad:
            return {"result": result}
        differentiable = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(result, list(differentiable.values()), cotangent.to(result.dtype))
        return {"result": result.detach()} | {f"grad_{n}": g for n, g in zip(differentiable, gradients, strict=True)}

    exact_inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    actual, same_dtype, exact = run(backend, inputs), run("reference", inputs), run("reference", exact_inputs)
    eps = torch.finfo(dtype).eps
    perturbed = [run("reference", _perturb(exact_inputs, eps)) for _ in range(PERTURBATIONS)]
    shares = []
    for name in actual:
        bound = error_bound(exact[name], same_dtype[name], [results[name] for results in perturbed], reduction)
        shares.append(assert_accurate(f"{backend} {name}", actual[name], exact[name], same_dtype[name].dtype, bound))
    return max(shares)


def _joined(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat(result, -1) if isinstance(result, tuple) else result


def _perturb(inputs: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    return {n: t * (1 + eps * (2 * torch.rand_like(t) - 1)) if t.is_floating_point() else t for n, t in inputs.items()}


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()
