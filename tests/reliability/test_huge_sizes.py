"""More elements than 32 bits can count

Every op is called, and its backward run, on tensors of up to 5 TB on the meta device, where there are shapes and no
memory. Every kernel is then launched on tensors of more than 2³¹ elements whose memory the system promises and never
has to give: only the last program of the launch runs, which is the one with the largest addresses, and what it wrote
must be right. So must what a call reads through a transposed tensor's huge strides. What a launch cannot do (too many
rows, image planes or candidates) is refused by name.

Found and fixed: 32-bit offsets in products with a transposed matrix, in attention's values and bias, and in the planes
of local_norm; a launch grid that more than 33 million rows did not fit.
"""

import importlib
import inspect
from unittest import mock

import pytest
import torch
from torch import Tensor

import ofb_kernels
from ofb_kernels import reference
from ofb_kernels.dispatch import INTERPRETED, MOST_ROWS
from ofb_kernels.ops.checks import MOST_CANDIDATES

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs single programs in Triton's interpreter")
PAST = 2**31
MOST_OF_GRID = 65535  # CUDA's limit on all grid dimensions but the first
MEBIBYTE = 2**20


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta", requires_grad=True)


def counts(submodules: int, *numbers: int) -> tuple[Tensor, ...]:
    return tuple(torch.ones(submodules, number, dtype=torch.int64, device="meta") for number in numbers)


def statistics_losses(alpha: Tensor, backend: str) -> Tensor:
    alive, sizes = (torch.ones_like(alpha, dtype=dtype) for dtype in (torch.bool, torch.int64))
    return ofb_kernels.candidate_statistics(alpha, alive, sizes, sizes, backend=backend)[0]


def reconstruction_loss(decoded: Tensor, backend: str) -> Tensor:
    """Of images of 8192 × 8192 pixels."""
    images, areas = meta(len(decoded), 3, 8192, 8192), torch.ones_like(decoded[..., 0], dtype=torch.int64)
    return ofb_kernels.masked_reconstruction_loss(decoded, images, areas, areas[0].bool(), (16, 16), backend=backend)


HUGE = {
    "bimask": (
        lambda **arguments: ofb_kernels.bimask(**arguments, counts=counts(65536, 8, 16), lam=0.5),
        lambda: {"score": meta(65536, 256, 4096), "alpha": meta(65536, 8, 16)},
        (65536, 256, 4096),
    ),
    "candidate_statistics": (statistics_losses, lambda: {"alpha": meta(2**28, 4096)}, (2**28,)),
    "masked_linear": (
        ofb_kernels.masked_linear,
        lambda: {"x": meta(4096, 4096, 16384), "weight": meta(65536, 16384), "bias": None, "mask": meta(65536)},
        (4096, 4096, 65536),
    ),
    "masked_mlp": (
        ofb_kernels.masked_mlp,
        lambda: {
            "x": meta(4096, 4096, 16384),
            "fc1_weight": meta(65536, 16384),
            "fc1_bias": meta(65536),
            "mask": meta(65536),
            "fc2_weight": meta(16384, 65536),
            "fc2_bias": meta(16384),
        },
        (4096, 4096, 16384),
    ),
    "masked_attention": (
        ofb_kernels.masked_attention,
        lambda: {"qkv": meta(4096, 4096, 3, 32, 128), "mask": meta(32, 128)},
        (4096, 4096, 4096),
    ),
    "masked_attention with bias": (
        ofb_kernels.masked_attention,
        lambda: {"qkv": meta(64, 65536, 3, 128, 128), "mask": meta(128, 128), "bias": meta(128, 65536, 65536)},
        (64, 65536, 16384),
    ),
    "masked_layer_norm": (
        ofb_kernels.masked_layer_norm,
        lambda: {"x": meta(4096, 16384, 4096), "weight": meta(4096), "bias": meta(4096), "mask": meta(4096)},
        (4096, 16384, 4096),
    ),
    "masked_add_layer_norm": (
        lambda **arguments: ofb_kernels.masked_add_layer_norm(**arguments)[1],
        lambda: (
            {"x": meta(4096, 16384, 4096), "branch": meta(4096, 16384, 4096)}
            | {"branch_mask": meta(4096), "weight": meta(4096), "bias": meta(4096), "mask": meta(4096)}
        ),
        (4096, 16384, 4096),
    ),
    "local_norm": (ofb_kernels.local_norm, lambda: {"images": meta(16384, 3, 8192, 8192)}, (16384, 3, 8192, 8192)),
    "masked_reconstruction_loss": (reconstruction_loss, lambda: {"decoded": meta(4096, 512 * 512, 3 * 16 * 16)}, ()),
}
IN_FLOAT32 = ("candidate_statistics", "masked_reconstruction_loss")  # losses, whatever the dtype of the inputs


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=interpreted)])
def test_shapes_and_dtypes_of_terabytes(backend, name, evidence):
    op, make, shape = HUGE[name]
    inputs, before = make(), resident_bytes()
    result = op(**inputs, backend=backend)
    dtype = torch.float32 if name in IN_FLOAT32 else torch.float16
    assert (result.shape, result.dtype, result.device.type) == (shape, dtype, "meta")
    if result.requires_grad:
        result.sum().backward()
        for each in filter(torch.is_tensor, inputs.values()):
            assert (each.grad.shape, each.grad.dtype) == (each.shape, each.dtype)
    assert resident_bytes() - before < 64 * MEBIBYTE
    evidence("calls on the meta device, with their backward", 1)


