"""One search step against the dense training step: forward, all losses, backward, optimizer step.

    python -m benchmarks.step --device cpu
    python -m benchmarks.step --device cuda

Variants run interleaved in one process on synthetic images; figures are ratios to the dense step and times.
"""

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F

from benchmarks.measure import environment, interleave, peak_memory, quantiles, ratio_to, results_folder, write_csv
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
CUDA_VARIANTS = ("dense", "dense + compile", "reference", "folded", "folded + compile", "triton")  # within minutes


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    default_variants = CUDA_VARIANTS if device == "cuda" else CPU_VARIANTS
    names = ["dense", *(n for n in arguments.variants or default_variants if n != "dense")]
    batch_size = arguments.batch_size or (256 if device == "cuda" else 8)
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    targets = torch.randint(0, 1000, (batch_size,), device=device)
    steps = {n: make_step(arguments.model, images, targets, *VARIANTS[n], arguments.residual_mask) for n in names}
    seconds = interleave(steps, device, arguments.rounds)
    ratios = ratio_to(seconds, "dense")
    rows = []
    for name in names:
        low, median, high = quantiles(seconds[name])
        ratio_low, ratio, ratio_high = ratios[name]
        rows.append(
            {"model": arguments.model, "batch_size": batch_size, "residual_mask": arguments.residual_mask}
            | {
                "variant": name,
                "ms_20": round(low * 1e3, 3),
                "ms": round(median * 1e3, 3),
                "ms_80": round(high * 1e3, 3),
            }
            | {
                "over_dense_20": round(ratio_low, 3),
                "over_dense": round(ratio, 3),
                "over_dense_80": round(ratio_high, 3),
            }
            | {"peak_bytes": peak_memory(steps[name], device), "rounds": arguments.rounds}
            | environment(device)
        )
        print(f"{name:32} {median * 1e3:9.1f} ms   {ratio:5.2f} × dense   ({ratio_low:.2f} to {ratio_high:.2f})")
    path = results_folder(device) / f"step-{arguments.model}-{batch_size}-{arguments.residual_mask}.csv"
    write_csv(rows, path)
    print(f"written to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name")
    parser.add_argument("--batch-size", type=int, help="default: 8 on a CPU, 256 on CUDA")
    parser.add_argument("--residual-mask", choices=["stream", "input"], default="stream")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each variant")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: all that fit the device")
    return parser.parse_args()


def make_step(
    model_name: str,
    images: torch.Tensor,
    targets: torch.Tensor,
    backend: str | None,
    compile_mode: str | None,
    residual_mask: str,
) -> Callable[[], None]:
    """A training step of the dense network (backend "") or a search step, as a function without arguments."""
    device = images.device.type
    model = timm.create_model(model_name, drop_path_rate=0.1).to(device)
    if backend == "":
        network, groups = model, model.parameters()

        def loss_of() -> torch.Tensor:
            return F.cross_entropy(model(images), targets, label_smoothing=0.1)
    else:
        network = Supernet(model, residual_mask=residual_mask, backend=backend)
        groups = network.parameter_groups()

        def loss_of() -> torch.Tensor:
            return network.loss(images, targets).total

    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    compute_loss = loss_of if compile_mode is None else torch.compile(loss_of, mode=compile_mode)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = compute_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(network, Supernet):
            network.step(optimizer)

    return step


if __name__ == "__main__":
    main()
