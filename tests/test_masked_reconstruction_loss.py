"""masked_reconstruction_loss: every backend against the definition, in all sizes of areas and windows."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ofb_kernels.ops.local_norm import local_norm
from ofb_kernels.ops.masked_reconstruction_loss import masked_reconstruction_loss
from ofb_kernels.testing import check_op
from tests.common import BACKENDS, dtypes_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(
    images=2, channels=2, size=(20, 30), pixels=(4, 6), drawn=7, dtype=torch.float32, device=DEVICE
) -> dict:
    """Random arguments of the op; about two in three of the drawn areas are masked, the first one always."""
    areas = size[0] // pixels[0] * (size[1] // pixels[1])
    places = torch.rand(images, areas).argsort(1)[:, :drawn]
    return {
        "decoded": torch.randn(images, places.shape[1], channels * pixels[0] * pixels[1]).to(device, dtype),
        "images": torch.randn(images, channels, *size).to(device, dtype),
        "areas": places.to(device),
        "masked": (torch.arange(places.shape[1]) % 3 < 2).to(device),
        "pixels": pixels,
    }


def check(inputs: dict, backend: str, **options) -> None:
    """The loss and decoded's gradient against the float64 reference."""
    inputs = inputs | options
    decoded = inputs.pop("decoded")
    check_op(masked_reconstruction_loss, {"decoded": decoded}, inputs, backend, reduction=decoded.numel())