class Launched(Exception):
    """The kernel under test has run; carries its arguments."""


class LastProgram:
    """Stands for a kernel: of a launch, the last program runs and no other."""

    def __init__(self, kernel, stop: bool):
        self.kernel, self.stop = kernel, stop

    def __getitem__(self, grid):
        assert grid[0] < PAST and max(grid[1:], default=1) <= MOST_OF_GRID, f"no GPU launches a grid of {grid}"
        last = tuple(size - 1 for size in (*grid, 1, 1)[:3])

        def launch(*arguments, **constants):
            from triton.runtime.interpreter import interpreter_builder

            at_last = mock.patch.object(
                interpreter_builder, "set_grid_idx", lambda *_: setattr(interpreter_builder, "grid_idx", last)
            )
            with at_last:
                self.kernel[1,](*arguments, **constants)
            if self.stop:
                raise Launched(inspect.signature(self.kernel.fn).bind_partial(*arguments).arguments)

        return launch


def last_program(module: str, kernel: str, function: str, *arguments) -> dict:
    """Run the module's launcher up to one kernel, of each kernel the last program only; that kernel's arguments."""
    module = importlib.import_module(f"ofb_kernels.kernels.{module}")
    kernels = {
        name: LastProgram(value, name == kernel) for name, value in vars(module).items() if name.endswith("_kernel")
    }
    with mock.patch.multiple(module, **kernels), pytest.raises(Launched) as launched:
        getattr(module, function)(*arguments)
    return launched.value.args[0]


def promised(*shape: int) -> Tensor:
    """float16 memory that is taken only where it is written."""
    return torch.empty(shape, dtype=torch.float16)


def half(*shape: int) -> Tensor:
    return torch.randn(shape).half()


def assert_right(got: Tensor, expected: Tensor) -> None:
    """Within four roundings of float16: of a product, its factors and the result."""
    tolerance = 4 * torch.finfo(torch.float16).eps
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


ROWS, COLUMNS = 2**21 + 5, 1027  # 5 rows in the last tile, 3 columns
ROWS_OF_NARROW, NARROW = 2**25 + 512 + 5, 67


