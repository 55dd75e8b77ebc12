"""bimask: every backend against the float64 reference, ranks and ties bit for bit, compilation, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ofb_kernels.ops.bimask import bimask
from ofb_kernels.testing import check_op
from tests.common import BACKENDS, dtypes_of


def make_inputs(heads, channels, dtype, device, candidates):
    """Scores further apart than their rounding, so that a perturbed one keeps its rank."""
    score = torch.linspace(-2, 2, heads * channels, device=device)[torch.randperm(heads * channels)]
    return {
        "score": score.view(heads, channels).to(dtype),
        "alpha": torch.rand(*candidates, device=device).to(dtype),
        "lam": torch.tensor(0.3, device=device, dtype=dtype),
    }


def single(inputs):
    return {"score": inputs["score"][0], "alpha": inputs["alpha"][0], "lam": inputs["lam"]}


def ranks_on(backend, score):
    """The rank of each unit, read off a mask with one candidate for every size: V = 1 − rank / units for equal p."""
    joint = score.dim() == 2
    sizes = [list(range(1, size + 1)) for size in score.shape]
    alpha = torch.zeros(score.shape, device=score.device)
    mask = bimask(score, alpha, tuple(sizes) if joint else sizes[0], 0.0, backend=backend)
    if not joint:
        return ((1 - mask) * score.shape[0]).round()
    channel_rank = ((1 - mask / mask.amax(1, keepdim=True)) * score.shape[1]).round()
    head_rank = ((1 - mask.amax(1)) * score.shape[0]).round()
    return head_rank, channel_rank


@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_matches_float64(backend, dtype, device):
    inputs = make_inputs(6, 24, dtype, device, (3, 7))
    options = {"counts": ([2, 4, 6], [6, 9, 12, 15, 18, 21, 24])}
    options["alive"] = torch.rand(3, 7, device=device) < 0.8
    check_op(bimask, inputs, options, backend, reduction=6 * 24)


@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_matches_float64_without_heads(backend, dtype, device):
    inputs = single(make_inputs(1, 200, dtype, device, (1, 7)))
    check_op(bimask, inputs, {"counts": [50, 75, 100, 125, 150, 175, 200]}, backend, reduction=200)


def test_most_candidates(device):
    """As many as the kernels hold, in a grid; one more is refused by them and taken by the others."""
    score, alpha = torch.randn(64, 64, device=device), torch.zeros(64, 64, device=device)
    counts = (list(range(1, 65)),) * 2
    mask = bimask(score, alpha, counts, 0.5, backend="triton")
    torch.testing.assert_close(mask, bimask(score, alpha, counts, 0.5, backend="reference"))
    score, alpha = torch.randn(17, 241, device=device), torch.zeros(17, 241, device=device)
    counts = list(range(1, 18)), list(range(1, 242))
    with pytest.raises(ValueError, match="expected at most 4096 candidates, got 4097"):
        bimask(score, alpha, counts, 0.5, backend="triton")
    assert bimask(score, alpha, counts, 0.5).isfinite().all()


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lam_at_an_end_of_its_range(backend, lam, device):
    inputs = make_inputs(3, 10, torch.float32, device, (2, 3)) | {"lam": torch.tensor(lam, device=device)}
    masks = [
        bimask(**inputs | {"lam": each}, counts=([1, 3], [2, 5, 10]), backend=backend) for each in (inputs["lam"], lam)
    ]
    assert torch.equal(*masks)


@pytest.mark.parametrize("candidates", [33, 65, 256])
def test_many_candidates_and_units(candidates, device):
    inputs = single(make_inputs(1, 1200, torch.float32, device, (1, candidates)))
    counts = torch.arange(1200 - candidates, 1200, device=device) + 1
    check_op(bimask, inputs, {"counts": counts}, "triton", reduction=1200)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    heads=st.integers(1, 20),
    channels=st.integers(1, 70),
    head_candidates=st.integers(1, 5),
    channel_candidates=st.integers(1, 9),
    step=st.integers(1, 3),
    transposed=st.booleans(),
)
def test_any_shape_and_strides(backend, heads, channels, head_candidates, channel_candidates, step, transposed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    candidates = (min(heads, head_candidates), min(channels, channel_candidates))
    inputs = make_inputs(heads, channels * step, torch.float32, device, (candidates[0], candidates[1] * step))
    inputs["score"], inputs["alpha"] = inputs["score"][:, ::step], inputs["alpha"][:, ::step]
    if transposed:
        inputs["score"] = inputs["score"].t().contiguous().t()
    sizes = zip(inputs["score"].shape, candidates, strict=True)
    counts = tuple(sorted((torch.randperm(size)[:number] + 1).tolist()) for size, number in sizes)
    options = {"counts": counts, "lam": inputs.pop("lam").item()}  # its gradient is what is left of a cancellation
    check_op(bimask, inputs, options, backend, reduction=heads * channels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_staircase_by_hand(backend, device):
    score = torch.tensor([0.0, 3.0, -1.0, 2.0], device=device)
    alpha = torch.tensor([0.2, 0.3, 0.5], device=device).log()
    alive = torch.tensor([True, False, True], device=device)
    mask = bimask(score, alpha, [1, 2, 4], 0.0, backend=backend)
    torch.testing.assert_close(mask, torch.tensor([0.5, 1.0, 0.5, 0.8], device=device))
    mask = bimask(score, alpha, [1, 2, 4], 0.0, alive, backend=backend)
    torch.testing.assert_close(mask, torch.tensor([5 / 7, 1.0, 5 / 7, 5 / 7], device=device))
    mask = bimask(score, alpha, [1, 2, 4], 0.25, backend=backend)
    torch.testing.assert_close(mask[0], torch.tensor(0.25 * 0.5 + 0.75 * 0.5, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_joint_staircase_by_hand(backend, device):
    score = torch.tensor([[0.0, 1.0], [3.0, 2.0]], device=device)  # head 1 before head 0
    alpha = torch.tensor([[0.1, 0.2], [0.3, 0.4]], device=device).log()  # heads {1, 2} × channels {1, 2}
    mask = bimask(score, alpha, ([1, 2], [1, 2]), 0.0, backend=backend)
    torch.testing.assert_close(mask, torch.tensor([[0.4, 0.7], [1.0, 0.6]], device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_alive_candidate_keeps_exactly_its_units(backend, device):
    inputs = make_inputs(4, 8, torch.float32, device, (2, 2))
    alive = torch.tensor([[False, False], [True, False]], device=device)
    arguments = {"counts": ([2, 3], [5, 8]), "lam": 0.0, "alive": alive, "backend": backend}
    mask = bimask(inputs["score"], inputs["alpha"], **arguments)
    head_rank, channel_rank = ranks_on("reference", inputs["score"])
    assert torch.equal(mask, ((head_rank[:, None] < 3) & (channel_rank < 5)).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_candidates_count_for_nothing(backend, device):
    score = torch.randn(10, device=device)
    alpha = torch.tensor([0.3, torch.inf, 0.1], device=device, requires_grad=True)
    alive = torch.tensor([True, False, True], device=device)
    mask = bimask(score, alpha, [2, 5, 10], 0.5, alive, backend=backend)
    assert torch.equal(mask, bimask(score, alpha[::2], [2, 10], 0.5, backend=backend))
    gradient = torch.autograd.grad(mask[0], alpha)[0]
    assert gradient[1] == 0 and gradient.isfinite().all()


def make_stack(sizes, candidates, dtype, device):
    """Inputs of each submodule alone, and of all filled up to one size."""
    alone, heads, channels = [], max(h for h, _ in sizes), max(d for _, d in sizes)
    most = [max(len(counts[i]) for counts in candidates) for i in range(2)]
    stack = {
        "score": torch.full((len(sizes), heads, channels), -torch.inf, dtype=dtype, device=device),
        "alpha": torch.randn(len(sizes), *most, dtype=dtype, device=device),
        "alive": torch.zeros(len(sizes), *most, dtype=torch.bool, device=device),
        "counts": tuple(torch.zeros(len(sizes), k, dtype=torch.int64, device=device) for k in most),
    }
    for i, ((h, d), counts) in enumerate(zip(sizes, candidates, strict=True)):
        grid = tuple(map(len, counts))
        inputs = make_inputs(h, d, dtype, device, grid) | {"counts": counts}
        inputs["alive"] = torch.rand(grid, device=device) < 0.8
        inputs["alive"][-1, -1] = True
        stack["score"][i, :h, :d] = inputs["score"]
        stack["alpha"][i, : grid[0], : grid[1]] = inputs["alpha"]
        stack["alive"][i, : grid[0], : grid[1]] = inputs["alive"]
        for padded, each in zip(stack["counts"], counts, strict=True):
            padded[i, : len(each)] = torch.tensor(each)
        alone.append(inputs)
    return alone, stack | {"lam": alone[0]["lam"]}


SIZES = [(3, 10), (2, 24), (1, 7)]
CANDIDATES = [([1, 3], [5, 7, 10]), ([2], [6, 24]), ([1], [1, 2, 3, 7])]


@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_stack_of_submodules_matches_float64(backend, dtype, device):
    _, stack = make_stack([(3, 24)] * 3, [([1, 3], [5, 24]), ([2, 3], [6, 20]), ([1, 2], [1, 9])], dtype, device)
    options = {"counts": stack.pop("counts"), "alive": stack.pop("alive")}
    check_op(bimask, stack, options, backend, reduction=3 * 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_submodule_of_a_stack_as_alone(backend, device):
    alone, stack = make_stack(SIZES, CANDIDATES, torch.float32, device)
    score, alpha = stack["score"].requires_grad_(), stack["alpha"].requires_grad_()
    mask = bimask(**stack, backend=backend)
    cotangent = torch.randn_like(mask)
    grad_score, grad_alpha = torch.autograd.grad(mask, [score, alpha], cotangent)
    assert grad_score.isfinite().all() and grad_alpha.isfinite().all()
    for i, ((heads, channels), inputs) in enumerate(zip(SIZES, alone, strict=True)):
        inputs |= {"lam": stack["lam"]}
        leaves = [inputs[name].requires_grad_() for name in ("score", "alpha")]
        expected = bimask(**inputs, backend=backend)
        gradients = torch.autograd.grad(expected, leaves, cotangent[i, :heads, :channels])
        rows, columns = inputs["alpha"].shape
        torch.testing.assert_close(mask[i, :heads, :channels], expected)
        torch.testing.assert_close(grad_score[i, :heads, :channels], gradients[0])
        torch.testing.assert_close(grad_alpha[i, :rows, :columns], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": ([1, 3], [5, 7])}, r"expected head counts as an int64 tensor for a score \(S, H, d\)"),
        ({"counts": (torch.ones(2).long(), torch.ones(3, 4).long())}, r"head counts .* of shape \(3, any number\)"),
        ({"alpha": torch.rand(3, 2, 5)}, r"expected alpha of shape \(3, 2, 4\), got \(3, 2, 5\)"),
        ({"alive": torch.ones(3, 2, 4).bool().index_fill(0, torch.tensor(1), False)}, "candidate of each submodule"),
    ],
)
def test_bad_stack(change, message):
    _, stack = make_stack(SIZES, CANDIDATES, torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        bimask(**stack | change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lam_1_is_importance_and_lam_0_sparsity(backend, device):
    inputs = make_inputs(3, 10, torch.float32, device, (2, 3))
    counts = ([1, 3], [2, 5, 10])
    importance = bimask(inputs["score"], inputs["alpha"], counts, 1.0, backend=backend)
    torch.testing.assert_close(importance, inputs["score"].sigmoid())
    sparsity = bimask(inputs["score"], inputs["alpha"], counts, 0.0, backend=backend)
    levels = inputs["alpha"].flatten().softmax(0).view(2, 3)
    torch.testing.assert_close(sparsity.min(), levels[1, 2])
    torch.testing.assert_close(sparsity.max(), levels.sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_and_ties(backend, device):
    score = torch.tensor([1.0, 2.0, 1.0, -torch.inf, 2.0, -torch.inf, 0.0, -0.0, 1.0], device=device)
    expected = torch.tensor([2.0, 0.0, 3.0, 7.0, 1.0, 8.0, 5.0, 6.0, 4.0], device=device)
    assert torch.equal(ranks_on(backend, score), expected)
    equal = torch.zeros(300, device=device)
    assert torch.equal(ranks_on(backend, equal), torch.arange(300.0, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_the_same_scores_tie(backend, device):
    """The order of the additions would part these heads, were the sums not integers."""
    channels = torch.randn(37, device=device)
    score = torch.stack([channels[torch.randperm(37)] for _ in range(21)])
    score[5] += 1
    head_rank, channel_rank = ranks_on(backend, score)
    expected = torch.arange(21.0, device=device)
    expected[:6] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0])
    assert torch.equal(head_rank, expected)
    assert torch.equal(channel_rank, torch.argsort(torch.argsort(-score)).float())


@pytest.mark.parametrize("backend", ["eager", "triton"])
@given(heads=st.integers(1, 20), channels=st.integers(1, 60), kinds=st.integers(1, 8))
def test_ranks_are_those_of_the_reference(backend, heads, channels, kinds):
    """Heads of a kind have the same scores in another order. Sums of different scores that are equal but for rounding
    would be decided by the last bit of a backend's sigmoid."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    score_of_kind = torch.randn(kinds, channels, device=device)
    score_of_kind[:, : channels // 2] = score_of_kind[:, :1]  # channels tie as well
    kind = torch.randint(kinds, (heads,))
    score = torch.stack([score_of_kind[k][torch.randperm(channels)] for k in kind])
    for got, expected in zip(ranks_on(backend, score), ranks_on("reference", score), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_of_minus_infinity_is_importance_0(backend, device):
    score = torch.tensor([[-torch.inf, 1.0], [-torch.inf, -torch.inf]], device=device, requires_grad=True)
    alpha = torch.zeros(2, 2, device=device, requires_grad=True)
    alive = torch.tensor([[True, False], [False, False]], device=device)
    mask = bimask(score, alpha, ([1, 2], [1, 2]), 0.5, alive, backend=backend)
    expected = torch.tensor([[0.0, 0.5 + 0.5 * torch.tensor(1.0).sigmoid()], [0.0, 0.0]], device=device)
    torch.testing.assert_close(mask, expected, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(mask.sum(), [score, alpha])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][score.isinf()] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_0_gradient(backend, device):
    inputs = make_inputs(4, 5, torch.float32, device, (2, 2))
    cotangent = torch.ones((), device=device).expand(4, 5)
    check_op(bimask, inputs, {"counts": ([2, 4], [3, 5])}, backend, reduction=20, cotangent=cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, device):
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    inputs = {n: t.requires_grad_() for n, t in make_inputs(3, 4, torch.float64, device, (2, 2)).items()}
    alive = torch.tensor([[True, True], [False, True]], device=device)
    assert gradcheck(
        lambda score, alpha, lam: bimask(score, alpha, ([1, 3], [2, 4]), lam, alive, backend=backend),
        list(inputs.values()),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend, device):
    inputs = make_inputs(6, 30, torch.float32, device, (2, 2))

    def run():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        mask = bimask(**leaves, counts=([2, 6], [20, 30]), backend=backend)
        return mask, *torch.autograd.grad(mask.square().sum(), list(leaves.values()))

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend, device):
    inputs = make_inputs(4, 10, torch.float32, device, (2, 2))
    expected = bimask(**inputs, counts=([2, 4], [5, 10]), backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        mask = bimask(**inputs, counts=([2, 4], [5, 10]), backend=backend)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_scores_compute_in_float32(backend, device):
    low = torch.float16 if backend == "triton" else torch.bfloat16
    inputs = {n: t.to(low) for n, t in make_inputs(4, 10, torch.float32, device, (2, 2)).items()}
    mask = bimask(**inputs, counts=([2, 4], [5, 10]), backend=backend)
    wide = bimask(**{n: t.float() for n, t in inputs.items()}, counts=([2, 4], [5, 10]), backend=backend)
    assert torch.equal(mask, wide.to(low))


@pytest.mark.parametrize("lam", [0.4, torch.tensor(0.4)], ids=["float", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, lam, device):
    score, alpha, _ = (t.requires_grad_() for t in make_inputs(4, 10, torch.float32, device, (2, 2)).values())
    lam = lam.to(device) if isinstance(lam, torch.Tensor) else lam
    alive = torch.tensor([[True, True], [False, True]], device=device)

    def op(score, alpha, lam, alive):
        return bimask(score, alpha, ([2, 4], [5, 10]), lam, alive, backend=backend)

    mask = torch.compile(op, fullgraph=True, backend="aot_eager")(score, alpha, lam, alive)
    expected = op(score, alpha, lam, alive)
    torch.testing.assert_close(mask, expected)
    cotangent = torch.randn_like(mask)
    for got, want in zip(
        torch.autograd.grad(mask, [score, alpha], cotangent),
        torch.autograd.grad(expected, [score, alpha], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_opcheck(device):
    score, alpha, lam = (t.requires_grad_() for t in make_inputs(4, 10, torch.float32, device, (2, 2)).values())
    score, alpha = (tensor.detach()[None].requires_grad_() for tensor in (score, alpha))
    counts = torch.tensor([[2, 4]], device=device), torch.tensor([[5, 10]], device=device)
    alive = torch.ones(1, 2, 2, dtype=torch.bool, device=device)
    torch.library.opcheck(torch.ops.ofb_kernels.bimask.default, (score, alpha, *counts, lam, alive))
    score, alpha, lam = score.detach(), alpha.detach(), lam.detach()
    _, *both_ranks = torch.ops.ofb_kernels.bimask(score, alpha, *counts, lam, alive)
    arguments = (torch.randn(1, 4, 10, device=device), score, alpha, *counts, lam, alive, *both_ranks)
    torch.library.opcheck(torch.ops.ofb_kernels.bimask_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"score": torch.rand(2, 3, 4, 5)},
            ValueError,
            r"or \(S, H, d\), got \(2, 3, 4, 5\)",
        ),
        ({"score": torch.rand(4, 0)}, ValueError, "expected channel counts ascending within 1 … 0 units"),
        ({"score": torch.ones(4, 10).long()}, TypeError, "expected score as a floating-point tensor, got torch.int64"),
        ({"alpha": None}, TypeError, "expected alpha as a torch.Tensor, got NoneType"),
        ({"alpha": torch.rand(4)}, ValueError, r"expected alpha of shape \(2, 2\), got \(4,\)"),
        ({"alpha": torch.rand(2, 0)}, ValueError, r"expected alpha of shape \(2, 2\), got \(2, 0\)"),
        ({"alpha": torch.rand(2, 2).half()}, TypeError, "expected alpha of score's dtype torch.float32, got torch.f"),
        ({"alpha": torch.rand(2, 2, device="meta")}, ValueError, "got alpha on meta"),
        ({"counts": [2, 4, 5]}, ValueError, r"expected counts as \(head counts, channel counts\).*, got \[2, 4, 5\]"),
        ({"counts": ([2, 4], [5, 9, 10])}, ValueError, r"expected alpha of shape \(2, 3\), got \(2, 2\)"),
        ({"counts": ([4, 2], [5, 10])}, ValueError, r"expected head counts ascending within 1 … 4 units, got \[4, 2\]"),
        ({"counts": ([2, 2], [5, 10])}, ValueError, r"expected head counts ascending within 1 … 4 units, got \[2, 2\]"),
        ({"counts": ([2, 5], [5, 10])}, ValueError, r"expected head counts ascending within 1 … 4 units, got \[2, 5\]"),
        ({"counts": ([0, 4], [5, 10])}, ValueError, r"expected head counts ascending within 1 … 4 units, got \[0, 4\]"),
        ({"counts": ([2, 4], [5, 11])}, ValueError, r"expected channel counts ascending within 1 … 10 units"),
        ({"counts": ([2, 4.0], [5, 10])}, ValueError, r"expected head counts as a sequence of ints, got \[2, 4.0\]"),
        (
            {"counts": (torch.ones(2), [5, 10])},
            ValueError,
            "int64 tensor of shape .any number. .* got torch.float32",
        ),
        ({"counts": (torch.ones(3).long(), [5, 10])}, ValueError, r"expected alpha of shape \(3, 2\), got \(2, 2\)"),
        ({"counts": (torch.ones(2, device="meta").long(), [5, 10])}, ValueError, "expected head counts .* on meta"),
        ({"lam": 1.1}, ValueError, r"expected lam in \[0, 1\], got 1.1"),
        ({"lam": float("nan")}, ValueError, r"expected lam in \[0, 1\], got nan"),
        ({"lam": torch.tensor(-0.5)}, ValueError, r"expected lam in \[0, 1\], got -0.5"),
        ({"lam": torch.tensor(1.0).nextafter(torch.tensor(2.0))}, ValueError, r"expected lam in \[0, 1\], got 1.00000"),
        ({"lam": torch.tensor(-1e-30)}, ValueError, r"expected lam in \[0, 1\], got -1.0"),
        ({"lam": -1e-30}, ValueError, r"expected lam in \[0, 1\], got -1e-30"),
        ({"lam": torch.rand(1)}, ValueError, r"expected lam as a float or a 0-d tensor .* got .* shape \(1,\)"),
        ({"lam": torch.tensor(1)}, ValueError, "expected lam as a float or a 0-d tensor .* got torch.int64"),
        ({"lam": torch.tensor(0.5, device="meta")}, ValueError, "expected lam as a float or a 0-d tensor .* on meta"),
        ({"lam": "0.5"}, TypeError, "expected lam as a float or a 0-d tensor, got str"),
        (
            {"alive": torch.zeros(2, 2).bool()},
            ValueError,
            "at least one candidate of each submodule",
        ),
        ({"alive": torch.ones(2, 2)}, TypeError, "expected alive as a bool tensor, got torch.float32"),
        ({"alive": torch.ones(4).bool()}, ValueError, r"expected alive of shape \(2, 2\), got \(4,\)"),
        ({"alive": torch.ones(2, 2, device="meta").bool()}, ValueError, "expected alive on cpu, got meta"),
        ({"alive": [True] * 4}, TypeError, "expected alive as a bool tensor, got list"),
        ({"backend": "cuda"}, ValueError, "expected one of reference, eager, triton, got 'cuda'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = make_inputs(4, 10, torch.float32, "cpu", (2, 2)) | {"counts": ([2, 4], [5, 10])} | change
    with pytest.raises(error, match=message):
        bimask(**arguments)


def test_single_form_wants_flat_counts(device):
    inputs = single(make_inputs(1, 10, torch.float32, device, (1, 2)))
    with pytest.raises(ValueError, match="expected counts as a sequence of ints"):
        bimask(**inputs, counts=([1], [5, 10]))
