"""Dense training, fine-tuning and evaluation of a plain timm model."""

import math
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import DropPath, calculate_drop_path_rates
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch import Tensor, nn
from torch.optim import Optimizer

from ofb.engine.checkpoint import load_checkpoint, save_checkpoint
from ofb.engine.config import RunConfig, TrainConfig, TrainingConfig
from ofb.engine.distributed import (
    averaged,
    check_device,
    in_job,
    mean_over_processes,
    on_main,
    rank,
    start_alike,
    sum_over_processes,
    without_exchange,
)
from ofb.engine.graph import StepGraph
from ofb.engine.journal import Journal
from ofb.engine.options import to_dict
from ofb.engine.shards import Loader, shard
from ofb.supernet.families import family_of

TRAIN_LR_AT_256 = 1.5e-4
TRAIN_WARMUP_EPOCHS = 5
STEPS_BETWEEN_NOTES = 50  # reading losses makes the host wait for the device
FREE_ON_RESUME = {
    "device", "workers", "backend", "cuda_graph", "output", "resume", "config", "log_wandb", "wandb_project",
}  # fmt: skip

LossOf = Callable[[Tensor, Tensor], dict[str, Tensor]]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def train(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader,
    config: TrainConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    stage: str = "train",
) -> nn.Module:
    """Train a model in place and return it with the weights of its best epoch on the validation images.

    With `config.output` each epoch is checkpointed there, and `config.resume` continues from the last one: a resumed
    run equals an uninterrupted one.

    Args:
        model: a timm model with `num_classes`.
        train_loader: batches of images (B, C, H, W) and class indices (B,), with a length.
        val_loader: the same, to choose the best epoch.
        config: the recipe; its data and model options are not read here.
        teacher: to distil from, as `config.distillation` says.
        stage: names checkpoint and metrics.

    Raises:
        ValueError: the run to resume was started with other options, or its checkpoint is damaged.
        FloatingPointError: the loss is no longer finite.
    """
    config = config or TrainConfig()
    device = pick_device(config)
    start_alike(model.to(device))
    set_drop_path(model, config.drop_path)
    criterion, teach = config.criterion(), teaching(teacher, config, device)
    ema = ModelEmaV3(model, config.model_ema_decay, use_warmup=True) if config.model_ema else None
    optimization = Optimization(
        make_optimizer(
            model, config, TRAIN_LR_AT_256, weight_decay=config.weight_decay, layer_decay=config.layer_decay
        ),
        lambda images, targets: {"loss": criterion(model(images), targets, teach(images))},
        config,
        config.shortened_warmup(TRAIN_WARMUP_EPOCHS),
        len(train_loader),
        device,
    )
    mix = make_mix(model, config)
    train_loader = shard(train_loader, math.lcm(config.grad_accum_steps, 1 if mix is None else 2))
    kept, best, start = model if ema is None else ema.module, Best(), 0
    state = resumed_state(config, stage)
    if state is not None:
        start, best = state["epoch"], Best(**state["best"])
        model.load_state_dict(state["model"])
        kept.load_state_dict(state["kept"])
        optimization.load_state_dict(state["optimization"])

    def stepped() -> None:
        if ema is not None:
            ema.update(model, optimization.steps)

    with Journal(config, stage, start) as journal:
        for epoch in range(start, config.epochs):
            seed_everything(config.seed, stage, epoch, rank())
            model.train()
            losses = run_epoch(train_loader, optimization, stepped, journal, f"{epoch + 1}/{config.epochs}", mix)
            metrics = evaluate(kept, val_loader, config)
            best.offer(kept, epoch, metrics)
            journal.record(epoch, losses | {f"val_{key}": value for key, value in metrics.items()})
            save_state(
                config,
                stage,
                epoch=epoch + 1,
                model=model.state_dict(),
                kept=kept.state_dict(),
                best=vars(best),
                optimization=optimization.state_dict(),
            )
    model.load_state_dict(best.weights)
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, config: RunConfig | None = None) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and mean cross entropy, the model in eval mode.

    Top-5 of fewer than five classes counts them all. The processes of a job share the images out among them, and all of
    them have to call this.
    """
    config = config or RunConfig()
    device = pick_device(config)
    model.to(device).eval()
    meters = {"top1": AverageMeter(), "top5": AverageMeter(), "loss": AverageMeter()}
    for images, targets in shard(loader):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast(config, device):
            logits = model(images)
        top1, top5 = accuracy(logits, targets, topk=(1, 5))
        loss = F.cross_entropy(logits.float(), targets)
        for meter, value in zip(meters.values(), (top1, top5, loss), strict=True):
            meter.update(value.double(), len(targets))
    sums = [float(meter.sum) for meter in meters.values()]
    local = torch.tensor([*sums, meters["loss"].count], dtype=torch.float64, device=device)
    *sums, count = sum_over_processes(local).tolist()
    return {name: total / max(count, 1) for name, total in zip(meters, sums, strict=True)}


# ---- what dense training and search share ----


def make_optimizer(
    parameters: nn.Module | Iterable[dict[str, Any]], config: TrainingConfig, lr_at_256: float, **options: Any
) -> Optimizer:
    """The config's timm optimizer over a model or over parameter groups, torch's own in a single kernel."""
    if config.opt == "adamw":
        options |= {"fused": True, "capturable": config.cuda_graph and pick_device(config).type == "cuda"}
    return create_optimizer_v2(parameters, opt=config.opt, lr=config.scaled_lr(lr_at_256), **options)


class Optimization:
    """Steps down a loss: optimizer, cosine schedule with warm-up, loss scaling, accumulation; one thing to save.

    The schedule is a function of the number of steps, so that number is all it needs to resume.

    Args:
        optimizer: over the parameters to train.
        loss_of: named losses of a batch, 0-d tensors; "loss" is the one that is minimized.
        config: the recipe.
        warmup_epochs: length of the warm-up.
        steps_per_epoch: optimizer steps in an epoch.
        device: of the parameters.
        cosine_epochs: length of the schedule; `config.epochs` if None.
        revision: a number that changes whenever tensors were replaced, so that a CUDA graph would be stale; None for a
            network that stays as it is.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss_of: LossOf,
        config: TrainingConfig,
        warmup_epochs: float,
        steps_per_epoch: int,
        device: torch.device,
        cosine_epochs: int | None = None,
        revision: Callable[[], int] | None = None,
    ) -> None:
        self.optimizer, self.config, self.device = optimizer, config, device
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.loss_of = averaged(loss_of, self.parameters, revision)
        self.schedule = CosineLRScheduler(
            optimizer,
            t_initial=(cosine_epochs or config.epochs) * steps_per_epoch,
            lr_min=config.min_lr,
            warmup_t=round(warmup_epochs * steps_per_epoch),
            warmup_lr_init=config.warmup_lr,
            t_in_epochs=False,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp and config.amp_dtype == "float16")
        self.graph = StepGraph(self._descend, optimizer, revision or (lambda: 0)) if self._captures() else None
        self.steps = 0
        self.schedule.step_update(0)

    def step(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """One optimizer step on a batch; the losses from before it."""
        losses = (self._descend if self.graph is None else self.graph)(images, targets)
        self.steps += 1
        self.schedule.step_update(self.steps)
        return losses

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]

    def _descend(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Forward and backward of each part of the batch, then the update: nothing here waits for the device."""
        totals: dict[str, Tensor] = {}
        parts = self.config.grad_accum_steps
        for part in zip(images.chunk(parts), targets.chunk(parts), range(parts), strict=True):
            part_images, part_targets, number = part
            share = len(part_images) / len(images)
            with nullcontext() if number + 1 == parts else without_exchange(self.loss_of):
                with autocast(self.config, self.device):
                    losses = {name: loss * share for name, loss in self.loss_of(part_images, part_targets).items()}
                self.scaler.scale(losses["loss"]).backward()
            totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return totals

    def _captures(self) -> bool:
        """Whether steps become a CUDA graph; says why not where the config asks for it."""
        if not self.config.cuda_graph:
            return False
        reasons = {
            f"the device is {self.device.type}": self.device.type != "cuda",
            "float16 loss scaling decides on the host": self.scaler.is_enabled(),
            f"only adamw can be captured, not {self.config.opt}": self.config.opt != "adamw",
            "the processes of a job exchange gradients": in_job(),
        }
        for reason in (reason for reason, applies in reasons.items() if applies):
            print(f"cuda_graph: steps run without one: {reason}", flush=True)
            return False
        return True


def run_epoch(
    loader: Loader,
    optimization: Optimization,
    stepped: Callable[[], None],
    journal: Journal,
    title: str,
    mix: Mix | None = None,
) -> dict[str, float]:
    """Train for an epoch and return the mean of each loss.

    Args:
        loader: the images.
        optimization: steps down its losses.
        stepped: called after each step.
        journal: shows the progress.
        title: of the progress bar.
        mix: what is done to each batch before the step, drawn on the host.
    """
    device = optimization.device
    sums, count = {}, 0
    batches, note = journal.progress(loader, len(loader), title)
    for images, targets in batches:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if mix is not None:
            images, targets = mix(images, targets)
        losses = optimization.step(images, targets)
        stepped()
        count += 1
        sums = {name: sums.get(name, 0) + loss.double() for name, loss in losses.items()}
        if count % STEPS_BETWEEN_NOTES == 0:
            note(_finite_means(sums, count, title))
    return _finite_means(sums, count, title)


def _finite_means(sums: dict[str, Tensor], count: int, title: str) -> dict[str, float]:
    means = dict(zip(sums, (mean_over_processes(torch.stack(list(sums.values()))) / count).tolist(), strict=True))
    if not np.isfinite(means["loss"]):
        raise FloatingPointError(f"the loss is not finite in epoch {title}; lower the learning rate (--lr)")
    return means


def pick_device(config: RunConfig) -> torch.device:
    """The device of a config; the GPU where there is one if it names none.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected one of this machine such as cpu, got {config.device!r} ({reason})"
        ) from error
    check_device(device)
    return device


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager:
    """The config's mixed precision."""
    return torch.autocast(device.type, getattr(torch, config.amp_dtype), enabled=config.amp)


