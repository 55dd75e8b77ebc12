"""The Triton backend's functions: straight where nothing looks, ops of torch's library where something does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ofb_kernels.ops.library import library_op

calls = []


@library_op("test_twice")
def twice(x: torch.Tensor, keep: bool) -> torch.Tensor:
    calls.append(x)
    return 2 * x


@twice.register_fake
def _(x, keep):
    return torch.empty_like(x)


def _backward(ctx, grad_out):
    return 2 * grad_out, None


twice.register_autograd(_backward, setup_context=lambda ctx, inputs, output: None)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def test_straight_where_nothing_looks(device):
    x = torch.randn(3, device=device, requires_grad=True)
    out = twice(x, True)
    out.sum().backward()
    assert calls[0] is x
    assert type(out.grad_fn).__name__ == "test_twiceBackward"  # no op of the library's
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_a_dispatch_mode_sees_the_op(device):
    x = torch.randn(3, device=device, requires_grad=True)
    with Seen() as seen:
        out = twice(x, True)
    assert seen.names[0] == "ofb_kernels::test_twice"
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full_like(x, 2))


def test_fake_and_meta_tensors_take_the_fake(device):
    with FakeTensorMode():
        assert twice(torch.randn(3, device=device), True).shape == (3,)
    assert twice(torch.randn(3, device="meta"), True).is_meta
    assert calls == []


def test_a_compiler_sees_the_op(device):
    graphs = []

    def look(module, _):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module

    x = torch.randn(3, device=device, requires_grad=True)
    out = torch.compile(lambda x: twice(x, True) + 1, fullgraph=True, backend=look)(x)
    assert "ofb_kernels.test_twice" in graphs[0]
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full_like(x, 2))


def test_a_transform_sees_the_op(device):
    """vmap calls it for one sample after the other; called straight it would get a wrapper of all."""
    x = torch.randn(2, 3, device=device)
    assert torch.equal(torch.func.vmap(lambda x: twice(x, True))(x), 2 * x)
    assert [tuple(each.shape) for each in calls] == [(3,), (3,)]
