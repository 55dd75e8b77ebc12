"""Whoever uses one output of an op pays for no gradient of the others: no zeros are made in their place."""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import ofb_kernels

LINEAR = {"x": (3, 5, 8), "weight": (12, 8), "bias": (12,), "mask": (12,)}
FC1 = {"x": (3, 5, 8), "fc1_weight": (12, 8), "fc1_bias": (12,), "mask": (12,)}
NORM = {"x": (3, 5, 8), "weight": (8,), "bias": (8,), "mask": (8,)}
SHAPES = {
    "bimask": {"score": (2, 3, 4), "alpha": (2, 3, 2)},
    "masked_linear": LINEAR,
    "masked_linear without mask": {name: shape for name, shape in LINEAR.items() if name != "mask"},
    "masked_mlp": FC1 | {"fc2_weight": (8, 12), "fc2_bias": (8,)},
    "masked_attention": {"qkv": (2, 5, 3, 2, 4), "mask": (2, 4), "bias": (2, 5, 5)},
    "masked_qkv_attention": {"x": (2, 5, 8), "weight": (24, 8), "bias": (24,), "mask": (2, 4)},
    "masked_layer_norm": NORM,
    "masked_add_layer_norm": NORM | {"branch": (3, 5, 8), "branch_mask": (8,)},
}
OUTPUTS = [(op, 0) for op in SHAPES] + [("masked_add_layer_norm", 1)]


def make_inputs(op: str, device: str) -> dict[str, Tensor]:
    return {name: torch.rand(shape, device=device, requires_grad=True) for name, shape in SHAPES[op].items()}


def output_of(op: str, used: int, device: str) -> Callable[..., Tensor]:
    """One of the op's outputs as a function of its inputs, on the Triton kernels."""
    name, *without = op.split(" without ")
    options = dict.fromkeys(without)
    if op == "bimask":
        counts = [[1, 2, 3]] * 2, [[2, 4]] * 2
        options = {"counts": tuple(torch.tensor(each, device=device) for each in counts), "lam": 0.5}

    def output(**inputs: Tensor) -> Tensor:
        result = getattr(ofb_kernels, name)(**inputs, **options, backend="triton")
        return result[used] if isinstance(result, tuple) else result

    return output


class RecordZeros(TorchDispatchMode):
    """The shapes of all tensors of zeros, or of another constant, that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if makes_a_constant(function):
            self.shapes.append(tuple(result.shape))
        return result


def makes_a_constant(function: object) -> bool:
    return any(word in str(function) for word in ("zero", "full", "fill"))


@pytest.mark.parametrize(("op", "used"), OUTPUTS)
def test_backward_makes_no_zeros(op, used, device):
    inputs = make_inputs(op, device)
    result = output_of(op, used, device)(**inputs)
    cotangent = torch.rand_like(result)
    with RecordZeros() as record:
        torch.autograd.grad(result, inputs.values(), cotangent, allow_unused=True)
    assert record.shapes == []


@pytest.mark.parametrize(("op", "used"), OUTPUTS)
def test_compiled_backward_makes_no_zeros(op, used, device):
    calls = []

    def record(graph, example_inputs):
        calls.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.compiler.reset()  # to a compiler all cases are one function, which it takes eight times
    inputs = make_inputs(op, device)
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=record)
    result = torch.compile(output_of(op, used, device), fullgraph=True, backend=backend)(**inputs)
    torch.autograd.grad(result, inputs.values(), torch.rand_like(result), allow_unused=True)
    assert any("ofb_kernels" in str(call) for call in calls)
    assert not any(makes_a_constant(call) for call in calls)


class WithoutGradient(torch.autograd.Function):
    """The identity, which hands no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize(("op", "used"), OUTPUTS)
def test_no_gradient_in_none_out(op, used, device):
    inputs = make_inputs(op, device)
    result = WithoutGradient.apply(output_of(op, used, device)(**inputs)).sum()
    assert torch.autograd.grad(result, inputs.values(), allow_unused=True) == (None,) * len(inputs)


def test_zeros_are_noticed():
    """The recorder sees what autograd fills in for an output that nobody uses."""

    class TwoOutputs(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone(), x.new_ones(7)

        @staticmethod
        def backward(ctx, grad, _grad_unused):
            return grad

    x = torch.ones(3, requires_grad=True)
    result, _ = TwoOutputs.apply(x)
    with RecordZeros() as record:
        torch.autograd.grad(result, x, torch.ones(3))
    assert record.shapes == [(7,)]
