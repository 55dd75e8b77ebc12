"""What the processes of tests/test_distributed.py run."""

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ofb
from ofb.cli import main
from ofb.engine import checkpoint
from ofb.engine.config import SearchConfig
from ofb.engine.distributed import (
    average_gradients,
    check_alike,
    mean_over_processes,
    on_main,
    process_group,
    rank,
    was_restarted,
)
from ofb.engine.search import make_supernet
from ofb.engine.shards import shard
from tests.common import tiny_vit

# A search that decides within four epochs, and nothing in it that each process draws for itself.
OPTIONS = {
    "epochs": 4,
    "finetune_epochs": 2,
    "batch_size": 16,
    "lr": 1e-3,
    "finetune_lr": 1e-3,
    "architecture_lr": 0.3,
    "one_hot_weight": 0.5,
    "one_hot_delay": 0.0,
    "architecture_init": "random",
    "pace": 0.0,
    "grad_accum_steps": 2,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "device": "cpu",
}
IMAGES, STEPS = 64, 4


class Numbered(Dataset):
    """Images and targets that are their own indices."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(index), index

    def __len__(self) -> int:
        return 21


def loaders() -> tuple[DataLoader, DataLoader]:
    """Sixty-four images; for evaluation in batches that two or four processes cannot share out evenly."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(IMAGES, 3, 16, 16, generator=generator), torch.arange(IMAGES) % 5)
    return DataLoader(data, 16, shuffle=True, drop_last=True), DataLoader(data, 21)


def found_by_search(folder: str) -> dict:
    """A whole search and fine-tuning in a run folder, and what is to be the same for any number of processes."""
    torch.manual_seed(rank())  # all start as the first process does
    config = SearchConfig(**OPTIONS, output=folder)
    supernet = make_supernet(tiny_vit(), config, STEPS)
    model = ofb.search(supernet, *loaders(), config)
    sizes = {choice["submodule"]: choice["size"] for choice in supernet.choices}
    metrics = ofb.evaluate(model, loaders()[1], config)
    return {"sizes": sizes, "weights": model.state_dict(), "metrics": metrics}


def what_a_process_finds(number: int, processes: int, folder: str) -> None:
    """Everything that a process of a job has to say, saved to folder/NUMBER.pt."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=processes)
    with written_files() as files:
        found = found_by_search(f"{folder}/run") | {"files": files}
    found |= {"shares": shares(), "uneven": error_of(list, shard([torch.zeros(2, 6)], multiple=processes))}
    found["tampered"] = error_of(tampered_search)
    found["means"] = means()
    found["other shape"] = error_of(check_other_shape)
    found["on main"] = on_main(rank), error_of(on_main, int, "no number")
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


def means() -> dict[str, torch.Tensor]:
    """The mean of the processes' numbers, by itself and as the gradient of a layer."""
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[1.0, 10.0]]) * rank()  # that of the bias stays None
    average_gradients(layer)
    return {"values": mean_over_processes(torch.tensor([1.0, 10.0]) * rank()), "gradient": layer.weight.grad}


def check_other_shape() -> None:
    """The same numbers everywhere, but in the last process a matrix of other rows and columns."""
    last = rank() == dist.get_world_size() - 1
    check_alike({"same": [torch.arange(6.0)], "turned": [torch.zeros((3, 2) if last else (2, 3))]}, "here")


def shares() -> dict[str, list]:
    """This process's share of a shuffled loader, of an iterable, and of a loader that was shared out before."""
    torch.manual_seed(rank())
    shuffled = DataLoader(Numbered(), 4, shuffle=True, num_workers=1)
    batches = [(torch.arange(6), torch.arange(6)), (torch.arange(6, 7), torch.arange(6, 7))]
    return {
        name: [targets.tolist() for _, targets in shard(loader)]
        for name, loader in {"loader": shuffled, "iterable": batches, "twice": shard(batches)}.items()
    }


@contextmanager
def written_files():
    """The names of all files that are put in place within the block."""
    files, replace = [], os.replace

    def noted(source, target):
        files.append(Path(target).name)
        replace(source, target)

    checkpoint.os.replace = noted
    yield files
    checkpoint.os.replace = replace


def tampered_search() -> None:
    """A search in which the last process, after its second step, changes one logit by a hair."""
    config = SearchConfig(**OPTIONS)
    supernet = make_supernet(tiny_vit(), config, STEPS)
    step = supernet.step

    def tampering(optimizer):
        if supernet.steps == 1 and rank() == dist.get_world_size() - 1:
            supernet.bimasks["mlp1"].alpha.data[0, 0] += 1e-6
        return step(optimizer)

    supernet.step = tampering
    ofb.search(supernet, *loaders(), config)


def error_of(function, *args) -> str:
    try:
        function(*args)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "none"


RUN = (
    "search --model vit_tiny_patch16_224 --model-kwargs embed_dim=32 depth=1 num_heads=2 --device cpu --batch-size 128 "
    "--epochs 3 --finetune-epochs 1 --lr 1e-3 --architecture-lr 0.3"
)


def killed_and_started_anew(folder: str) -> None:
    """Two runs by torchrun, the second one killed in its second epoch and started anew as torchrun does."""

    def kill_in_second_epoch(loader, stage, *rest):
        if stage.epoch > 0 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_epoch(loader, stage, *rest)

    with process_group():
        if not was_restarted():
            assert main([*RUN.split(), "--output", f"{folder}/straight"]) == 0
            run_epoch, ofb.engine.search.run_epoch = ofb.engine.search.run_epoch, kill_in_second_epoch
        assert main([*RUN.split(), "--output", f"{folder}/killed"]) == 0


if __name__ == "__main__":
    killed_and_started_anew(sys.argv[1])
