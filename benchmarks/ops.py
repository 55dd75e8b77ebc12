"""Every op, forward and forward with backward, in all its forms and beside the least time the device could take.

    python -m benchmarks.ops --device cpu --quick
    python -m benchmarks.ops --device cuda

Shapes are those of DeiT-S and DeiT-B, data is random, variants run interleaved in one process. The floor of a pass is
the longer of its operations at peak rate and its least bytes at peak bandwidth, both ceilings measured in the same run.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ofb_kernels
from benchmarks.measure import environment, interleave, quantiles, results_folder, write_csv

TOKENS = 197
BLOCKS = 12
WIDTHS = {"deit_small": (384, 6), "deit_base": (768, 12)}  # residual width and heads, each of 64 channels
SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@dataclass
class Case:
    """One op on one shape: its differentiable inputs, other arguments, and MACs of the forward and the backward."""

    op: str
    shape: str
    inputs: dict[str, Tensor]
    options: dict = field(default_factory=dict)
    macs: int = 0
    backward_macs: int = 0
    differentiable: bool = True

    def run(self, backend: str) -> Tensor:
        return getattr(ofb_kernels, self.op)(**self.inputs, **self.options, backend=backend)


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    rates = ceilings() if arguments.device == "cuda" else None
    rows = []
    for case in cases(arguments.device, arguments.quick):
        for name, backward in (("forward", False), ("forward+backward", True)):
            if case.differentiable or not backward:
                rows += measure(case, name, backward, arguments, rates)
        torch.compiler.reset()
    path = (arguments.output or results_folder(arguments.device)) / "ops.csv"
    write_csv([row | environment(arguments.device) for row in rows], path)
    print(f"written to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="DeiT-S at one batch size only")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant")
    parser.add_argument("--output", type=Path, help="folder of ops.csv; default: benchmarks/results/<device>")
    return parser.parse_args()


def cases(device: str, quick: bool) -> Iterator[Case]:
    batches = (2,) if device == "cpu" else (256,) if quick else (64, 256)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(of).requires_grad_()

    def mask(*shape: int) -> Tensor:
        return torch.rand(shape, device=device).requires_grad_()

    for model, (width, heads) in list(WIDTHS.items())[: 1 if quick else None]:
        hidden, head_dim = 4 * width, width // heads
        counts = (range(2, heads + 1, 2), range(16, 65, 8))
        counts = tuple(torch.tensor(each, device=device).repeat(BLOCKS, 1) for each in counts)
        yield Case(
            "bimask", f"{model} all attention",
            {"score": random(BLOCKS, heads, head_dim, of=torch.float32), "alpha": mask(BLOCKS, heads // 2, 7)},
            {"counts": counts, "lam": torch.tensor(0.5, device=device)},
        )  # fmt: skip
        for batch in batches:
            shape, rows = f"{model} batch {batch}", batch * TOKENS
            x = random(batch, TOKENS, width)
            fc1 = random(hidden, width), random(hidden)
            product = rows * width * hidden
            yield Case(
                "masked_linear", shape,
                {"x": x, "weight": fc1[0], "bias": fc1[1], "mask": mask(hidden)}, {"activation": "gelu"},
                macs=product, backward_macs=2 * product,
            )  # fmt: skip
            fc2 = {"fc2_weight": random(width, hidden), "fc2_bias": random(width)}
            yield Case(
                "masked_mlp", shape,
                {"x": x, "fc1_weight": fc1[0], "fc1_bias": fc1[1], "mask": mask(hidden)} | fc2,
                macs=2 * product, backward_macs=4 * product,
            )  # fmt: skip
            scores = batch * heads * TOKENS**2 * head_dim
            yield Case(
                "masked_attention", shape,
                {"qkv": random(batch, TOKENS, 3, heads, head_dim), "mask": mask(heads, head_dim)},
                macs=2 * scores, backward_macs=5 * scores,
            )  # fmt: skip
            vectors = {"weight": random(width), "bias": random(width), "mask": mask(width)}
            yield Case("masked_layer_norm", shape, {"x": x} | vectors)
            images = torch.randn(batch, 3, 224, 224, device=device)
            yield Case("local_norm", f"batch {batch}", {"images": images}, differentiable=False)


def measure(
    case: Case, name: str, backward: bool, arguments: argparse.Namespace, rates: tuple[float, float] | None
) -> list[dict]:
    """A row for each variant of one pass; prints them."""
    out = case.run("eager")
    seconds = interleave(variants(case, backward, out, arguments.device), arguments.device, arguments.rounds)
    floor = None if rates is None else floor_seconds(case, backward, out, rates)
    rows = []
    for variant, values in seconds.items():
        low, median, high = (round(1e3 * value, 4) for value in quantiles(values))
        rows.append(
            {"op": case.op, "shape": case.shape, "pass": name, "variant": variant}
            | {"ms_20": low, "ms": median, "ms_80": high}
            | {"floor_ms": None if floor is None else round(1e3 * floor, 4)}
        )
        over_floor = "" if floor is None else f"   {median / (1e3 * floor):6.2f} × floor"
        print(f"{case.op:18} {case.shape:22} {name:17} {variant:20} {median:10.4f} ms{over_floor}", flush=True)
    return rows


def variants(case: Case, backward: bool, out: Tensor, device: str) -> dict[str, Callable]:
    """Each form of the pass as a function without arguments."""
    forwards = {
        "reference": lambda: case.run("reference"),
        "eager": lambda: case.run("eager"),
        "reference + compile": torch.compile(lambda: case.run("reference"), dynamic=False),
        "eager + compile": torch.compile(lambda: case.run("eager"), dynamic=False),
    }
    if device == "cuda":
        forwards["triton"] = lambda: case.run("triton")
    if case.op == "masked_attention" and device == "cuda":
        candidates = {name: on_sdpa(case, sdpa) for name, sdpa in SDPA_BACKENDS.items()}
        forwards |= {name: forward for name, forward in candidates.items() if serves(name, forward)}
    if not backward:
        return forwards
    leaves = [tensor for tensor in case.inputs.values() if tensor.requires_grad]
    cotangent = torch.randn_like(out)
    return {
        name: lambda forward=forward: torch.autograd.grad(forward(), leaves, cotangent)
        for name, forward in forwards.items()
    }


def on_sdpa(case: Case, sdpa: SDPBackend) -> Callable[[], Tensor]:
    """The eager form of masked attention on one backend of scaled_dot_product_attention."""

    def run() -> Tensor:
        with sdpa_kernel(sdpa):
            return case.run("eager")

    return run


def serves(name: str, forward: Callable[[], Tensor]) -> bool:
    """Not every GPU and PyTorch has every backend of scaled_dot_product_attention."""
    try:
        forward()
    except RuntimeError as error:
        print(f"{name} is left out: {str(error).splitlines()[0]}")
        return False
    return True


def floor_seconds(case: Case, backward: bool, out: Tensor, rates: tuple[float, float]) -> float:
    """The least time of a pass. A backward reads what the forward read and wrote, or as much, and writes gradients."""
    operations_rate, bytes_rate = rates
    forward_bytes = sum(tensor.nbytes for tensor in (*case.inputs.values(), out))
    forward = max(2 * case.macs / operations_rate, forward_bytes / bytes_rate)
    if not backward:
        return forward
    return forward + max(2 * case.backward_macs / operations_rate, 2 * forward_bytes / bytes_rate)


def ceilings() -> tuple[float, float]:
    """Operations and bytes a second of this GPU: an 8192³ bf16 product, and a copy of 2 GiB read plus written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = interleave({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, "cuda", rounds=20)
    rates = 2 * 8192**3 / quantiles(seconds["product"])[1], 2 * source.nbytes / quantiles(seconds["copy"])[1]
    print(f"ceilings: {rates[0] / 1e12:.0f} TFLOP/s, {rates[1] / 1e12:.2f} TB/s")
    return rates


if __name__ == "__main__":
    main()
