"""Decide by measurement what runs where: ofb_kernels/measured.json, from an ops.csv and from tuned configurations.

    OFB_KERNELS_AUTOTUNE=1 python -m benchmarks.ops --device cuda
    python -m benchmarks.decide [benchmarks/results/<gpu>/ops.csv]

For the backends, the op's Triton and folded forms are compared, forward with backward where it has one, as plain calls.
The configurations are those tuned on this machine. What the table holds of other compute capabilities stays.
"""

import argparse
import json
from pathlib import Path

from benchmarks.measure import read_csv, results_folder
from ofb_kernels.kernels.tuning import tuned_path
from ofb_kernels.measured import PATH

BACKENDS = {"triton": "triton", "folded": "eager"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("csv", type=Path, nargs="?", help="what benchmarks.ops wrote on a GPU; default: on this one")
    parser.add_argument("--tuned", type=Path, default=tuned_path(), help="what OFB_KERNELS_AUTOTUNE=1 wrote")
    parser.add_argument("--output", type=Path, default=PATH, help="the table to bring up to date")
    arguments = parser.parse_args()
    rows = read_csv(arguments.csv or results_folder("cuda") / "ops.csv")
    capabilities = {row["capability"] for row in rows}
    if len(capabilities) != 1 or "" in capabilities:
        parser.error(f"csv: expected rows of one GPU, got compute capabilities {sorted(capabilities)}")
    capability = capabilities.pop()
    tuned = json.loads(arguments.tuned.read_text()).get(capability, {}) if arguments.tuned.exists() else {}
    table = json.loads(arguments.output.read_text())
    table[capability] = {"backends": decisions(rows), "configurations": tuned}
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
