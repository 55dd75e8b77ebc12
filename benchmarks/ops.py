"""Every op, forward and forward with backward, in all its forms and beside the least time the device could take.

    python -m benchmarks.ops --device cpu --quick
    python -m benchmarks.ops --device cuda [--quick]
    python -m benchmarks.ops --device cpu --quick --op masked_linear --model row --batch-size 1 --no-compile

Shapes are those of DeiT-S and DeiT-B, whole, pruned to half, and pruned to multiples of 8 that are not of 16; data is
random, variants run interleaved in one process, on a GPU as CUDA graphs too. "folded" is the op's eager backend, the
best form in plain PyTorch; "triton" takes the default configuration of each kernel, "triton, …" another one for one of
them. On a CPU masked_linear runs without its mask too; "row" is a single row of 4096 features.
"""

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ofb_kernels
from benchmarks import floors
from benchmarks.configurations import Choice, defaults_and_others, with_defaults
from benchmarks.floors import MODELS, Sizes
from benchmarks.measure import (
    GRAPH,
    ceiling_columns,
    ceilings,
    keep,
    measure,
    mixed_precision,
    results_folder,
    that_run,
    with_graphs,
)
from benchmarks.process import add_process_options, own_row, take_turn, verdict
from ofb_kernels.dispatch import INTERPRETED
from ofb_kernels.measured import sizes_of

SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
ON_SDPA = ("masked_attention", "masked_qkv_attention")
SHARES_KERNELS_OF = {"masked_qkv_attention": "masked_attention"}
ALL_LATENCY = ("bimask", "candidate_statistics")  # always in float32, on a few thousand numbers
PASSES = ("forward", "both")
ROW = {"width": 4096, "heads": 64, "head_dim": 64, "hidden": 4096, "depth": 1, "tokens": 1}  # of no image
SHAPES = MODELS | {"row": ROW}
OF_IMAGES = ("local_norm", "masked_reconstruction_loss")  # ops on pixels, which are never pruned
Form = Callable[[], object]


@dataclass
class Case:
    """One op on one shape: its tensors, all differentiated that ask for it, and its other arguments."""

    op: str
    inputs: dict[str, Tensor]
    options: dict

    def run(self, backend: str) -> Tensor | tuple[Tensor, ...]:
        with mixed_precision(next(iter(self.inputs.values())).device.type):
            return getattr(ofb_kernels, self.op)(**self.inputs, **self.options, backend=backend)

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.inputs.values() if tensor.requires_grad]


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    until = take_turn(arguments)
    torch.manual_seed(0)
    rates = ceilings(device)
    path = (arguments.output or results_folder(device)) / "ops.csv"
    for size, model, batch in product(arguments.size, arguments.model, arguments.batch_size):
        sizes = Sizes(batch, **SHAPES[model]).named(size)
        for case in cases(sizes, device):
            unasked = arguments.op and case.op not in arguments.op
            if unasked or (case.op in OF_IMAGES and (size != "full" or not sizes.side)):
                continue
            about = {"benchmark": "op", "subject": f"{case.op} {model}", "batch_size": batch, "size": size}
            about |= {"shape": "x".join(map(str, sizes_of(case.inputs)))} | ceiling_columns(rates)
            for which in PASSES if case.leaves() else PASSES[:1]:
                if time.monotonic() > until:
                    verdict(f"{case.op} {model} {size} {which}: left out, no time was left")
                    continue
                print(f"{case.op}, {model}, batch {batch}, {size}, {which}", flush=True)
                floor = None if rates is None else floor_seconds(case.op, which, sizes, rates)
                rows = measure_pass(case, which, arguments, floor, about | {"pass": which}, until)
                keep(rows, path)  # what is measured stays, should the rest not come
                if rows:
                    verdict(in_one_line(rows))
            torch.compiler.reset()
    print(f"written to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="DeiT-S at one batch size only")
    parser.add_argument("--op", nargs="+", help="these ops only")
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), help="default: deit_small, deit_base")
    parser.add_argument("--batch-size", nargs="+", type=int, help="default: 2 on a CPU, 64, 256 and 1024 on CUDA")
    parser.add_argument("--size", nargs="+", choices=["full", "half", "pruned"], help="default: all, with --quick full")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant")
    parser.add_argument("--no-compile", action="store_true", help="leave out the forms under torch.compile")
    parser.add_argument("--output", type=Path, help="folder of ops.csv; default: benchmarks/results/<device>")
    add_process_options(parser)
    arguments = parser.parse_args()
    quick, on_cpu = arguments.quick, arguments.device == "cpu"
    arguments.model = arguments.model or (["deit_small"] if quick else ["deit_small", "deit_base"])
    arguments.size = arguments.size or (["full"] if quick else ["full", "half", "pruned"])
    arguments.batch_size = arguments.batch_size or ([2] if on_cpu else [256] if quick else [64, 256, 1024])
    return arguments


