"""Steps down a loss. A step that is not finite is left out; many of them in a row are an error."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from ofb.engine.config import TrainingConfig
from ofb.engine.cuda_graph import StepGraph
from ofb.engine.device import autocast, no_cuda_graph, pick_device, uses_amp
from ofb.engine.distributed import averaged, without_exchange

BAD_STEPS = 20  # in a row are a divergence; float16's loss scale needs 16 to come down from 2**16 to 1
SKIPPED = "skipped"  # among a step's losses: 1 where it was left out

LossOf = Callable[[Tensor, Tensor], dict[str, Tensor]]


class Diverged(FloatingPointError):
    """Losses or gradients are not finite any more."""


def make_optimizer(
    parameters: nn.Module | Iterable[dict[str, Any]], config: TrainingConfig, lr_at_256: float, **options: Any
) -> Optimizer:
    """The config's timm optimizer over a model or over parameter groups, torch's own in a single kernel.

    Raises:
        ValueError: timm's optimizer does not run here.
    """
    if config.opt == "adamw":
        options |= {"fused": True, "capturable": no_cuda_graph(config, pick_device(config)) is None}
    try:
        optimizer = create_optimizer_v2(parameters, opt=config.opt, lr=config.scaled_lr(lr_at_256), **options)
    except (AssertionError, ImportError) as error:  # of bitsandbytes and APEX
        raise ValueError(f"opt: expected one that runs here, got {config.opt}: {error}; take adamw") from error
    if getattr(optimizer, "is_second_order", False):
        needs = "which needs the gradient of a gradient, and attention has none"
        raise ValueError(f"opt: expected an optimizer of first order, got {config.opt}, {needs}; take adamw")
    return optimizer


class Optimization:
    """Steps down a loss: optimizer, cosine schedule with warm-up, loss scaling, accumulation; one thing to save.

    The schedule is a function of the number of steps, so that number is all it needs to resume. A step whose loss or
    gradients are not finite changes no parameter; a `GradScaler` sees to it, which scales for float16 only.

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
        self.scales = uses_amp(config, device) and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if self.scales else 1.0)
        self.bad_steps = torch.zeros((), device=device)  # in a row
        self.graph = None
        if self._captures():
            self.graph = StepGraph(self._descend, self._abandon, optimizer, revision or (lambda: 0))
        self.steps, self.lr_factor = 0, 1.0
        self._set_rates()

    def step(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """One optimizer step on a batch; the losses from before it, all 0 and "skipped" 1 where it was left out."""
        losses = (self._descend if self.graph is None else self.graph)(images, targets)
        self.steps += 1
        self._set_rates()
        return losses

    def slow_down(self, factor: float) -> None:
        """Multiply the schedule's learning rates by a factor from now on."""
        self.lr_factor = factor
        self._set_rates()

    def is_sound(self) -> bool:
        """Whether the last step was not left out; waits for the device."""
        return self.bad_steps.item() == 0

    def check(self, images: Tensor, targets: Tensor, most: int = BAD_STEPS) -> None:
        """Make sure that not all of the last `most` steps were left out; waits for the device.

        Raises:
            Diverged: they were; the message tells what is not finite for this batch.
        """
        bad = int(self.bad_steps.item())
        if bad >= most:
            found = self._look(images, targets)
            raise Diverged(f"the loss or its gradients were not finite in {bad} steps: {found}")

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        captures = [group.get("capturable") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, capturable in zip(self.optimizer.param_groups, captures, strict=True):
            if capturable is not None:  # as it is here, not as it was where the checkpoint was written
                group["capturable"] = capturable
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]
        self._set_rates()

    def _descend(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Forward and backward of each part of the batch, then the update: nothing here waits for the device."""
        totals = self._backward(images, targets)
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.config.clip_grad is None:
            largest = nn.utils.get_total_norm(gradients, torch.inf)
        else:
            largest = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad)
        self.scaler.step(self.optimizer)  # or not, if it found what is not finite
        self.scaler.update(None if self.scales else 1.0)
        self.optimizer.zero_grad()
        bad = ~largest.isfinite()
        self.bad_steps.add_(1).mul_(bad)
        return {name: loss.masked_fill(bad, 0) for name, loss in totals.items()} | {SKIPPED: bad.float()}

    def _abandon(self) -> None:
        """Forget a step that broke off: its gradients, and that the scaler has seen them."""
        self.optimizer.zero_grad()
        self.scaler.update(1.0)  # what a step that is captured scales by

    def _backward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Gradients of the mean loss; the losses."""
        totals: dict[str, Tensor] = {}
        # How many parts there are may differ between processes: only the last one exchanges gradients.
        parts = min(self.config.grad_accum_steps, len(images))
        for number, part in enumerate(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True), 1):
            share = len(part[0]) / len(images)  # of the batch's mean: parts differ in size where they do not divide it
            with nullcontext() if number == parts else without_exchange(self.loss_of):
                with autocast(self.config, self.device):
                    losses = {name: loss * share for name, loss in self.loss_of(*part).items()}
                loss = losses["loss"]
                # Times 1, or NaN where the loss is not finite: then its gradients are not either, in any process.
                self.scaler.scale(loss * (1 + 0 * loss.detach())).backward()
            totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
        return totals

    def _set_rates(self) -> None:
        self.schedule.step_update(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] *= self.lr_factor

    def _look(self, images: Tensor, targets: Tensor) -> str:
        """What of images, losses, gradients and weights is not finite."""
        losses = self._backward(images, targets)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        kinds = {"images": [images], "gradients": gradients, "weights": self.parameters}
        bad = {kind: sum(not each.isfinite().all() for each in tensors) for kind, tensors in kinds.items()}
        shown = [f"{kind} in {count} of {len(kinds[kind])} tensors" for kind, count in bad.items() if count]
        self.optimizer.zero_grad()
        values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        rate = max(float(group["lr"]) for group in self.optimizer.param_groups)
        return f"{values}; not finite: {', '.join(shown) or 'nothing now'}; learning rate {rate:.3g}"

    def _captures(self) -> bool:
        """Whether steps become a CUDA graph; says why not where the config asks for it."""
        reason = no_cuda_graph(self.config, self.device)
        if reason is not None and self.config.cuda_graph:
            print(f"cuda_graph: steps run without one: {reason}", flush=True)
        return reason is None