def linear_forward():
    x, weight, bias, mask = half(ROWS, 3), half(COLUMNS, 3), half(COLUMNS), half(COLUMNS)
    out = last_program("masked_linear", "_forward_kernel", "forward", x, weight, bias, mask, "gelu", False)["out_ptr"]
    tile = slice(-3, None)
    expected = reference.masked_linear(x[-5:].float(), weight[tile].float(), bias[tile].float(), mask[tile], "gelu")
    return out, out[-5:, tile], expected


def linear_backward():
    grad_out, slope = promised(ROWS_OF_NARROW, NARROW), promised(ROWS_OF_NARROW, NARROW)
    grad_out[-5:], slope[-5:] = half(5, NARROW), half(5, NARROW)
    grad = last_program("masked_linear", "_backward_kernel", "backward", grad_out, slope, "gelu")["grad_ptr"]
    return grad, grad[-5:, -3:], grad_out[-5:, -3:].float() * slope[-5:, -3:].float()


def mlp_backward():
    grad_out, weight, slope = half(ROWS, 4), half(4, COLUMNS), promised(ROWS, COLUMNS)
    slope[-5:, -3:] = half(5, 3)
    grad = last_program("masked_mlp", "_backward_kernel", "backward", grad_out, weight, slope, "gelu")["grad_ptr"]
    return grad, grad[-5:, -3:], (grad_out[-5:].float() @ weight[:, -3:].float()) * slope[-5:, -3:].float()


def norm_inputs():
    x, weight, bias, mask = promised(ROWS, COLUMNS), half(COLUMNS), half(COLUMNS), torch.rand(COLUMNS) + 0.1
    x[-5:] = half(5, COLUMNS)
    return x, weight, bias, mask


def norm_forward():
    x, weight, bias, mask = norm_inputs()
    arguments = x, weight, bias, mask, 1e-6, torch.float16
    out = last_program("masked_layer_norm", "_forward_kernel", "forward", *arguments)["out_ptr"]
    expected = reference.masked_layer_norm(x[-5:].float(), weight.float(), bias.float(), mask, 1e-6)
    return out, out[-5:], expected


def norm_backward():
    """With a branch, which is added before: the stream is the norm's input."""
    from ofb_kernels.kernels.masked_layer_norm import Branch

    x, weight, bias, mask = norm_inputs()
    grad_out, grad_stream, branch = (promised(ROWS, COLUMNS) for _ in range(3))
    for each in (grad_out, grad_stream, branch):
        each[-5:] = half(5, COLUMNS)
    mean, rstd = torch.empty(ROWS), torch.empty(ROWS)
    stream = x[-5:].float().requires_grad_()
    share = mask / mask.sum()
    mean[-5:] = (stream.detach() * share).sum(-1)
    rstd[-5:] = (((stream.detach() - mean[-5:, None]).square() * share).sum(-1) + 1e-6).rsqrt()
    arguments = grad_out, x, weight, bias, mask, mean, rstd, 1e-6, grad_stream, Branch(branch, None, mask, None, 1)
    grad_branch = last_program("masked_layer_norm", "_backward_kernel", "backward", *arguments)["grad_branch_ptr"]
    normalized = reference.masked_layer_norm(stream, weight.float(), bias.float(), mask, 1e-6)
    (grad_stream_in,) = torch.autograd.grad(normalized, stream, grad_out[-5:].float())
    return grad_branch, grad_branch[-5:], (grad_stream_in + grad_stream[-5:].float()) * mask


SEQUENCES, TOKENS, HEADS, WIDTH = PAST // (5 * 2 * 64) + 1, 5, 2, 64


def attention_inputs():
    qkv, mask = promised(SEQUENCES, TOKENS, 3, HEADS, WIDTH), half(HEADS, WIDTH).sigmoid()
    qkv[-1] = half(TOKENS, 3, HEADS, WIDTH)
    leaf = qkv[-1:].double().requires_grad_()
    return qkv, mask, leaf, reference.masked_attention(leaf, mask.double(), 0.125, None)


