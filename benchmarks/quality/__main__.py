"""Which method finds the better small network? Accuracy at the same MACs, for the same epochs and recipe.

    python -m benchmarks.quality.fashion_mnist               # lays out the data, once
    python -m benchmarks.quality --reduced                   # two CPU cores, about an hour
    python -m benchmarks.quality --data cifar10 --data-dir DIR [--methods ofb uniform …] [--targets 50% 30% 15%]

A dense network is trained once. Every method makes a smaller one of it, with several seeds: the rivals shrink it and
fine-tune for as many epochs as OFB searches and fine-tunes in all. Validation images choose the epoch, test images only
report. Results go to a CSV, one row a network; runs that stand there already are not repeated. Latencies are measured
by `python -m benchmarks.quality.latency`, the page of results is written by `python -m benchmarks.quality.page`.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from multiprocessing import active_children, get_context
from pathlib import Path

import torch

from benchmarks.quality.grid import KEY, METHODS, OFB, ONE_SEARCH, Job, run
from benchmarks.quality.results import csv_path, read_rows, write_rows
from benchmarks.quality.settings import SETTINGS, dense_folder, images, train_dense
from ofb.engine.checkpoint import write_text
from ofb.engine.config import SearchConfig
from ofb.engine.options import from_dict, key_and_value

SHOWN = ("method", "target", "seed", "distillation", "options", "val_top1", "test_top1", "left_open", "seconds")
TARGETS = ["50%", "30%", "15%"]
MAIN = ["ofb", "uniform", "taylor, global"]
GPU_PROCESSES = 4
INTERRUPTED = 130


def main() -> None:
    try:
        compare(parse_arguments())
    except KeyboardInterrupt:
        print("\ninterrupted: finished runs are in the CSV, the same command does the others", file=sys.stderr)
        sys.exit(INTERRUPTED)


def compare(arguments: argparse.Namespace) -> None:
    """Do what is not in the CSV yet, and add it there run by run."""
    path = arguments.output or csv_path(arguments.data)
    figures = path.with_suffix(".dense.json")
    if not figures.exists() or not dense_folder(arguments.data).exists():
        write_text(figures, json.dumps(train_dense(arguments.data, arguments.data_dir)) + "\n")
    rows = read_rows(path)
    known = {tuple(row[name] for name in KEY) for row in rows}
    jobs = [job for job in jobs_of(arguments) if not known.issuperset(job.keys())]
    print(f"{len(jobs)} runs to do, {len(rows)} rows in {path}", flush=True)
    with closing(finished(jobs, arguments.processes)) as results:
        for found in results:
            rows += found
            write_rows(rows, path)
            for row in found:
                print("  ".join(f"{name} {row[name]}" for name in SHOWN if row[name] != ""), flush=True)


def finished(jobs: list[Job], processes: int) -> Iterator[list[dict]]:
    """The rows of each job as it ends. Where one fails, or the user interrupts, the others end with it."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(run, job) for job in jobs]):
                yield done.result()
        except BaseException:
            for process in active_children():
                process.kill()  # or it would go on with the jobs that wait
            raise


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=list(SETTINGS), default="fashion_mnist-reduced")
    parser.add_argument("--data-dir", default="data", help="folder of the data set")
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, ONE_SEARCH], default=[*METHODS, ONE_SEARCH], metavar="METHOD"
    )
    parser.add_argument("--targets", nargs="+", default=TARGETS, type=_share, help="of the dense network's MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--distillation", nargs="+", choices=["", "soft", "hard"], default=["", "soft"])
    parser.add_argument("--reduced", action="store_true", help="only what two CPU cores have time for")
    parser.add_argument("--options", nargs="+", default=[], help="options of the search for the OFB methods, key=value")
    parser.add_argument(
        "--processes",
        type=int,
        default=GPU_PROCESSES if torch.cuda.is_available() else os.cpu_count(),
        help="runs side by side; on a CPU each takes a core",
    )
    parser.add_argument("--output", type=Path, help="CSV; default: benchmarks/quality/results/<data>.csv")
    arguments = parser.parse_args()
    try:
        from_dict(SearchConfig, dict(key_and_value("options", pair) for pair in arguments.options))
        images(arguments.data, arguments.data_dir)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _share(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?%", text) or not 0 < float(text[:-1]) <= 100:
        raise argparse.ArgumentTypeError(f"expected a share of the dense network's MACs such as 30%, got {text!r}")
    return text


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that what is there early covers every method."""
    jobs = [
        Job(arguments.data, method, target, seed, distillation, tuple(arguments.options), arguments.data_dir)
        for seed in arguments.seeds
        for distillation in arguments.distillation
        for method in arguments.methods
        for target in ([",".join(arguments.targets)] if method == ONE_SEARCH else arguments.targets)
    ]
    return [job for job in jobs if not (arguments.reduced and _can_wait(job, arguments.targets))]


def _can_wait(job: Job, targets: list[str]) -> bool:
    """Whether the reduced grid leaves a run out.

    Without a teacher, the main methods run at every target, and the other rivals at the last one.
    """
    if job.distillation:
        return True
    return job.method not in MAIN and (job.method in (*OFB, ONE_SEARCH) or job.target != targets[-1])


if __name__ == "__main__":
    main()
