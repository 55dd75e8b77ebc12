"""masked_add_layer_norm: every backend against the float64 reference, gradients, compilation, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ofb_kernels import masked_add_layer_norm, masked_layer_norm
from ofb_kernels.testing import check_op
from tests.common import BACKENDS, dtypes_of


def make_inputs(leading, width, dtype, device, bias=True, branch_bias=False):
    inputs = {
        "x": torch.randn(*leading, width, device=device) + 1,
        "branch_bias": torch.randn(width, device=device) if branch_bias else None,
        "branch": torch.randn(*leading, width, device=device),
        "branch_mask": torch.rand(width, device=device),
        "weight": torch.rand(width, device=device) + 0.5,
        "bias": torch.randn(width, device=device) if bias else None,
        "mask": torch.rand(width, device=device) + 0.1,
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items() if tensor is not None}


def drop_some(samples, device):
    """Stochastic depth: every third sample's branch is dropped."""
    return (torch.arange(samples, device=device) % 3 > 0).float() / 0.7


def both(**arguments):
    """Stream and norm beside each other: one result for check_op."""
    return torch.cat(masked_add_layer_norm(**arguments), -1)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("width", [24, 200, 384])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_matches_float64(backend, dtype, width, drops, device):
    inputs = make_inputs((4, 97), width, dtype, device)
    options = {"sample_scale": drop_some(4, device) if drops else None}
    check_op(both, inputs, options, backend, reduction=4 * 97)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("width", [17, 200])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_with_the_bias_of_the_branch(backend, dtype, width, masked, drops, device):
    inputs = make_inputs((4, 33), width, dtype, device, branch_bias=True)
    options = {"sample_scale": drop_some(4, device) if drops else None}
    if not masked:
        options["mask"] = None
        del inputs["mask"]
    check_op(both, inputs, options, backend, reduction=4 * 33)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_of_a_branch_too_wide_for_its_sum(backend, device):
    inputs = make_inputs((2, 3), 2056, torch.float32, device, branch_bias=True)
    check_op(both, inputs, {}, backend, reduction=2056)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("width", [17, 200, 384])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_without_mask(backend, dtype, width, drops, device):
    """A plain LayerNorm behind the add; at 17 and 200 a row ends before its tile does."""
    inputs = make_inputs((4, 33), width, dtype, device)
    del inputs["mask"]
    options = {"mask": None, "sample_scale": drop_some(4, device) if drops else None}
    check_op(both, inputs, options, backend, reduction=4 * 33)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_of_ones_is_layer_norm(backend, device):
    inputs = make_inputs((4, 5), 48, torch.float32, device)
    ones = both(**inputs | {"mask": torch.ones_like(inputs["mask"])}, backend=backend)
    torch.testing.assert_close(both(**inputs | {"mask": None}, backend=backend), ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_add_then_masked_layer_norm(backend, device):
    inputs = make_inputs((4, 5), 48, torch.float32, device)
    scale = drop_some(4, device)
    stream, normalized = masked_add_layer_norm(**inputs, sample_scale=scale, backend=backend)
    expected = inputs["x"] + scale[:, None, None] * inputs["branch"] * inputs["branch_mask"]
    torch.testing.assert_close(stream, expected)
    norm = inputs["weight"], inputs["bias"], inputs["mask"]
    torch.testing.assert_close(normalized, masked_layer_norm(stream, *norm, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("drops", [False, True])
def test_one_result_alone(backend, used, drops, device):
    """What the result does not depend on gets no gradient: the norm's vectors where only the stream was used."""
    inputs = {n: t.requires_grad_() for n, t in make_inputs((3, 5), 24, torch.float64, device).items()}
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    cotangent = torch.randn(3, 5, 24, dtype=torch.float64, device=device)
    scale = drop_some(3, device) if drops else None

    def gradients(name):
        result = masked_add_layer_norm(**inputs, sample_scale=scale, backend=name)[used]
        return torch.autograd.grad(result, inputs.values(), cotangent, allow_unused=True)

    for got, want in zip(gradients(backend), gradients("reference"), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias(backend, device):
    inputs = make_inputs((5, 3), 17, torch.float32, device, bias=False)
    check_op(both, inputs, {"bias": None}, backend, reduction=17)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    leading=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    width=st.integers(4, 300),
    step=st.integers(1, 3),
    transposed=st.booleans(),
)
def test_any_shape_and_strides(backend, leading, width, step, transposed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {n: t[..., ::step] for n, t in make_inputs(leading, width * step, torch.float32, device).items()}
    if transposed:
        inputs["branch"] = inputs["branch"].mT.contiguous().mT
    scale = drop_some(leading[0], device)
    rows = torch.Size(leading).numel()
    check_op(both, inputs, {"sample_scale": scale}, backend, reduction=max(rows, width))


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_0_gradient(backend, device):
    inputs = make_inputs((4, 5), 7, torch.float32, device)
    cotangent = torch.ones((), device=device).expand(4, 5, 14)
    check_op(both, inputs, {}, backend, reduction=20, cotangent=cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    inputs = {n: t.requires_grad_() for n, t in make_inputs((0, 5), 7, torch.float32, device).items()}
    stream, normalized = masked_add_layer_norm(**inputs, sample_scale=drop_some(0, device), backend=backend)
    (stream.sum() + normalized.sum()).backward()
    assert stream.shape == normalized.shape == (0, 5, 7)
    assert all((tensor.grad == 0).all() for tensor in inputs.values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, bias, device):
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    inputs = {n: t.requires_grad_() for n, t in make_inputs((3, 2), 5, torch.float64, device, bias).items()}
    inputs.setdefault("bias", None)
    scale = drop_some(3, device).double()
    # an eps of the variance's own size, or its part of the mask's gradient could not be seen
    options = dict(eps=0.3, sample_scale=scale, backend=backend)
    names = ("x", "branch", "branch_mask", "weight", "bias", "mask")
    assert gradcheck(lambda *tensors: masked_add_layer_norm(*tensors, **options), [inputs[name] for name in names])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend, device):
    inputs = make_inputs((3, 100), 50, torch.float32, device)

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        out = torch.cat(masked_add_layer_norm(*leaves, sample_scale=drop_some(3, device), backend=backend))
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_stream_wide(backend, device):
    low = torch.float16 if backend == "triton" else torch.bfloat16
    inputs = make_inputs((2, 33), 24, torch.float32, device)
    inputs["branch"] = inputs["branch"].to(low)  # as it comes from a product
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    exact = [t.detach().double().requires_grad_() for t in inputs.values()]
    cotangents = [torch.randn(2, 33, 24, device=device), torch.randn(2, 33, 24, device=device).to(low)]
    with torch.autocast(device, dtype=low):
        results = masked_add_layer_norm(**inputs, backend=backend)
        gradients = torch.autograd.grad(results, inputs.values(), cotangents)
    expected = masked_add_layer_norm(*exact, backend="reference")
    expected_gradients = torch.autograd.grad(expected, exact, [c.double() for c in cotangents])
    assert [result.dtype for result in results] == [torch.float32, low]
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs.values()]
    for got, want in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        # everything is computed in float32 and rounded once
        tolerance = dict(rtol=torch.finfo(got.dtype).eps, atol=torch.finfo(got.dtype).tiny)
        if got.dtype == torch.float32:
            tolerance = dict(rtol=1e-5, atol=1e-5 * want.abs().max().item())
        torch.testing.assert_close(got.double(), want, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, device):
    inputs = [t.requires_grad_() for t in make_inputs((3, 5), 8, torch.float32, device).values()]
    scale = drop_some(3, device)

    def run(*tensors):
        return torch.cat(masked_add_layer_norm(*tensors, sample_scale=scale, backend=backend))

    out, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias, masked, device):
    """The branch has a bias where the norm has one."""
    inputs = {n: t.requires_grad_() for n, t in make_inputs((3, 5), 8, torch.float32, device, bias, bias).items()}
    scale = drop_some(3, device)
    vectors = inputs["weight"], inputs.get("bias"), inputs["mask"] if masked else None
    of_branch = inputs["branch"], inputs.get("branch_bias"), inputs["branch_mask"], scale
    arguments = (inputs["x"], *of_branch, *vectors, 1e-6, torch.float16)
    torch.library.opcheck(torch.ops.ofb_kernels.masked_add_layer_norm.default, arguments)
    arguments = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    grad, (x, branch, *rest) = torch.randn(3, 5, 8, device=device), arguments[:8]
    statistics = torch.randn(15, device=device), torch.rand(15, device=device)
    for grads in ((grad, grad.clone()), (grad, None), (None, grad)):
        arguments = (*grads, x, branch, *rest, *statistics, 1e-6)
        torch.library.opcheck(torch.ops.ofb_kernels.masked_add_layer_norm_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(6)}, ValueError, r"expected x of shape \(\.\.\., N, D\), got \(6,\)"),
        ({"branch": torch.randn(3, 2, 5)}, ValueError, r"expected branch of shape \(3, 2, 6\), got \(3, 2, 5\)"),
        ({"branch": torch.randn(3, 2, 6).half()}, TypeError, "expected branch of x's dtype torch.float32"),
        ({"branch_mask": torch.rand(3, 6)}, ValueError, r"expected branch_mask of shape \(6\), got \(3, 6\)"),
        ({"branch_bias": torch.rand(5)}, ValueError, r"expected branch_bias of shape \(6\), got \(5,\)"),
        ({"branch_bias": torch.rand(6).half()}, TypeError, "expected branch_bias of x's dtype torch.float32"),
        ({"branch_mask": None}, TypeError, "expected branch_mask as a torch.Tensor, got NoneType"),
        ({"mask": torch.rand(5)}, ValueError, r"expected mask of shape \(6\), got \(5,\)"),
        ({"sample_scale": torch.rand(2)}, ValueError, r"expected sample_scale of shape \(3\), got \(2,\)"),
        ({"sample_scale": torch.rand(3, requires_grad=True)}, ValueError, "sample_scale without a gradient"),
        ({"sample_scale": 0.5}, TypeError, "expected sample_scale as a torch.Tensor, got float"),
        ({"mask": torch.rand(6, device="meta")}, ValueError, "got mask on meta"),
        ({"eps": -1.0}, ValueError, "expected eps >= 0, got -1.0"),
        ({"backend": "cuda"}, ValueError, "expected one of reference, eager, triton, got 'cuda'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        masked_add_layer_norm(**make_inputs((3, 2), 6, torch.float32, "cpu") | change)
