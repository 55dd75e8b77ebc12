"""The results page: benchmarks/README.md and its pictures, from the CSVs under benchmarks/results.

python -m benchmarks.page
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from benchmarks.measure import ROOT, read_csv
from benchmarks.plot import draw

HEADER = """# Speed and memory

Written by `python -m benchmarks.page` from the CSVs under `results/`; nothing here is typed in by hand. Every time is
the median of interleaved calls in one process on random data, ratios are medians of the rounds' ratios with the 20 and
80 % quantiles. "floor" is the least time the card could take, from shapes and from ceilings measured in the same run
(`python -m benchmarks.floors` prints it with no GPU). What was predicted and what came of it: [NOTES.md](NOTES.md).
"""
NOT_MEASURED = """
## GPU

Not measured: no result of a GPU has been committed. `make card` writes them ([docs/gpu.md](../docs/gpu.md)).
"""

Row = dict[str, str]


def main() -> None:
    results = ROOT / "results"
    for folder in device_folders(results):
        for name, rows in pictures(folder).items():
            draw(rows, folder / name)
    path = ROOT / "README.md"
    path.write_text(page(results))
    print(f"written to {path}")


def page(results: Path) -> str:
    """The whole page, without its pictures."""
    folders = device_folders(results)
    parts = [HEADER, *(device_section(folder) for folder in folders)]
    if not any(folder.name.startswith("nvidia") for folder in folders):
        parts.append(NOT_MEASURED)
    return "".join(parts)


def device_folders(results: Path) -> list[Path]:
    return sorted(folder for folder in results.iterdir() if any(folder.glob("*.csv")))


def pictures(folder: Path) -> dict[str, list[Row]]:
    """Rows of each picture: the steps, and the ops whole, forward with backward, at one batch size."""
    rows = _rows(folder)
    steps = side_by_side(row for row in rows if row["benchmark"] == "step")
    ops = [row for row in rows if row["benchmark"] == "op" and row["size"] == "full"]
    batches = {row["batch_size"] for row in ops}
    batch = "256" if "256" in batches else min(batches, default="")
    with_backward = {row["subject"] for row in ops if row["pass"] == "both"}
    ops = [row for row in ops if row["batch_size"] == batch]
    ops = [row for row in ops if row["pass"] == ("both" if row["subject"] in with_backward else "forward")]
    return {name: chosen for name, chosen in {"step.png": steps, "ops.png": ops}.items() if chosen}


def side_by_side(steps: Iterable[Row]) -> list[Row]:
    """Steps of one network at one size as one case: each process timed its variants beside the dense network, so that
    their ratios compare. What several of them timed is shown once, as the first of them did."""
    steps = sorted(steps, key=lambda row: (_case(row)[:-1], row["pass"]))
    shown = {(*_case(row)[:-1], row["variant"], row["graph"]): row | {"pass": "step"} for row in reversed(steps)}
    return sorted(shown.values(), key=lambda row: (_case(row), row["graph"], float(row["over_base"])))


def device_section(folder: Path) -> str:
    """Tables of one device, each under what it depends on."""
    rows = _rows(folder)
    parts = [f"\n## {rows[0]['device']}\n"]
    parts += [f"\n![{name}](results/{folder.name}/{name})\n" for name in pictures(folder)]
    on_gpu = rows[0]["capability"] != ""
    ops = [row for row in rows if row["benchmark"] == "op" and on_gpu]
    for about, cases in groupby(ops, key=lambda row: (row["subject"].split()[1], row["batch_size"])):
        cases = list(cases)
        title = f"ops of {about[0]}, batch {about[1]}, as CUDA graphs"
        parts.append(f"\n### {title}\n\n{_about(cases[0])} Ratios are the form's time over Triton's.\n\n")
        parts.extend(f"{line}\n" for line in _ops_table(cases))
    for (benchmark, subject, batch, size, which), group in groupby((r for r in rows if r not in ops), key=_case):
        group = list(group)
        what = f"one {which}" if benchmark == "step" else which
        parts.append(f"\n### {subject}, batch {batch}, {size} size, {what}\n\n{_about(group[0])}\n\n")
        parts.extend(f"{line}\n" for line in _table(group))
    return "".join(parts)


def _rows(folder: Path) -> list[Row]:
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read_csv(path)]
    return [row for _, case in groupby(rows, key=_case) for row in worth_showing(list(case))]


def worth_showing(case: list[Row]) -> list[Row]:
    """Of an op's forms: as graphs where there are any, with the memory that the same form took without one; of the
    Triton kernels' other configurations the fastest, if the default ones are slower."""
    graphs = [row for row in case if row["graph"] == "True"]
    if case[0]["benchmark"] != "op" or not graphs:
        return case
    memory = {row["variant"]: row["peak_bytes"] for row in case if row["graph"] != "True"}
    forms = sorted(graphs, key=lambda row: float(row["ms"]))
    triton = [row["variant"] for row in forms if row["variant"].split(",")[0] == "triton"]
    kept = [row for row in forms if "," not in row["variant"] or row["variant"] == triton[0]]
    return [row | {"peak_bytes": memory.get(row["variant"], "")} for row in kept]


