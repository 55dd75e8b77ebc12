"""Timing shared by all benchmarks: variants interleaved in one process, quantiles, ceilings, one CSV schema."""

import csv
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from benchmarks.floors import Rates
from benchmarks.process import own_row, synchronize
from ofb_kernels.dispatch import INTERPRETED

ROOT = Path(__file__).parent
QUANTILES = (0.2, 0.5, 0.8)
COLD_BYTES = 256 * 2**20  # more than any L2 holds
HEAD_START = 5_000_000  # clock cycles, about 3 ms: longer than the host takes to launch an op
COLUMNS = (
    "benchmark", "subject", "batch_size", "size", "pass", "shape", "variant", "graph",
    "ms_20", "ms", "ms_80", "base", "over_base_20", "over_base", "over_base_80",
    "peak_bytes", "launches", "floor_ms", "ceiling_tflops", "ceiling_tbps", "rounds",
    "device", "capability", "torch", "triton", "timm", "threads", "commit", "date", "configurations",
)  # fmt: skip

Run = Callable[[], object]


def measure(
    runs: Mapping[str, Run],
    base: str,
    device: str,
    rounds: int,
    floor: float | None,
    about: dict[str, object],
    *,
    device_start: bool = False,
    until: float = math.inf,
) -> list[dict[str, object]]:
    """A row of the schema for each variant, timed interleaved; prints them.

    Args:
        runs: what to time. A name that ends in GRAPH is a CUDA graph already.
        base: the variant that ratios are taken to; the first one where that failed.
        device: "cpu" or "cuda".
        rounds: timed calls of each variant.
        floor: the least seconds it could take, None where that is not known.
        about: the row's other columns.
        device_start: as in `interleave`.
        until: as in `interleave`.
    """
    timed = interleave(runs, device, rounds, device_start=device_start, until=until)
    if not timed:
        return []
    base = base if base in timed else next(iter(timed))
    ratios = ratio_to(timed, base)
    rows = []
    for variant, values in timed.items():
        times = dict(zip(("ms_20", "ms", "ms_80"), (round(1e3 * t, 4) for t in quantiles(values)), strict=True))
        names = ("over_base_20", "over_base", "over_base_80")
        over = dict(zip(names, (round(r, 4) for r in ratios[variant]), strict=True))
        row = about | times | over | {
            "variant": variant.removesuffix(GRAPH),
            "graph": variant.endswith(GRAPH),
            "base": base.removesuffix(GRAPH),
            "peak_bytes": None,
            "launches": None,
            "floor_ms": None if floor is None else round(1e3 * floor, 4),
            "rounds": len(values),
        }  # fmt: skip
        # A graph took its memory when it was captured. Launches matter where the host's time counts, and take seconds.
        if not row["graph"]:
            with own_row(f"{variant}: memory and launches"):
                row["peak_bytes"] = peak_memory(runs[variant], device)
                launched = {} if device_start else launches(runs[variant], device)
                row["launches"] = sum(map(len, launched.values())) or None
                print(heaviest(launched), end="", flush=True)
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
            with own_row(name + GRAPH):
                graphs[name + GRAPH] = graphed(runs[name])
    return dict(runs) | graphs


def graphed(run: Run) -> Run:
    """`run` as the replay of one CUDA graph, warmed up on the stream it is captured on; its tensors stay where they
    are."""
    from ofb.engine.cuda_graph import capture, run_on  # here: most commands need no graph, and it is slow to import

    stream = torch.cuda.Stream()
    for _ in range(3):
        run_on(stream, run)
    return capture(run, stream)[0].replay


def that_run(makers: Mapping[str, Callable[[], Run]], until: float = math.inf) -> dict[str, Run]:
    """The variants that can be made and called here, each called once; the others are left out, with a line.

    Args:
        makers: what makes each variant. The first ones are made first.
        until: `time.monotonic()` after which no other is made.
    """
    able = {}
    for name, make in makers.items():
        if time.monotonic() > until:
            print(f"  {name} is left out: no time is left to make it", flush=True)
            continue
        with own_row(name):
            run = make()
            run()
            synchronize()
            able[name] = run
    return able


def interleave(
    variants: Mapping[str, Run],
    device: str,
    rounds: int,
    warmup: int = 2,
    *,
    device_start: bool = False,
    until: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each call of each variant; in every round each variant runs once, so that drift hits all alike.

    On a GPU L2 is overwritten before each call: in a training step nothing is where the last call left it.

    Args:
        variants: what to time; one that fails is left out.
        device: "cpu" or "cuda".
        rounds: timed calls of each.
        warmup: calls of each before them.
        device_start: the GPU begins when the host has launched all of a call, so that host time does not count.
        until: `time.monotonic()` after which no other round begins, but for the first.
    """
    cold = torch.empty(COLD_BYTES if device == "cuda" else 0, dtype=torch.uint8, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        if number > warmup and time.monotonic() > until:
            break
        for name in list(seconds):
            cold.zero_()
            took = None
            with own_row(name):
                took = _seconds_of(variants[name], device, device_start)
            if took is None:
                del seconds[name]
            elif number >= warmup:
                seconds[name].append(took)
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
    """Bytes allocated at the peak of one call, over what was allocated before; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(run: Run, device: str) -> dict[str, list[float]]:
    """What one call puts on the GPU, by name: the microseconds of each kernel, copy and fill; nothing on a CPU."""
    if device != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    launched: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launched.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return launched


def heaviest(launched: Mapping[str, list[float]], most: int = 40) -> str:
    """Lines for the names that took longest in all: microseconds, launches, name."""
    ranked = sorted(launched.items(), key=lambda item: -sum(item[1]))
    return "".join(f"    {sum(each):10.0f} us  {len(each):5} launches  {name[:120]}\n" for name, each in ranked[:most])


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
    return {
        "device": device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "threads": str(torch.get_num_threads()) if device == "cpu" else "",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU" + (" with interpreted Triton" if INTERPRETED else "")


def results_folder(device: str) -> Path:
    """benchmarks/results/<device>, its name in lower case with dashes."""
    return ROOT / "results" / device_name(device).lower().replace(" ", "-")


def write_csv(rows: list[dict], path: Path) -> None:
    """Write rows of the schema, replacing the file; where that fails the file stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    try:
        with open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file of the schema, values as text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def keep(rows: list[dict], path: Path) -> None:
    """Write rows of the schema; the file's rows of other cases stay. What cannot be written is said, and no error."""
    try:
        cases = {case_of(row) for row in rows}
        others = [row for row in read_csv(path) if case_of(row) not in cases] if path.exists() else []
        write_csv([*others, *rows], path)
    except OSError as error:
        print(f"  {path} is not written: {error.strerror}", flush=True)


def case_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """What is measured in a row; rows of one case are compared with one another."""
    return tuple(str(row[name]) for name in ("benchmark", "subject", "batch_size", "size", "pass"))


def _seconds_of(run: Run, device: str, device_start: bool) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if device_start:
        torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def commit() -> str:
    """Of the checkout, or what the variable COMMIT says: a copy may have no history, or another one."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return git.stdout.strip() if git.returncode == 0 else ""
