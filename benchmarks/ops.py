"""Every op, forward, backward and both, in all its forms and beside the least time the device could take.

    python -m benchmarks.ops --device cpu --quick
    python -m benchmarks.ops --device cuda [--quick]

Shapes are those of DeiT-S and DeiT-B, whole and pruned to half; data is random, variants run interleaved in one
process. "folded" is the op's eager backend, the best form in plain PyTorch.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ofb_kernels
from benchmarks import floors
from benchmarks.floors import SIZES, Sizes
from benchmarks.measure import (
    ceiling_columns,
    ceilings,
    measure,
    mixed_precision,
    results_folder,
    that_run,
    with_graphs,
    write_csv,
)
from ofb_kernels.measured import sizes_of

BACKENDS = {"reference": "reference", "folded": "eager", "triton": "triton"}
SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}
PASSES = ("forward", "backward", "both")


@dataclass
class Case:
    """One op on one shape: its tensors, all differentiated that ask for it, and its other arguments."""

    op: str
    inputs: dict[str, Tensor]
    options: dict

    def run(self, backend: str) -> Tensor | tuple[Tensor, ...]:
        with mixed_precision(next(iter(self.inputs.values())).device.type):
            return getattr(ofb_kernels, self.op)(**self.inputs, **self.options, backend=backend)

    def dispatched(self) -> dict[str, Tensor]:
        """The tensors that the op's choice of backend looks at: the first and, if it has one, the mask."""
        first = next(iter(self.inputs))
        return {name: tensor for name, tensor in self.inputs.items() if name in (first, "mask")}

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.inputs.values() if tensor.requires_grad]


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    torch.manual_seed(0)
    functorch_config.donated_buffer = False  # a backward alone is timed over a graph that must stay
    rates = ceilings(device)
    path, rows = (arguments.output or results_folder(device)) / "ops.csv", []
    for model, batch, size, sizes in shapes(device, arguments.quick):
        for case in cases(sizes, device):
            if arguments.op and case.op not in arguments.op:
                continue
            forms = forms_of(case, device)
            for which in PASSES if case.leaves() else PASSES[:1]:
                print(f"{case.op}, {model}, batch {batch}, {size}, {which}", flush=True)
                about = {"benchmark": "op", "subject": f"{case.op} {model}", "batch_size": batch, "size": size}
                shape = "x".join(map(str, sizes_of(case.dispatched())))
                about |= {"pass": which, "shape": shape} | ceiling_columns(rates)
                runs = runs_of(forms, case, which, device)
                floor = None if rates is None else floor_seconds(case.op, which, sizes, rates)
                rows += measure(runs, "folded", device, arguments.rounds, floor, about)
                write_csv(rows, path)  # what is measured stays, should the rest not come
            torch.compiler.reset()
    print(f"written to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="DeiT-S at one batch size only")
    parser.add_argument("--op", nargs="+", help="these ops only")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant")
    parser.add_argument("--output", type=Path, help="folder of ops.csv; default: benchmarks/results/<device>")
    return parser.parse_args()


def shapes(device: str, quick: bool) -> Iterator[tuple[str, int, str, Sizes]]:
    """(model, batch size, "full" or "half", sizes)."""
    batches = (2,) if device == "cpu" else (256,) if quick else (64, 256, 1024)
    for model in list(SIZES)[: 1 if quick else None]:
        for batch in batches:
            full = Sizes(batch, **SIZES[model])
            yield model, batch, "full", full
            if not quick:
                yield model, batch, "half", full.halved()


def cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """Every op at these sizes, as in a search step: activations in autocast's dtype, masks and stream in float32."""
    low = torch.bfloat16 if device == "cuda" else torch.float32
    batch, tokens, width, hidden = sizes.batch, sizes.tokens, sizes.width, sizes.hidden

    def random(*shape: int, dtype: torch.dtype = low) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def mask(*shape: int) -> Tensor:
        return torch.rand(shape, device=device).requires_grad_()

    counts = (range(2, sizes.heads + 1, 2) if sizes.heads > 2 else [sizes.heads]), range(16, sizes.head_dim + 1, 8)
    counts = tuple(torch.tensor(list(each), device=device).repeat(sizes.depth, 1) for each in counts)
    score = random(sizes.depth, sizes.heads, sizes.head_dim, dtype=torch.float32)
    alpha = mask(sizes.depth, counts[0].shape[1], counts[1].shape[1])
    lam = torch.tensor(0.5, device=device)
    yield Case("bimask", {"score": score, "alpha": alpha}, {"counts": counts, "lam": lam})
    x, fc1 = random(batch, tokens, width), {"weight": random(hidden, width), "bias": random(hidden)}
    yield Case("masked_linear", {"x": x, **fc1, "mask": mask(hidden)}, {"activation": "gelu"})
    fc1 = {f"fc1_{name}": tensor for name, tensor in fc1.items()}
    fc2 = {"fc2_weight": random(width, hidden), "fc2_bias": random(width)}
    yield Case("masked_mlp", {"x": x, **fc1, "mask": mask(hidden), **fc2}, {})
    qkv = random(batch, tokens, 3, sizes.heads, sizes.head_dim)
    yield Case("masked_attention", {"qkv": qkv, "mask": mask(sizes.heads, sizes.head_dim)}, {})
    stream = random(batch, tokens, width, dtype=torch.float32)
    vectors = {name: random(width, dtype=torch.float32) for name in ("weight", "bias")} | {"mask": mask(width)}
    yield Case("masked_layer_norm", {"x": stream, **vectors}, {})
    branch = {"branch": random(batch, tokens, width), "branch_mask": mask(width)}
    yield Case("masked_add_layer_norm", {"x": stream, **branch, **vectors}, {})
    yield Case("local_norm", {"images": torch.randn(batch, 3, 224, 224, device=device)}, {})


def forms_of(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """Each form of the op, forward, as a function without arguments; those that cannot run here are left out."""
    forms = {name: lambda backend=backend: case.run(backend) for name, backend in BACKENDS.items()}
    if device == "cpu":
        del forms["triton"]
    for name in ("reference", "folded"):
        forms[f"{name} + compile"] = torch.compile(forms[name], dynamic=False)
    if case.op == "masked_attention" and device == "cuda":
        forms |= {name: on_sdpa(case, sdpa) for name, sdpa in SDPA_BACKENDS.items()}
    return that_run(forms)


def runs_of(forms: dict[str, Callable], case: Case, which: str, device: str) -> dict[str, Callable[[], object]]:
    """One pass of every form, on a GPU those of interest as CUDA graphs besides."""
    runs = forms
    if which != "forward":
        runs = {name: _backward_of(form, case.leaves(), with_forward=which == "both") for name, form in forms.items()}
    return with_graphs(runs, ("folded + compile", "triton") if device == "cuda" else ())


def on_sdpa(case: Case, sdpa: SDPBackend) -> Callable[[], Tensor]:
    """The folded form of masked attention on one backend of scaled_dot_product_attention."""

    def run() -> Tensor:
        with sdpa_kernel(sdpa):
            return case.run("eager")

    return run


def floor_seconds(op: str, which: str, sizes: Sizes, rates: floors.Rates) -> float | None:
    """The least time of a pass; None for bimask, which is all latency."""
    if op not in floors.OPS:
        return None
    forward, backward = floors.OPS[op](sizes)
    return floors.seconds({"forward": forward, "backward": backward, "both": forward + backward}[which], rates)


def _backward_of(form: Callable, leaves: list[Tensor], with_forward: bool) -> Callable[[], object]:
    outputs = _tensors(form())
    cotangents = [torch.randn_like(output) for output in outputs]
    if with_forward:
        return lambda: torch.autograd.grad(_tensors(form()), leaves, cotangents)
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


if __name__ == "__main__":
    main()