def attention_forward():
    qkv, mask, _, expected = attention_inputs()
    out = last_program("masked_attention", "_forward_kernel", "forward", qkv, mask, 0.125)["out_ptr"]
    return out, out[-1:, :, -WIDTH:], expected[..., -WIDTH:].detach()


def attention_backward(kernel: str, parts: slice):
    qkv, mask, leaf, expected = attention_inputs()
    grad_out, out = promised(SEQUENCES, TOKENS, HEADS * WIDTH), promised(SEQUENCES, TOKENS, HEADS * WIDTH)
    grad_out[-1], out[-1] = half(TOKENS, HEADS * WIDTH), expected[0].detach()
    q, k, _ = (leaf.detach() * mask.double()).unbind(2)
    log_sum_exp = torch.empty(SEQUENCES, HEADS, TOKENS)
    scores = torch.einsum("qhd,khd->hqk", q[0], k[0]) * 0.125
    log_sum_exp[-1] = scores.logsumexp(-1) / torch.log(torch.tensor(2.0))
    arguments = grad_out, qkv, mask, out, log_sum_exp, 0.125
    grad_qkv = last_program("masked_attention", kernel, "backward", *arguments)["grad_qkv_ptr"]
    (grad,) = torch.autograd.grad(expected, leaf, grad_out[-1:].double())
    return grad_qkv, grad_qkv[-1, :, parts, -1], grad[0, :, parts, -1]


def attention_backward_query():
    return attention_backward("_backward_query_kernel", slice(0, 1))


def attention_backward_key_value():
    return attention_backward("_backward_key_value_kernel", slice(1, 3))


LONG, LAST = 46403, 3  # tokens, whose square is more than 2³¹, and those of them in the last tile


def biased_inputs():
    qkv, mask, bias = half(1, LONG, 3, 1, 16), half(1, 16).sigmoid(), torch.zeros(0)
    bias = promised(1, 1, LONG, LONG)
    bias[0, 0, -LAST:] = half(LAST, LONG)
    return qkv, mask, bias


def masked_parts(qkv: Tensor, mask: Tensor) -> list[Tensor]:
    return [part[0, :, 0] for part in (qkv.float() * mask.float()).unbind(2)]


def biased_forward():
    qkv, mask, bias = biased_inputs()
    out = last_program("masked_attention", "_forward_kernel", "forward", qkv, mask, 0.25, bias)["out_ptr"]
    q, k, v = masked_parts(qkv, mask)
    p = (q[-LAST:] @ k.t() * 0.25 + bias[0, 0, -LAST:].float()).softmax(-1)
    return bias, out[0, -LAST:], p @ v


def biased_backward_arguments():
    """With any log-sum-exp: p is what the kernels make of it."""
    qkv, mask, bias = biased_inputs()
    log_sum_exp = torch.rand(1, 1, LONG) + 8
    return half(1, LONG, 16), qkv, mask, half(1, LONG, 16), log_sum_exp, 0.25, bias


def biased_backward_query():
    arguments = grad_out, qkv, mask, out, log_sum_exp, _, bias = biased_backward_arguments()
    grad_qkv = last_program("masked_attention", "_backward_query_kernel", "backward", *arguments)["grad_qkv_ptr"]
    q, k, v = masked_parts(qkv, mask)
    grad_scores = gradient_of_scores(
        q[-LAST:], k, v, grad_out[0, -LAST:], out[0, -LAST:], log_sum_exp[0, 0, -LAST:], bias
    )
    return bias, grad_qkv[0, -LAST:, 0, 0], 0.25 * mask.float() * (grad_scores @ k)


def gradient_of_scores(q, k, v, grad_out, out, log_sum_exp, bias):
    scores = q @ k.t() * 0.25 + bias[0, 0, -LAST:, -len(k) :].float()
    p = torch.exp2(scores / torch.log(torch.tensor(2.0)) - log_sum_exp[:, None])
    delta = (grad_out.float() * out.float()).sum(-1, keepdim=True)
    return p * (grad_out.float() @ v.t() - delta)


