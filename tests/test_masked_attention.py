"""masked_attention: every backend against the float64 reference, gradients, compilation, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ofb_kernels.kernels import masked_attention as kernel
from ofb_kernels.kernels import tuning
from ofb_kernels.ops.masked_attention import masked_attention, masked_qkv_attention
from ofb_kernels.testing import check_op
from tests.common import BACKENDS, dtypes_of


def make_inputs(batch, tokens, heads, head_dim, dtype, device):
    inputs = {
        "qkv": torch.randn(batch, tokens, 3, heads, head_dim, device=device),
        "mask": torch.rand(heads, head_dim, device=device),
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


@pytest.mark.parametrize(("tokens", "head_dim"), [(197, 24), (300, 64), (65, 128), (1, 1)])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_matches_float64(backend, dtype, tokens, head_dim, device):
    inputs = make_inputs(2, tokens, 2, head_dim, dtype, device)
    check_op(masked_attention, inputs, {}, backend, reduction=2 * tokens)


def make_biased(batch, windows, tokens, heads, head_dim, dtype, device):
    """With a bias for all sequences, or for each of some windows, where some keys are as good as hidden."""
    bias = torch.randn(windows or 1, heads, tokens, tokens, device=device)
    bias[:, :, : tokens // 2, : tokens // 3] -= 100
    return make_inputs(batch, tokens, heads, head_dim, dtype, device) | {
        "bias": (bias if windows else bias[0]).to(dtype)
    }


@pytest.mark.parametrize(("batch", "windows"), [(3, None), (4, 2)])
@pytest.mark.parametrize(("tokens", "head_dim"), [(49, 12), (49, 28), (3, 1)])
@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
def test_bias_matches_float64(backend, dtype, tokens, head_dim, batch, windows, device):
    inputs = make_biased(batch, windows, tokens, 2, head_dim, dtype, device)
    check_op(masked_attention, inputs, {}, backend, reduction=batch * tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_in_another_dtype_and_any_strides(backend, device):
    inputs = make_biased(4, 2, 9, 2, 8, torch.float16, device)
    inputs["bias"] = torch.randn(9, 2, 9, 4, device=device).permute(3, 1, 0, 2)[::2]
    check_op(masked_attention, inputs, {"scale": 0.3}, backend, reduction=36)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_do_not_exist(backend, device):
    """Keys under a bias of −∞ leave no trace, not even where a whole tile of them comes first."""
    inputs = make_inputs(1, 40, 2, 8, torch.float32, device)
    bias = torch.zeros(2, 40, 40, device=device)
    bias[:, :, :36] = -torch.inf
    out = masked_attention(**inputs, bias=bias, backend=backend)
    q, k, v = (inputs["qkv"] * inputs["mask"]).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, 36:]) * 8**-0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, 36:]).flatten(2)
    torch.testing.assert_close(out, expected)
    check_op(masked_attention, inputs | {"bias": bias}, {}, backend, reduction=40)
    leaf = bias.requires_grad_()
    masked_attention(**inputs, bias=leaf, backend=backend).square().sum().backward()
    assert (leaf.grad[:, :, :36] == 0).all()


def test_a_bias_that_alone_has_a_gradient_takes_no_sdpa(device, monkeypatch):
    """On a GPU that keeps nothing for such a gradient (torch 2.11)."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    inputs = make_inputs(1, 5, 2, 8, torch.float32, device)
    bias = torch.zeros(2, 5, 5, device=device, requires_grad=True)
    masked_attention(**inputs, bias=bias, backend="eager").square().sum().backward()
    assert bias.grad.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_keys_hidden_in_some_windows(backend, device):
    inputs = make_biased(2, 2, 33, 2, 12, torch.float32, device)
    hidden = torch.rand(2, 1, 33, 33, device=device) < 0.3
    hidden[..., range(33), range(33)] = False  # every query keeps its own key
    inputs["bias"] = inputs["bias"].masked_fill(hidden, -torch.inf)
    check_op(masked_attention, inputs, {}, backend, reduction=2 * 33)


def test_windows_follow_each_other(device):
    """Sequence b has the bias of window b mod W."""
    inputs = make_biased(6, 3, 5, 2, 4, torch.float64, device)
    bias = inputs.pop("bias")
    out = masked_attention(**inputs, bias=bias, backend="reference")
    for sequence in range(6):
        one = masked_attention(inputs["qkv"][[sequence]], inputs["mask"], bias=bias[sequence % 3], backend="reference")
        torch.testing.assert_close(out[[sequence]], one)