def cases(sizes: Sizes, device: str, low: torch.dtype | None = None) -> Iterator[Case]:
    """Every op at these sizes, as in a search step: activations in autocast's dtype, masks and stream in float32.

    Args:
        sizes: of the network.
        device: "cpu" or "cuda".
        low: the activations' dtype; bfloat16 on a GPU and float32 on a CPU if None.
    """
    low = low or (torch.bfloat16 if device == "cuda" else torch.float32)
    batch, tokens, width, hidden = sizes.batch, sizes.tokens, sizes.width, sizes.hidden

    def random(*shape: int, dtype: torch.dtype = low, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    def mask(*shape: int) -> Tensor:
        return torch.rand(shape, device=device).requires_grad_()

    heads, step = sizes.heads, sizes.head_dim // 8
    counts = (range(2, heads + 1, 2) if heads > 2 else [heads]), range(2 * step, 8 * step + 1, step)
    counts = tuple(torch.tensor(list(each), device=device).repeat(sizes.depth, 1) for each in counts)
    score = random(sizes.depth, sizes.heads, sizes.head_dim, dtype=torch.float32)
    alpha = mask(sizes.depth, counts[0].shape[1], counts[1].shape[1])
    lam = torch.tensor(0.5, device=device)
    yield Case("bimask", {"score": score, "alpha": alpha}, {"counts": counts, "lam": lam})
    grid = counts[0][:, :, None].expand(alpha.shape)
    sizes_of_grid = {"heads": grid.flatten(1), "units": (grid * counts[1][:, None]).flatten(1)}
    logits = alpha.detach().flatten(1).requires_grad_()
    yield Case("candidate_statistics", {"alpha": logits}, {"alive": torch.ones_like(logits).bool()} | sizes_of_grid)
    x, fc1 = random(batch, tokens, width), {"weight": random(hidden, width), "bias": random(hidden)}
    yield Case("masked_linear", {"x": x, **fc1, "mask": mask(hidden)}, {"activation": "gelu"})
    fc1 = {f"fc1_{name}": tensor for name, tensor in fc1.items()}
    fc2 = {"fc2_weight": random(width, hidden), "fc2_bias": random(width)}
    yield Case("masked_mlp", {"x": x, **fc1, "mask": mask(hidden), **fc2}, {})
    qkv = random(batch, tokens, 3, sizes.heads, sizes.head_dim)
    yield Case("masked_attention", {"qkv": qkv, "mask": mask(sizes.heads, sizes.head_dim)}, {})
    columns = 3 * sizes.attention_width
    projection = {"weight": random(columns, width, scale=width**-0.5), "bias": random(columns)}
    yield Case("masked_qkv_attention", {"x": x, **projection, "mask": mask(sizes.heads, sizes.head_dim)}, {})
    stream = random(batch, tokens, width, dtype=torch.float32)
    vectors = {name: random(width, dtype=torch.float32) for name in ("weight", "bias")} | {"mask": mask(width)}
    yield Case("masked_layer_norm", {"x": stream, **vectors}, {})
    branch = {"branch": random(batch, tokens, width), "branch_mask": mask(width)}
    yield Case("masked_add_layer_norm", {"x": stream, **branch, **vectors}, {})
    images = torch.randn(batch, 3, sizes.side, sizes.side, device=device)
    yield Case("local_norm", {"images": images}, {})
    areas = torch.rand(batch, tokens - 1, device=device).argsort(1)[:, : sizes.drawn]
    masked = torch.ones(sizes.drawn, dtype=torch.bool, device=device)
    options = {"images": images, "areas": areas, "masked": masked, "pixels": (floors.PATCH, floors.PATCH)}
    yield Case("masked_reconstruction_loss", {"decoded": random(batch, sizes.drawn, 3 * floors.PATCH**2)}, options)


def measure_pass(
    case: Case, which: str, arguments: argparse.Namespace, floor: float | None, about: dict, until: float
) -> list[dict]:
    """A row for each form of one pass of an op that runs here; the triton ones say in which configurations."""
    device = arguments.device
    forms, choices = forms_of(case, which, device, not arguments.no_compile, arguments.without)

    def make(name: str) -> Form:
        run = pass_of(forms[name], case, which)
        if name not in choices:
            return run
        return with_defaults(run, *choices[name] if name != "triton" else ())

    runs = that_run({name: partial(make, name) for name in forms}, until)
    if device == "cuda":
        graphs = with_graphs(runs, [name for name in runs if name + GRAPH not in arguments.without])
        runs = {name: run for name, run in graphs.items() if name not in choices or name == "triton"}
    rows = measure(runs, "folded", device, arguments.rounds, floor, about, device_start=True, until=until)
    return [row | {"configurations": json.dumps(choices.get(row["variant"], []))} for row in rows]


def forms_of(
    case: Case, which: str, device: str, compiled: bool, without: Collection[str] = ()
) -> tuple[dict[str, Form], dict[str, list[Choice]]]:
    """Each form of the op, forward, as a function without arguments; and the configurations to run the triton ones in.

    What is left out is not called either, not even to see its configurations: it may have made the device unusable.
    """
    reference, folded, triton = (partial(case.run, backend) for backend in ("reference", "eager", "triton"))
    forms: dict[str, Form] = {"folded": folded}
    choices: dict[str, list[Choice]] = {}
    if (device == "cuda" or INTERPRETED) and "triton" not in without:
        with own_row("triton"):
            choices = configurations_of(triton, case, which)
            forms |= dict.fromkeys(choices, triton)
    if case.op in ON_SDPA and device == "cuda":
        forms |= {name: on_sdpa(case, sdpa) for name, sdpa in SDPA_BACKENDS.items()}
    forms["reference"] = reference
    if case.op == "masked_linear" and device == "cpu" and which == "forward":
        forms["without mask"] = partial(replace(case, inputs=case.inputs | {"mask": None}).run, "eager")
    if compiled:
        rivals = {"folded": folded, "reference": reference}
        forms |= {f"{name} + compile": torch.compile(form, dynamic=False) for name, form in rivals.items()}
    return {name: form for name, form in forms.items() if name not in without}, choices


def configurations_of(triton: Form, case: Case, which: str) -> dict[str, list[Choice]]:
    """The default configurations as those of "triton", and each other one of a kernel under a name of its own.

    Of a forward with backward only those of the backward's kernels: the others have their turn in the forward. An op
    that shares its kernels has the default ones alone: the others have their turn in the op that it shares them with.
    """
    known = {choice.kernel for choice in defaults_and_others(triton)[0]} if which != "forward" else set()
    defaults, others = defaults_and_others(pass_of(triton, case, which))
    if case.op in SHARES_KERNELS_OF:
        return {"triton": defaults}
    return {"triton": defaults} | {f"triton, {each}": [each] for each in others if each.kernel not in known}


def pass_of(form: Form, case: Case, which: str) -> Form:
    """One pass of a form: forward, or both forward and backward."""
    if which == "forward":
        return form
    leaves, cotangents = case.leaves(), [torch.randn_like(output) for output in _tensors(form())]
    return lambda: torch.autograd.grad(_tensors(form()), leaves, cotangents)


def on_sdpa(case: Case, sdpa: SDPBackend) -> Form:
    """The folded form of an attention on one backend of scaled_dot_product_attention."""

    def run() -> Tensor:
        with sdpa_kernel(sdpa):
            return case.run("eager")

    return run


def floor_seconds(op: str, which: str, sizes: Sizes, rates: floors.Rates) -> float | None:
    """The least time of a pass; None for an op that is all latency."""
    if op not in floors.OPS:
        return None
    forward, backward = floors.OPS[op](sizes)
    return floors.seconds(forward if which == "forward" else forward + backward, rates)


def in_one_line(rows: list[dict]) -> str:
    """The times of a pass: triton over its floor, its fastest configuration, the other forms; graphs, where there are
    any."""
    shown = sorted([row for row in rows if row["graph"]] or rows, key=lambda row: row["ms"])
    times = {row["variant"]: f"{1e3 * row['ms']:.0f} us" for row in shown}
    if "triton" in times and shown[0]["floor_ms"]:
        milliseconds = next(row["ms"] for row in shown if row["variant"] == "triton")
        times["triton"] += f" = {milliseconds / shown[0]['floor_ms']:.1f} floors"
    tuned = [name for name in times if name.startswith("triton, ")]
    names = dict.fromkeys(["triton", *tuned[:1], *(name for name in times if name not in tuned)])
    about = f"{rows[0]['subject']} {rows[0]['size']} {rows[0]['pass']}"
    return f"{about}: " + "; ".join(f"{name} {times[name]}" for name in names if name in times)


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


if __name__ == "__main__":
    main()
