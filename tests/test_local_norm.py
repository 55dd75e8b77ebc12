"""local_norm: every backend against the definition, pixel by pixel and in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from ofb_kernels.ops.local_norm import local_norm
from ofb_kernels.testing import PERTURBATIONS, assert_accurate, error_bound
from tests.common import BACKENDS, dtypes_of


def check(images, backend, **options):
    exact_images = images.double()
    exact = local_norm(exact_images, **options, backend="reference")
    same_dtype = local_norm(images, **options, backend="reference")
    eps = torch.finfo(images.dtype).eps
    perturbed = [
        local_norm(exact_images * (1 + eps * (2 * torch.rand_like(exact_images) - 1)), **options, backend="reference")
        for _ in range(PERTURBATIONS)
    ]
    bound = error_bound(exact, same_dtype, perturbed, reduction=options.get("window", 47) ** 2)
    assert_accurate(backend, local_norm(images, **options, backend=backend), exact, images.dtype, bound)


def test_reference_by_hand():
    images = torch.randn(1, 2, 6, 9, dtype=torch.float64)
    out = local_norm(images, window=5, eps=1e-3, backend="reference")
    for c, y, x in [(0, 0, 0), (1, 3, 4), (0, 5, 8), (1, 0, 7)]:
        window = images[0, c, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        expected = (images[0, c, y, x] - window.mean()) / (window.var() + 1e-3).sqrt()
        torch.testing.assert_close(out[0, c, y, x], expected)


@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_matches_float64(backend, dtype, device):
    check(torch.randn(2, 3, 40, 70, device=device).to(dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@given(height=st.integers(1, 20), width=st.integers(1, 80), half=st.integers(0, 12), transposed=st.booleans())
def test_any_size_and_window(backend, height, width, half, transposed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = (
        torch.randn(2, 1, width, height, device=device).mT
        if transposed
        else torch.randn(2, 1, height, width, device=device)
    )
    check(images, backend, window=2 * half + 1, eps=0.1)


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(48, 64, 47), (30, 250, 21), (5, 140, 111), (70, 33, 61), (3, 300, 201), (9, 40, 1001)],
)
def test_tiles_of_wide_images_and_wide_windows(height, width, window, device):
    check(torch.randn(1, 1, height, width, device=device), "triton", window=window, eps=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_windows(value, device):
    images = torch.randn(1, 1, 60, 150, device=device)
    images[0, 0, 31, 83] = value
    finite = local_norm(images, window=9, backend="triton").isfinite()
    expected = torch.ones_like(finite)
    expected[0, 0, 27:36, 79:88] = False
    assert torch.equal(finite, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_images_give_zero(backend, device):
    out = local_norm(torch.full((1, 1, 30, 30), 0.5, device=device), backend=backend)
    assert out.abs().max() < 1e-3


@pytest.mark.parametrize("value", [0.1, 3.7, 100.3, -1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_makes_no_variance_negative(backend, value, device):
    """Of a constant far from 0 the mean square may round to less than the squared mean, by more than eps."""
    images = torch.full((1, 1, 32, 32), value, device=device)
    assert local_norm(images, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_of_the_whole_image_is_global(backend, device):
    images = torch.randn(2, 3, 8, 8, device=device)
    mean, variance = images.mean((2, 3), keepdim=True), images.var((2, 3), keepdim=True)
    expected = (images - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(local_norm(images, window=47, backend=backend), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_no_gradient_autocast_and_repeatability(backend, device):
    assert local_norm(torch.empty(0, 3, 8, 8, device=device), backend=backend).shape == (0, 3, 8, 8)
    images = torch.randn(2, 3, 17, 33, device=device, requires_grad=True)
    out = local_norm(images, backend=backend)
    assert not out.requires_grad
    assert torch.equal(out, local_norm(images, backend=backend))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(out, local_norm(images, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, device):
    images = torch.randn(2, 3, 9, 11, device=device)
    compiled = torch.compile(lambda x: local_norm(x, 5, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), local_norm(images, 5, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_once_for_all_sizes(backend, device):
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: local_norm(x, 5, backend=backend), fullgraph=True, dynamic=True, backend=graphs)
    for height, width in [(9, 11), (40, 35), (64, 96), (130, 7)]:
        images = torch.randn(2, 3, height, width, device=device)
        torch.testing.assert_close(compiled(images), local_norm(images, 5, backend=backend))
    assert graphs.frame_count == 1


def test_opcheck(device):
    images = torch.randn(2, 3, 5, 7, device=device)
    for argument in (images, images.mT):
        torch.library.opcheck(torch.ops.ofb_kernels.local_norm.default, (argument, 5, 1e-6))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.randn(3, 8, 8)}, ValueError, r"expected images of shape \(B, C, H, W\), got \(3, 8, 8\)"),
        ({"images": torch.ones(1, 3, 8, 8).int()}, TypeError, "got torch.int32"),
        ({"window": 4}, ValueError, "expected window as an odd positive int, got 4"),
        ({"window": -1}, ValueError, "got -1"),
        ({"window": 3.0}, ValueError, "got 3.0"),
        ({"eps": -1.0}, ValueError, "expected eps >= 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "got nan"),
        ({"backend": "numpy"}, ValueError, "got 'numpy'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        local_norm(**({"images": torch.randn(1, 3, 8, 8)} | change))