@pytest.mark.parametrize("wanted", [True, False])
def test_bias_gradient_is_computed_only_where_it_is_wanted(wanted, device, monkeypatch):
    calls, backward_bias = [], kernel.backward_bias
    monkeypatch.setattr(kernel, "backward_bias", lambda *tensors: calls.append(1) or backward_bias(*tensors))
    inputs = make_biased(4, 2, 5, 2, 4, torch.float32, device)
    inputs["qkv"].requires_grad_()
    inputs["bias"].requires_grad_(wanted)
    masked_attention(**inputs, backend="triton").sum().backward()
    assert len(calls) == wanted
    assert inputs["qkv"].grad is not None and (inputs["bias"].grad is not None) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_under_autocast(backend, device):
    low = torch.float16 if backend == "triton" else torch.bfloat16
    inputs = make_biased(4, 2, 33, 2, 24, torch.float32, device)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.autocast(device, dtype=low):
        out = masked_attention(**leaves, backend=backend)
    out.float().sum().backward()
    assert out.dtype == low
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in leaves.values())
    expected = masked_attention(**{n: t.detach().to(low) for n, t in inputs.items()}, backend="reference")
    torch.testing.assert_close(out, expected, atol=8 * torch.finfo(low).eps, rtol=8 * torch.finfo(low).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_gradcheck(backend, device):
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    inputs = [t.requires_grad_() for t in make_biased(2, 2, 2, 1, 2, torch.float64, device).values()]
    assert gradcheck(lambda qkv, mask, bias: masked_attention(qkv, mask, bias=bias, backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_compiles_to_one_graph_and_repeats_its_bits(backend, device):
    inputs = [t.requires_grad_() for t in make_biased(4, 2, 20, 2, 6, torch.float32, device).values()]

    def function(qkv, mask, bias):
        return masked_attention(qkv, mask, bias=bias, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(out := run(*inputs), *torch.autograd.grad(out.square().sum(), inputs)) for run in (function,) * 2]
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    out = compiled(*inputs)
    got = (out, *torch.autograd.grad(out.square().sum(), inputs))
    for one, other in zip(got, results[0], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("head_dim", range(16, 129, 8))
def test_every_head_dim_a_search_can_reach(head_dim, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = make_inputs(1, 50, 2, head_dim, dtype, device)
    check_op(masked_attention, inputs, {}, "triton", reduction=head_dim)


# Behind whole tiles of 32 or 64 a rest of 1, 5, 16, 17, 32, 33, 49 or a whole tile.
REST_OF_TILE = [1, 5, 15, 16, 17, 33, 49, 64, 65, 69, 80, 81, 96, 97, 113, 128]


@pytest.mark.parametrize("tokens", REST_OF_TILE)
def test_last_tile_of_any_size(tokens, device):
    inputs = make_inputs(1, tokens, 1, 24, torch.float16, device)
    check_op(masked_attention, inputs, {}, "triton", reduction=2 * tokens)


@pytest.mark.parametrize("tokens", REST_OF_TILE[1:])  # of one key the bias has no gradient and its error no bound
def test_last_tile_of_any_size_with_a_bias(tokens, device):
    inputs = make_biased(1, None, tokens, 1, 24, torch.float16, device)
    check_op(masked_attention, inputs, {}, "triton", reduction=2 * tokens)


@pytest.mark.parametrize(
    ("tokens", "block", "tail", "backward_tail"),
    [
        (197, 64, 16, 16),
        (197, 32, 16, 32),  # two sizes of tile cost more than half a tile
        (212, 64, 32, 64),
        (240, 64, 64, 64),
        (256, 64, 64, 64),
        (10, 64, 16, 16),
        (17, 64, 32, 32),  # the only tile is as small as can be
        (64, 64, 64, 64),
        (1, 16, 16, 16),
    ],
)
def test_last_tile_is_a_small_one(tokens, block, tail, backward_tail):
    assert (kernel._tail(tokens, block), kernel._backward_tail(tokens, block)) == (tail, backward_tail)


CANDIDATES = max(
    len(table[2, 64])
    for table in (
        kernel.FORWARD_CONFIGURATIONS,
        kernel.BACKWARD_QUERY_CONFIGURATIONS,
        kernel.BACKWARD_KEY_VALUE_CONFIGURATIONS,
    )
)


@pytest.mark.parametrize(
    ("configuration", "tokens", "tail"),
    [
        (dict(BLOCK_M=64, TAIL_M=16), 197, 16),
        (dict(BLOCK_M=64, TAIL_M=16), 208, 16),
        (dict(BLOCK_M=64, TAIL_M=16), 209, 64),
        (dict(BLOCK_M=64, TAIL_M=16), 256, 64),
        (dict(BLOCK_M=64, TAIL_M=16), 5, 64),  # no whole tile that would take the other size
        (dict(BLOCK_M=64), 197, 64),
    ],
)
def test_last_program_takes_few_queries(configuration, tokens, tail):
    assert kernel._with_tail_rows(configuration, tokens) == configuration | {"TAIL_M": tail}


@pytest.mark.parametrize(("tokens", "head_dim"), [(133, 40), (145, 64), (128, 24), (80, 16), (65, 56)])
@pytest.mark.parametrize("index", range(1, CANDIDATES))
def test_every_candidate_is_right(index, tokens, head_dim, device, monkeypatch):
    """Candidates of the three kernels, one of each at a time."""
    monkeypatch.setattr(tuning, "choose", lambda name, candidates, *_: candidates[min(index, len(candidates) - 1)])
    inputs = make_inputs(1, tokens, 1, head_dim, torch.float16, device)
    check_op(masked_attention, inputs, {}, "triton", reduction=2 * tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 80),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40),
    step=st.integers(1, 2),
    layout=st.permutations(range(5)),
    scale=st.sampled_from([None, 0.3, 1]),
    windows=st.sampled_from([None, 1, "batch"]),
)
def test_any_shape_and_strides(backend, batch, tokens, heads, head_dim, step, layout, scale, windows):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(batch, tokens, heads, head_dim * step, torch.float32, device)
    inverse = [layout.index(dim) for dim in range(5)]
    inputs["qkv"] = inputs["qkv"].permute(layout).contiguous().permute(inverse)[..., ::step]
    inputs["mask"] = inputs["mask"][:, ::step]
    if windows is not None:
        windows = batch if windows == "batch" else windows
        inputs["bias"] = torch.randn(tokens, windows, tokens, heads, device=device).permute(1, 3, 0, 2)
    check_op(masked_attention, inputs, {"scale": scale}, backend, reduction=max(batch * tokens, head_dim))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_in_another_dtype(backend, device):
    inputs = make_inputs(2, 9, 2, 8, torch.float16, device) | {"mask": torch.rand(2, 8, device=device)}
    check_op(masked_attention, inputs, {}, backend, reduction=18)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_of_zeros_and_ones(backend, device):
    """A masked channel is out of every result, and the others compute as if it were not there."""
    inputs = make_inputs(2, 21, 2, 12, torch.float32, device)
    inputs["mask"] = (torch.arange(12, device=device) < 8).float().expand(2, 12)
    out = masked_attention(**inputs, scale=0.4, backend=backend).view(2, 21, 2, 12)
    kept = masked_attention(inputs["qkv"][..., :8], torch.ones(2, 8, device=device), scale=0.4, backend="reference")
    torch.testing.assert_close(out[..., :8], kept.view(2, 21, 2, 8))
    assert (out[..., 8:] == 0).all()
    check_op(masked_attention, inputs, {}, backend, reduction=42)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_stay_finite(backend, sign, device):
    """Scores of a few hundred, all of one sign: the maximum goes out before the exponential."""
    inputs = make_inputs(1, 70, 1, 16, torch.float32, device)
    inputs["qkv"] = inputs["qkv"] + torch.tensor([10.0, 10.0 * sign, 0.0], device=device)[:, None, None]
    check_op(masked_attention, inputs, {}, backend, reduction=70)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_0_gradient(backend, device):
    inputs = make_inputs(2, 5, 2, 6, torch.float32, device)
    cotangent = torch.ones((), device=device).expand(2, 5, 12)
    check_op(masked_attention, inputs, {}, backend, reduction=10, cotangent=cotangent)


@pytest.mark.parametrize("shape", [(0, 5, 2, 6), (2, 0, 2, 6)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend, shape, device):
    inputs = {n: t.requires_grad_() for n, t in make_inputs(*shape, torch.float32, device).items()}
    out = masked_attention(**inputs, backend=backend)
    out.sum().backward()
    assert out.shape == (shape[0], shape[1], 12)
    assert all((tensor.grad == 0).all() for tensor in inputs.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, device):
    if backend == "triton" and device == "cuda":
        pytest.skip("the kernels take no float64 on a GPU")
    inputs = [t.requires_grad_() for t in make_inputs(2, 3, 2, 2, torch.float64, device).values()]
    assert gradcheck(lambda *tensors: masked_attention(*tensors, backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend, device):
    inputs = make_inputs(2, 100, 2, 24, torch.float32, device)

    def run():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        out = masked_attention(*leaves, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend, device):
    low = torch.float16 if backend == "triton" else torch.bfloat16
    inputs = make_inputs(2, 33, 2, 24, torch.float32, device)
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    with torch.autocast(device, dtype=low):
        out = masked_attention(**leaves, backend=backend)
    out.float().sum().backward()
    assert out.dtype == low
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    expected = masked_attention(**{n: t.to(low) for n, t in inputs.items()}, backend="reference")
    torch.testing.assert_close(out, expected, atol=8 * torch.finfo(low).eps, rtol=8 * torch.finfo(low).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, device):
    inputs = [t.requires_grad_() for t in make_inputs(2, 5, 2, 6, torch.float32, device).values()]
    compiled = torch.compile(
        lambda *tensors: masked_attention(*tensors, scale=0.3, backend=backend), fullgraph=True, backend="aot_eager"
    )
    out = compiled(*inputs)
    expected = masked_attention(*inputs, scale=0.3, backend=backend)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_opcheck(device):
    inputs = {n: t.requires_grad_() for n, t in make_inputs(2, 5, 2, 6, torch.float32, device).items()}
    ops, qkv, mask = torch.ops.ofb_kernels, inputs["qkv"].detach(), inputs["mask"].detach()
    for bias in (None, torch.randn(2, 2, 5, 5, device=device)):
        leaf = bias if bias is None else bias.clone().requires_grad_()
        torch.library.opcheck(ops.masked_attention.default, (inputs["qkv"], inputs["mask"], 0.3, leaf))
        out, log_sum_exp = ops.masked_attention(qkv, mask, 0.3, bias)
        arguments = (torch.randn_like(out), qkv, mask, out, log_sum_exp, 0.3, bias)
        torch.library.opcheck(ops.masked_attention_backward.default, arguments)
    torch.library.opcheck(ops.masked_attention_backward_bias.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_with_the_projection(bias, dtype, device):
    """Weights in float32, as under autocast, or in the activations' dtype."""
    x = torch.randn(2, 5, 7, device=device, dtype=dtype)
    weight, mask = torch.randn(36, 7, device=device), torch.rand(2, 6, device=device)
    inputs = (x, weight, torch.randn(36, device=device) if bias else None, mask)
    op, backward = torch.ops.ofb_kernels.masked_qkv_attention, torch.ops.ofb_kernels.masked_qkv_attention_backward
    for attention_bias in (None, torch.randn(2, 2, 5, 5, device=device)):
        leaves = [each if each is None else each.clone().requires_grad_() for each in (*inputs, attention_bias)]
        torch.library.opcheck(op.default, (*leaves[:4], 0.3, leaves[4], True))
        results = op(*inputs, 0.3, attention_bias, True)
        for needs in ((True, True), (True, False), (False, True)):
            arguments = (torch.randn_like(results[0]), *inputs, attention_bias, *results, 0.3, *needs)
            torch.library.opcheck(backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.randn(2, 5, 36)}, ValueError, r"expected qkv of shape \(B, N, 3, H, d\), got \(2, 5, 36\)"),
        ({"qkv": torch.randn(2, 5, 2, 2, 6)}, ValueError, r"expected qkv of shape \(B, N, 3, H, d\)"),
        ({"mask": torch.rand(6)}, ValueError, r"expected mask of shape \(2, 6\), got \(6,\)"),
        ({"qkv": torch.ones(2, 5, 3, 2, 6).long()}, TypeError, "expected qkv as a floating-point tensor"),
        ({"mask": torch.rand(2, 6, device="meta")}, ValueError, "got mask on meta"),
        ({"mask": 1.0}, TypeError, "expected mask as a torch.Tensor, got float"),
        ({"scale": "0.1"}, TypeError, "expected scale as a float or None, got str"),
        (
            {"bias": torch.rand(2, 5, 4)},
            ValueError,
            r"expected bias of shape \(2, 5, 5\) or \(W, 2, 5, 5\), got \(2, 5, 4\)",
        ),
        ({"bias": torch.rand(5, 5)}, ValueError, r"expected bias of shape .*, got \(5, 5\)"),
        ({"bias": torch.rand(0, 2, 5, 5)}, ValueError, "got W = 0"),
        ({"bias": torch.rand(2, 5, 5, device="meta")}, ValueError, "got bias on meta; move it there"),
        (
            {"bias": torch.rand(2, 5, 5).bfloat16(), "backend": "triton"},
            ValueError,
            "expected bias as one of|on a CUDA",
        ),
        (
            {"bias": torch.rand(3, 2, 5, 5)},
            ValueError,
            "expected bias for W windows that divide the batch of 2, got W = 3",
        ),
        ({"bias": torch.ones(2, 5, 5).long()}, TypeError, "expected bias as a floating-point tensor"),
        ({"backend": "cuda"}, ValueError, "expected one of reference, eager, triton, got 'cuda'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = make_inputs(2, 5, 2, 6, torch.float32, "cpu") | change
    with pytest.raises(error, match=message):
        masked_attention(**arguments)


def test_triton_refuses_wide_heads(device):
    inputs = make_inputs(1, 3, 1, 129, torch.float32, device)
    with pytest.raises(ValueError, match="expected heads of d ≤ 128 channels, got 129"):
        masked_attention(**inputs, backend="triton")
    torch.testing.assert_close(masked_attention(**inputs), masked_attention(**inputs, backend="reference"))


@pytest.mark.parametrize(("backend", "dtype"), dtypes_of(*BACKENDS))
@pytest.mark.parametrize("bias", [True, False])
def test_with_the_projection_inside(backend, dtype, bias, device):
    inputs = {
        "x": torch.randn(2, 19, 20, device=device),
        "weight": torch.randn(3 * 2 * 12, 20, device=device) / 20**0.5,
        "bias": torch.randn(3 * 2 * 12, device=device),
        "mask": torch.rand(2, 12, device=device),
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items() if bias or name != "bias"}
    check_op(masked_qkv_attention, inputs, {} if bias else {"bias": None}, backend, reduction=2 * 19)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windowed_with_the_projection_inside(backend, device):
    inputs = {
        "x": torch.randn(4, 19, 20, device=device),
        "weight": torch.randn(3 * 2 * 12, 20, device=device) / 20**0.5,
        "bias": torch.randn(3 * 2 * 12, device=device),
        "mask": torch.rand(2, 12, device=device),
        "attention_bias": torch.randn(2, 2, 19, 19, device=device),
    }
    check_op(masked_qkv_attention, inputs, {}, backend, reduction=4 * 19)


@pytest.mark.parametrize("backend", BACKENDS)
def test_projection_inside_compiles_to_one_graph(backend, device):
    x, weight = torch.randn(2, 5, 8, device=device), torch.randn(24, 8, device=device)
    bias, mask = torch.randn(24, device=device), torch.rand(2, 4, device=device)
    attention_bias = torch.randn(2, 2, 5, 5, device=device)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias, mask, attention_bias)]

    def function(*tensors):
        return masked_qkv_attention(*tensors[:4], scale=0.3, attention_bias=tensors[4], backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(out, expected)
    for got, want in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.randn(23, 8)}, ValueError, r"expected weight of shape \(24, 8\), got \(23, 8\)"),
        ({"x": torch.randn(5, 8)}, ValueError, r"expected x of shape \(B, N, K\), got \(5, 8\)"),
        ({"mask": torch.rand(8)}, ValueError, r"expected mask of shape \(H, d\), got \(8,\)"),
        ({"bias": torch.rand(8)}, ValueError, r"expected bias of shape \(24\), got \(8,\)"),
        ({"weight": torch.randn(24, 8).double()}, TypeError, "expected weight of x's dtype"),
        ({"scale": "big"}, TypeError, "expected scale as a float or None, got str"),
        ({"attention_bias": torch.rand(2, 5, 4)}, ValueError, r"expected attention_bias of shape \(2, 5, 5\) or"),
    ],
)
def test_projection_inside_bad_input(change, error, message):
    arguments = {"x": torch.randn(2, 5, 8), "weight": torch.randn(24, 8), "bias": None, "mask": torch.rand(2, 4)}
    with pytest.raises(error, match=message):
        masked_qkv_attention(**(arguments | change))
