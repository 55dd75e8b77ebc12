"""Which method finds the better small network? Accuracy at the same MACs, for the same epochs and recipe.

    python -m benchmarks.quality.fashion_mnist               # lays out the data, once
    python -m benchmarks.quality [--data torch/fashion_mnist] [--methods ofb uniform …] [--targets 50% 30% 15%]

A dense network is trained once. Every method makes a smaller one of it, with several seeds: the rivals shrink it and
fine-tune for as many epochs as OFB searches and fine-tunes in all. Validation images choose the epoch, test images only
report. Results go to a CSV, one row a run; runs that stand there already are not repeated. The page of results is
written by `python -m benchmarks.quality.page`.
"""

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from benchmarks.quality.grid import METHODS, SETTINGS, Job, run, train_dense
from benchmarks.quality.results import csv_path, read_rows, write_rows
from ofb.engine.checkpoint import write_text

KEY = ("data", "method", "target", "seed", "distillation", "options")
SHOWN = ("method", "target", "seed", "distillation", "options", "val_top1", "test_top1", "left_open", "seconds")


def main() -> None:
    arguments = parse_arguments()
    path = arguments.output or csv_path(arguments.data)
    dense = train_dense(arguments.data)
    write_text(path.with_suffix(".dense.json"), json.dumps(dense) + "\n")
    rows = read_rows(path)
    known = {tuple(row[name] for name in KEY) for row in rows}
    jobs = [job for job in jobs_of(arguments) if tuple(_key(job)) not in known]
    print(f"{len(jobs)} runs to do, {len(rows)} in {path}", flush=True)
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, job) for job in jobs]):
            rows.append(done.result())
            write_rows(rows, path)
            print("  ".join(f"{name} {rows[-1][name]}" for name in SHOWN if rows[-1][name] != ""), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=list(SETTINGS), default="torch/fashion_mnist")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--targets", nargs="+", default=["50%", "30%", "15%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--distillation", nargs="+", choices=["", "soft", "hard"], default=[""])
    parser.add_argument("--options", nargs="+", default=[], help="options of the search for the OFB methods, key=value")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side, a core each")
    parser.add_argument("--output", type=Path, help="CSV; default: benchmarks/quality/results/<data>.csv")
    return parser.parse_args()


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that what is there early covers every method."""
    return [
        Job(arguments.data, method, target, seed, distillation, tuple(arguments.options))
        for seed in arguments.seeds
        for distillation in arguments.distillation
        for target in arguments.targets
        for method in arguments.methods
    ]


def _key(job: Job) -> Iterator[str]:
    for name in KEY:
        value = getattr(job, name)
        yield " ".join(value) if name == "options" else str(value)


if __name__ == "__main__":
    main()
