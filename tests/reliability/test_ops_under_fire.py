"""The ops on hostile inputs

NaN and infinities, subnormal numbers, masks of exact zeros and ones, memory that is not theirs (outputs in buffers full
of NaN, whose edges must not change), the same call twice, other company in the batch.
"""

import pytest
import torch

import ofb_kernels
from tests.common import BACKENDS

GUARD = 64  # elements on both sides of what an op may touch


def linear(rows, random):
    x, weight, bias, mask = random(rows, 37), random(29, 37), random(29), random(29).sigmoid()
    return {"x": x, "weight": weight, "bias": bias, "mask": mask}, {"activation": "gelu"}


def mlp(rows, random):
    inputs = {"x": random(rows, 21), "fc1_weight": random(35, 21), "fc1_bias": random(35)}
    return inputs | {"mask": random(35).sigmoid(), "fc2_weight": random(21, 35), "fc2_bias": random(21)}, {}


def attention(rows, random):
    return {"qkv": random(rows, 19, 3, 2, 12), "mask": random(2, 12).sigmoid()}, {}


def biased_attention(rows, random):
    return attention(rows, random)[0] | {"bias": random(2, 19, 19)}, {}


def layer_norm(rows, random):
    return {"x": random(rows, 33), "weight": random(33), "bias": random(33), "mask": random(33).sigmoid()}, {}


def local_norm(rows, random):
    return {"images": random(rows, 3, 17, 23)}, {"window": 5}


CASES = {
    "masked_linear": (ofb_kernels.masked_linear, linear),
    "masked_mlp": (ofb_kernels.masked_mlp, mlp),
    "masked_attention": (ofb_kernels.masked_attention, attention),
    "masked_attention with bias": (ofb_kernels.masked_attention, biased_attention),
    "masked_layer_norm": (ofb_kernels.masked_layer_norm, layer_norm),
    "local_norm": (ofb_kernels.local_norm, local_norm),
}
DIFFERENTIABLE = [name for name in CASES if name != "local_norm"]


@pytest.fixture
def random(device):
    return lambda *shape: torch.randn(*shape, device=device)


def run(op, inputs, options, backend):
    """The result and the gradients of all inputs, for a cotangent that depends on nothing but the result's shape."""
    leaves = {name: each.detach().clone().requires_grad_() for name, each in inputs.items()}
    result = op(**leaves, **options, backend=backend)
    if not result.requires_grad:
        return {"result": result}
    cotangent = torch.linspace(-1, 1, result.numel(), device=result.device).view(result.shape)
    return {"result": result} | dict(
        zip(leaves, torch.autograd.grad(result, list(leaves.values()), cotangent), strict=True)
    )


def close(backend_values, reference_values):
    for name, value in backend_values.items():
        torch.testing.assert_close(value, reference_values[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_what_is_not_finite_goes_where_plain_torch_takes_it(backend, case, value, random):
    op, make = CASES[case]
    inputs, options = make(3, random)
    inputs[next(iter(inputs))].flatten()[40] = value
    got, expected = (op(**inputs, **options, backend=each) for each in (backend, "reference"))
    if (case, backend) == ("local_norm", "eager"):  # products over rows and columns take it all over its channel
        assert not got[~expected.isfinite()].isfinite().any()
        expected[0, 0] = got[0, 0]
    assert torch.equal(got.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_subnormal_numbers(backend, case, random):
    op, make = CASES[case]
    inputs, options = make(3, lambda *shape: random(*shape) * 1e-40)
    close(run(op, inputs, options, backend), run(op, inputs, options, "reference"))


@pytest.mark.parametrize("ones", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_masks_of_zeros_and_ones(backend, case, ones, random):
    op, make = CASES[case]
    inputs, options = make(3, random)
    if ones == 0 and case == "masked_layer_norm":
        pytest.skip("LayerNorm over no channel is 0 / 0")
    inputs["mask"] = (torch.rand_like(inputs["mask"]) < ones).to(inputs["mask"].dtype)
    close(run(op, inputs, options, backend), run(op, inputs, options, "reference"))


class Guards:
    """Places tensors in the middle of larger buffers full of NaN."""

    def __init__(self) -> None:
        self.buffers = []

    def surrounded(self, tensor):
        buffer = torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype, device=tensor.device)
        self.buffers.append(buffer)
        buffer[GUARD : GUARD + tensor.numel()] = tensor.flatten()
        return buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)

    def allocating(self, allocate):
        """torch's allocation, its memory surrounded and full of NaN itself."""

        def guarded(*args, **kwargs):
            made = allocate(*args, **kwargs)
            plain = made.is_floating_point() and made.is_contiguous()
            return self.surrounded(torch.full_like(made, torch.nan)) if plain else made

        return guarded

    def untouched(self) -> bool:
        return all(bool(edge.isnan().all()) for each in self.buffers for edge in (each[:GUARD], each[-GUARD:]))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_kernels_touch_their_own_memory_only_and_all_of_it(case, rows, random, monkeypatch):
    op, make = CASES[case]
    inputs, options = make(rows, random)
    expected = run(op, inputs, options, "reference")
    guards = Guards()
    leaves = {name: guards.surrounded(each).requires_grad_() for name, each in inputs.items()}
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, guards.allocating(getattr(owner, name)))
    result = op(**leaves, **options, backend="triton")
    got = {"result": result}
    if result.requires_grad:
        cotangent = torch.linspace(-1, 1, result.numel(), device=result.device).view(result.shape)
        gradients = torch.autograd.grad(result, list(leaves.values()), guards.surrounded(cotangent))
        got |= dict(zip(leaves, gradients, strict=True))
    monkeypatch.undo()
    assert len(guards.buffers) > len(leaves) + 1, "nothing was allocated where this test can see it"
    assert guards.untouched()
    close(got, expected)  # unwritten or foreign memory would show as NaN


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_gives_the_same_bits(backend, case, random):
    op, make = CASES[case]
    inputs, options = make(4, random)
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (run(op, inputs, options, backend) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_does_not_depend_on_what_else_is_in_the_batch(backend, case, random):
    op, make = CASES[case]
    inputs, options = make(4, random)
    first = next(iter(inputs))
    alone = inputs | {first: inputs[first][1:2]}
    crowd = inputs | {first: torch.cat([random(*inputs[first].shape) * 1e3, inputs[first]])}
    by_itself = op(**alone, **options, backend=backend)
    among_others = op(**crowd, **options, backend=backend)[5:6]
    if backend == "triton" and case != "masked_mlp":
        assert torch.equal(by_itself, among_others)
    else:  # torch's own products, the MLP's second one among them, choose their blocking by the number of rows
        torch.testing.assert_close(by_itself, among_others)
