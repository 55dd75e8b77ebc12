"""One search step against the dense training step: forward, all losses, backward, optimizer step.

    python -m benchmarks.step --device cpu
    python -m benchmarks.step --device cuda [--quick]

Variants run interleaved in one process on synthetic images; figures are ratios to the dense step, times, peak memory,
launches and, on a GPU, the least time the step could take. "half" is a supernet pruned to half of its width, heads and
hidden units, and a dense network of that size.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.floors import MODELS, SIZES, Sizes
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
from benchmarks.process import add_process_options, take_turn, verdict
from ofb import Supernet
from ofb.supernet.bimask import BiMask
from ofb_kernels import eager, reference


class Variant(NamedTuple):
    """How a step computes: ops backend (None: the package's choice), torch.compile's mode, and norms in plain PyTorch.

    The eager backend's LayerNorm is an autograd.Function tuned for a CPU; a compiler does better with the plain
    expression.
    """

    backend: str | None
    compile_mode: str | None = None
    plain_norm: bool = False


DENSE = "dense"  # the plain network's own training step, in place of an ops backend
VARIANTS = {
    "dense": Variant(DENSE),
    "folded": Variant("eager"),
    "triton": Variant("triton"),
    "reference": Variant("reference"),
    "package": Variant(None),
    "dense + compile": Variant(DENSE, "default"),
    "folded + compile": Variant("eager", "default"),
    "folded + plain norm + compile": Variant("eager", "default", plain_norm=True),
    "triton + compile": Variant("triton", "default"),
    "reference + compile": Variant("reference", "default"),
    "folded + compile max-autotune": Variant("eager", "max-autotune-no-cudagraphs"),
}
CPU_VARIANTS = ("dense", "reference", "folded", "package")
CUDA_VARIANTS = tuple(name for name in VARIANTS if name != "package")
QUICK_VARIANTS = ("dense", "folded", "triton")
UNLIKELY = -100.0  # an architecture logit whose candidate dies at the next pruning event


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    until = time.monotonic() + arguments.seconds
    for model, batch, size in product(arguments.model, arguments.batch_size, arguments.size):
        print(f"{model}, batch {batch}, {size}, residual_mask={arguments.residual_mask}", flush=True)
        steps = that_run(make_steps(model, batch, size, arguments), until)
        until = take_turn(arguments)
        rates = ceilings(device)
        steps = with_graphs(steps, captured(arguments))
        about = {"benchmark": "step", "subject": f"{model} {arguments.residual_mask}", "batch_size": batch}
        about |= {"size": size, "pass": "step" + beside(arguments.variants)} | ceiling_columns(rates)
        floor = None if rates is None else floor_seconds(model, batch, size, rates)
        rows = measure(steps, "dense", device, arguments.rounds, floor, about, until=until)
        folder = arguments.output or results_folder(device)
        compiled = "-compiled" if beside(arguments.variants) else ""
        keep(rows, folder / f"step-{model}-{batch}-{size}-{arguments.residual_mask}{compiled}.csv")
        for row in rows:
            verdict(in_one_line(row))
        torch.compiler.reset()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="DeiT-S, batch 256, full size, nothing compiled")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help="default: deit_small, on CUDA deit_base too")
    parser.add_argument("--batch-size", nargs="+", type=int, help="default: 8 on a CPU, 64, 256 and 1024 on CUDA")
    parser.add_argument("--size", nargs="+", choices=["full", "half"], help="default: full, on CUDA half too")
    parser.add_argument("--residual-mask", choices=["stream", "input"], default="stream")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each variant")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all that fit the device")
    parser.add_argument("--output", type=Path, help="folder of the CSVs; default: benchmarks/results/<device>")
    add_process_options(parser)
    arguments = parser.parse_args()
    whole = arguments.device == "cuda" and not arguments.quick
    arguments.model = arguments.model or (list(SIZES) if whole else ["deit_small"])
    arguments.size = arguments.size or (["full", "half"] if whole else ["full"])
    arguments.batch_size = arguments.batch_size or ([64, 256, 1024] if whole else [8 if _on_cpu(arguments) else 256])
    usual = CPU_VARIANTS if _on_cpu(arguments) else QUICK_VARIANTS if arguments.quick else CUDA_VARIANTS
    arguments.variants = ["dense", *(name for name in arguments.variants or usual if name != "dense")]
    return arguments


def make_steps(
    model: str, batch: int, size: str, arguments: argparse.Namespace
) -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes a training step of the dense network, and search steps in each variant: functions without arguments.

    Whatever takes part in making one, fails with that one alone.
    """
    torch.manual_seed(0)
    side = Sizes(batch, **MODELS[model]).side
    images = torch.randn(batch, 3, side, side, device=arguments.device)
    targets = torch.randint(0, 1000, (batch,), device=arguments.device)

    def make(variant: Variant) -> Callable[[], None]:
        return make_step(make_network(model, size, variant, arguments), variant, images, targets)

    names = [name for name in arguments.variants if name not in arguments.without]
    return {name: partial(make, VARIANTS[name]) for name in names}


def beside(variants: Iterable[str]) -> str:
    """The compiled variants, which tell one choice of variants from another; nothing where there are none."""
    compiled = [name for name in variants if VARIANTS[name].compile_mode is not None]
    return f" beside {' and '.join(compiled)}" if compiled else ""


def captured(arguments: argparse.Namespace) -> list[str]:
    """The variants that are timed as CUDA graphs besides."""
    names = [] if _on_cpu(arguments) else arguments.variants
    return [name for name in names if name + GRAPH not in arguments.without]


def make_network(model: str, size: str, variant: Variant, arguments: argparse.Namespace) -> nn.Module:
    """The dense network or a supernet, at full or half size."""
    dense = timm_model(model).to(arguments.device)
    if variant.backend == DENSE and size == "full":
        return dense
    target = "50%" if size == "full" else lowest_target(model)
    supernet = search(dense, target, arguments.residual_mask, None if variant.backend == DENSE else variant.backend)
    if size == "half":
        halve(supernet)
    return copy.deepcopy(supernet.model) if variant.backend == DENSE else supernet


def search(dense: nn.Module, target: str, residual_mask: str, backend: str | None) -> Supernet:
    """The supernet that a search step is timed of."""
    options = {"residual_mask": residual_mask, "mask_ratio_start": 0.05, "mask_ratio_end": 0.25}
    return Supernet(dense, target=target, backend=backend, **options)


def timm_model(model: str, drop_path_rate: float = 0.1, depth: int | None = None) -> nn.Module:
    """The network that a name of `floors.MODELS` stands for, with random weights; `depth` if not of its own."""
    sizes = Sizes(1, **MODELS[model])
    options = {"drop_path_rate": drop_path_rate, "depth": depth or sizes.depth}
    if model in SIZES:
        return timm.create_model(f"{model}_patch16_224", **options)
    shape = {"embed_dim": sizes.width, "num_heads": sizes.heads, "mlp_ratio": sizes.hidden / sizes.width}
    return timm.create_model("vit_tiny_patch16_224", img_size=sizes.side, **shape, **options)


def lowest_target(model: str) -> str:
    """One that lets a supernet shrink by half in every direction."""
    return "15%" if model in SIZES else "40%"


def halve(supernet: Supernet, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Prune to half of the width, the heads and the hidden units, all smaller candidates left alive."""
    for name, bimask in supernet.bimasks.items():
        heads, channels = bimask.candidates.full
        if name.startswith("attn"):
            _condemn(bimask, (bimask.head_counts > heads // 2)[:, None])
        else:
            _condemn(bimask, bimask.channel_counts > channels // 2)
    supernet.prune(optimizer)


def shrink(supernet: Supernet, optimizer: torch.optim.Optimizer | None = None) -> None:
    """A pruning event in which every open submodule shrinks by one size, in channels as long as there is a choice, then
    in heads; all smaller candidates are left alive."""
    for bimask in supernet.bimasks.values():
        if not bimask.final:
            counts = bimask.channel_counts if len(bimask.channel_counts) > 1 else bimask.head_counts[:, None]
            _condemn(bimask, counts == counts.max())
    supernet.prune(optimizer)


def _condemn(bimask: BiMask, candidates: Tensor) -> None:
    """At the next pruning event these candidates die, and no other does."""
    bimask.alpha.data.zero_().masked_fill_(candidates, UNLIKELY)


def make_step(network: nn.Module, variant: Variant, images: Tensor, targets: Tensor) -> Callable[[], None]:
    """Forward, losses, backward and AdamW. Schedules and pruning, which come between steps, are not in it."""
    is_supernet = isinstance(network, Supernet)
    groups = network.parameter_groups() if is_supernet else network.parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True, capturable=images.is_cuda)

    def loss_of() -> Tensor:
        if is_supernet:
            return network.loss(images, targets).total
        return F.cross_entropy(network(images), targets, label_smoothing=0.1)

    compute_loss = loss_of if variant.compile_mode is None else torch.compile(loss_of, mode=variant.compile_mode)

    def step() -> None:
        with mixed_precision(images.device.type), plain_norms() if variant.plain_norm else nullcontext():
            loss = compute_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_norms() -> AbstractContextManager:
    """Inside, the eager backend's masked LayerNorm is the reference's plain expression."""
    return mock.patch.object(eager, "masked_layer_norm", reference.masked_layer_norm)


def floor_seconds(model: str, batch: int, size: str, rates: floors.Rates) -> float:
    return floors.seconds(floors.step(Sizes(batch, **MODELS[model]).named(size)), rates)


def in_one_line(row: dict) -> str:
    graph = GRAPH if row["graph"] else ""
    floor = f", {row['ms'] / row['floor_ms']:.2f} floors" if row["floor_ms"] else ""
    memory = f", {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
    launched = f", {row['launches']} launches" if row["launches"] else ""
    about = f"step {row['subject'].split()[0]} {row['batch_size']} {row['size']} {row['variant']}{graph}"
    return f"{about}: {row['ms']:.2f} ms, {row['over_base']:.2f} × {row['base']}{floor}{memory}{launched}"


def _on_cpu(arguments: argparse.Namespace) -> bool:
    return arguments.device == "cpu"


if __name__ == "__main__":
    main()
