"""Every option of this package, its default and its help text: the command line and the config files are made of these.

Defaults are those that won in benchmarks/QUALITY.md, where only sizes were not rounded; the recipe of the paper (OFB,
CVPR 2024, section 4.1) is a preset. Names are timm's where timm has the option.
"""

import difflib
import os
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from ofb.checks import at_least, between, check_numbers, positive, within
from ofb.engine.options import key_and_value, split_targets

if TYPE_CHECKING:  # torch and timm are imported where they are needed: help comes without them
    from ofb.supernet.losses import Criterion
    from ofb.supernet.search_space import SearchSpace

MOST_WORKERS = 8  # more seldom help one process, and each takes memory
DATA_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")  # of what timm does not read from a folder of images
PATHS = ("data_dir", "checkpoint", "teacher", "latency_table")  # options that may name a folder or a file


@dataclass(kw_only=True)
class RunConfig:
    """Where and how a command runs."""

    config: str | None = None
    """YAML file of options, such as the config.yaml of another run; those given beside it come first."""

    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one if not given."""

    amp: bool | None = None
    """Mixed precision (--amp, --no-amp); on for a GPU that computes in --amp-dtype if not given."""

    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Lower precision of --amp."""

    deterministic: bool = False
    """The same bits each time on a GPU as well, at some cost in speed; an op that cannot is an error."""

    seed: int = 0
    """Seed of everything random: weights, data order, augmentation, held-out images."""


