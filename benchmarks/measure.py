"""Timing shared by all benchmarks: variants interleaved in one process, quantiles, ceilings, one CSV schema."""

import csv
import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from benchmarks.floors import Rates

ROOT = Path(__file__).parent
QUANTILES = (0.2, 0.5, 0.8)
COLD_BYTES = 256 * 2**20  # more than any L2 holds
COLUMNS = (
    "benchmark", "subject", "batch_size", "size", "pass", "shape", "variant", "graph",
    "ms_20", "ms", "ms_80", "base", "over_base_20", "over_base", "over_base_80",
    "peak_bytes", "launches", "floor_ms", "ceiling_tflops", "ceiling_tbps", "rounds",
    "device", "capability", "torch", "triton", "timm", "threads", "commit", "date",
)  # fmt: skip

Run = Callable[[], object]


def measure(
    runs: Mapping[str, Run], base: str, device: str, rounds: int, floor: float | None, about: dict[str, object]
) -> list[dict[str, object]]:
    """A row of the schema for each variant, timed interleaved; prints them.

    Args:
        runs: what to time. A name that ends in GRAPH is a CUDA graph already.
        base: the variant that ratios are taken to.
        device: "cpu" or "cuda".
        rounds: timed calls of each variant.
        floor: the least seconds it could take, None where that is not known.
        about: the row's other columns.
    """
    timed = interleave(runs, device, rounds)
    ratios = ratio_to(timed, base)
    rows = []
    for variant, values in timed.items():
        times = dict(zip(("ms_20", "ms", "ms_80"), (round(1e3 * t, 4) for t in quantiles(values)), strict=True))
        names = ("over_base_20", "over_base", "over_base_80")
        over = dict(zip(names, (round(r, 4) for r in ratios[variant]), strict=True))
        row = about | times | over | {
            "variant": variant.removesuffix(GRAPH),
            "graph": variant.endswith(GRAPH),
            "base": base,
            "peak_bytes": peak_memory(runs[variant], device),
            "launches": launches(runs[variant], device),
            "floor_ms": None if floor is None else round(1e3 * floor, 4),
            "rounds": rounds,
        }  # fmt: skip
        rows.append({column: row.get(column) for column in COLUMNS} | environment(device))
        above = "" if floor is None else f"  {times['ms'] / (1e3 * floor):7.2f} × floor"
        spread = f"({over['over_base_20']:.2f} to {over['over_base_80']:.2f})"
        print(f"  {variant:34} {times['ms']:10.3f} ms  {over['over_base']:6.2f} × {base} {spread}{above}", flush=True)
    return rows


GRAPH = " (graph)"


def with_graphs(runs: Mapping[str, Run], names: Iterable[str]) -> dict[str, Run]:
    """The runs, and those named as CUDA graphs besides; one that cannot be captured is left out, with a line."""
    graphs = {}
    for name in names:
        if name in runs:
            try:
                graphs[name + GRAPH] = graphed(runs[name])
            except RuntimeError as error:
                print(f"  {name}{GRAPH} is left out: {str(error).splitlines()[0]}", flush=True)
    return dict(runs) | graphs


def graphed(run: Run) -> Run:
    """`run` as the replay of one CUDA graph; its tensors must stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def that_run(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Those variants that this device, PyTorch and memory can run at all; the others are left out, with a line."""
    able = {}
    for name, run in runs.items():
        try:
            run()
            able[name] = run
        except RuntimeError as error:  # out of memory is one, too
            print(f"  {name} is left out: {str(error).splitlines()[0]}", flush=True)
    return able


def interleave(variants: Mapping[str, Run], device: str, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call of each variant; in every round each variant runs once, so that drift hits all alike.

    On a GPU L2 is overwritten before each call: in a training step nothing is where the last call left it.
    """
    cold = torch.empty(COLD_BYTES if device == "cuda" else 0, dtype=torch.uint8, device=device)
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            cold.zero_()
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


def peak_memory(run: Run, device: str) -> int | None:
    """Bytes allocated at the peak of one call, over what was allocated before; None on a CPU.

    A graph allocated when it was captured: its call takes nothing.
    """
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(run: Run, device: str) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU; None on a CPU."""
    if device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def ceilings(device: str) -> Rates | None:
    """What this GPU reaches: an 8192³ bf16 product, and a copy of 2 GiB, bytes read plus written; None on a CPU."""
    if device != "cuda":
        return None
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(256, (2**31,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = interleave({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, "cuda", rounds=20)
    rates = Rates(2 * 8192**3 / quantiles(seconds["product"])[1], 2 * source.nbytes / quantiles(seconds["copy"])[1])
    print(f"ceilings: {rates.operations / 1e12:.0f} TFLOP/s, {rates.bytes / 1e12:.2f} TB/s", flush=True)
    return rates


def mixed_precision(device: str) -> AbstractContextManager:
    """bfloat16 autocast on a GPU, float32 on a CPU."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def ceiling_columns(rates: Rates | None) -> dict[str, float]:
    if rates is None:
        return {}
    return {"ceiling_tflops": round(rates.operations / 1e12, 1), "ceiling_tbps": round(rates.bytes / 1e12, 3)}


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
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else "",
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
    """Write rows of the schema, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file of the schema, values as text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _seconds_of(run: Run, device: str) -> float:
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
