"""One search step against the dense training step: forward, all losses, backward, optimizer step.

    python -m benchmarks.step --device cpu
    python -m benchmarks.step --device cuda [--quick]

Variants run interleaved in one process on synthetic images; figures are ratios to the dense step, times, peak memory,
launches and, on a GPU, the least time the step could take. "half" is a supernet pruned to half of its width, heads and
hidden units, and a dense network of that size.
"""

import argparse
import copy
from collections.abc import Callable
from itertools import product

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from ofb import Supernet

# variant: (ops backend, torch.compile mode); no backend stands for the plain network's own training step
VARIANTS = {
    "dense": ("", None),
    "dense + compile": ("", "default"),
    "reference": ("reference", None),
    "reference + compile": ("reference", "default"),
    "folded": ("eager", None),
    "folded + compile": ("eager", "default"),
    "folded + compile max-autotune": ("eager", "max-autotune-no-cudagraphs"),
    "triton": ("triton", None),
    "package": (None, None),
}
CPU_VARIANTS = ("dense", "reference", "folded", "package")
CUDA_VARIANTS = tuple(name for name in VARIANTS if name != "package")
QUICK_VARIANTS = ("dense", "dense + compile", "reference", "folded", "folded + compile", "triton")
GRAPHS = ("dense + compile", "folded + compile", "folded + compile max-autotune", "triton")


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    rates = ceilings(device)
    for model, batch, size in product(arguments.model, arguments.batch_size, arguments.size):
        print(f"{model}, batch {batch}, {size}, residual_mask={arguments.residual_mask}", flush=True)
        about = {"benchmark": "step", "subject": f"{model} {arguments.residual_mask}", "batch_size": batch}
        about |= {"size": size, "pass": "step"} | ceiling_columns(rates)
        steps = that_run(make_steps(model, batch, size, arguments))
        steps = with_graphs(steps, GRAPHS if device == "cuda" else ())
        floor = None if rates is None else floor_seconds(model, batch, size, rates)
        rows = measure(steps, "dense", device, arguments.rounds, floor, about)
        path = results_folder(device) / f"step-{model}-{batch}-{size}-{arguments.residual_mask}.csv"
        write_csv(rows, path)
        print(f"written to {path}", flush=True)
        torch.compiler.reset()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="DeiT-S, batch 256, full size, without the slow compilers")
    parser.add_argument("--model", nargs="+", choices=list(SIZES), help="default: deit_small, on CUDA deit_base too")
    parser.add_argument("--batch-size", nargs="+", type=int, help="default: 8 on a CPU, 64, 256 and 1024 on CUDA")
    parser.add_argument("--size", nargs="+", choices=["full", "half"], help="default: full, on CUDA half too")
    parser.add_argument("--residual-mask", choices=["stream", "input"], default="stream")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each variant")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all that fit the device")
    arguments = parser.parse_args()
    whole = arguments.device == "cuda" and not arguments.quick
    arguments.model = arguments.model or (list(SIZES) if whole else ["deit_small"])
    arguments.size = arguments.size or (["full", "half"] if whole else ["full"])
    arguments.batch_size = arguments.batch_size or ([64, 256, 1024] if whole else [8 if _on_cpu(arguments) else 256])
    usual = CPU_VARIANTS if _on_cpu(arguments) else QUICK_VARIANTS if arguments.quick else CUDA_VARIANTS
    arguments.variants = ["dense", *(name for name in arguments.variants or usual if name != "dense")]
    return arguments


def make_steps(model: str, batch: int, size: str, arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A training step of the dense network, and search steps in each variant, as functions without arguments."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, device=arguments.device)
    targets = torch.randint(0, 1000, (batch,), device=arguments.device)
    return {
        name: make_step(make_network(model, size, *VARIANTS[name], arguments), images, targets)
        for name in arguments.variants
    }


def make_network(
    model: str, size: str, backend: str | None, compile_mode: str | None, arguments: argparse.Namespace
) -> tuple[nn.Module, str | None]:
    """The dense network (backend "") or a supernet, at full or half size, and how its loss is to be compiled."""
    dense = timm.create_model(f"{model}_patch16_224", drop_path_rate=0.1).to(arguments.device)
    if backend == "" and size == "full":
        return dense, compile_mode
    options = {"residual_mask": arguments.residual_mask, "backend": backend or None}
    reconstruction = {"mask_ratio_start": 0.05, "mask_ratio_end": 0.25}
    supernet = Supernet(dense, target="50%" if size == "full" else "15%", **reconstruction, **options)
    if size == "half":
        halve(supernet)
    return (copy.deepcopy(supernet.model) if backend == "" else supernet), compile_mode


def halve(supernet: Supernet) -> None:
    """Prune to half of the width, the heads and the hidden units, all smaller candidates left alive."""
    for name, bimask in supernet.bimasks.items():
        heads, channels = bimask.candidates.full
        if name.startswith("attn"):
            too_large = (bimask.head_counts > heads // 2)[:, None].expand(bimask.alpha.shape)
        else:
            too_large = (bimask.channel_counts > channels // 2).expand(bimask.alpha.shape)
        bimask.alpha.data[too_large] = -100.0
    supernet.prune()


def make_step(network_and_mode: tuple[nn.Module, str | None], images: Tensor, targets: Tensor) -> Callable[[], None]:
    """Forward, losses, backward and AdamW. Schedules and pruning, which come between steps, are not in it."""
    network, compile_mode = network_and_mode
    is_supernet = isinstance(network, Supernet)
    groups = network.parameter_groups() if is_supernet else network.parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True, capturable=images.is_cuda)

    def loss_of() -> Tensor:
        if is_supernet:
            return network.loss(images, targets).total
        return F.cross_entropy(network(images), targets, label_smoothing=0.1)

    compute_loss = loss_of if compile_mode is None else torch.compile(loss_of, mode=compile_mode)

    def step() -> None:
        with mixed_precision(images.device.type):
            loss = compute_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor_seconds(model: str, batch: int, size: str, rates: floors.Rates) -> float:
    full = Sizes(batch, **SIZES[model])
    return floors.seconds(floors.step(full if size == "full" else full.halved()), rates)


def _on_cpu(arguments: argparse.Namespace) -> bool:
    return arguments.device == "cpu"


if __name__ == "__main__":
    main()