def seed_everything(seed: int, stage: str, epoch: int, rank: int = 0) -> None:
    """Seed all global generators for one epoch: order, augmentation and dropout then depend on nothing before it.

    A checkpoint between two epochs therefore needs no generator's state. With another `rank` it is other randomness.
    """
    entropy = [seed, epoch, *stage.encode(), *([rank] if rank else [])]
    state = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def teaching(
    teacher: nn.Module | None, config: TrainingConfig, device: torch.device
) -> Callable[[Tensor], Tensor | None]:
    """A function from images to the teacher's logits, or to None where the config does not distil.

    Raises:
        ValueError: the config distils and there is no teacher.
    """
    if config.distillation is None or (config.distillation == "auto" and teacher is None):
        return lambda images: None
    if teacher is None:
        raise ValueError(f"teacher: expected a network for {config.distillation} distillation, got none")
    teacher.to(device).eval()

    @torch.no_grad()
    def teach(images: Tensor) -> Tensor:
        return teacher(images)

    return teach


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Set stochastic depth, growing linearly over the blocks to `rate`."""
    blocks = family_of(model).blocks(model)
    for block, block_rate in zip(blocks, calculate_drop_path_rates(rate, len(blocks)), strict=True):
        block.drop_path1 = DropPath(block_rate) if block_rate > 0 else nn.Identity()
        block.drop_path2 = DropPath(block_rate) if block_rate > 0 else nn.Identity()


def save_state(config: TrainingConfig, stage: str, **state: Any) -> None:
    """Save a stage's state after an epoch into the run folder, if there is one."""
    if config.output is not None:
        save_checkpoint(_checkpoint_path(config, stage), state | {"config": to_dict(config)})


