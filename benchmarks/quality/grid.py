"""The methods that are compared, and a run of one: make a small network of the dense one, train it, judge it."""

import copy
import io
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ofb
from benchmarks.quality import rivals
from benchmarks.quality.settings import SETTINGS, Setting, dense_folder, images
from ofb.engine.config import SearchConfig, TrainConfig
from ofb.engine.data import Loaders
from ofb.engine.device import pick_device
from ofb.engine.journal import Journal
from ofb.engine.optimization import Optimization, make_optimizer
from ofb.engine.options import key_and_value
from ofb.engine.search import make_supernet
from ofb.engine.seeding import seed_everything
from ofb.engine.stage import Stage
from ofb.engine.train import run_epoch, teaching
from ofb.export import count_params
from ofb.supernet import Supernet
from ofb.supernet.families import count_macs

# What OFB is compared with from within: itself, a part left out or put in.
OFB = {
    "ofb": {},
    "ofb, importance only": {"lam_start": 1.0, "lam_end": 1.0},
    "ofb, sparsity only": {"lam_start": 0.0, "lam_end": 0.0},
    "ofb, fixed lambda": {"lam_start": 0.5, "lam_end": 0.5},
    "ofb, no one-hot": {"one_hot_weight": 0.0},
    "ofb, PMIM": {"mask_ratio_start": 0.05, "mask_ratio_end": 0.25},
    "ofb, residual_mask input": {"residual_mask": "input"},
    "ofb, tokens": {"tokens": True},
    "ofb, random scores": {"score_init": "random"},
    "ofb, magnitude scores": {"score_init": "magnitude"},
    "ofb, paper's weights": {
        "one_hot_weight": 0.5, "one_hot_delay": 0.0, "macs_weight": 5.0, "pace": 0.0,
        "score_init": "random", "score_mean": 0.0, "architecture_init": "random",
    },
}  # fmt: skip
RANDOM_TRIALS = 4
ONE_SEARCH = "ofb, one search"  # for all targets together, in half the epochs of separate searches


@dataclass(frozen=True)
class Job:
    """One run: what makes its row, or its rows where `target` names several, such as "50%,30%,15%"."""

    data: str
    method: str
    target: str
    seed: int
    distillation: str = ""
    options: tuple[str, ...] = ()  # of SearchConfig, key=value, beside the method's own
    data_dir: str = "data"

    def keys(self) -> list[tuple[str, ...]]:
        """What tells each of its rows from all others, in the order of `KEY`."""
        options = " ".join(self.options)
        return [
            (self.data, self.method, target, str(self.seed), self.distillation, options)
            for target in self.target.split(",")
        ]


KEY = ("data", "method", "target", "seed", "distillation", "options")


@dataclass(frozen=True)
class Task:
    """What a method has to work with."""

    job: Job
    setting: Setting
    dense: nn.Module
    loaders: Loaders

    @property
    def macs(self) -> int:
        """The target in MACs."""
        return int(count_macs(self.dense) * float(self.job.target.rstrip("%")) / 100)


@dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes:
        model: trained.
        search_epochs, finetune_epochs: that it took.
        left_open: sizes that OFB's search had not settled by its end.
    """

    model: nn.Module
    search_epochs: float
    finetune_epochs: int
    left_open: int | str = ""


def run(job: Job) -> list[dict]:
    """Make, train and judge small networks; a row for each target. A CPU run takes one core."""
    torch.set_num_threads(1)
    task = Task(job, SETTINGS[job.data], ofb.load(dense_folder(job.data)), images(job.data, job.data_dir))
    seed_everything(job.seed, "quality", 0)
    # On a CPU a run has one core to itself or shares it: what it computed for is what it costs.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start, log = clock(), io.StringIO()
    with redirect_stdout(log):
        found = one_search(task) if job.method == ONE_SEARCH else [METHODS[job.method](task)]
    seconds = (clock() - start) / len(found)
    return [
        dict(zip(KEY, key, strict=True)) | judged(each, task) | {"seconds": f"{seconds:.0f}", "commit": commit()}
        for key, each in zip(job.keys(), found, strict=True)
    ]


def judged(found: Found, task: Task) -> dict:
    """A network's figures."""
    config = train_config(task, 1)
    val, test = (ofb.evaluate(found.model, part, config) for part in (task.loaders.val, task.loaders.test))
    return {
        "search_epochs": f"{found.search_epochs:g}",
        "finetune_epochs": found.finetune_epochs,
        "val_top1": f"{val['top1']:.2f}",
        "test_top1": f"{test['top1']:.2f}",
        "macs": count_macs(found.model),
        "params": count_params(found.model),
        "left_open": found.left_open,
        "torch": torch.__version__,
    }


# ---- OFB ----


def search(task: Task) -> Found:
    """OFB, whole or without a part."""
    config = search_config(task, **OFB[task.job.method])
    supernet = make_supernet(copy.deepcopy(task.dense), config, len(task.loaders.train))
    model = ofb.search(supernet, task.loaders.train, task.loaders.val, config, teacher=task.dense)
    return Found(model, config.epochs, config.finetune_epochs, left_open(supernet))


def one_search(task: Task) -> list[Found]:
    """All targets in one search, of half the epochs that separate searches take together."""
    count = len(task.job.target.split(","))
    config = search_config(task, targets=task.job.target, epochs=round(count * task.setting.search_epochs / 2))
    supernet = make_supernet(copy.deepcopy(task.dense), config, len(task.loaders.train))
    networks = ofb.search_targets(supernet, task.loaders.train, task.loaders.val, config, teacher=task.dense)
    return [Found(model, config.epochs / count, config.finetune_epochs) for model in networks.values()]


