"""Dense training, fine-tuning and evaluation of a plain timm model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import DropPath, calculate_drop_path_rates
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch import Tensor, nn

from ofb.engine.config import RunConfig, TrainConfig, TrainingConfig
from ofb.engine.device import autocast, determinism, pick_device, with_precision
from ofb.engine.distributed import start_alike, sum_over_processes
from ofb.engine.journal import Journal
from ofb.engine.optimization import BAD_STEPS, Optimization, make_optimizer
from ofb.engine.run_folder import locked
from ofb.engine.shards import Loader, shard
from ofb.engine.stage import Stage, through_setbacks
from ofb.supernet.families import family_of

TRAIN_LR_AT_256 = 1.5e-4
TRAIN_WARMUP_EPOCHS = 5
STEPS_BETWEEN_NOTES = 50  # reading losses makes the host wait for the device

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def train(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader,
    config: TrainConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    stage: str = "train",
    later_epochs: int = 0,
) -> nn.Module:
    """Train a model in place and return it with the weights of its best epoch on the validation images.

    With `config.output` checkpoints are written there, and `config.resume` continues from the last one: a resumed run
    equals an uninterrupted one. A training that diverges goes back to it, with half the learning rate.

    Args:
        model: a timm model with `num_classes`.
        train_loader: batches of images (B, C, H, W) and class indices (B,), with a length.
        val_loader: the same, to choose the best epoch.
        config: the recipe; its data and model options are not read here.
        teacher: to distil from, as `config.distillation` says.
        stage: names checkpoint and metrics.
        later_epochs: that follow in the same run, to say how long it will take.

    Raises:
        ValueError: the run to resume was started otherwise, its checkpoints are damaged, or it is still running.
        FloatingPointError: losses or gradients are not finite, and no lower learning rate helped.
        KeyboardInterrupt: SIGINT or SIGTERM came; where there is a run folder, a checkpoint was written first.
    """
    config = with_precision(config or TrainConfig())

    def attempt(config: TrainConfig, setbacks: int) -> nn.Module:
        return _train(model, train_loader, val_loader, config, teacher, stage, setbacks, later_epochs)

    with locked(config.output), determinism(config):
        return through_setbacks(attempt, config)


def _train(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader,
    config: TrainConfig,
    teacher: nn.Module | None,
    name: str,
    setbacks: int,
    later_epochs: int,
) -> nn.Module:
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
    kept, best = model if ema is None else ema.module, Best()
    parts = {"model": model, "kept": kept, "best": best}
    stage = Stage(config, name, len(train_loader), optimization, parts, setbacks, later_epochs)

    def stepped() -> None:
        if ema is not None:
            ema.update(model, optimization.steps)

    def an_epoch(epoch: int) -> None:
        model.train()
        losses = run_epoch(train_loader, stage, stepped, journal, mix)
        metrics = evaluate(kept, val_loader, config)
        best.offer(kept, epoch, metrics)
        journal.record(epoch, losses | {f"val_{key}": value for key, value in metrics.items()})

    with Journal(config, name, stage.epoch) as journal:
        stage.run(an_epoch)
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


def run_epoch(
    loader: Loader, stage: Stage, stepped: Callable[[], None], journal: Journal, mix: Mix | None = None
) -> dict[str, float]:
    """Train for what is left of the stage's epoch and return the mean of each loss over all of it.

    Args:
        loader: the images.
        stage: what steps down its losses, and where it stands.
        stepped: called after each step.
        journal: shows the progress.
        mix: what is done to each batch before the step, drawn on the host.

    Raises:
        ValueError: a batch to mix has an odd number of images.
        Diverged: too many steps on end, or all of the epoch's, were not finite.
        Stopped: a signal asked for it.
    """
    optimization = stage.optimization
    device, most = optimization.device, min(BAD_STEPS, len(loader))
    batches, note = journal.progress(loader, len(loader), f"{stage.epoch + 1}/{stage.config.epochs}")
    for images, targets in stage.remaining(batches):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if mix is not None:
            if len(images) % 2:
                raise ValueError(
                    f"train_loader: expected an even number of images in each batch, which mixup and cutmix need, got "
                    f"{len(images)}; give it drop_last=True, or set both to 0"
                )
            images, targets = mix(images, targets)
        losses = optimization.step(images, targets)
        stepped()
        stage.stepped(losses)
        if stage.batches % min(STEPS_BETWEEN_NOTES, len(loader)) == 0:
            optimization.check(images, targets, most)
            note(stage.means())
    return stage.means()


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

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def make_mix(model: nn.Module, config: TrainConfig) -> Mix | None:
    """timm's mixup and cutmix, None where the config has neither."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=model.num_classes)
