"""The methods that are compared, and a run of one: make a small network of the dense one, train it, judge it."""

import copy
import io
import json
import subprocess
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import ofb
from benchmarks.quality import rivals
from benchmarks.quality.images import small_images
from ofb.engine.config import SearchConfig, TrainConfig
from ofb.engine.data import Loaders, create_loaders
from ofb.engine.journal import Journal
from ofb.engine.search import make_supernet
from ofb.engine.train import Optimization, make_optimizer, run_epoch, seed_everything, teaching
from ofb.export import count_params
from ofb.report import cpu_latency
from ofb.supernet.families import count_macs

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """A data set, the dense network for it, and how long things take."""

    data: str
    model: dict
    dense_epochs: int
    search_epochs: int
    finetune_epochs: int
    train_images: int = 0
    val_images: int = 0
    batch_size: int = 128
    dense_lr: float = 1e-3
    lr: float = 1e-3


SETTINGS = {
    "digits": Setting(
        "digits",
        dict(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=4),
        dense_epochs=100,
        search_epochs=40,
        finetune_epochs=40,
        batch_size=64,
        dense_lr=2e-3,
    ),
    "torch/fashion_mnist": Setting(
        "torch/fashion_mnist",
        dict(img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=4),
        dense_epochs=150,
        dense_lr=2e-3,
        search_epochs=8,
        finetune_epochs=12,
        train_images=20_000,
        val_images=5_000,
    ),
    "torch/fashion_mnist-64": Setting(  # narrower: what is taken away is missed
        "torch/fashion_mnist",
        dict(img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4),
        dense_epochs=150,
        dense_lr=2e-3,
        search_epochs=8,
        finetune_epochs=12,
        train_images=20_000,
        val_images=5_000,
    ),
}

# What OFB is compared with from within: itself, a part left out or put in.
OFB = {
    "ofb": {},
    "ofb, importance only": {"lam_start": 1.0, "lam_end": 1.0},
    "ofb, sparsity only": {"lam_start": 0.0, "lam_end": 0.0},
    "ofb, fixed lambda": {"lam_start": 0.5, "lam_end": 0.5},
    "ofb, no one-hot": {"one_hot_weight": 0.0},
    "ofb, PMIM": {"mask_ratio_start": 0.05, "mask_ratio_end": 0.25},
    "ofb, residual_mask input": {"residual_mask": "input"},
    "ofb, random scores": {"score_init": "random"},
    "ofb, magnitude scores": {"score_init": "magnitude"},
    "ofb, paper's weights": {"one_hot_weight": 0.5, "macs_weight": 5.0, "score_init": "random", "score_mean": 0.0},
}
RANDOM_TRIALS = 4


@dataclass(frozen=True)
class Job:
    """One run: what makes its row."""

    data: str
    method: str
    target: str
    seed: int
    distillation: str = ""
    options: tuple[str, ...] = field(default=())  # of SearchConfig, key=value, beside the method's own


def run(job: Job) -> dict:
    """Make, train and judge one small network."""
    torch.set_num_threads(1)
    setting, dense = SETTINGS[job.data], ofb.load(dense_folder(job.data))
    loaders = images(setting)
    seed_everything(job.seed, "quality", 0)
    target = int(count_macs(dense) * float(job.target.rstrip("%")) / 100)
    start, log = time.perf_counter(), io.StringIO()
    with redirect_stdout(log):
        model, left_open = METHODS[job.method](job, setting, copy.deepcopy(dense), loaders, target)
    seconds = time.perf_counter() - start
    val, test = (ofb.evaluate(model, part, TrainConfig(device="cpu")) for part in (loaders.val, loaders.test))
    return asdict(job) | {
        "options": " ".join(job.options),
        "search_epochs": setting.search_epochs,
        "finetune_epochs": setting.finetune_epochs,
        "val_top1": f"{val['top1']:.2f}",
        "test_top1": f"{test['top1']:.2f}",
        "macs": count_macs(model),
        "params": count_params(model),
        "latency_ms": f"{cpu_latency({'model': model})['model']:.3f}",
        "left_open": left_open,
        "seconds": f"{seconds:.0f}",
        "torch": torch.__version__,
        "commit": commit(),
    }


