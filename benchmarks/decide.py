"""Decide by measurement what runs where: ofb_kernels/measured.json, from the ops.csv of a GPU.

    python -m benchmarks.decide [benchmarks/results/<gpu>/ops.csv]

For the backends, the op's Triton and folded forms are compared, forward with backward where it has one; for the
configurations, the Triton form with one kernel in another of its configurations. Both are timed as CUDA graphs: the
host's time is no part of a kernel's. What the table holds of other compute capabilities stays.
"""

import argparse
import json
from itertools import groupby
from pathlib import Path

from benchmarks.measure import case_of, read_csv, results_folder
from ofb_kernels.measured import PATH

BACKENDS = {"triton": "triton", "folded": "eager"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("csv", type=Path, nargs="?", help="what benchmarks.ops wrote on a GPU; default: on this one")
    parser.add_argument("--output", type=Path, default=PATH, help="the table to bring up to date")
    arguments = parser.parse_args()
    rows = read_csv(arguments.csv or results_folder("cuda") / "ops.csv")
    capabilities = {row["capability"] for row in rows}
    if len(capabilities) != 1 or "" in capabilities:
        parser.error(f"csv: expected rows of one GPU, got compute capabilities {sorted(capabilities)}")
    write_table(rows, arguments.output)
    print(f"written to {arguments.output}")


def propose(folder: Path) -> None:
    """measured.json beside a GPU's ops.csv: the package's table with what is new."""
    rows = read_csv(folder / "ops.csv") if (folder / "ops.csv").exists() else []
    if any(row["capability"] for row in rows):
        write_table(rows, folder / "measured.json")


def write_table(rows: list[dict[str, str]], path: Path) -> None:
    """Bring a table up to date, or the package's own where there is none yet."""
    table = json.loads((path if path.exists() else PATH).read_text())
    table[rows[0]["capability"]] = {"backends": decisions(rows), "configurations": configurations(rows)}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def decisions(rows: list[dict[str, str]]) -> dict[str, list]:
    """For each op, [sizes, fastest backend] of every shape at which both backends were measured."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    with_backward = {row["subject"] for row in rows if row["pass"] == "both"}
    for row in rows:
        decisive = row["pass"] == ("both" if row["subject"] in with_backward else "forward")
        if decisive and row["variant"] in BACKENDS and row["graph"] == "True":
            shape = times.setdefault((row["subject"].split()[0], row["shape"]), {})
            shape[BACKENDS[row["variant"]]] = float(row["ms"])
    table: dict[str, list] = {}
    for (op, shape), measured in sorted(times.items()):
        if len(measured) == len(BACKENDS):
            table.setdefault(op, []).append([list(map(int, shape.split("x"))), min(measured, key=measured.get)])
    return table


def configurations(rows: list[dict[str, str]]) -> dict[str, list]:
    """For each kernel, [sizes, fastest configuration] of every launch that was timed in several.

    A row says in which configurations its kernels ran that have several: the "triton" row in the default ones, another
    row in one that differs.
    """
    times: dict[tuple[str, str], dict[str, float]] = {}  # (kernel, sizes) → configuration → ms, the keys as JSON
    graphs = sorted((row for row in rows if row["graph"] == "True" and row["configurations"]), key=case_of)
    for _, case in groupby(graphs, key=case_of):
        by_variant = {row["variant"]: row for row in case}
        others = {name: row for name, row in by_variant.items() if name.startswith("triton, ")}
        kernels = {json.loads(row["configurations"])[0][0] for row in others.values()}
        for name, row in by_variant.items():
            for kernel, sizes, configuration in json.loads(row["configurations"]):
                if kernel in kernels and name in ("triton", *others):
                    measured = times.setdefault((kernel, json.dumps(sizes)), {})
                    measured[json.dumps(configuration)] = float(row["ms"])
    table: dict[str, list] = {}
    for (kernel, sizes), measured in sorted(times.items()):
        table.setdefault(kernel, []).append([json.loads(sizes), json.loads(min(measured, key=measured.get))])
    return table


if __name__ == "__main__":
    main()