def loss_and_gradient(inputs: dict, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    decoded = inputs["decoded"].detach().requires_grad_()
    loss = masked_reconstruction_loss(**inputs | {"decoded": decoded}, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss, decoded)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_the_pixels_of_masked_areas_only(backend, device):
    images = torch.randn(2, 3, 8, 12, device=device)  # 4 × 6 areas
    rebuilt = torch.randn_like(images)
    error = (rebuilt - local_norm(images)).abs()
    expected = torch.cat([error[0, :, 2:4, 4:6].flatten(), error[1, :, 6:8, 0:2].flatten()]).mean()
    decoded = F.pixel_unshuffle(rebuilt, 2).flatten(2).mT  # what a decoder gives before its pixel shuffle
    areas, masked = torch.tensor([[8, 3], [18, 0]], device=device), torch.tensor([True, False], device=device)
    decoded = decoded.take_along_dim(areas[..., None], 1)
    loss = masked_reconstruction_loss(decoded, images, areas, masked, (2, 2), backend=backend)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("value", [0.1, 3.7, 100.3, -1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_makes_no_variance_negative(backend, value, device):
    """Of a constant far from 0 the mean square may round to less than the squared mean, by more than eps."""
    inputs = make_inputs(1, 1, (32, 32), (4, 4), drawn=64, device=device)
    inputs |= {"images": torch.full_like(inputs["images"], value), "masked": torch.ones_like(inputs["masked"])}
    assert all(each.isfinite().all() for each in loss_and_gradient(inputs, backend))


@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_matches_float64(backend, dtype, device):
    check(make_inputs(size=(48, 70), pixels=(16, 16), dtype=dtype, device=device), backend)


@pytest.mark.parametrize("decoded_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("images_dtype", [torch.float32, torch.float16])
def test_dtypes_mix(images_dtype, decoded_dtype, device):
    inputs = make_inputs(device=device)
    inputs |= {"decoded": inputs["decoded"].to(decoded_dtype), "images": inputs["images"].to(images_dtype)}
    check(inputs, "triton")
    loss, gradient = loss_and_gradient(inputs, "triton")
    assert (loss.dtype, gradient.dtype) == (torch.float32, decoded_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    pixels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rest=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    half=st.integers(0, 12),
    drawn=st.integers(1, 9),
)
def test_any_size_and_window(backend, pixels, rest, half, drawn):
    size = pixels[0] + rest[0], pixels[1] + rest[1]
    check(make_inputs(1, 1, size, pixels, drawn), backend, window=2 * half + 1, eps=0.1)


@pytest.mark.parametrize(
    ("size", "pixels", "window"),
    [
        ((48, 64), (16, 16), 47),
        ((70, 100), (32, 32), 47),
        ((45, 29), (14, 14), 47),
        ((64, 64), (16, 16), 31),
        ((32, 35), (32, 32), 5),
        ((8, 8), (2, 2), 47),
        ((3, 150), (2, 2), 201),
        ((40, 70), (16, 16), 1001),
    ],
)
def test_areas_and_windows_of_networks(size, pixels, window, device):
    check(make_inputs(1, 1, size, pixels, 5, device=device), "triton", window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_windows(value, backend, device):
    """And what no masked area sees does not count."""
    inputs = make_inputs(1, 1, (60, 64), (4, 4), 240, device=device)
    inputs |= {"areas": torch.arange(240, device=device)[None], "window": 9}
    inputs["images"][0, 0, 31, 43] = value
    seen = ~local_norm(inputs["images"], window=9, backend="reference").isfinite()
    seen = F.max_pool2d(seen.float(), 4).flatten().bool()
    assert seen.sum() == 9
    masked = torch.ones_like(seen)
    assert not masked_reconstruction_loss(**inputs | {"masked": masked}, backend=backend).isfinite()
    if backend == "eager":  # products over rows and columns take it all over its image
        return
    loss, gradient = loss_and_gradient(inputs | {"masked": ~seen}, backend)
    assert loss.isfinite() and gradient.isfinite().all()
    _, gradient = loss_and_gradient(inputs | {"masked": masked}, backend)
    assert torch.equal((gradient == 0).any(2)[0], seen)  # as torch has it: the sign of a NaN is 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_areas_that_are_not_masked_do_not_count(backend, device):
    inputs = make_inputs(device=device)
    loss, gradient = loss_and_gradient(inputs, backend)
    inputs["decoded"][:, ~inputs["masked"]] = float("nan")
    other, other_gradient = loss_and_gradient(inputs, backend)
    assert torch.equal(other, loss) and torch.equal(other_gradient[:, inputs["masked"]], gradient[:, inputs["masked"]])
    assert not gradient[:, ~inputs["masked"]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_masked_area_the_loss_is_0(backend, device):
    inputs = make_inputs(device=device)
    loss, gradient = loss_and_gradient(inputs | {"masked": torch.zeros_like(inputs["masked"])}, backend)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", [{"images": 0}, {"drawn": 0}, {"channels": 0}])
def test_nothing_gives_0(backend, empty, device):
    loss, gradient = loss_and_gradient(make_inputs(**({"images": 2} | empty), device=device), backend)
    assert loss.shape == () and loss == 0 and gradient.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, device):
    inputs = make_inputs(device=device)
    strided = {
        "decoded": inputs["decoded"].mT.contiguous().mT,
        "images": inputs["images"].to(memory_format=torch.channels_last),
        "areas": inputs["areas"].t().contiguous().t(),
        "masked": inputs["masked"].repeat_interleave(2)[::2],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    check(inputs | strided, backend)
    for expected, got in zip(
        loss_and_gradient(inputs, backend), loss_and_gradient(inputs | strided, backend), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatability_autocast_and_no_gradient_of_images(backend, device):
    inputs = make_inputs(device=device)
    results = loss_and_gradient(inputs, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        again = loss_and_gradient(inputs, backend)
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))
    inputs["images"].requires_grad_()
    assert not masked_reconstruction_loss(**inputs, backend=backend).requires_grad
    with torch.no_grad():
        decoded = inputs["decoded"].requires_grad_()
        loss = masked_reconstruction_loss(**inputs | {"decoded": decoded}, backend=backend)
    assert torch.equal(loss, results[0]) and not loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    """Where it is differentiable: no prediction lies near its target."""
    if DEVICE == "cuda" and backend == "triton":
        pytest.skip("Triton takes no float64 on a GPU")
    inputs = make_inputs(1, 1, (5, 7), (2, 3), 3, torch.float64) | {"window": 3}
    decoded = inputs.pop("decoded").sign() * 5
    call = lambda decoded: masked_reconstruction_loss(decoded, **inputs, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, decoded.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph_for_any_batch(backend, device):
    torch.compiler.reset()
    compiled = torch.compile(masked_reconstruction_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for images in (2, 3, 5):
        inputs = make_inputs(images, 1, (9, 9), (2, 3), 4, device=device) | {"window": 5}
        expected = loss_and_gradient(inputs, backend)
        decoded = inputs["decoded"].detach().requires_grad_()
        loss = compiled(**inputs | {"decoded": decoded}, backend=backend)
        torch.testing.assert_close(loss.detach(), expected[0])
        torch.testing.assert_close(torch.autograd.grad(loss, decoded)[0], expected[1])


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(keep, device):
    inputs = make_inputs(2, 1, (9, 9), (2, 3), 4, device=device)
    decoded = inputs["decoded"].requires_grad_(keep)
    for images in (inputs["images"], inputs["images"].mT.contiguous().mT):
        arguments = decoded, images, inputs["areas"], inputs["masked"], *inputs["pixels"], 5, 1e-6, keep
        torch.library.opcheck(torch.ops.ofb_kernels.masked_reconstruction_loss.default, arguments)


def test_an_area_outside_the_image_shows(device):
    inputs = make_inputs(device=device)
    for wrong in (25, -1):  # of 5 × 5 areas
        areas = inputs["areas"].clone()
        areas[1, 0] = wrong
        assert masked_reconstruction_loss(**inputs | {"areas": areas}, backend="triton").isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"decoded": torch.randn(2, 7, 47)}, ValueError, r"expected decoded of shape \(2, K, 48\), got \(2, 7, 47\)"),
        ({"decoded": torch.ones(2, 7, 48).int()}, TypeError, "expected decoded as a floating-point .* got torch.int32"),
        ({"images": torch.randn(3, 20, 30)}, ValueError, r"expected images of shape \(B, C, H, W\), got \(3, 20, 30\)"),
        ({"areas": torch.zeros(2, 6).long()}, ValueError, r"expected areas of shape \(2, 7\), got \(2, 6\)"),
        ({"areas": torch.zeros(2, 7)}, TypeError, "expected areas of dtype torch.int64, got torch.float32; use .to"),
        ({"areas": [[0]]}, TypeError, "expected areas as a torch.Tensor, got list"),
        ({"areas": torch.zeros(2, 7, device="meta").long()}, ValueError, "got areas on meta; move it there"),
        ({"masked": torch.ones(6).bool()}, ValueError, r"expected masked of shape \(7\), got \(6,\)"),
        ({"masked": torch.ones(7)}, TypeError, "expected masked of dtype torch.bool, got torch.float32"),
        ({"pixels": 4}, ValueError, "expected pixels as two positive ints, height and width of an area, got 4"),
        ({"pixels": (0, 4)}, ValueError, r"got \(0, 4\)"),
        ({"pixels": (21, 6)}, ValueError, "expected images of at least one area of 21 × 6 pixels, got 20 × 30"),
        ({"window": 4}, ValueError, "expected window as an odd positive int, got 4"),
        ({"eps": -1.0}, ValueError, "expected eps >= 0, got -1.0"),
        ({"backend": "numpy"}, ValueError, "got 'numpy'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"masked_reconstruction_loss: .*{message}|{message}"):
        masked_reconstruction_loss(**make_inputs(device="cpu") | change)