def search(job: Job, setting: Setting, dense: nn.Module, loaders: Loaders, target: int) -> tuple[nn.Module, int]:
    """OFB, whole or without a part."""
    config = search_config(job, setting, **OFB[job.method])
    supernet = make_supernet(copy.deepcopy(dense), config, len(loaders.train))
    model = ofb.search(supernet, loaders.train, loaders.val, config, teacher=dense)
    return model, sum(choice["how"] == "chosen" for choice in supernet.choices)


def two_stage(job: Job, setting: Setting, dense: nn.Module, loaders: Loaders, target: int) -> tuple[nn.Module, int]:
    """The paper's foil: half of the search learns importance at full size, the other half sizes by that importance."""
    half = setting.search_epochs // 2
    without_sizes = {"one_hot_weight": 0.0, "macs_weight": 0.0, "prune_threshold": 0.0}
    config = search_config(job, setting, lam_start=1.0, lam_end=1.0, **without_sizes)
    supernet = make_supernet(copy.deepcopy(dense), config, len(loaders.train)).train()
    teach = teaching(dense, config, CPU)

    def loss_of(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": supernet.loss(x, y, teach(x)).total}

    groups = supernet.parameter_groups(config.weight_decay, config.architecture_lr, config.score_lr)
    optimizer, halved = make_optimizer(groups, config, 1.0), replace(config, epochs=half)
    optimization = Optimization(optimizer, loss_of, halved, 0.2 * half, len(loaders.train), CPU)
    for epoch in range(half):
        seed_everything(job.seed, "importance", epoch)
        run_epoch(loaders.train, optimization, supernet.step, Journal(None, "importance"), str(epoch))
    masks = {name: bimask.mask(1.0) for name, bimask in supernet.bimasks.items()}
    supernet.family.fold(supernet.model, masks, masks["embed"].flatten())
    sizes_only = {"lam_start": 0.0, "lam_end": 0.0, "score_init": "random"}
    config = search_config(job, setting, epochs=setting.search_epochs - half, **sizes_only)
    second = make_supernet(supernet.model, config, len(loaders.train))
    for name, bimask in second.bimasks.items():
        bimask.score.data.copy_(supernet.bimasks[name].score.data)
    model = ofb.search(second, loaders.train, loaders.val, config, teacher=dense)
    return model, sum(choice["how"] == "chosen" for choice in second.choices)


def best_of_random(
    job: Job, setting: Setting, dense: nn.Module, loaders: Loaders, target: int
) -> tuple[nn.Module, int]:
    """Random sub-networks share the epochs of the search; the best on validation images gets the fine-tuning."""
    config = train_config(job, setting, epochs=max(1, setting.search_epochs // RANDOM_TRIALS))
    best, most = None, -1.0
    for trial in range(RANDOM_TRIALS):
        model = rivals.random_sizes(dense, target, seed=100 * job.seed + trial)
        ofb.train(model, loaders.train, loaders.val, config, teacher=dense)
        top1 = ofb.evaluate(model, loaders.val, config)["top1"]
        best, most = (model, top1) if top1 > most else (best, most)
    return finetuned(best, job, setting, dense, loaders, epochs=setting.finetune_epochs)


def finetuned(
    model: nn.Module, job: Job, setting: Setting, dense: nn.Module, loaders: Loaders, epochs: int | None = None
) -> tuple[nn.Module, str]:
    config = train_config(job, setting, epochs=epochs or setting.search_epochs + setting.finetune_epochs)
    return ofb.train(model, loaders.train, loaders.val, config, teacher=dense), ""


def uniform(job: Job, setting: Setting, dense: nn.Module, loaders: Loaders, target: int) -> tuple[nn.Module, str]:
    return finetuned(rivals.uniform(dense, target), job, setting, dense, loaders)


def from_scratch(job: Job, setting: Setting, dense: nn.Module, loaders: Loaders, target: int) -> tuple[nn.Module, str]:
    return finetuned(rivals.from_scratch(dense, target), job, setting, dense, loaders)


def magnitude(job: Job, setting: Setting, dense: nn.Module, loaders: Loaders, target: int) -> tuple[nn.Module, str]:
    return finetuned(rivals.torch_pruning(dense, target), job, setting, dense, loaders)


def taylor(job: Job, setting: Setting, dense: nn.Module, loaders: Loaders, target: int) -> tuple[nn.Module, str]:
    batches = list(zip(range(8), loaders.train, strict=False))
    images = torch.cat([x for _, (x, _) in batches])
    targets = torch.cat([y for _, (_, y) in batches])
    small = rivals.torch_pruning(
        dense, target, lambda model: F.cross_entropy(model(images), targets), everywhere="global" in job.method
    )
    return finetuned(small, job, setting, dense, loaders)


METHODS = dict.fromkeys(OFB, search) | {
    "two-stage": two_stage,
    "uniform": uniform,
    "from scratch": from_scratch,
    "best of random": best_of_random,
    "magnitude": magnitude,
    "taylor": taylor,
    "taylor, global": taylor,
}


def search_config(job: Job, setting: Setting, **options) -> SearchConfig:
    given = {name: yaml.safe_load(value) for name, value in (option.split("=", 1) for option in job.options)}
    return SearchConfig(
        **dict(
            epochs=setting.search_epochs,
            finetune_epochs=setting.finetune_epochs,
            target=job.target,
            lr=setting.lr,
            finetune_lr=setting.lr,
            layer_decay=None,
            model_ema=False,
        )
        | shared_options(job, setting)
        | options
        | given
    )


def train_config(job: Job, setting: Setting, epochs: int) -> TrainConfig:
    """The fine-tuning of the search, for another number of epochs."""
    return replace(search_config(job, setting).finetune(), epochs=epochs)


def shared_options(job: Job, setting: Setting) -> dict:
    return {
        "data": setting.data,
        "data_dir": "data",
        "batch_size": setting.batch_size,
        "seed": job.seed,
        "device": "cpu",
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_path": 0.0,
        "distillation": job.distillation or None,
    }


def images(setting: Setting, data_dir: str = "data") -> Loaders:
    if setting.data == "digits":
        config = TrainConfig(data="digits", batch_size=setting.batch_size, workers=0)
        return create_loaders(config, timm.create_model("vit_tiny_patch16_224", **setting.model), CPU)
    return small_images(setting.data, data_dir, setting.batch_size, setting.train_images, setting.val_images)


def dense_folder(data: str) -> Path:
    return Path("runs/quality") / data.replace("/", "-") / "dense"


def train_dense(data: str) -> dict:
    """Train the dense network of a setting, unless it is there; what is known of it, its validation curve included."""
    folder, setting = dense_folder(data), SETTINGS[data]
    loaders, job = images(setting), Job(data, "dense", "100%", 0)
    config = replace(
        train_config(job, setting, setting.dense_epochs),
        lr=setting.dense_lr,
        drop_path=0.1,
        clip_grad=1.0,
        output=str(folder),
    )
    if not (folder / "model.safetensors").exists():
        seed_everything(0, "dense", 0)
        model = timm.create_model("vit_tiny_patch16_224", **setting.model)
        shape = tuple(next(iter(loaders.val))[0].shape[1:])
        model.pretrained_cfg = model.default_cfg = {"input_size": shape, "num_classes": 10}
        ofb.save(ofb.train(model, loaders.train, loaders.val, config), folder)
    model = ofb.load(folder)
    curve = [json.loads(line)["val_top1"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    test = ofb.evaluate(model, loaders.test, config)["top1"]
    return {"macs": count_macs(model), "params": count_params(model), "test_top1": test, "val_top1": curve}


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