@dataclass(kw_only=True)
class DataConfig:
    """Which images, and how they are read."""

    data: str | None = None
    """`digits` (1,797 scans of 8 × 8 pixels that scikit-learn ships), or a data set as timm names it: an empty string
    for an image folder, torch/cifar10, hfds/…, tfds/… If not given, the image folder --data-dir, or else the digits."""

    data_dir: str | None = None
    """Folder of the data set: of images with a folder for each split, or of classes alone, which is split (--val-share,
    --test-share)."""

    train_split: str = "train"
    """Split to train on; class indices are those of its classes."""

    val_split: str | None = None
    """Split that chooses the best epoch; if not given, `validation` where there is `test` as well, or else part of the
    training split (--val-share)."""

    test_split: str | None = None
    """Split that only reports; if not given, `test` where there is one, or else `validation`."""

    val_share: float = 0.02
    """Share of the training images that is held out to choose the best epoch, where there is no --val-split."""

    test_share: float = 0.1
    """Share of the images that only reports, of a folder of classes without splits; the same for each --seed."""

    batch_size: int = 1024
    """Images in a step, over all processes of a job together."""

    skip_broken: bool = False
    """Leave image files out that cannot be read, and count them, instead of stopping at the first."""

    workers: int | None = None
    """Processes that read and augment images, for each process of a job; one for each processor there is for it, 8 at
    most, if not given. `digits` needs none."""

    def __post_init__(self) -> None:
        check_numbers(self)
        at_least(self, 1, "batch_size")
        if self.workers is not None:
            at_least(self, 0, "workers")
        between(self, 0, 1, "val_share", "test_share")
        if self.data is None:
            self.data = "digits" if self.data_dir is None else ""
        if self.data == "digits" and self.data_dir:
            raise ValueError(
                f"data: expected `digits` without a folder, got data_dir {self.data_dir} as well; leave --data-dir "
                'out to use the digits, or say --data "" to use the folder'
            )
        if self.is_image_folder and self.data_dir is None:
            raise ValueError(
                f"data: expected `digits`, a timm data set with a prefix such as torch/cifar10, or any name with "
                f"--data-dir, got {self.data!r} alone; add --data-dir FOLDER"
            )

    @property
    def worker_count(self) -> int:
        """Processes that read images."""
        if self.workers is not None:
            return self.workers
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of the job on this machine, by torchrun
        return max(1, min(MOST_WORKERS, processors // beside))

    @property
    def is_image_folder(self) -> bool:
        """Whether the data set is a folder, or tar file, of images."""
        if self.data.lower() in ("torch/image_folder", "torch/folder"):
            return True
        return self.data != "digits" and self.data.partition("/")[0].lower() not in DATA_PREFIXES


@dataclass(kw_only=True)
class TrainingConfig(RunConfig, DataConfig):
    """What dense training and search have in common."""

    model: str = "deit_small_patch16_224"
    """Any timm model name."""

    model_kwargs: tuple[str, ...] = ()
    """Arguments for the model, each key=value, such as img_size=8 embed_dim=96."""

    pretrained: bool = False
    """Start from timm's pretrained weights."""

    checkpoint: str | None = None
    """Start from a network that was saved here (a run folder or its export folder) instead of --model."""

    output: str | None = None
    """Run folder; runs/COMMAND-MODEL-TIME if not given."""

    resume: bool = False
    """Continue the run in --output, with the options it was started with."""

    dry_run: bool = False
    """Say what would be done, and end: nothing is trained or written."""

    checkpoint_every: int = 1000
    """Steps between checkpoints within an epoch; there is one after each epoch as well."""

    keep_checkpoints: int = 2
    """Checkpoints of each stage to keep, the newest ones."""

    allow_other_code: bool = False
    """Resume although this package, torch or timm is not what wrote the checkpoint."""

    log_wandb: bool = False
    """Log to Weights & Biases as well, where it is installed; WANDB_MODE=offline keeps it on this machine."""

    wandb_project: str = "ofb"
    """Weights & Biases project of --log-wandb."""

    epochs: int = 100
    """Length of the training."""

    opt: str = "adamw"
    """Any timm optimizer."""

    lr: float | None = None
    """Learning rate; it grows with the batch size from the recipe's value at batch size 256 if not given."""

    min_lr: float = 1e-5
    """Where the cosine schedule ends."""

    warmup_lr: float = 1e-6
    """Where the warm-up starts."""

    warmup_epochs: float | None = None
    """Length of the warm-up; the recipe's, but no more than a fifth of the training, if not given."""

    weight_decay: float = 0.05
    """Decay of weight matrices; biases, norms and tokens have none."""

    clip_grad: float | None = None
    """Largest norm of the gradient."""

    grad_accum_steps: int = 1
    """Parts in which a batch, or each process's share of it, goes through the network, one after the other; memory is
    that of one part."""

    cuda_graph: bool | None = None
    """Each step as one CUDA graph, captured anew after a prune; on for a GPU and adamw if not given."""

    drop_path: float = 0.1
    """Stochastic depth rate of the last block; earlier blocks have less."""

    smoothing: float = 0.1
    """Label smoothing."""

    distillation: Literal["auto", "soft", "hard"] | None = "auto"
    """Learn from a teacher as well: from its probabilities (soft) or its classes (hard); auto is soft where there is a
    teacher."""

    teacher: str | None = None
    """Any timm model (with its pretrained weights), or a run folder; a search learns from the trained network it starts
    from if not given."""

    distillation_alpha: float = 0.5
    """Weight of the teacher; the labels have the rest."""

    distillation_tau: float = 1.0
    """Temperature of soft distillation."""

    mixup: float = 0.8
    """Mixup alpha; the search itself never mixes images, its fine-tuning does."""

    cutmix: float = 1.0
    """Cutmix alpha; the search itself never mixes images, its fine-tuning does."""

    aa: str | None = "rand-m9-mstd0.5-inc1"
    """AutoAugment or RandAugment policy, None for none; not for `digits`."""

    aug_repeats: int = 0
    """How often an epoch shows each image it draws, differently augmented, in one batch; it draws so many images fewer
    (repeated augmentation). 0 or 1 for the ordinary epoch; not for `digits`."""

    reprob: float = 0.25
    """Probability of random erasing; not for `digits`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "grad_accum_steps", "checkpoint_every", "keep_checkpoints")
        at_least(self, 0, "aug_repeats", "min_lr", "warmup_lr", "weight_decay", "mixup", "cutmix")
        between(self, 0, 1, "drop_path", "smoothing", "reprob")
        positive(self, "lr", "clip_grad")
        within(self, 0, self.epochs, "warmup_epochs")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size: expected an even number, which mixup and cutmix need, got {self.batch_size}")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"grad_accum_steps: expected a divisor of batch_size {self.batch_size}, got {self.grad_accum_steps}"
            )
        if self.log_wandb and find_spec("wandb") is None:
            raise ValueError("log_wandb: expected Weights & Biases, which is not installed; pip install wandb")
        if self.resume and self.output is None:
            raise ValueError("resume: expected the run folder as well; add --output FOLDER")
        self.criterion()
        self._check_optimizer()
        self.model_options()

    def _check_optimizer(self) -> None:
        from timm.optim import list_optimizers

        if self.opt.removeprefix("lookahead_") not in list_optimizers():
            close = ", ".join(difflib.get_close_matches(self.opt, list_optimizers())) or "adamw"
            raise ValueError(f"opt: expected a timm optimizer, got {self.opt!r}; did you mean {close}?")

    def criterion(self) -> "Criterion":
        """The classification loss."""
        from ofb.supernet.losses import Criterion

        return Criterion(self.smoothing, self.distillation, self.distillation_alpha, self.distillation_tau)

    def model_options(self) -> dict[str, Any]:
        """`model_kwargs` as keyword arguments; values are Python literals or else strings."""
        options = dict(key_and_value("model_kwargs", pair) for pair in self.model_kwargs)
        for name in options:  # a config may come from a stranger
            if name.startswith("pretrained") or name in ("checkpoint_path", "cache_dir"):
                raise ValueError(f"model_kwargs: expected sizes and parts of the model, got {name}; see --checkpoint")
        return options

    def scaled_lr(self, lr_at_256: float) -> float:
        """The learning rate in use: `lr`, or the recipe's scaled to the batch size."""
        return self.lr if self.lr is not None else lr_at_256 * self.batch_size / 256

    def shortened_warmup(self, epochs: float) -> float:
        """The warm-up in use: `warmup_epochs`, or the recipe's, no longer than a fifth of the training."""
        return self.warmup_epochs if self.warmup_epochs is not None else min(epochs, self.epochs / 5)


@dataclass(kw_only=True)
class TrainConfig(TrainingConfig):
    """Train or fine-tune a dense network."""

    epochs: int = 300

    layer_decay: float | None = None
    """Learning rate of each layer as a share of the next one's."""

    model_ema: bool = False
    """Keep, evaluate and deliver the moving average of the weights."""

    model_ema_decay: float = 0.9999
    """Decay of the moving average once it is warm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0, 1, "model_ema_decay")
        positive(self, "layer_decay")


@dataclass(kw_only=True)
class SearchConfig(TrainingConfig):
    """Search a network of a given cost inside a dense one, then fine-tune it."""

    preset: str | None = None
    """Start from a published recipe: deit-tiny-imagenet, deit-small-imagenet or deit-base-imagenet. It comes before the
    defaults and after the options given beside it."""

    weight_decay: float = 1e-3

    target: str = "50%"
    """Cost of the network to find: a share of the dense MACs (50% or 0.5) or MACs (1.1G); or one or several budgets to
    keep within, such as params=5M, latency_ms=2.5 or macs=50%,params=40%."""

    targets: str | None = None
    """Several costs instead of --target, the largest first, such as 50%,30%,15%: one search passes them one after the
    other, and each network is fine-tuned. Costs of several budgets are divided by semicolons."""

    latency_table: str | None = None
    """For a target of latency, the latency.json of an earlier run; measured at the start, on --device, if not given."""

    latency_batch_size: int = 1
    """Images at once when latency is measured, for the table of a target and at the end."""

    round_to: int = 8
    """Residual width and hidden sizes are multiples of this, channels of a head of this or 8, whichever is smaller. The
    full size may stay; a submodule that would be left with fewer than 4 sizes is not rounded; 1 rounds nothing."""

    freeze: tuple[str, ...] = ()
    """Submodules that keep their full size, by name or pattern: embed mlp0 "attn*"."""

    candidates: tuple[str, ...] = ()
    """Sizes to choose from instead of a submodule's own: "mlp0=64,96,128", for attention heads x channels:
    "attn*=2,4x32,64", or one of the two: "attn*=2,4x"."""

    bounds: tuple[str, ...] = ()
    """Smallest and largest candidate of submodules, as shares of the full size: "mlp*=0.5:1"."""

    tokens: bool = False
    """Search the number of patches as well: the network looks at some positions of the image only."""

    backend: Literal["reference", "eager", "triton"] | None = None
    """Backend of the ops; the fastest for the device if not given."""

    residual_mask: Literal["stream", "input"] = "stream"
    """Mask everything that enters the residual stream, or the embedding alone as the released code does."""

    lam_start: float = 0.99
    """Share of the importance in a mask at the beginning."""

    lam_end: float = 0.1
    """Share of the importance in a mask after the warm-up."""

    mask_ratio_start: float = 0.0
    """Share of the patches that are masked and rebuilt at the beginning."""

    mask_ratio_end: float = 0.0
    """Share of the patches that are masked and rebuilt after the warm-up; 0 for both leaves masked image modelling out
    (the paper: 0.05 and 0.25)."""

    score_init: Literal["taylor", "magnitude", "random"] = "taylor"
    """Which units start as the most important ones: those the loss depends on most by its Taylor expansion on some
    training images, those of largest weights, or any as in the paper."""

    architecture_init: Literal["full", "equal", "random"] = "full"
    """Start with larger sizes likelier, so that the masks start near 1; with all sizes equally likely; or with logits
    from U(0, 1) as the paper does."""

    score_mean: float = 4.0
    """Where the importance logits start; importance starts at their sigmoid."""

    architecture_lr: float | None = None
    """Learning rate of the architecture logits at its peak; 25 / steps of the search if not given."""

    score_lr: float | None = None
    """Learning rate of the importance logits at its peak; 0.5 / steps of the search if not given."""

    one_hot_weight: float = 0.05
    """Weight of the adaptive one-hot loss."""

    one_hot_delay: float = 0.5
    """Share of the search before the one-hot loss sets in: it sharpens whatever difference there is (the paper: 0)."""

    macs_weight: float = 100.0
    """Weight of the loss of the MACs, and of whatever other costs the target limits."""

    pace: float = 0.3
    """Share of the search over which the MACs loss lowers its target from the dense network's cost to the final one;
    no candidate dies before."""

    settling: float = 0.4
    """Share of the search at its end over which ever more candidates are dropped, so that no size is left open; 0
    leaves it to the one-hot loss, as the paper does."""

    prunes_per_epoch: int = 3
    """Pruning events in an epoch."""

    prune_threshold: float = 0.2
    """A candidate dies when its probability falls to this share of the average."""

    cosine_epochs: int | None = None
    """Length of the search's cosine schedule; search and fine-tuning together, as if they were one training, if not
    given (the paper: the search alone)."""

    finetune_epochs: int = 300
    """Length of the fine-tuning; 0 for none."""

    finetune_lr: float | None = None
    """Learning rate of the fine-tuning; 1.5e-4 · batch size / 256 if not given."""

    finetune_warmup_epochs: float = 0.0
    """Warm-up of the fine-tuning; none, because it goes on where the search stopped (the paper: 5)."""

    finetune_weight_decay: float = 0.05
    """Weight decay of the fine-tuning."""

    layer_decay: float | None = 0.95
    """In fine-tuning, learning rate of each layer as a share of the next one's."""

    model_ema: bool = True
    """In fine-tuning, keep, evaluate and deliver the moving average of the weights."""

    model_ema_decay: float = 0.9999
    """Decay of the moving average once it is warm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "finetune_epochs", "finetune_weight_decay", "one_hot_weight", "macs_weight")
        at_least(self, 1, "prunes_per_epoch", "latency_batch_size")
        between(self, 0, 1, "prune_threshold")
        positive(self, "architecture_lr", "score_lr", "cosine_epochs", "finetune_lr")
        self.search_space()
        if len(self.all_targets()) > self.epochs:
            raise ValueError(f"targets: expected at most one an epoch, got {self.targets} in {self.epochs} epochs")
        if self.finetune_epochs:
            within(self, 0, self.finetune_epochs, "finetune_warmup_epochs")
            self.finetune()

    def all_targets(self) -> list[str]:
        """The targets to pass, in their order."""
        if self.targets is None:
            return [self.target]
        return split_targets(self.targets)

    def search_space(self) -> "SearchSpace":
        """What is wanted of the candidate sizes."""
        from ofb.supernet.search_space import SearchSpace

        return SearchSpace.parse(self.round_to, self.freeze, self.candidates, self.bounds, self.tokens)

    def finetune(self) -> TrainConfig:
        """The fine-tuning as dense training."""
        shared = {field.name: getattr(self, field.name) for field in fields(TrainConfig)}
        return TrainConfig(
            **shared
            | {
                "epochs": self.finetune_epochs,
                "lr": self.finetune_lr,
                "warmup_epochs": self.finetune_warmup_epochs,
                "weight_decay": self.finetune_weight_decay,
            }
        )