def _ops_table(rows: list[Row]) -> Iterator[str]:
    """A line for each pass of each op: how the other forms compare with Triton's, then its own figures."""
    rivals = list(dict.fromkeys(row["variant"] for row in rows if not row["variant"].startswith("triton")))
    columns = ["op", "size", "pass", *rivals, "triton, µs", "over floor", "peak MiB", "faster configuration, µs"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for (_, subject, _, size, which), case in groupby(rows, key=_case):
        by_variant = {row["variant"]: row for row in case}
        if "triton" not in by_variant:
            continue
        triton = by_variant.pop("triton")
        ms = float(triton["ms"])
        ratios = [f"{float(by_variant[name]['ms']) / ms:.2f}" if name in by_variant else "" for name in rivals]
        floor = f"{ms / float(triton['floor_ms']):.2f}" if triton["floor_ms"] else ""
        memory = f"{int(triton['peak_bytes']) / 2**20:.0f}" if triton["peak_bytes"] else ""
        other = next((row for name, row in by_variant.items() if name.startswith("triton, ")), None)
        faster = f"{other['variant'].removeprefix('triton, ')}: {1e3 * float(other['ms']):.0f}" if other else ""
        cells = [subject.split()[0], size, which, *ratios, f"{1e3 * ms:.0f}", floor, memory, faster]
        yield "| " + " | ".join(cells) + " |"


def _case(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("benchmark", "subject", "batch_size", "size", "pass"))


def _about(row: Row) -> str:
    versions = f"torch {row['torch']}, Triton {row['triton']}, timm {row['timm']}"
    threads = f", {row['threads']} threads" if row["threads"] else ""
    ceilings = f", ceilings {row['ceiling_tflops']} TFLOP/s and {row['ceiling_tbps']} TB/s" if row["floor_ms"] else ""
    return f"{versions}{threads}{ceilings}; {row['rounds']} rounds, commit {row['commit']}, {row['date']}."


def _table(rows: Iterable[Row]) -> Iterator[str]:
    rows = list(rows)
    on_gpu = rows[0]["capability"] != ""
    columns = [
        "variant",
        f"time over {rows[0]['base']}",
        "ms",
        *(["over floor", "peak MiB", "launches"] if on_gpu else []),
    ]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        graph = ", CUDA graph" if row["graph"] == "True" else ""
        over = f"{float(row['over_base']):.2f} ({float(row['over_base_20']):.2f} to {float(row['over_base_80']):.2f})"
        ms = float(row["ms"])
        events = f", {row['shape']}" if row["benchmark"] == "search" else ""
        cells = [row["variant"] + graph + events, over, f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"]
        if on_gpu:
            floor = f"{float(row['ms']) / float(row['floor_ms']):.2f}" if row["floor_ms"] else ""
            memory = f"{int(row['peak_bytes']) / 2**20:.0f}" if row["peak_bytes"] else ""
            cells += [floor, memory, row["launches"]]
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
