"""masked_linear: every backend against the float64 reference, gradients, compilation, bad input."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from ofb_kernels.kernels import masked_linear as kernel_of_masked_linear
from ofb_kernels.kernels.column_sums import column_sums
from ofb_kernels.kernels.common import hidden_multiple
from ofb_kernels.kernels.fold import fold, weight_gradient
from ofb_kernels.kernels.product import describable, is_persistent
from ofb_kernels.kernels.tuning import run_configured
from ofb_kernels.ops.masked_linear import ACTIVATIONS, masked_linear
from ofb_kernels.testing import check_op
from tests.common import BACKENDS, dtypes_of


def make_inputs(leading, inner, columns, dtype, device, bias=True):
    inputs = {
        "x": torch.randn(*leading, inner, device=device),
        "weight": torch.randn(columns, inner, device=device) / inner**0.5,
        "bias": torch.randn(columns, device=device) if bias else None,
        "mask": torch.rand(columns, device=device),
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items() if tensor is not None}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_matches_float64(backend, dtype, activation, device):
    inputs = make_inputs((2, 197), 72, 200, dtype, device)
    check_op(masked_linear, inputs, {"activation": activation}, backend, reduction=2 * 197)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias(backend, device):
    inputs = make_inputs((5, 3), 17, 9, torch.float32, device, bias=False)
    check_op(masked_linear, inputs, {"bias": None, "activation": "gelu"}, backend, reduction=17)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_without_mask(backend, dtype, activation, bias, device):
    """A plain linear layer."""
    inputs = make_inputs((2, 97), 40, 136, dtype, device, bias)
    del inputs["mask"]
    options = {"mask": None, "activation": activation} | ({} if bias else {"bias": None})
    check_op(masked_linear, inputs, options, backend, reduction=2 * 97)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_without_mask_what_is_frozen_gets_no_gradient(frozen, device):
    inputs = make_inputs((5, 3), 7, 6, torch.float32, device)
    del inputs["mask"]
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    masked_linear(**inputs, mask=None, backend="triton").square().sum().backward()
    assert [name for name, tensor in inputs.items() if tensor.grad is None] == [frozen]


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    leading=st.lists(st.integers(1, 9), max_size=3),
    inner=st.integers(1, 70),
    columns=st.integers(1, 70),
    transposed=st.booleans(),
    step=st.integers(1, 3),
)
def test_any_shape_and_strides(backend, leading, inner, columns, transposed, step):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(leading, inner * step, columns, torch.float32, device)
    inputs["x"] = inputs["x"][..., ::step]
    inputs["weight"] = inputs["weight"][:, ::step]
    inputs["mask"] = torch.rand(columns * step, device=device)[::step]
    if transposed:
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    rows = max(1, torch.Size(leading).numel())
    check_op(masked_linear, inputs, {"activation": "gelu"}, backend, reduction=max(rows, inner))


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_0_gradient(backend, device):
    inputs = make_inputs((4, 5), 6, 7, torch.float32, device)
    cotangent = torch.ones((), device=device).expand(4, 5, 7)
    check_op(masked_linear, inputs, {"activation": "gelu"}, backend, reduction=20, cotangent=cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    inputs = {n: t.requires_grad_() for n, t in make_inputs((0, 5), 6, 7, torch.float32, device).items()}
    out = masked_linear(**inputs, activation="gelu", backend=backend)
    out.sum().backward()
    assert out.shape == (0, 5, 7)
    assert all((tensor.grad == 0).all() for tensor in inputs.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, activation, device):
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    inputs = [t.requires_grad_() for t in make_inputs((3,), 5, 4, torch.float64, device).values()]
    assert gradcheck(lambda *tensors: masked_linear(*tensors, activation, backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend, device):
    inputs = make_inputs((3, 100), 40, 50, torch.float32, device)

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        out = masked_linear(*leaves, "gelu", backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_a_weight_of_the_right_dtype_is_taken_as_it_is_whatever_the_bias(device):
    """What the op keeps for its backward follows from the weight's dtype alone."""
    weight, bias = torch.randn(24, 16, device=device, dtype=torch.float16), torch.randn(24, device=device)
    taken, cast = fold(weight, bias, None, torch.float16)
    assert taken is weight and torch.equal(cast, bias.half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend, device):
    low = torch.float16 if backend == "triton" else torch.bfloat16
    inputs = make_inputs((2, 33), 24, 40, torch.float32, device)
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    with torch.autocast(device, dtype=low):
        out = masked_linear(**leaves, activation="gelu", backend=backend)
    out.float().sum().backward()
    assert out.dtype == low
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    expected = masked_linear(**{n: t.to(low) for n, t in inputs.items()}, activation="gelu", backend="reference")
    torch.testing.assert_close(out, expected, atol=8 * torch.finfo(low).eps, rtol=8 * torch.finfo(low).eps)


