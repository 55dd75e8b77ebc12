"""eager: masked_qkv_attention with dq, dk and dv multiplied where they lie, the form that a GPU takes."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from ofb_kernels import eager
from ofb_kernels.ops.masked_attention import masked_qkv_attention
from ofb_kernels.testing import check_op
from tests.common import dtypes_of

NAMES = ("x", "weight", "bias", "mask")


@pytest.fixture
def in_place(monkeypatch):
    """The form of a GPU on any device."""
    monkeypatch.setattr(eager, "_packs_gradients", lambda x: False)


def make_inputs(device, dtype=torch.float32, batch=2, tokens=19, heads=2, head_dim=12, width=20) -> dict[str, Tensor]:
    inputs = {
        "x": torch.randn(batch, tokens, width, device=device),
        "weight": torch.randn(3 * heads * head_dim, width, device=device) / width**0.5,
        "bias": torch.randn(3 * heads * head_dim, device=device),
        "mask": torch.rand(heads, head_dim, device=device),
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def attend(*inputs: Tensor, **options) -> Tensor:
    return masked_qkv_attention(*inputs, backend="eager", **options)


def gradients_of(inputs: dict[str, Tensor], names=NAMES, **options) -> tuple[Tensor, ...]:
    leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in inputs.items()}
    out = attend(**leaves, **options)
    torch.manual_seed(1)
    return out, *torch.autograd.grad(out, [leaves[name] for name in names], torch.randn_like(out))


def test_which_form_runs(device):
    """Gradients stay where they lie on a GPU alone, and not under a compiler."""
    asked = torch.compile(lambda x: x + eager._packs_gradients(x), backend="eager", fullgraph=True)
    assert asked(torch.zeros(1, device=device)).item() == 1
    assert eager._packs_gradients(torch.zeros(1)) and not eager._packs_gradients(SimpleNamespace(is_cuda=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of("eager"))
def test_matches_float64(backend, dtype, bias, device, in_place):
    inputs = {name: tensor for name, tensor in make_inputs(device, dtype).items() if bias or name != "bias"}
    check_op(masked_qkv_attention, inputs, {} if bias else {"bias": None}, backend, reduction=2 * 19)


def test_attention_bias_matches_float64(device, in_place):
    inputs = make_inputs(device, batch=4) | {"attention_bias": torch.randn(2, 2, 19, 19, device=device)}
    check_op(masked_qkv_attention, inputs, {}, "eager", reduction=4 * 19)


def test_any_strides(device, in_place):
    inputs = make_inputs(device)
    inputs["x"] = torch.randn(19, 20, 4, device=device).permute(2, 0, 1)[::2]
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    cotangent = torch.ones((), device=device).expand(2, 19, 24)
    check_op(masked_qkv_attention, inputs, {}, "eager", reduction=2 * 19, cotangent=cotangent)


def test_gradcheck(device, in_place):
    inputs = make_inputs(device, torch.float64, tokens=3, head_dim=2, width=3)
    assert gradcheck(attend, [tensor.requires_grad_() for tensor in inputs.values()])


@pytest.mark.parametrize(
    ("names", "products"),
    [(("x",), 3), (("weight",), 3), (("bias",), 0), (("mask",), 3), (("x", "bias"), 3), (("x", "mask"), 6)],
)
def test_only_what_is_asked_for(names, products, device, in_place):
    """The same values as with every gradient, and no product for one that nobody wants."""
    inputs = make_inputs(device)
    with RecordCalls() as record:
        out, *found = gradients_of(inputs, names)
    whole = dict(zip(("out", *NAMES), gradients_of(inputs), strict=True))
    for name, result in zip(("out", *names), (out, *found), strict=True):
        torch.testing.assert_close(result, whole[name])
    assert len(record.products) == 1 + products


def test_nothing_is_packed(device, in_place):
    """Neither a copy of dq, dk and dv into one tensor, nor of any of them."""
    inputs, rows, columns = make_inputs(device), 2 * 19, 2 * 12
    with RecordCalls() as record:
        gradients_of(inputs)
    assert len(record.products) == 1 + 3 + 3
    assert max(record.copied, default=0) < rows * columns


class RecordCalls(TorchDispatchMode):
    """The products of a call, and how many elements each of its copies has."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[str] = []
        self.copied: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            self.products.append(name)
        elif name in ("clone", "copy_", "cat", "stack"):
            self.copied.append(result.numel())
        return result


