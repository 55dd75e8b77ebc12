"""Random calls of every op

A seed draws a call: sizes from 0 to a hundred (ones, primes, one past a block), transposed, sliced, expanded and
shifted memory, float16 to float64, masks of fractions or exact zeros and ones, subnormal numbers, NaN and infinities,
any subset of inputs that wants a gradient. The result and each gradient are compared with the float64 reference within
a bound derived from errors (`ofb_kernels.testing`), what is not finite must be so in the same places, and the same call
again must give the same bits. The kernels run interpreted where there is no GPU, and take no bfloat16 there. A wrong
call (shape, dtype, device, layout, not a tensor, an option outside its range) must raise a ValueError or TypeError that
names the op: no other error, and no answer.

A failure names its seed; `python -c "from tests.reliability.test_fuzz import right_call; right_call('bimask', 17)"`
(`TRITON_INTERPRET=1` without a GPU) repeats that call alone. Hypothesis draws calls the same way and shrinks them.

Found and fixed: attention without heads ended the process (torch's fused attention on a CPU), inputs without features
failed, the kernels' ReLU lost the gradient at NaN, a NaN in a row of candidates spread to the gradient of the dead
ones, and some wrong arguments were not named.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ofb_kernels
from ofb_kernels.dispatch import triton_refusal
from ofb_kernels.reference import ACTIVATIONS
from ofb_kernels.testing import PERTURBATIONS, assert_accurate, error_bound

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 29, 32, 33, 47, 64, 65, 97)
RIGHT, WRONG = (16, 250), (60, 2000)  # calls of each op: in the ordinary run, at night


@dataclass
class Call:
    """A call of an op.

    Attributes:
        inputs: the tensors by argument name.
        options: the other arguments.
        reduction: terms added up for one element of any result.
        dims: for each input what its dimensions are called; those of one name have one size.
        distinct: dimensions along which an input must differ: gradients would be what is left of a cancellation.
        wrong_options: for some options what they may not be.
        scores: the input that a softmax is taken of. In its gradient p ⊙ (dp − Σ p ⊙ dp) the difference may cancel.
    """

    inputs: dict[str, Tensor]
    options: dict
    reduction: int
    dims: dict[str, str]
    distinct: dict[str, tuple[int, ...]] = field(default_factory=dict)
    wrong_options: dict[str, tuple] = field(default_factory=dict)
    scores: str | None = None


def size(draw: random.Random, zero: float = 0.04) -> int:
    return 0 if draw.random() < zero else draw.choice(SIZES)


def leading(draw: random.Random, most: int = 3, least: int = 0) -> tuple[int, ...]:
    """Leading dimensions of at most a few hundred rows in all."""
    sizes = [size(draw) for _ in range(draw.randint(least, most))]
    while torch.Size(sizes).numel() > 300:
        sizes[sizes.index(max(sizes))] //= 2
    return tuple(sizes)


def randn(draw: random.Random, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw.getrandbits(40))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def mask(draw: random.Random, *shape: int, some: bool = False) -> Tensor:
    """Fractions, exact zeros and ones, or some of each; with `some`, a tenth at least everywhere."""
    fractions = randn(draw, *shape).sigmoid()
    if some:
        return fractions + 0.1
    bits = (randn(draw, *shape) < draw.choice((-9, 0, 0, 9))).double()
    return draw.choice((fractions, bits, torch.where(randn(draw, *shape) > 0, fractions, bits)))


def linear(draw: random.Random) -> Call:
    rows, inner, columns = leading(draw), size(draw), size(draw)
    inputs = {"x": randn(draw, *rows, inner), "weight": randn(draw, columns, inner) / max(inner, 1) ** 0.5}
    inputs |= {"bias": randn(draw, columns), "mask": mask(draw, columns)}
    options = {"activation": draw.choice(tuple(ACTIVATIONS))}
    dims = {"x": "...k", "weight": "nk", "bias": "n", "mask": "n"}
    return Call(inputs, options, max(*rows, inner, 1), dims, wrong_options={"activation": ("tanh", 3, [])})


def mlp(draw: random.Random) -> Call:
    rows, inner, hidden, out = leading(draw), size(draw), size(draw), size(draw)
    inputs = {"x": randn(draw, *rows, inner), "fc1_weight": randn(draw, hidden, inner) / max(inner, 1) ** 0.5}
    inputs |= {"fc1_bias": randn(draw, hidden), "mask": mask(draw, hidden)}
    inputs |= {"fc2_weight": randn(draw, out, hidden) / max(hidden, 1) ** 0.5, "fc2_bias": randn(draw, out)}
    options = {"activation": draw.choice(tuple(ACTIVATIONS))}
    dims = {"x": "...k", "fc1_weight": "nk", "fc1_bias": "n", "mask": "n", "fc2_weight": "en", "fc2_bias": "e"}
    rows = torch.Size(rows).numel()
    return Call(inputs, options, max(rows, inner, hidden, 1), dims, wrong_options={"activation": ("tanh", 3, [])})


def attention(draw: random.Random) -> Call:
    batch, heads = (0 if draw.random() < 0.04 else draw.randint(1, most) for most in (6, 3))
    tokens, width = size(draw), size(draw)
    tokens = tokens if batch * heads == 1 else tokens % 34
    inputs = {"qkv": randn(draw, batch, tokens, 3, heads, width), "mask": mask(draw, heads, width)}
    options = {"scale": draw.choice((None, 0.3, 1))}
    dims = {"qkv": "bn3hd", "mask": "hd"}
    wrong = {"scale": ("one", [1.0], True)}
    return Call(inputs, options, max(batch * tokens, width, 1), dims, {"qkv": (1,)}, wrong)


def biased_attention(draw: random.Random) -> Call:
    """Not of one token: a softmax of one score has the gradient 0, what is computed is left of a cancellation."""
    call = attention(draw)
    while call.inputs["qkv"].shape[1] == 1:
        call = attention(draw)
    batch, tokens, _, heads, _ = call.inputs["qkv"].shape
    windows = draw.choice([each for each in range(1, batch + 1) if batch % each == 0] or [1])
    shared = windows == 1 and draw.random() < 0.5
    call.inputs["bias"] = randn(draw, *([] if shared else [windows]), heads, tokens, tokens)
    call.dims |= {"bias": "hnn" if shared else "whnn"}
    call.scores = "bias"
    return call


def qkv_attention(draw: random.Random) -> Call:
    call = biased_attention(draw)
    batch, tokens, _, heads, width = call.inputs.pop("qkv").shape
    inner = size(draw)
    inputs = {"x": randn(draw, batch, tokens, inner), "bias": randn(draw, 3 * heads * width)}
    inputs["weight"] = randn(draw, 3 * heads * width, inner) / max(inner, 1) ** 0.5
    call.inputs = inputs | {"mask": call.inputs["mask"], "attention_bias": call.inputs["bias"]}
    call.dims = {"x": "bnk", "bias": "o", "weight": "ok", "mask": "hd", "attention_bias": call.dims["bias"]}
    call.reduction, call.distinct = max(call.reduction, inner), {"x": (1,), "weight": (0,)}
    call.scores = "attention_bias"
    return call


def layer_norm(draw: random.Random) -> Call:
    """At least 4 channels: of fewer, dx is what is left of a cancellation, right by luck if at all."""
    rows, width = leading(draw), max(4, size(draw))
    inputs = {"x": randn(draw, *rows, width) + 1, "weight": randn(draw, width), "bias": randn(draw, width)}
    inputs["mask"] = mask(draw, width, some=True)
    if draw.random() < 0.3:
        inputs["mask"][4:] = (randn(draw, width - 4) > 0).double()
    dims = {"x": "...d", "weight": "d", "bias": "d", "mask": "d"}
    reduction = max(torch.Size(rows).numel(), width)
    wrong = {"eps": (-1e-6, float("nan"), "small", None)}
    return Call(inputs, {"eps": 1e-5}, reduction, dims, {"x": (-1,)}, wrong)


def add_layer_norm(draw: random.Random) -> Call:
    call = layer_norm(draw)
    if call.inputs["x"].dim() == 1:
        call.inputs["x"] = call.inputs["x"][None]
    shape = call.inputs["x"].shape
    call.inputs |= {"branch": randn(draw, *shape), "branch_mask": mask(draw, shape[-1])}
    call.dims |= {"branch": "...d", "branch_mask": "d"}
    if draw.random() < 0.5:
        call.options["sample_scale"] = (randn(draw, shape[0]) > 0).float().to(DEVICE) / 0.7
    if draw.random() < 0.5:
        call.inputs["branch_bias"], call.dims["branch_bias"] = randn(draw, shape[-1]), "d"
    return call


def both_results(**arguments: object) -> Tensor:
    """Stream and norm beside each other."""
    return torch.cat(ofb_kernels.masked_add_layer_norm(**arguments), -1)


def images(draw: random.Random) -> Call:
    """With an eps that outweighs the rounding of Σx² − n·μ², which cancels where neighbours are alike."""
    planes = (0 if draw.random() < 0.04 else draw.randint(1, 3) for _ in range(2))
    inputs = {"images": randn(draw, *planes, size(draw), size(draw))}
    options = {"window": draw.choice((1, 3, 5, 9, 47)), "eps": draw.choice((0.1, 1.0))}
    wrong = {"window": (0, -3, 4, 3.0, "3", None), "eps": (-1.0, float("nan"), "small", None)}
    return Call(inputs, options, options["window"] ** 2, {"images": "bchw"}, {"images": (2, 3)}, wrong)


def units(draw: random.Random) -> Call:
    """Scores further apart than their rounding: a perturbed one keeps its rank."""
    stack, heads, channels = draw.choice(((), (), (1,), (3,))), draw.randint(1, 8), draw.choice(SIZES)
    heads = 1 if channels > 12 else heads  # heads whose importance differs by rounding only have any order
    order = randn(draw, *stack, heads, channels).flatten().argsort().argsort()
    spread = torch.linspace(-2, 2, order.numel(), dtype=torch.float64) + 0.1
    inputs = {"score": spread[order].view(*stack, heads, channels)}
    head_counts = sorted(draw.sample(range(1, heads + 1), draw.randint(1, min(heads, 4))))
    channel_counts = sorted(draw.sample(range(1, channels + 1), draw.randint(1, min(channels, 9))))
    inputs["alpha"] = randn(draw, *stack, len(head_counts), len(channel_counts))
    counts = (head_counts, channel_counts)
    options = {"counts": counts, "lam": draw.choice((0.0, 0.3, 1, 0.5)), "alive": _alive(draw, inputs["alpha"])}
    dims = {"score": "hd", "alpha": "AB"}
    if stack:
        options["counts"] = tuple(torch.tensor(each, device=DEVICE).expand(*stack, -1) for each in counts)
        dims = {"score": "shd", "alpha": "sAB"}
    elif heads == 1 and draw.random() < 0.5:
        inputs = {name: each[0] for name, each in inputs.items()}
        options |= {"counts": channel_counts, "alive": options["alive"][0]}
        dims = {"score": "d", "alpha": "B"}
    wrong = {"lam": (-0.1, 1.1, float("nan"), "half", None), "counts": (None, 3, [], [[0], [1]], ["one", "two"])}
    return Call(inputs, options, heads * channels, dims, {"score": range(3)}, wrong)


def _alive(draw: random.Random, alpha: Tensor) -> Tensor:
    alive = randn(draw, *alpha.shape) > -0.5
    alive[..., -1, -1] = True
    return alive.to(DEVICE)


def candidates(draw: random.Random) -> Call:
    """Logits that are close, alike, or one far above the others in each row: σ lies well off the tangent's poles, or is
    clamped there. In between the loss grows a rounding of p a thousandfold."""
    shape = draw.choice(SIZES), draw.choice(SIZES)
    logits = 3 * randn(draw, *shape).sigmoid()
    kind = draw.choice(("close", "close", "alike", "one-hot"))
    if kind == "alike":
        logits = 1 + 1e-6 * logits
    elif kind == "one-hot":
        logits[:, -1] += 100
    options = {"alive": _alive(draw, logits[:, None])[:, 0]}
    options |= {name: (12 * randn(draw, *shape).sigmoid()).ceil().long().to(DEVICE) for name in ("heads", "units")}
    wrong = {name: (None, 3, [[1]], torch.ones(shape), torch.ones(*shape, 1).long()) for name in ("heads", "units")}
    wrong["alive"] = (None, [[True]], torch.ones(shape), torch.zeros(shape).bool())
    return Call({"alpha": logits}, options, shape[1], {"alpha": "AB"}, {"alpha": (1,)}, wrong, "alpha")


def three_results(**arguments: object) -> Tensor:
    """One-hot losses, expected heads and expected units beside each other."""
    return torch.stack(ofb_kernels.candidate_statistics(**arguments), -1)


def rebuilt_areas(draw: random.Random) -> Call:
    (p, q), (rows, columns), channels = *([draw.randint(1, most) for _ in range(2)] for most in (9, 4)), 3
    batch, drawn = draw.randint(1, 3), draw.randint(1, rows * columns)
    areas = torch.stack([torch.tensor(draw.sample(range(rows * columns), drawn)) for _ in range(batch)]).to(DEVICE)
    masked = torch.tensor([draw.random() < 0.7 for _ in range(drawn)], device=DEVICE)
    pictures = randn(draw, batch, channels, rows * p + draw.randint(0, 3), columns * q + draw.randint(0, 3))
    options = {"images": pictures.float().to(DEVICE), "areas": areas, "masked": masked, "pixels": (p, q)}
    options |= {"window": draw.choice((1, 3, 5, 9, 47)), "eps": draw.choice((0.1, 1.0))}
    inputs = {"decoded": randn(draw, batch, drawn, channels * p * q)}
    wrong = {"window": (0, 4, "3", None), "eps": (-1.0, "small"), "pixels": (3, (0, 1), ("a", "b"), None)}
    return Call(inputs, options, max(inputs["decoded"].numel(), options["window"] ** 2), {"decoded": "bke"}, {}, wrong)


OPS: dict[str, tuple[Callable, Callable[[random.Random], Call]]] = {
    "bimask": (ofb_kernels.bimask, units),
    "candidate_statistics": (three_results, candidates),
    "masked_linear": (ofb_kernels.masked_linear, linear),
    "masked_mlp": (ofb_kernels.masked_mlp, mlp),
    "masked_attention": (ofb_kernels.masked_attention, attention),
    "masked_attention with bias": (ofb_kernels.masked_attention, biased_attention),
    "masked_qkv_attention": (ofb_kernels.masked_qkv_attention, qkv_attention),
    "masked_layer_norm": (ofb_kernels.masked_layer_norm, layer_norm),
    "masked_add_layer_norm": (both_results, add_layer_norm),
    "local_norm": (ofb_kernels.local_norm, images),
    "masked_reconstruction_loss": (ofb_kernels.masked_reconstruction_loss, rebuilt_areas),
}
# Eager's local_norm takes what is not finite all over its image by products, the kernel of bimask gives a NaN no rank
# and leaves units alone that no candidate keeps: all of it still shows, but in other places and with other values.
SPREADS = {("local_norm", "eager"), ("bimask", "triton")}
# torch's fused attention on a CPU gives 0 to a query with a score of ∞ where a softmax gives NaN.
HIDES = {(name, "eager") for name in ("masked_attention", "masked_attention with bias", "masked_qkv_attention")}


def laid_out(draw: random.Random, tensor: Tensor, distinct: Sequence[int]) -> Tensor:
    """The tensor in other memory: in place, permuted, every second or third element of a larger one, or one row for all
    of a dimension that is not `distinct`."""
    kind = draw.choice(("dense", "permuted", "strided", "shifted", "expanded"))
    if kind == "permuted":
        order = draw.sample(range(tensor.dim()), tensor.dim())
        return tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(tensor.dim())])
    if kind == "strided":
        steps = [draw.randint(1, 3) for _ in tensor.shape]
        large = tensor.new_full(
            [length * step + 1 for length, step in zip(tensor.shape, steps, strict=True)], torch.nan
        )
        return large[tuple(slice(1, None, step) for step in steps)].copy_(tensor)
    if kind == "shifted":
        buffer = tensor.new_full((tensor.numel() + 9,), torch.nan)
        return buffer[draw.randint(1, 8) :][: tensor.numel()].view(tensor.shape).copy_(tensor)
    dim = draw.randrange(max(1, tensor.dim()))
    if kind == "expanded" and tensor.dim() and dim not in distinct and dim - tensor.dim() not in distinct:
        return tensor.narrow(dim, 0, min(1, tensor.shape[dim])).contiguous().expand(tensor.shape)
    return tensor.contiguous()


def spoil(draw: random.Random, tensors: dict[str, Tensor]) -> str | None:
    """NaN or an infinity in up to three places of one input; which input."""
    name = draw.choice(sorted(tensors))
    flat = tensors[name].view(-1)
    for _ in range(draw.randint(1, 3) if len(flat) else 0):
        flat[draw.randrange(len(flat))] = draw.choice((torch.nan, torch.inf, -torch.inf))
    return name


def backend_and_dtype(draw: random.Random) -> tuple[str, torch.dtype]:
    backend = draw.choice(("triton", "triton", "triton", "eager", "reference"))
    dtypes = [torch.float32, torch.float16, torch.float64, torch.bfloat16]
    served = [dtype for dtype in dtypes if not triton_refusal({"x": torch.empty(0, dtype=dtype, device=DEVICE)})]
    return backend, draw.choice(served if backend == "triton" else dtypes)


def gradients(op, inputs, options, backend, wanted, cotangent) -> dict[str, Tensor]:
    """The result, and the gradients of the inputs that want one."""
    leaves = {name: each.detach().requires_grad_(name in wanted) for name, each in inputs.items()}
    result = op(**leaves, **options, backend=backend)
    if not result.requires_grad:
        return {"result": result}
    found = torch.autograd.grad(result, [leaves[name] for name in wanted], cotangent.to(result))
    return {"result": result.detach()} | {f"gradient of {name}": each for name, each in zip(wanted, found, strict=True)}


def rounded_again(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs in float64, moved by up to what rounding may: an eps, or the last bit of what is subnormal.

    What is one number in memory is rounded once.
    """

    def moved(tensor: Tensor) -> Tensor:
        number, limits = tensor.double(), torch.finfo(tensor.dtype)
        shape = [1 if stride == 0 else length for length, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        noise = 2 * torch.rand(shape, dtype=torch.float64, device=tensor.device) - 1
        other = number + (limits.eps * number.abs() + limits.eps * limits.smallest_normal) * noise
        return torch.where((number != 0) & number.isfinite(), other, number)

    return {name: moved(tensor) for name, tensor in inputs.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def right_call(name: str, seed: int | random.Random) -> str:
    """Draw a call of the op and check it; what was drawn."""
    draw = random.Random(f"{name} {seed}") if isinstance(seed, int) else seed
    op, make = OPS[name]
    call, (backend, dtype) = make(draw), backend_and_dtype(draw)
    spoilt = None
    if draw.random() < 0.15 and all(each.numel() for each in call.inputs.values()):
        spoilt = spoil(draw, call.inputs)
    elif draw.random() < 0.1:  # down to where numbers lose their bits
        first = next(iter(call.inputs))
        call.inputs[first] = call.inputs[first] * torch.finfo(dtype).smallest_normal * 0.1
    inputs = {
        each: laid_out(draw, tensor.to(DEVICE, dtype), call.distinct.get(each, ()))
        for each, tensor in call.inputs.items()
    }
    differentiable = [] if name == "local_norm" else sorted(inputs)
    wanted = draw.sample(differentiable, draw.randint(min(1, len(differentiable)), len(differentiable)))
    drawn = f"{backend} {dtype} " + ", ".join(
        f"{each} {tuple(t.shape)} strides {t.stride()} + {t.storage_offset()}" for each, t in inputs.items()
    )
    drawn += f", options {call.options}, gradients of {wanted}, not finite: {spoilt}"
    try:
        _check(op, call, inputs, backend, dtype, wanted, draw, (name, backend))
    except Exception as error:
        raise AssertionError(f"{name}, seed {seed}: {error}\n{drawn}") from error
    return drawn


def _check(op, call, inputs, backend, dtype, wanted, draw, kind) -> None:
    exact_inputs = {name: each.double() for name, each in inputs.items()}
    shape = op(**inputs, **call.options, backend="reference").shape
    cotangent = randn(draw, *shape).to(DEVICE, dtype)

    def run(which: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradients(op, tensors, call.options, which, wanted, cotangent)

    actual, again, same_dtype = run(backend, inputs), run(backend, inputs), run("reference", inputs)
    exact = run("reference", exact_inputs)
    perturbed = [run("reference", rounded_again(inputs)) for _ in range(2 * PERTURBATIONS)]
    assert actual.keys() == same_dtype.keys()
    for name, got in actual.items():
        expected, finite = same_dtype[name], same_dtype[name].isfinite() & exact[name].isfinite()
        assert got.dtype == expected.dtype and got.shape == expected.shape, f"{name}: {got.dtype} {tuple(got.shape)}"
        assert same_bits(got, again[name]), f"{name}: other bits the second time"
        if kind in SPREADS and not same_dtype["result"].isfinite().all():
            assert expected.isfinite().all() or not got.isfinite().all(), f"{name}: what is not finite got lost"
            continue
        if kind in HIDES:
            assert got[expected.isfinite()].isfinite().all(), f"{name}: not finite where the reference is"
            finite &= got.isfinite()
        else:
            assert torch.equal(got.isfinite(), expected.isfinite()), f"{name}: not finite in other places"
        bound = error_bound(
            exact[name][finite], expected[finite], [each[name][finite] for each in perturbed], call.reduction
        )
        tiny, eps = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps
        bound += call.reduction * tiny * eps  # a last bit for each term
        if name == f"gradient of {call.scores}" and cotangent.numel():
            # Σ p ⊙ dp = Σ do ⊙ o, of which o was rounded
            rounded = (cotangent * same_dtype["result"]).double().abs().nan_to_num(0, 0, 0).sum(-1).max().item()
            bound += call.reduction * torch.finfo(same_dtype["result"].dtype).eps * rounded
        assert_accurate(name, got[finite], exact[name][finite], expected.dtype, bound)


def wrong_call(name: str, seed: int | random.Random) -> str:
    """Draw a call of the op with one thing wrong in it and check that it is refused; what was wrong."""
    draw = random.Random(f"{name} wrong {seed}") if isinstance(seed, int) else seed
    op, make = OPS[name]
    call = make(draw)
    inputs = {each: tensor.to(DEVICE, torch.float32) for each, tensor in call.inputs.items()}
    arguments = inputs | call.options | {"backend": draw.choice((None, "reference", "eager", "triton"))}
    mistake = draw.choice((_size, _rank, _dtype, _device, _layout, _no_tensor, _option))
    wrong = mistake(draw, call, inputs)
    if wrong is None:  # of this kind there is none in this op
        wrong = _no_tensor(draw, call, inputs)
    argument, value = wrong
    shown = f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)
    drawn = f"{name}, seed {seed}: {argument} = {shown} beside { {k: tuple(t.shape) for k, t in inputs.items()} }"
    try:
        op(**arguments | {argument: value})
    except (ValueError, TypeError) as error:
        text = str(error)
        assert argument in text or name.split()[0] in text, f"{drawn}\nnamed neither op nor argument: {error}"
        return drawn
    except Exception as error:
        raise AssertionError(f"{drawn}\nraised {type(error).__name__}: {error}") from error
    raise AssertionError(f"{drawn}\nwas answered")


def _size(draw, call, inputs):
    """One more of a dimension whose size is given elsewhere too."""
    letters = "".join(call.dims.values()) + "AB"  # candidates are counted by `counts`
    tied = [
        (name, dim - len(dims))
        for name, dims in call.dims.items()
        for dim, letter in enumerate(dims)
        if letter == "3" or letter in "ABdeknhos" and letters.count(letter) > 1 and name != "score"
    ]
    if not tied:
        return None
    name, dim = draw.choice(tied)
    rest = list(inputs[name].shape)
    rest[dim] = 1
    return name, torch.cat([inputs[name], inputs[name].new_ones(rest)], dim)


def _rank(draw, call, inputs):
    """A dimension too many, or none."""
    name = draw.choice(sorted(inputs))
    fixed = "..." not in call.dims[name] and call.dims[name] != "hnn"
    return name, inputs[name][None] if fixed and draw.random() < 0.5 else inputs[name].new_ones(())


def _dtype(draw, call, inputs):
    name = draw.choice(sorted(inputs))
    dtypes = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
    if "weight" in name or name in ("fc1_bias", "fc2_bias", "branch") or (name == "alpha" and "score" in inputs):
        dtypes += [torch.float16, torch.float64]
    return name, inputs[name].to(draw.choice(dtypes))


def _device(draw, call, inputs):
    name = draw.choice(sorted(inputs))
    return (name, inputs[name].to("meta")) if len(inputs) > 1 else None


def _layout(draw, call, inputs):
    name = draw.choice(sorted(inputs))
    return name, inputs[name].to_sparse()


def _no_tensor(draw, call, inputs):
    name = draw.choice(sorted(inputs))
    wrong = [inputs[name].tolist(), inputs[name].cpu().numpy(), 1.0, "tensor", object()]
    return name, draw.choice(wrong if name.endswith("bias") else [*wrong, None])


def _option(draw, call, inputs):
    name = draw.choice(["backend", *call.wrong_options])
    return name, draw.choice({"backend": ("cuda", 3, [])}.get(name) or call.wrong_options[name])


@pytest.mark.filterwarnings("ignore")  # numpy's in the interpreter, of NaN and overflows that are meant
@pytest.mark.parametrize("name", OPS)
def test_right_calls(name, night, evidence):
    calls = RIGHT[night]
    for seed in range(calls):
        torch.manual_seed(seed)
        right_call(name, seed)
    evidence("calls drawn, each made twice and compared with float64, gradients included", calls)


def test_what_fuzzing_found():
    """No heads (torch's fused attention ended the process), no features, and what ReLU lets back through a NaN."""
    qkv, mask = torch.randn(2, 5, 3, 0, 4, device=DEVICE), torch.rand(0, 4, device=DEVICE)
    x, weight = torch.randn(3, 0, device=DEVICE), torch.randn(7, 0, device=DEVICE)
    for backend in ("reference", "eager", "triton"):
        assert ofb_kernels.masked_attention(qkv, mask, backend=backend).shape == (2, 5, 0)
        assert (ofb_kernels.masked_linear(x, weight, None, torch.ones(7, device=DEVICE), backend=backend) == 0).all()
        leaf = torch.tensor([[torch.nan], [-1.0], [2.0]], device=DEVICE, requires_grad=True)
        one = torch.ones(1, 1, device=DEVICE)
        ofb_kernels.masked_linear(leaf, one, None, one[0], "relu", backend=backend).sum().backward()
        assert leaf.grad.flatten().tolist() == [1, 0, 1]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=12)
@given(name=st.sampled_from(sorted(OPS)), draw=st.randoms(use_true_random=False))
def test_right_calls_of_hypothesis(name, draw):
    torch.manual_seed(0)
    right_call(name, draw)


@pytest.mark.parametrize("name", OPS)
def test_wrong_calls(name, night, evidence):
    calls = WRONG[night]
    for seed in range(calls):
        wrong_call(name, seed)
    evidence("wrong calls, each refused with a ValueError or TypeError that names op or argument", calls)
