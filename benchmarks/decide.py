"""Decide by measurement which backend serves which op and sizes: ofb_kernels/measured.json, from an ops.csv.

    python -m benchmarks.decide benchmarks/results/<gpu>/ops.csv

Compared are the op's Triton and folded forms, forward with backward where it has one, as plain calls. What the table
holds of other compute capabilities stays.
"""

import argparse
import json
from pathlib import Path

from benchmarks.measure import read_csv
from ofb_kernels.measured import PATH

BACKENDS = {"triton": "triton", "folded": "eager"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("csv", type=Path, help="what benchmarks.ops wrote on a GPU")
    parser.add_argument("--output", type=Path, default=PATH, help="the table to bring up to date")
    arguments = parser.parse_args()
    rows = read_csv(arguments.csv)
    capabilities = {row["capability"] for row in rows}
    if len(capabilities) != 1 or "" in capabilities:
        parser.error(f"csv: expected rows of one GPU, got compute capabilities {sorted(capabilities)}")
    table = json.loads(arguments.output.read_text()) | {capabilities.pop(): decisions(rows)}
    arguments.output.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"written to {arguments.output}")


def decisions(rows: list[dict[str, str]]) -> dict[str, list]:
    """For each op, [sizes, fastest backend] of every shape at which both backends were measured."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    with_backward = {row["subject"] for row in rows if row["pass"] == "both"}
    for row in rows:
        decisive = row["pass"] == ("both" if row["subject"] in with_backward else "forward")
        if decisive and row["variant"] in BACKENDS and row["graph"] == "False":
            shape = times.setdefault((row["subject"].split()[0], row["shape"]), {})
            shape[BACKENDS[row["variant"]]] = float(row["ms"])
    table: dict[str, list] = {}
    for (op, shape), measured in sorted(times.items()):
        if len(measured) == len(BACKENDS):
            table.setdefault(op, []).append([list(map(int, shape.split("x"))), min(measured, key=measured.get)])
    return table


if __name__ == "__main__":
    main()