def biased_backward_key_value():
    """dv of the last keys: dk waits for what the other kernel leaves of every query."""
    arguments = grad_out, qkv, mask, _, log_sum_exp, _, bias = biased_backward_arguments()
    bias[0, 0, :, -LAST:] = half(LONG, LAST)
    grad_qkv = last_program("masked_attention", "_backward_key_value_kernel", "backward", *arguments)["grad_qkv_ptr"]
    q, k, _ = masked_parts(qkv, mask)
    scores = q @ k[-LAST:].t() * 0.25 + bias[0, 0, :, -LAST:].float()
    p = torch.exp2(scores / torch.log(torch.tensor(2.0)) - log_sum_exp[0, 0, :, None])
    return bias, grad_qkv[0, -LAST:, 2, 0], mask.float() * (p.t() @ grad_out[0].float())


def backward_bias():
    arguments = grad_out, qkv, mask, out, log_sum_exp, _, bias = biased_backward_arguments()
    partial = last_program("masked_attention", "_backward_bias_kernel", "backward_bias", *arguments)["partial_ptr"]
    q, k, v = masked_parts(qkv, mask)
    last = slice(-LAST, None)
    expected = gradient_of_scores(
        q[last], k[last], v[last], grad_out[0, last], out[0, last], log_sum_exp[0, 0, last], bias
    )
    return partial, partial[0, 0, 0, last, last], expected


SIDE = 46403  # of an image, whose last tile is narrower than the others


def local_norm_last_pixels():
    """The last rows and columns, whose windows lie in what this program reads."""
    images = promised(1, 1, SIDE, SIDE)
    images[0, 0, -16:, -16:] = half(16, 16)
    out = last_program("local_norm", "_normalize_kernel", "forward", images, 3, 1e-2)["out_ptr"]
    expected = reference.local_norm(images[:, :, -16:, -16:].float(), 3, 1e-2)
    return out, out[0, 0, -2:, -3:], expected[0, 0, -2:, -3:]


def bimask_submodules():
    """The mask of the last of many submodules, whose ranks and candidates are its own."""
    submodules, channels = PAST // 4096 + 1, 4096
    score, alpha = torch.empty(submodules, 1, channels), torch.randn(submodules, 1, 2)
    score[-1] = torch.linspace(2, -2, channels)
    ones, numbers = (
        torch.ones(submodules, 1, dtype=torch.int64),
        torch.tensor([[100, channels - 8]]).expand(submodules, 2),
    )
    arguments = alpha, ones, numbers.contiguous(), torch.tensor(0.3), torch.ones(submodules, 1, 2, dtype=torch.bool)
    mask = last_program("bimask", "_forward_kernel", "forward", score, *arguments)["mask_ptr"]
    last = [each[-1:] if each.dim() else each for each in (score, *arguments)]
    return mask, mask[-1, 0, -32:], reference.bimask(*last)[0, 0, -32:]


def bimask_backward():
    submodules, channels = PAST // 4096 + 1, 4096
    score, grad = (torch.empty(submodules, 1, channels) for _ in range(2))
    score[-1], grad[-1] = torch.linspace(2, -2, channels), torch.randn(channels)
    ones, numbers = torch.ones(submodules, 1, dtype=torch.int64), torch.ones(submodules, 2, dtype=torch.int64)
    ranks = torch.empty(submodules, 1, dtype=torch.int32), torch.empty(submodules, 1, channels, dtype=torch.int32)
    ranks[0][-1], ranks[1][-1] = 0, torch.arange(channels)
    alive = torch.ones(submodules, 1, 2, dtype=torch.bool)
    arguments = score, torch.randn(submodules, 1, 2), ones, numbers, torch.tensor(0.3), alive, *ranks
    grad_score = last_program("bimask", "_backward_kernel", "backward", grad, *arguments)["grad_score_ptr"]
    importance = score[-1].sigmoid()
    return grad_score, grad_score[-1], grad[-1] * 0.3 * importance * (1 - importance)