@pytest.mark.parametrize("others", [("gelu",), (None, None)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, others, device):
    """Masked with an activation, and plain."""
    inputs = [t.requires_grad_() for t in make_inputs((3, 5), 8, 6, torch.float32, device).values()]
    inputs = inputs[: 5 - len(others)]
    compiled = torch.compile(
        lambda *tensors: masked_linear(*tensors, *others, backend=backend), fullgraph=True, backend="aot_eager"
    )
    out = compiled(*inputs)
    expected = masked_linear(*inputs, *others, backend=backend)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [15, 2])  # many and few, beside 8 inner columns
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias, rows, dtype, masked, device):
    inputs = {n: t.requires_grad_() for n, t in make_inputs((1, rows), 8, 6, torch.float32, device, bias).items()}
    if not masked:
        del inputs["mask"]
    x = inputs["x"].detach().to(dtype).requires_grad_()
    arguments = (x, inputs["weight"], inputs.get("bias"), inputs.get("mask"), "gelu", True)
    torch.library.opcheck(torch.ops.ofb_kernels.masked_linear.default, arguments)
    tensors = [tensor if tensor is None else tensor.detach() for tensor in arguments[:4]]
    out, *kept = torch.ops.ofb_kernels.masked_linear(*tensors, "gelu", True)
    for needs in ((True, True), (True, False), (False, True)):
        backward = (torch.randn_like(out), *tensors, *kept, "gelu", *needs)
        torch.library.opcheck(torch.ops.ofb_kernels.masked_linear_backward.default, backward)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_few_rows(backend, dtype, rows, activation, device):
    """Fewer than the inner columns: the mask is on the output."""
    inputs = make_inputs((rows,), 72, 40, dtype, device)
    check_op(masked_linear, inputs, {"activation": activation}, backend, reduction=72)


