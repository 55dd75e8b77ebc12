"""Throughput of a search with one process and with several, the batch of all together staying the same.

    python -m benchmarks.scaling --processes 1 2
    python -m benchmarks.scaling --processes 1 2 4 8 --device cuda --model deit_small_patch16_224 --batch-size 1024

Steps are whole ones (forward, all losses, backward with the exchange of gradients, AdamW) on synthetic images. On a CPU
the processes share its cores out among them; on GPUs each has its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch

from ofb import SearchConfig, process_group
from ofb.engine.checkpoint import write_text
from ofb.engine.device import pick_device
from ofb.engine.distributed import processes, start_alike
from ofb.engine.optimization import Optimization, make_optimizer
from ofb.engine.search import make_supernet

WARMUP_STEPS = 3


def main() -> None:
    arguments = parse_arguments()
    if arguments.result is not None:
        with process_group():
            write_text(arguments.result, json.dumps(step_seconds(arguments)))
        return
    print(f"{arguments.model}, batch {arguments.batch_size}, {arguments.device}, {arguments.steps} steps, medians")
    print("processes  ms a step  images/s  of linear")
    rates = {}
    for count in arguments.processes:
        seconds = statistics.median(in_job(count, arguments))
        rates[count] = arguments.batch_size / seconds
        first = arguments.processes[0]
        share = rates[count] / rates[first] * first / count
        print(f"{count:9}  {1e3 * seconds:9.1f}  {rates[count]:8.1f}  {share:9.0%}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm model")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a step, over all processes")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--result", help=argparse.SUPPRESS)  # file for the times: this is a process of a job
    return parser.parse_args()


def in_job(count: int, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each timed step of so many processes that torchrun starts."""
    threads = max(1, os.cpu_count() // count)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += ["-m", "benchmarks.scaling", *sys.argv[1:], "--result", str(result)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
        return json.loads(result.read_text())


def step_seconds(arguments: argparse.Namespace) -> list[float]:
    """Seconds of each timed step, in a process of a job."""
    options = {"device": arguments.device, "batch_size": arguments.batch_size, "amp": arguments.amp}
    config = SearchConfig(**options, cuda_graph=False)  # which several processes cannot have
    device = pick_device(config)
    supernet = make_supernet(timm.create_model(arguments.model), config, steps_per_epoch=1000).to(device)
    start_alike(supernet)

    def loss_of(images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": supernet.loss(images, targets).total}

    optimizer = make_optimizer(supernet.parameter_groups(), config, lr_at_256=2.5e-4)
    optimization = Optimization(optimizer, loss_of, config, 0, 1000, device, revision=lambda: supernet.revision)
    share = arguments.batch_size // processes()
    size = supernet.model.patch_embed.img_size
    images = torch.randn(share, supernet.model.patch_embed.proj.in_channels, *size, device=device)
    targets = torch.randint(supernet.model.num_classes, (share,), device=device)
    seconds = []
    for _ in range(WARMUP_STEPS + arguments.steps):
        start = time.perf_counter()
        optimization.step(images, targets)["loss"].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP_STEPS:]


if __name__ == "__main__":
    main()