def statistics_inputs():
    """Sizes in a byte each, which the kernels read as they read int64: 2 GB instead of 17."""
    submodules, candidates = PAST // 4096 + 1, 4096
    alpha = torch.empty(submodules, candidates)
    alive, sizes = (torch.empty(submodules, candidates, dtype=dtype) for dtype in (torch.bool, torch.int8))
    alpha[-1], alive[-1] = torch.randn(candidates), torch.rand(candidates) < 0.8
    sizes[-1] = torch.arange(candidates) % 99
    return alpha, alive, sizes, sizes


def statistics_forward():
    arguments = statistics_inputs()
    results = last_program("candidate_statistics", "_forward_kernel", "forward", *arguments)
    got = [results[name][-1] for name in ("one_hot_ptr", "expected_heads_ptr", "expected_units_ptr")]
    expected = reference.candidate_statistics(*(each[-1:] for each in arguments))
    return arguments[0], torch.stack(got), torch.cat(expected)


def statistics_backward():
    """The gradient times the number of candidates: each of them has about that share of p."""
    arguments = statistics_inputs()
    grads = [torch.full((len(arguments[0]),), each) for each in (1.0, 0.3, -0.2)]
    grad = last_program("candidate_statistics", "_backward_kernel", "backward", grads, *arguments)["grad_alpha_ptr"]
    leaf, *options = (each[-1:] for each in arguments)
    results = reference.candidate_statistics(leaf.requires_grad_(), *options)
    weighted = sum(each * grad[0] for each, grad in zip(results, grads, strict=True))
    return grad, len(leaf[0]) * grad[-1], len(leaf[0]) * torch.autograd.grad(weighted.sum(), leaf)[0][0]


def reconstruction_forward():
    """The last tile of 4 × 4 pixels in the last areas of the last image: the sign of each error, and Σ |error|."""
    side, areas, last = SIDE // 16, (SIDE // 16) ** 2, 16
    images, decoded = promised(2, 1, SIDE, SIDE), promised(2, areas, 256)
    drawn, masked = torch.empty(2, areas, dtype=torch.int64), torch.empty(areas, dtype=torch.bool)
    drawn[-1, -last:], masked[-last:] = torch.arange(areas - last, areas), torch.arange(last) % 3 > 0
    bottom = images[-1:, :, 16 * (side - 1) - 1 : 16 * side + 1, 16 * (side - last) - 1 : 16 * side + 1]
    decoded[-1, -last:] = half(last, 256)
    bottom.copy_(half(*bottom.shape))
    arguments = decoded, images, drawn, masked, (16, 16), 3, 1e-2, True
    results = last_program("masked_reconstruction_loss", "_forward_kernel", "forward", *arguments)
    target = reference.local_norm(bottom.float(), 3, 1e-2)[0, 0, 1:-1, 1:-1]
    error = decoded[-1, -last:].float().view(last, 16, 16) - target.view(16, last, 16).transpose(0, 1)
    error = (error * masked[-last:, None, None])[:, -4:, -4:]
    got = results["sign_ptr"][-1, -last:].view(last, 16, 16)[:, -4:, -4:].flatten(), results["error_sums_ptr"][-1:]
    return images, torch.cat(got), torch.cat([error.sign().flatten(), error.abs().sum()[None]])


def reconstruction_backward():
    sign = torch.empty(PAST + 5, dtype=torch.int8)
    sign[-5:] = torch.tensor([1, -1, 0, 1, 1])
    arguments = torch.tensor(3.0), sign, torch.tensor(0.5), torch.float16
    grad = last_program("masked_reconstruction_loss", "_backward_kernel", "backward", *arguments)["grad_ptr"]
    return grad, grad[-5:], 1.5 * sign[-5:]