def test_packing_is_noticed(device, monkeypatch):
    monkeypatch.setattr(eager, "_packs_gradients", lambda x: True)
    with RecordCalls() as record:
        gradients_of(make_inputs(device))
    assert len(record.products) == 3 and max(record.copied) == 3 * 2 * 19 * 2 * 12


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": 0}, {"heads": 0}, {"width": 0}])
def test_empty(sizes, device, in_place):
    inputs = make_inputs(device, **({"width": 4} | sizes))
    if sizes == {"width": 0}:
        inputs["weight"] = torch.zeros(72, 0, device=device)
    out, *found = gradients_of(inputs)
    assert out.shape == (*inputs["x"].shape[:2], inputs["mask"].numel())
    for name, gradient in zip(NAMES, found, strict=True):
        assert gradient.shape == inputs[name].shape and gradient.isfinite().all()


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside, device, in_place):
    """Gradients are in float32, be the backward called inside autocast or behind it."""
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(device).items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        out = attend(**inputs)
        if inside:
            out.float().sum().backward()
    if not inside:
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs.values())
    low = {name: tensor.detach().bfloat16() for name, tensor in inputs.items()}
    tolerance = 8 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out, masked_qkv_attention(**low, backend="reference"), atol=tolerance, rtol=tolerance)


def test_a_backward_inside_autocast_of_a_forward_outside(device, in_place):
    inputs = make_inputs(device)
    expected = gradients_of(inputs)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = attend(**leaves)
    torch.manual_seed(1)
    cotangent = torch.randn_like(out)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = torch.autograd.grad(out, list(leaves.values()), cotangent)
    for one, other in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)  # whatever SDPA's own backward does there
        assert one.dtype == torch.float32


def test_used_twice_and_kept(device, in_place):
    """Two calls on the same tensors add up; a graph that is kept gives the same gradients again."""
    inputs = [tensor.requires_grad_() for tensor in make_inputs(device, torch.float64).values()]
    once = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    loss = sum(attend(*inputs).square().sum() for _ in range(2))
    for _ in range(2):
        for one, two in zip(once, torch.autograd.grad(loss, inputs, retain_graph=True), strict=True):
            torch.testing.assert_close(2 * one, two)


def test_no_gradient_in_none_out(device, in_place):
    class WithoutGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    inputs = [tensor.requires_grad_() for tensor in make_inputs(device).values()]
    loss = WithoutGradient.apply(attend(*inputs)).sum()
    assert torch.autograd.grad(loss, inputs, allow_unused=True) == (None,) * len(inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic, device, in_place):
    """Also where the form of a GPU is compiled after all."""
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        inputs = [tensor.requires_grad_() for tensor in make_inputs(device, torch.float64, batch=batch).values()]
        out, expected = compiled(*inputs), attend(*inputs)
        torch.testing.assert_close(out, expected)
        found, wanted = (torch.autograd.grad(each.square().sum(), inputs) for each in (out, expected))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_gradients_by_function_transforms(device, in_place):
    inputs = tuple(make_inputs(device, torch.float64).values())
    found = torch.func.grad(lambda *tensors: attend(*tensors).square().sum(), argnums=(0, 1, 2, 3))(*inputs)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    for one, other in zip(found, torch.autograd.grad(attend(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_few_tokens_match_float64(device):
    """Fewer than inner columns: the mask is on the projection's output."""
    check_op(masked_qkv_attention, make_inputs(device, batch=1, tokens=5), {}, "eager", reduction=20)
