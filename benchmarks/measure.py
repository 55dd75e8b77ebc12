"""Timing shared by all benchmarks: variants interleaved in one process, quantiles, one CSV schema."""

import csv
import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parent
QUANTILES = (0.2, 0.5, 0.8)


def interleave(variants: Mapping[str, Callable], device: str, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call of each variant; in every round each variant runs once, so that drift hits all alike."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(_seconds_of(run, device))
    return seconds


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20, 50 and 80 % quantiles."""
    return tuple(
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    )


def ratio_to(seconds: Mapping[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Quantiles of each variant's time over the base's, taken round by round."""
    return {n: quantiles([a / b for a, b in zip(v, seconds[base], strict=True)]) for n, v in seconds.items()}


def peak_memory(run: Callable, device: str) -> int | None:
    """Bytes allocated at the peak of one call, over what was allocated before; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment(device: str) -> dict[str, str]:
    """What a figure depends on: device, versions, commit, date."""
    import timm

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "timm": timm.__version__,
        "threads": str(torch.get_num_threads()) if device == "cpu" else "",
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def results_folder(device: str) -> Path:
    """benchmarks/results/<device>, its name in lower case with dashes."""
    return ROOT / "results" / device_name(device).lower().replace(" ", "-")


def write_csv(rows: list[dict], path: Path) -> None:
    """Write rows of equal keys, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _seconds_of(run: Callable, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() if git.returncode == 0 else ""
