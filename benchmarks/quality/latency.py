"""How long the found networks take: one of each method, target and kind of distillation, timed in turns in one sitting.

    python -m benchmarks.quality.latency [--data fashion_mnist-reduced] [--data-dir data]

The grid's rows are of many days with other load of the machine each, so their latencies would not compare. Sizes alone
decide here: searches run as in the grid, but nothing is fine-tuned, and networks whose sizes nothing learns are hardly
trained. Networks are kept under runs/quality and not made again: make them first, then measure on a quiet machine.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import ofb
from benchmarks.quality.grid import COMPARED, METHODS, Job, Task, search, two_stage
from benchmarks.quality.results import NETWORK_KEY, csv_path, latency_path, read_rows, write_rows
from benchmarks.quality.settings import SETTINGS, dense_folder, images
from ofb.engine.seeding import seed_everything
from ofb.network_latency import measure_network_latency

NETWORKS = Path("runs/quality/networks")
LEARNED = (search, two_stage)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.quality.latency", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=list(SETTINGS), default="fashion_mnist-reduced")
    parser.add_argument("--data-dir", default="data", help="folder of the data set")
    arguments = parser.parse_args()
    if not csv_path(arguments.data).exists():
        parser.error(f"data: expected results of {arguments.data}, got none; run python -m benchmarks.quality first")
    torch.set_num_threads(1)
    found = dict(networks(arguments.data, arguments.data_dir))
    latencies = measure_network_latency({str(key): network for key, network in found.items()})
    rows = [
        {
            "data": arguments.data,
            **dict(zip(NETWORK_KEY, key, strict=True)),
            "latency_ms": f"{latencies[str(key)].ms:.3f}",
        }
        for key in found
    ]
    write_rows(rows, latency_path(arguments.data))
    print(f"{len(rows)} latencies in {latency_path(arguments.data)}")


def networks(data: str, data_dir: str) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """The dense network and what the pictures show: (method, distillation, target) of each network, and the network."""
    yield ("dense", "", "100%"), ofb.load(dense_folder(data))
    for row in read_rows(csv_path(data)):
        if row["seed"] == "0" and row["method"] in COMPARED and not row["options"]:
            key = tuple(row[name] for name in NETWORK_KEY)
            yield key, kept(Job(data, row["method"], row["target"], 0, row["distillation"], data_dir=data_dir))


def kept(job: Job) -> nn.Module:
    """The network of a job, made if it is not kept yet."""
    folder = NETWORKS / "-".join((job.data, job.method, job.distillation, job.target))
    if not (folder / "config.json").exists():
        print("making", *job.keys()[0], flush=True)
        ofb.save(make(job), folder)
    return ofb.load(folder)


def make(job: Job) -> nn.Module:
    """A network of the sizes that a job finds."""
    method, setting = METHODS[job.method], SETTINGS[job.data]
    setting = replace(setting, search_epochs=setting.search_epochs if method in LEARNED else 1, finetune_epochs=1)
    seed_everything(job.seed, "quality", 0)
    return method(Task(job, setting, ofb.load(dense_folder(job.data)), images(job.data, job.data_dir))).model


if __name__ == "__main__":
    main()