LAST_PROGRAMS = (
    linear_forward,
    linear_backward,
    mlp_backward,
    norm_forward,
    norm_backward,
    attention_forward,
    attention_backward_query,
    attention_backward_key_value,
    biased_forward,
    backward_bias,
    local_norm_last_pixels,
    bimask_submodules,
    bimask_backward,
    statistics_forward,
    statistics_backward,
    reconstruction_forward,
    reconstruction_backward,
)


LONG_LOOPS = (biased_backward_query, biased_backward_key_value)


@interpreted
@pytest.mark.parametrize("case", LAST_PROGRAMS, ids=lambda case: case.__name__)
def test_the_last_program_of_a_huge_launch(case, evidence):
    huge, got, expected = case()
    assert huge.numel() > PAST
    assert_right(got, expected)
    evidence("kernels run at addresses past 2³¹ elements", 1)


@interpreted
@pytest.mark.parametrize("case", LONG_LOOPS, ids=lambda case: case.__name__)
def test_the_last_program_of_a_huge_launch_that_takes_long(case, night, evidence):
    if not night:
        pytest.skip("some tens of seconds in the interpreter: at night")
    test_the_last_program_of_a_huge_launch(case, evidence)


def spread(tensor: Tensor, dim: int, stride: int) -> Tensor:
    """The tensor with this stride in one dimension, in memory most of which is never taken."""
    strides = [stride if d == dim else each for d, each in enumerate(tensor.stride())]
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


@interpreted
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("spread_input", ["x", "weight"])
def test_a_product_reads_through_huge_strides(spread_input, dim):
    """A step over a block of the inner dimension is 64 strides: more than 2³¹ from 2²⁵ on."""
    inputs = {"x": half(2, 70), "weight": half(3, 70)}
    stride = 2**25 + 1 if dim == 1 else PAST + 1
    far = inputs | {spread_input: spread(inputs[spread_input], dim, stride)}
    options = {"bias": None, "mask": half(3), "backend": "triton"}
    assert torch.equal(ofb_kernels.masked_linear(**far, **options), ofb_kernels.masked_linear(**inputs, **options))


@interpreted
@pytest.mark.parametrize(("dim", "stride"), [(2, 2**30 + 1), (1, PAST // 4 + 1), (3, PAST + 1)])
def test_attention_reads_through_huge_strides(dim, stride):
    """v lies two strides behind q where the three are stacked before they are packed."""
    qkv, mask = half(1, 5, 3, 2, 8), half(2, 8).sigmoid()

    def results(tensor: Tensor) -> tuple[Tensor, Tensor]:
        leaf = tensor.detach().requires_grad_()
        out = ofb_kernels.masked_attention(leaf, mask, backend="triton")
        return out, *torch.autograd.grad(out, leaf, torch.linspace(-1, 1, out.numel()).half().view(out.shape))

    near, far = results(qkv), results(spread(qkv, dim, stride))
    assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))


@interpreted
def test_what_a_launch_cannot_do_is_refused():
    rows = torch.empty(MOST_ROWS + 1, 1, device="meta")
    one = torch.empty(1, 1, device="meta")
    with pytest.raises(ValueError, match=f"masked_linear: .*at most {MOST_ROWS} rows, got {MOST_ROWS + 1}"):
        ofb_kernels.masked_linear(rows, one, None, one[0], backend="triton")
    with pytest.raises(ValueError, match="local_norm: .*at most 65535 image planes"):
        ofb_kernels.local_norm(torch.empty(256, 256, 1, 1), backend="triton")
    units = MOST_CANDIDATES + 1
    with pytest.raises(ValueError, match=f"bimask: .*at most {MOST_CANDIDATES} candidates, got {units}"):
        ofb_kernels.bimask(torch.randn(units), torch.randn(units), range(1, units + 1), 0.5, backend="triton")
