"""masked_layer_norm: every backend against the float64 reference, gradients, compilation, bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ofb_kernels.ops.masked_layer_norm import MAX_WIDTH, masked_layer_norm
from ofb_kernels.testing import check_op
from tests.common import BACKENDS, dtypes_of


def make_inputs(leading, width, dtype, device, bias=True):
    inputs = {
        "x": torch.randn(*leading, width, device=device) + 1,
        "weight": torch.rand(width, device=device) + 0.5,
        "bias": torch.randn(width, device=device) if bias else None,
        "mask": torch.rand(width, device=device) + 0.1,
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items() if tensor is not None}


@pytest.mark.parametrize("width", [24, 200, 384])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_matches_float64(backend, dtype, width, device):
    inputs = make_inputs((2, 197), width, dtype, device)
    check_op(masked_layer_norm, inputs, {}, backend, reduction=2 * 197)


@pytest.mark.parametrize("width", [513, 1025, MAX_WIDTH])
def test_wide_rows(width, device):
    inputs = make_inputs((19,), width, torch.float32, device)
    check_op(masked_layer_norm, inputs, {}, "triton", reduction=width)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias(backend, device):
    inputs = make_inputs((5, 3), 17, torch.float32, device, bias=False)
    check_op(masked_layer_norm, inputs, {"bias": None}, backend, reduction=17)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [17, 200, 256, 384])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_without_mask(backend, dtype, width, bias, device):
    """A plain LayerNorm; at 17 and 200 a row ends before its tile does."""
    inputs = make_inputs((2, 57), width, dtype, device, bias)
    del inputs["mask"]
    options = {"mask": None} if bias else {"mask": None, "bias": None}
    check_op(masked_layer_norm, inputs, options, backend, reduction=2 * 57)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    leading=st.lists(st.integers(1, 9), max_size=3),
    width=st.integers(4, 300),  # with two channels dx is the rest of a cancellation, right by luck if at all
    step=st.integers(1, 3),
    transposed=st.booleans(),
)
def test_any_shape_and_strides(backend, leading, width, step, transposed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {n: t[..., ::step] for n, t in make_inputs(leading, width * step, torch.float32, device).items()}
    if transposed:
        inputs["x"] = inputs["x"].mT.contiguous().mT if leading else inputs["x"]
    rows = torch.Size(leading).numel()
    check_op(masked_layer_norm, inputs, {}, backend, reduction=max(rows, width))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_far_from_zero(backend, device):
    inputs = make_inputs((50,), 96, torch.float32, device)
    inputs["x"] += 1000
    check_op(masked_layer_norm, inputs, {}, backend, reduction=96)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_of_ones_is_layer_norm(backend, device):
    x, weight, bias, _ = make_inputs((7,), 40, torch.float32, device).values()
    expected = F.layer_norm(x, (40,), weight, bias, 1e-6)
    for mask in (torch.ones_like(bias), None):
        torch.testing.assert_close(masked_layer_norm(x, weight, bias, mask, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_of_zeros_and_ones_is_the_pruned_layer_norm(backend, device):
    x, weight, bias, mask = make_inputs((7,), 40, torch.float32, device).values()
    kept = torch.arange(40, device=device) % 3 > 0
    out = masked_layer_norm(x, weight, bias, kept.float(), backend=backend)
    pruned = F.layer_norm(x[:, kept], (int(kept.sum()),), weight[kept], bias[kept], 1e-6)
    torch.testing.assert_close(out[:, kept], pruned)
    assert (out[:, ~kept] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_0_gradient(backend, device):
    inputs = make_inputs((4, 5), 7, torch.float32, device)
    cotangent = torch.ones((), device=device).expand(4, 5, 7)
    check_op(masked_layer_norm, inputs, {}, backend, reduction=20, cotangent=cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    inputs = {n: t.requires_grad_() for n, t in make_inputs((0, 5), 7, torch.float32, device).items()}
    out = masked_layer_norm(**inputs, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 5, 7)
    assert all((tensor.grad == 0).all() for tensor in inputs.values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (3, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, leading, bias, device):
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    inputs = {n: t.requires_grad_() for n, t in make_inputs(leading, 5, torch.float64, device, bias).items()}
    inputs.setdefault("bias", None)
    # an eps of the variance's own size, or its part of the mask's gradient could not be seen
    assert gradcheck(
        lambda x, weight, bias, mask: masked_layer_norm(x, weight, bias, mask, eps=0.3, backend=backend),
        [inputs[name] for name in ("x", "weight", "bias", "mask")],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend, device):
    inputs = make_inputs((3, 100), 50, torch.float32, device)

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        out = masked_layer_norm(*leaves, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_only_the_result(backend, device):
    low = torch.float16 if backend == "triton" else torch.bfloat16
    inputs = {n: t.requires_grad_() for n, t in make_inputs((2, 33), 24, torch.float32, device).items()}
    expected = masked_layer_norm(**inputs, backend=backend)
    cotangent = torch.randn_like(expected).to(low)
    expected_gradients = torch.autograd.grad(expected, inputs.values(), cotangent.float())
    with torch.autocast(device, dtype=low):
        out = masked_layer_norm(**inputs, backend=backend)
        gradients = torch.autograd.grad(out, inputs.values(), cotangent)
    assert out.dtype == low
    assert torch.equal(out, expected.to(low))
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, masked, device):
    inputs = [t.requires_grad_() for t in make_inputs((3, 5), 8, torch.float32, device).values()]
    inputs, without = (inputs, ()) if masked else (inputs[:3], (None,))
    compiled = torch.compile(
        lambda *tensors: masked_layer_norm(*tensors, *without, backend=backend), fullgraph=True, backend="aot_eager"
    )
    out = compiled(*inputs)
    expected = masked_layer_norm(*inputs, *without, backend=backend)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias, masked, device):
    inputs = {n: t.requires_grad_() for n, t in make_inputs((3, 5), 8, torch.float32, device, bias).items()}
    mask = inputs["mask"] if masked else None
    arguments = (inputs["x"], inputs["weight"], inputs.get("bias"), mask, 1e-6, torch.float16)
    torch.library.opcheck(torch.ops.ofb_kernels.masked_layer_norm.default, arguments)
    x, weight, bias, mask = (None if t is None else t.detach() for t in arguments[:4])
    mean, rstd = torch.randn(15, device=device), torch.rand(15, device=device)
    arguments = (torch.randn_like(x), x, weight, bias, mask, mean, rstd, 1e-6)
    torch.library.opcheck(torch.ops.ofb_kernels.masked_layer_norm_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.rand(5)}, ValueError, r"expected mask of shape \(6\), got \(5,\)"),
        ({"weight": torch.randn(7)}, ValueError, r"expected weight of shape \(6\), got \(7,\)"),
        ({"bias": torch.randn(1, 6)}, ValueError, r"expected bias of shape \(6\), got \(1, 6\)"),
        ({"x": torch.randn(())}, ValueError, r"expected x of shape \(\.\.\., D\), got \(\)"),
        ({"x": torch.ones(3, 6).long()}, TypeError, "expected x as a floating-point tensor, got torch.int64"),
        ({"x": torch.randn(3, 6).half()}, TypeError, "expected weight of x's dtype torch.float16, got torch.float32"),
        ({"mask": torch.rand(6, device="meta")}, ValueError, "got mask on meta"),
        ({"weight": None}, TypeError, "expected weight as a torch.Tensor, got NoneType"),
        ({"mask": 1.0}, TypeError, "expected mask as a torch.Tensor, got float"),
        ({"eps": -1.0}, ValueError, "expected eps >= 0, got -1.0"),
        ({"backend": "cuda"}, ValueError, "expected one of reference, eager, triton, got 'cuda'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = make_inputs((3,), 6, torch.float32, "cpu") | change
    with pytest.raises(error, match=message):
        masked_layer_norm(**arguments)


def test_triton_refuses_too_wide_a_row(device):
    inputs = make_inputs((1,), MAX_WIDTH + 1, torch.float32, device)
    with pytest.raises(ValueError, match="expected x of at most 4096 channels, got 4097"):
        masked_layer_norm(**inputs, backend="triton")
