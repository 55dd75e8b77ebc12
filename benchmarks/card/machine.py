"""What this card is and reaches: versions, name, clocks, and the ceilings of products and copies.

    python -m benchmarks.card.machine --device cuda
"""

import argparse
import platform
import subprocess

import torch

from benchmarks.measure import ceilings, environment
from benchmarks.process import add_process_options, take_turn, verdict
from ofb_kernels.kernels.tuning import shared_memory_of

QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add_process_options(parser)
    arguments = parser.parse_args()
    take_turn(arguments)
    here = environment(arguments.device)
    versions = ", ".join(f"{name} {here[name]}" for name in ("torch", "triton", "timm"))
    verdict(f"{here['device']}, commit {here['commit'] or 'unknown'}")
    verdict(f"Python {platform.python_version()}, {versions}")
    if arguments.device == "cuda":
        verdict(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, capability {here['capability']}")
        rates = ceilings("cuda")
        verdict(f"ceilings: {rates.operations / 1e12:.0f} TFLOP/s in bfloat16, {rates.bytes / 1e12:.2f} TB/s")
        verdict(smi())
        shared, processors = shared_memory_of(0) / 1024, torch.cuda.get_device_properties(0).multi_processor_count
        verdict(f"{processors} multiprocessors, {shared:.0f} KiB of shared memory for a block")


def smi() -> str:
    """Clocks and power as nvidia-smi tells them, right after the ceilings: the card is awake."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi says nothing: {error}"


if __name__ == "__main__":
    main()
