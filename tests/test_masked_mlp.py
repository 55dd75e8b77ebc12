"""masked_mlp: every backend against the float64 reference, gradients, compilation, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ofb_kernels.ops.masked_mlp import ACTIVATIONS, masked_mlp
from ofb_kernels.testing import check_op
from tests.common import BACKENDS, dtypes_of


def make_inputs(leading, inner, hidden, columns, dtype, device, bias=True):
    inputs = {
        "x": torch.randn(*leading, inner, device=device),
        "fc1_weight": torch.randn(hidden, inner, device=device) / inner**0.5,
        "fc1_bias": torch.randn(hidden, device=device) if bias else None,
        "mask": torch.rand(hidden, device=device),
        "fc2_weight": torch.randn(columns, hidden, device=device) / hidden**0.5,
        "fc2_bias": torch.randn(columns, device=device) if bias else None,
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items() if tensor is not None}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_matches_float64(backend, dtype, activation, device):
    inputs = make_inputs((2, 197), 72, 200, 56, dtype, device)
    check_op(masked_mlp, inputs, {"activation": activation}, backend, reduction=2 * 197)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias(backend, device):
    inputs = make_inputs((5, 3), 17, 9, 11, torch.float32, device, bias=False)
    check_op(masked_mlp, inputs, {"fc1_bias": None, "fc2_bias": None}, backend, reduction=17)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    leading=st.lists(st.integers(1, 9), max_size=3),
    inner=st.integers(1, 40),
    hidden=st.integers(1, 70),
    columns=st.integers(1, 40),
    transposed=st.booleans(),
    step=st.integers(1, 3),
)
def test_any_shape_and_strides(backend, leading, inner, hidden, columns, transposed, step):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(leading, inner * step, hidden * step, columns, torch.float32, device)
    inputs["x"] = inputs["x"][..., ::step]
    inputs["fc1_weight"] = inputs["fc1_weight"][::step, ::step]
    inputs["fc1_bias"] = inputs["fc1_bias"][::step]
    inputs["mask"] = inputs["mask"][::step]
    inputs["fc2_weight"] = inputs["fc2_weight"][:, ::step]
    if transposed:
        inputs["fc2_weight"] = inputs["fc2_weight"].t().contiguous().t()
    rows = max(1, torch.Size(leading).numel())
    check_op(masked_mlp, inputs, {}, backend, reduction=max(rows, inner, hidden))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_in_another_dtype(backend, device):
    inputs = make_inputs((4, 5), 6, 7, 3, torch.float16, device) | {"mask": torch.rand(7, device=device)}
    check_op(masked_mlp, inputs, {}, backend, reduction=20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_0_gradient(backend, device):
    inputs = make_inputs((4, 5), 6, 7, 3, torch.float32, device)
    cotangent = torch.ones((), device=device).expand(4, 5, 3)
    check_op(masked_mlp, inputs, {}, backend, reduction=20, cotangent=cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    inputs = {n: t.requires_grad_() for n, t in make_inputs((0, 5), 6, 7, 3, torch.float32, device).items()}
    out = masked_mlp(**inputs, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 5, 3)
    assert all((tensor.grad == 0).all() for tensor in inputs.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, activation, device):
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    inputs = [t.requires_grad_() for t in make_inputs((3,), 4, 3, 2, torch.float64, device).values()]
    assert gradcheck(lambda *tensors: masked_mlp(*tensors, activation, backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend, device):
    inputs = make_inputs((3, 100), 40, 50, 30, torch.float32, device)

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        out = masked_mlp(*leaves, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend, device):
    low = torch.float16 if backend == "triton" else torch.bfloat16
    inputs = make_inputs((2, 33), 24, 40, 16, torch.float32, device)
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    with torch.autocast(device, dtype=low):
        out = masked_mlp(**leaves, backend=backend)
    out.float().sum().backward()
    assert out.dtype == low
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    expected = masked_mlp(**{n: t.to(low) for n, t in inputs.items()}, backend="reference")
    torch.testing.assert_close(out, expected, atol=8 * torch.finfo(low).eps, rtol=8 * torch.finfo(low).eps)


def test_keeps_only_what_the_backward_needs(device):
    inputs = make_inputs((2, 33), 24, 40, 16, torch.float32, device)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        masked_mlp(**leaves, backend="triton")
    intermediates = [tensor for tensor in kept if not any(tensor is leaf for leaf in leaves.values())]
    # the activation's slope, its result, fc1's folded weight, and nothing of fc2's, which is taken as it is
    assert [tuple(tensor.shape) for tensor in intermediates] == [(66, 40), (66, 40), (40, 24), (0,)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, device):
    inputs = [t.requires_grad_() for t in make_inputs((3, 5), 8, 6, 4, torch.float32, device).values()]
    compiled = torch.compile(
        lambda *tensors: masked_mlp(*tensors, backend=backend), fullgraph=True, backend="aot_eager"
    )
    out = compiled(*inputs)
    expected = masked_mlp(*inputs, backend=backend)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias, device):
    names = ("x", "fc1_weight", "fc1_bias", "mask", "fc2_weight", "fc2_bias")
    inputs = {n: t.requires_grad_() for n, t in make_inputs((3, 5), 8, 6, 4, torch.float32, device, bias).items()}
    torch.library.opcheck(torch.ops.ofb_kernels.masked_mlp.default, (*map(inputs.get, names), "gelu", True))
    tensors = [tensor if tensor is None else tensor.detach() for tensor in map(inputs.get, names)]
    out, *kept = torch.ops.ofb_kernels.masked_mlp(*tensors, "gelu", True)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        arguments = (torch.randn_like(out), *tensors, *kept, "gelu", *needs)
        torch.library.opcheck(torch.ops.ofb_kernels.masked_mlp_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.rand(5)}, ValueError, r"expected mask of shape \(6\), got \(5,\)"),
        ({"fc1_weight": torch.randn(6, 7)}, ValueError, r"expected fc1_weight of shape \(N, 8\), got \(6, 7\)"),
        ({"fc1_bias": torch.randn(1, 6)}, ValueError, r"expected fc1_bias of shape \(6\), got \(1, 6\)"),
        ({"fc2_weight": torch.randn(4, 5)}, ValueError, r"expected fc2_weight of shape \(E, 6\), got \(4, 5\)"),
        ({"fc2_bias": torch.randn(6)}, ValueError, r"expected fc2_bias of shape \(4\), got \(6,\)"),
        ({"x": torch.randn(())}, ValueError, r"expected x of shape \(\.\.\., K\), got \(\)"),
        ({"x": torch.ones(3, 8).long()}, TypeError, "expected x as a floating-point tensor, got torch.int64"),
        ({"fc2_weight": torch.randn(4, 6).half()}, TypeError, "expected fc2_weight of x's dtype torch.float32"),
        ({"mask": torch.rand(6, device="meta")}, ValueError, "on meta"),
        ({"fc2_bias": [0.0] * 4}, TypeError, "expected fc2_bias as a torch.Tensor, got list"),
        ({"activation": "tanh"}, ValueError, "expected activation as one of .*, got 'tanh'"),
        ({"backend": "cuda"}, ValueError, "expected one of reference, eager, triton, got 'cuda'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = make_inputs((3,), 8, 6, 4, torch.float32, "cpu") | change
    with pytest.raises(error, match=message):
        masked_mlp(**arguments)