@pytest.mark.parametrize(("rows", "folded"), [(1, False), (32, False), (512, True), (50_432, True)])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_mask_goes_where_fewer_bytes_are(backend, rows, folded, device):
    """Into the weight (8, 384), or onto the output (rows, 8)."""
    inputs = {n: t.requires_grad_() for n, t in make_inputs((rows,), 384, 8, torch.float32, device).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = masked_linear(**inputs, backend=backend)
    weight = inputs["weight"]
    others = [each for each in kept if sorted(each.shape) == [8, 384] and each.data_ptr() != weight.data_ptr()]
    assert bool(others) == folded
    out.sum().backward()
    expected = torch.autograd.grad(masked_linear(**inputs, backend="reference").sum(), list(inputs.values()))
    for leaf, gradient in zip(inputs.values(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.rand(5)}, ValueError, r"expected mask of shape \(6\), got \(5,\)"),
        ({"weight": torch.randn(6, 7)}, ValueError, r"expected weight of shape \(N, 8\), got \(6, 7\)"),
        ({"weight": torch.randn(8)}, ValueError, r"expected weight of shape \(N, 8\), got \(8,\)"),
        ({"bias": torch.randn(1, 6)}, ValueError, r"expected bias of shape \(6\), got \(1, 6\)"),
        ({"x": torch.randn(())}, ValueError, r"expected x of shape \(\.\.\., K\), got \(\)"),
        ({"x": torch.ones(3, 8).long()}, TypeError, "expected x as a floating-point tensor, got torch.int64"),
        ({"x": torch.randn(3, 8).half()}, TypeError, "expected weight of x's dtype torch.float16, got torch.float32"),
        ({"mask": torch.rand(6, device="meta")}, ValueError, "got mask on meta"),
        ({"mask": [1.0] * 6}, TypeError, "expected mask as a torch.Tensor, got list"),
        ({"activation": "tanh"}, ValueError, "expected activation as one of .*, got 'tanh'"),
        ({"backend": "cuda"}, ValueError, "expected one of reference, eager, triton, got 'cuda'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = make_inputs((3,), 8, 6, torch.float32, "cpu") | change
    with pytest.raises(error, match=message):
        masked_linear(**arguments)


def test_rows_that_begin_anywhere_take_the_plain_kernel(device, monkeypatch):
    """Descriptors take rows that begin at multiples of 16 bytes; the choice is another for others of the same sizes."""
    chosen = {}

    def look(kernel, candidates, *rest):
        chosen[kernel] = [is_persistent(configuration) for configuration in candidates]
        return run_configured(kernel, candidates, *rest)

    monkeypatch.setattr(kernel_of_masked_linear, "run_configured", look)
    inputs = make_inputs((33,), 24, 40, torch.float16, device)
    check_op(masked_linear, inputs, {"activation": "gelu"}, "triton", reduction=40)
    for name in ("x", "weight"):
        moved = torch.empty(inputs[name].numel() + 1, dtype=torch.float16, device=device)[1:].view_as(inputs[name])
        other = inputs | {name: moved.copy_(inputs[name])}
        check_op(masked_linear, other, {"activation": "gelu"}, "triton", reduction=40)
    if describable(inputs["x"], inputs["weight"]):  # not on a GPU before Hopper
        assert any(chosen["masked_linear.forward 2 bytes, described"])
    assert not any(chosen["masked_linear.forward 2 bytes"])


def test_multiples_that_triton_does_not_see():
    assert [hidden_multiple(*sizes) for sizes in ((384, 16), (200, 384), (12, 8), (7, 16), (1, 1))] == [1, 8, 4, 1, 1]


def test_gelu_is_as_exact_as_float32(device):
    """Its own Φ, at 20,001 places: within two roundings of the value, or of 1 where that is larger."""
    x = torch.linspace(-12, 12, 20_001, device=device)[:, None].requires_grad_()
    one = torch.ones(1, 1, device=device)
    out = masked_linear(x, one, None, one[0], "gelu", backend="triton")
    exact_x = x.detach().double().requires_grad_()
    exact = torch.nn.functional.gelu(exact_x)
    bound = 2 * torch.finfo(torch.float32).eps * exact.detach().abs().clamp(min=1)
    assert ((out - exact).abs() <= bound).all()
    slopes = torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(exact.sum(), exact_x)[0]
    assert (slopes[0] - slopes[1]).abs().max() <= 2.5e-7


@pytest.mark.parametrize("rows", [0, 1, 31, 33, 1000, 5000])
def test_column_sums(rows, device):
    """The sums that all backward passes end with, of matrices of any strides."""
    matrix = torch.randn(130, rows, device=device).t()
    torch.testing.assert_close(column_sums(matrix), matrix.double().sum(0).float(), atol=1e-4, rtol=1e-5)
    half = column_sums(matrix.half(), torch.float16)
    assert half.dtype == torch.float16 and half.shape == (130,)


@pytest.mark.skipif("dtype" not in torch.ops.aten.mm.overloads(), reason="torch before 2.8 casts it")
def test_a_gpu_writes_the_gradient_of_float32_weights_as_it_adds_it_up():
    with FakeTensorMode():
        grad, x = (torch.empty(6, columns, dtype=torch.bfloat16, device="cuda") for columns in (4, 3))
        seen = []
        with mock.patch.object(torch, "mm", lambda *args, **options: seen.append(options) or args[0] @ args[1]):
            assert weight_gradient(grad, x, torch.float32).shape == (4, 3)
            assert weight_gradient(grad, x, torch.bfloat16).dtype == torch.bfloat16
        assert seen == [{"out_dtype": torch.float32}]
        assert weight_gradient(grad, x, torch.float32).dtype == torch.float32