def two_stage(task: Task) -> Found:
    """The paper's foil: half of the search learns importance at full size, the other half sizes by that importance."""
    half = task.setting.search_epochs // 2
    first = _importance_stage(task, half)
    masks = {name: bimask.mask(1.0) for name, bimask in first.bimasks.items()}
    first.family.fold(first.model, masks, {"embed": masks["embed"].flatten()})
    sizes_only = {"lam_start": 0.0, "lam_end": 0.0, "score_init": "random"}
    config = search_config(task, epochs=task.setting.search_epochs - half, **sizes_only)
    second = make_supernet(first.model, config, len(task.loaders.train))
    for name, bimask in second.bimasks.items():
        bimask.score.data.copy_(first.bimasks[name].score.data)
    model = ofb.search(second, task.loaders.train, task.loaders.val, config, teacher=task.dense)
    return Found(model, 2 * half, config.finetune_epochs, left_open(second))


def _importance_stage(task: Task, epochs: int) -> Supernet:
    """A supernet whose units have learned their importance, all sizes being full."""
    without_sizes = {"one_hot_weight": 0.0, "macs_weight": 0.0, "prune_threshold": 0.0}
    config = search_config(task, lam_start=1.0, lam_end=1.0, **without_sizes)
    device, steps = pick_device(config), len(task.loaders.train)
    supernet = make_supernet(copy.deepcopy(task.dense), config, steps).to(device).train()
    teach = teaching(task.dense, config, device)

    def loss_of(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": supernet.loss(x, y, teach(x)).total}

    groups = supernet.parameter_groups(config.weight_decay, config.architecture_lr, config.score_lr)
    optimizer, shortened = make_optimizer(groups, config, 1.0), replace(config, epochs=epochs)
    optimization = Optimization(optimizer, loss_of, shortened, 0.2 * epochs, steps, device)
    stage, journal = Stage(shortened, "importance", steps, optimization, {}), Journal(shortened, "importance")
    stage.run(lambda epoch: run_epoch(task.loaders.train, stage, supernet.step, journal))
    return supernet


def left_open(supernet: Supernet) -> int:
    return sum(choice["how"] == "chosen" for choice in supernet.choices)


# ---- rivals ----


def shrunk(shrink: Callable[[nn.Module, int], nn.Module]) -> Callable[[Task], Found]:
    """The method that shrinks the dense network at once and spends all epochs on training what is left."""

    def method(task: Task) -> Found:
        epochs = task.setting.search_epochs + task.setting.finetune_epochs
        return finetuned(shrink(task.dense, task.macs), task, epochs)

    return method


def taylor(task: Task) -> Found:
    batches = [batch for _, batch in zip(range(8), task.loaders.train, strict=False)]
    x, y = (torch.cat(parts).to(next(task.dense.parameters()).device) for parts in zip(*batches, strict=True))
    everywhere = "global" in task.job.method

    def shrink(dense: nn.Module, macs: int) -> nn.Module:
        return rivals.torch_pruning(dense, macs, lambda m: F.cross_entropy(m(x), y), everywhere=everywhere)

    return shrunk(shrink)(task)


def best_of_random(task: Task) -> Found:
    """Random sub-networks share the epochs of the search; the best on validation images gets the fine-tuning."""
    epochs = max(1, task.setting.search_epochs // RANDOM_TRIALS)
    best, most = None, -1.0
    for trial in range(RANDOM_TRIALS):
        model = rivals.random_sizes(task.dense, task.macs, seed=100 * task.job.seed + trial)
        model = finetuned(model, task, epochs).model
        top1 = ofb.evaluate(model, task.loaders.val, train_config(task, epochs))["top1"]
        best, most = (model, top1) if top1 > most else (best, most)
    return replace(finetuned(best, task, task.setting.finetune_epochs), search_epochs=epochs * RANDOM_TRIALS)


def finetuned(model: nn.Module, task: Task, epochs: int) -> Found:
    config = train_config(task, epochs)
    model = ofb.train(model, task.loaders.train, task.loaders.val, config, teacher=task.dense)
    return Found(model, 0, epochs)


METHODS = dict.fromkeys(OFB, search) | {
    "two-stage": two_stage,
    "uniform": shrunk(rivals.uniform),
    "from scratch": shrunk(rivals.from_scratch),
    "best of random": best_of_random,
    "magnitude": shrunk(rivals.torch_pruning),
    "taylor": taylor,
    "taylor, global": taylor,
}
COMPARED = ["ofb", *(method for method in METHODS if method not in OFB)]  # OFB as it is and its rivals


# ---- the recipe ----


def search_config(task: Task, **options) -> SearchConfig:
    """The search of a job: what all methods share, the method's own options, and last the command line's."""
    job, setting = task.job, task.setting
    given = dict(key_and_value("options", pair) for pair in job.options)
    recipe = {
        "data": setting.data,
        "data_dir": None if setting.data == "digits" else job.data_dir,
        "batch_size": setting.batch_size,
        "seed": job.seed,
        "target": job.target.split(",")[-1],
        "round_to": 1,  # as the rows in results/ were measured: with 8 a narrow network has fewer widths to choose from
        "epochs": setting.search_epochs,
        "finetune_epochs": setting.finetune_epochs,
        "lr": setting.lr,
        "finetune_lr": setting.lr,
        "distillation": job.distillation or None,
        "layer_decay": None,
        "model_ema": False,
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_path": 0.0,
    }
    return SearchConfig(**recipe | options | given)


def train_config(task: Task, epochs: int) -> TrainConfig:
    """The fine-tuning of the search, for another number of epochs."""
    return replace(search_config(task).finetune(), epochs=epochs)


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
