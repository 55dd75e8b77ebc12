"""candidate_statistics: every backend against the float64 reference and by hand, clamps, compilation, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ofb.supernet import adaptive_one_hot_loss
from ofb_kernels.ops.candidate_statistics import candidate_statistics
from ofb_kernels.reference import SIGMA_MARGIN
from ofb_kernels.testing import check_op
from tests.common import BACKENDS, dtypes_of

# Rows whose σ or log p is clamped, at both ends, and rows of few alive candidates.
EXTREMES = {
    "uniform": ([0.0] * 5, [1, 1, 1, 1, 1]),
    "nearly uniform": ([1e-3, 0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1, 1]),
    "one-hot": ([60.0, 0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1, 1]),
    "nearly one-hot": ([8.0, 0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1, 1]),
    "huge": ([1e4, -1e4, 9999.0, 0.0, -1e4], [1, 1, 1, 1, 1]),
    "one alive": ([3.0, 1.0, -2.0, 0.5, 0.0], [0, 0, 1, 0, 0]),
    "two alive": ([3.0, 1.0, -2.0, 0.5, 0.0], [0, 1, 0, 1, 0]),
    "dead ones larger": ([3e38, 1.0, -2.0, torch.inf, 0.0], [0, 1, 1, 0, 1]),
}


def make_options(rows, candidates, device):
    alive = torch.rand(rows, candidates, device=device) < 0.8
    alive[:, -1] = True
    heads = torch.randint(1, 13, (rows, candidates), device=device)
    return {"alive": alive, "heads": heads, "units": 64 * heads}


def extremes(dtype, device):
    """alpha of all EXTREMES, and the other arguments."""
    alpha, alive = (torch.tensor(each, device=device) for each in zip(*EXTREMES.values(), strict=True))
    options = make_options(*alpha.shape, device) | {"alive": alive.bool()}
    return alpha.to(dtype).requires_grad_(), options


def one_result(number):
    return lambda **arguments: candidate_statistics(**arguments)[number]


@pytest.mark.parametrize("result", range(3), ids=["one_hot", "heads", "units"])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_each_result_matches_float64(backend, dtype, result, device):
    """Alone: the others have no gradient then, and are of another magnitude."""
    alpha = torch.randn(25, 33, device=device).to(dtype)
    check_op(one_result(result), {"alpha": alpha}, make_options(25, 33, device), backend, reduction=33)


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=st.integers(1, 5), candidates=st.integers(1, 70), step=st.integers(1, 3), spread=st.floats(0.1, 5))
def test_any_shape_and_strides(backend, rows, candidates, step, spread):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alpha = (spread * torch.randn(candidates * step, rows, device=device))[::step].t()
    options = make_options(candidates, rows, device)
    options = {name: each.t() for name, each in options.items()}
    options["alive"][:, -1] = True
    check_op(candidate_statistics, {"alpha": alpha}, options, backend, reduction=candidates)


@pytest.mark.parametrize("candidates", [1, 256, 1000, 4096])
def test_many_candidates(candidates, device):
    alpha = torch.randn(2, candidates, device=device)
    check_op(candidate_statistics, {"alpha": alpha}, make_options(2, candidates, device), "triton", candidates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend, device):
    alpha = torch.tensor([[0.2, 0.3, 0.5, 9.0]], device=device).log()
    alive = torch.tensor([[True, True, True, False]], device=device)
    heads, units = torch.tensor([[1, 2, 4, 50]], device=device), torch.tensor([[10, 20, 80, 70]], device=device)
    one_hot, expected_heads, expected_units = candidate_statistics(alpha, alive, heads, units, backend=backend)
    torch.testing.assert_close(one_hot[0], adaptive_one_hot_loss(alpha[0, :3]))
    assert expected_heads.item() == pytest.approx(0.2 * 1 + 0.3 * 2 + 0.5 * 4)
    assert expected_units.item() == pytest.approx(0.2 * 10 + 0.3 * 20 + 0.5 * 80)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_stack_as_alone(backend, device):
    alpha, alive = torch.randn(3, 7, device=device), torch.ones(3, 7, dtype=torch.bool, device=device)
    alive[1, 4:] = alive[2, 1:] = False
    sizes = torch.ones(3, 7, dtype=torch.int64, device=device)
    one_hot, *sums = candidate_statistics(alpha, alive, sizes, sizes, backend=backend)
    expected = adaptive_one_hot_loss(alpha[0]), adaptive_one_hot_loss(alpha[1, :4]), alpha.new_zeros(())
    torch.testing.assert_close(one_hot, torch.stack(expected))
    for each in sums:
        torch.testing.assert_close(each, torch.ones_like(each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamps_are_those_of_the_reference(dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    tolerances = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 1e-6}
    alpha, options = extremes(dtype, device)
    results = {backend: candidate_statistics(alpha, **options, backend=backend) for backend in ("reference", "triton")}
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, **tolerances)
        got, expected = (torch.autograd.grad(each.sum(), alpha, retain_graph=True)[0] for each in (got, expected))
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, **tolerances)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_keeps_its_digits_at_the_poles(backend, device):
    """By hand, as cot(πσ) = −cot(π(1 − σ)): uniform rows end at the margin from 0, one-hot ones at that from 1."""
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    n, from_one = 5, 1 - (1 - SIGMA_MARGIN)
    expected = [math.log(n) + 1 / (n * math.tan(math.pi * SIGMA_MARGIN)), -1 / (n * math.tan(math.pi * from_one))]
    alpha = torch.tensor([[0.0] * n, [60.0] + [0.0] * (n - 1)], dtype=torch.float64, device=device)
    alive, sizes = torch.ones_like(alpha).bool(), torch.ones_like(alpha).long()
    losses = candidate_statistics(alpha, alive, sizes, sizes, backend=backend)[0]
    roundings = 8  # of π, of the angle, of its tangent, of the product with n and of its inverse, of either side
    tolerance = roundings * torch.finfo(torch.float64).eps
    torch.testing.assert_close(losses, losses.new_tensor(expected), rtol=tolerance, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_alive_candidate_and_dead_ones_get_no_gradient(backend, device):
    alpha, options = extremes(torch.float32, device)
    one_hot = candidate_statistics(alpha, **options, backend=backend)[0]
    (gradient,) = torch.autograd.grad(one_hot.sum(), alpha)
    single = list(EXTREMES).index("one alive")
    assert one_hot[single] == 0 and (gradient[single] == 0).all()
    assert (gradient[~options["alive"]] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_shows_in_its_row_alone(backend, value, device):
    alpha, options = torch.randn(3, 6, device=device), make_options(3, 6, device)
    options["alive"][1, 0] = False
    expected = candidate_statistics(alpha, **options, backend=backend)
    alpha[1, -1] = value
    results = candidate_statistics(alpha.requires_grad_(), **options, backend=backend)
    (gradient,) = torch.autograd.grad(sum(each.sum() for each in results), alpha)
    for got, before in zip(results, expected, strict=True):
        assert got[1].isnan() and torch.equal(got[::2], before[::2])
    assert gradient[1].isnan().any() and gradient[::2].isfinite().all()
    assert (gradient[~options["alive"]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend, device):
    alpha, options = torch.randn(25, 33, device=device, requires_grad=True), make_options(25, 33, device)

    def run():
        results = candidate_statistics(alpha, **options, backend=backend)
        return *results, *torch.autograd.grad(sum(each.sum() for each in results), alpha)

    assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, device):
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    alpha = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    options = make_options(4, 6, device)
    assert gradcheck(lambda alpha: candidate_statistics(alpha, **options, backend=backend), (alpha,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_and_autocast_compute_in_float32(backend, device):
    alpha, options = torch.randn(4, 6, device=device).half(), make_options(4, 6, device)
    expected = candidate_statistics(alpha.float(), **options, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = candidate_statistics(alpha, **options, backend=backend)
    assert all(map(torch.equal, results, expected)) and results[0].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, device):
    alpha, options = torch.randn(4, 6, device=device, requires_grad=True), make_options(4, 6, device)

    def op(alpha):
        one_hot, heads, _ = candidate_statistics(alpha, **options, backend=backend)
        return one_hot.sum() + heads.square().sum()

    compiled, expected = torch.compile(op, fullgraph=True, backend="aot_eager")(alpha), op(alpha)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, alpha) for each in (compiled, expected)))


def test_opcheck(device):
    alpha, options = torch.randn(4, 6, device=device), tuple(make_options(4, 6, device).values())
    torch.library.opcheck(torch.ops.ofb_kernels.candidate_statistics.default, (alpha.requires_grad_(), *options))
    grads = torch.randn(4, device=device), None, torch.randn((), device=device).expand(4)
    arguments = *grads, alpha.detach(), *options
    torch.library.opcheck(torch.ops.ofb_kernels.candidate_statistics_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": torch.rand(6)}, ValueError, r"expected alpha of shape \(S, K\) with candidates, got \(6,\)"),
        ({"alpha": torch.rand(4, 0)}, ValueError, r"with candidates, got \(4, 0\)"),
        ({"alpha": torch.ones(4, 6).long()}, TypeError, "expected alpha as a floating-point tensor, got torch.int64"),
        ({"alive": torch.ones(4, 6)}, TypeError, "expected alive as a bool tensor, got torch.float32"),
        ({"alive": torch.ones(4, 5).bool()}, ValueError, r"expected alive of shape \(4, 6\), got \(4, 5\)"),
        ({"alive": torch.zeros(4, 6).bool()}, ValueError, "at least one candidate of each submodule"),
        ({"heads": torch.ones(4, 6)}, TypeError, "expected heads as an int64 tensor, got torch.float32"),
        ({"units": None}, TypeError, "expected units as an int64 tensor, got NoneType"),
        ({"units": torch.ones(4).long()}, ValueError, r"expected units of shape \(4, 6\), got \(4,\)"),
        ({"heads": torch.ones(4, 6, device="meta").long()}, ValueError, "expected heads on cpu, got meta"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"alpha": torch.rand(4, 6)} | make_options(4, 6, "cpu")
    with pytest.raises(error, match=message):
        candidate_statistics(**arguments | change)


def test_more_candidates_than_the_kernels_hold(device):
    options = make_options(1, 4097, device)
    with pytest.raises(ValueError, match="expected at most 4096 candidates, got 4097"):
        candidate_statistics(torch.rand(1, 4097, device=device), **options, backend="triton")