def resumed_state(config: TrainingConfig, stage: str) -> dict[str, Any] | None:
    """The state to continue a stage from, None where it starts anew.

    Raises:
        ValueError: the run was started with options that differ, or its checkpoint is damaged.
    """
    return on_main(_resumed_state, config, stage) if config.resume else None


def _resumed_state(config: TrainingConfig, stage: str) -> dict[str, Any] | None:
    if not _checkpoint_path(config, stage).exists():
        return None
    state = load_checkpoint(_checkpoint_path(config, stage))
    for name, value in to_dict(config).items():
        if name not in FREE_ON_RESUME and state["config"].get(name) != value:
            raise ValueError(
                f"{name}: the run in {config.output} was started with {state['config'].get(name)}, got {value}; "
                "leave the option out, or start a new run"
            )
    return state


def _checkpoint_path(config: TrainingConfig, stage: str) -> Path:
    return Path(config.output) / "checkpoints" / f"{stage}.pt"


# ---- parts of train ----


@dataclass
class Best:
    """The best epoch so far on the validation images."""

    top1: float = -1.0
    loss: float = 0.0
    epoch: int = -1
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, model: nn.Module, epoch: int, metrics: dict[str, float]) -> None:
        """Keep this epoch if it is the best: by accuracy, among equals by loss."""
        if (metrics["top1"], -metrics["loss"]) > (self.top1, -self.loss):
            self.top1, self.loss, self.epoch = metrics["top1"], metrics["loss"], epoch
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def make_mix(model: nn.Module, config: TrainConfig) -> Mix | None:
    """timm's mixup and cutmix, None where the config has neither."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=model.num_classes)
