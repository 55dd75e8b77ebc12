"""A stage of a run, such as the search or the fine-tuning: where it stands, and that it can go on from there.

A checkpoint is written when a stage begins, every `checkpoint_every` batches, after each epoch, and when a signal asks
the process to end. What is random depends on epoch and batch alone (`seeding`), so a stage that goes on from any
checkpoint equals one that was never interrupted.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ofb.engine.checkpoint import load_checkpoint, save_checkpoint
from ofb.engine.config import PATHS, TrainingConfig
from ofb.engine.distributed import mean_over_processes, on_main, rank
from ofb.engine.estimate import StepClock, describe_estimate
from ofb.engine.optimization import SKIPPED, Diverged, Optimization
from ofb.engine.options import to_dict
from ofb.engine.provenance import code_versions
from ofb.engine.run_folder import CHECKPOINT_FOLDER
from ofb.engine.seeding import seed_everything
from ofb.engine.signals import Stopped, StopRequests
from ofb.engine.terminal import in_lines

SETBACKS = 3  # of a stage; each halves the learning rate
# Options that may change when a run is resumed; the last one changes rounding and what is drawn at random.
FREE_ON_RESUME = {
    "device", "workers", "backend", "cuda_graph", "output", "resume", "config", "log_wandb", "wandb_project",
    "checkpoint_every", "keep_checkpoints", "allow_other_code", "dry_run", "grad_accum_steps",
}  # fmt: skip

Result = TypeVar("Result")


class Part(Protocol):
    """What a checkpoint keeps the state of."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> object: ...


class Stage:
    """Where a stage stands.

    Args:
        config: of the run.
        name: "train", "search" or "finetune", and what tells it from others of the kind.
        steps_per_epoch: batches in an epoch.
        optimization: what steps.
        parts: whatever else changes in it, by name, in the order in which it is loaded.
        setbacks: how often it had to start again because it diverged.
        later_epochs: of the run's stages after it, to say how long all of them will take.

    Attributes:
        resumed: whether it goes on from a checkpoint.
        epoch, batches: whole epochs behind it, and batches of the present one.
        sums: of the losses of these batches.

    Raises:
        ValueError: the run was started with options, data or code that differ, or its checkpoints are damaged.
    """

    def __init__(
        self,
        config: TrainingConfig,
        name: str,
        steps_per_epoch: int,
        optimization: Optimization,
        parts: Mapping[str, Part],
        setbacks: int = 0,
        later_epochs: int = 0,
    ) -> None:
        self.config, self.name, self.steps_per_epoch = config, name, steps_per_epoch
        self.later_epochs = later_epochs
        self.clock = StepClock(optimization.device, steps_per_epoch)
        self.tells = setbacks == 0  # how long it will take: once
        self.optimization, self.parts = optimization, {**parts, "optimization": optimization}
        self.epoch, self.batches, self.setbacks = 0, 0, setbacks
        self.sums: dict[str, Tensor] = {}
        self.requests = None if config.output is None else StopRequests()
        state = on_main(_state_to_resume, config, name, steps_per_epoch) if config.resume else None
        self.resumed = state is not None
        if state is not None:
            self._load(state)
        optimization.slow_down(0.5**self.setbacks)

    def run(self, an_epoch: Callable[[int], None], finished: Callable[[], bool] = lambda: False) -> None:
        """Go through the epochs that are left, or until it is `finished`.

        Raises:
            Stopped: a signal asked for it; where there is a run folder, a checkpoint was written first.
            Diverged: steps are not finite any more.
        """
        with self.requests or nullcontext():
            if not self.resumed:
                self.save()
            while self.epoch < self.config.epochs and not finished():
                an_epoch(self.epoch)
                self.epoch, self.batches, self.sums = self.epoch + 1, 0, {}
                self.save()
                if self.clock.epoch_ended() and not finished():
                    self._tell_what_is_left()
                self._stop_if_asked()

    def remaining(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The present epoch's batches that are left.

        Those before them are read again and passed over, so that whatever draws order and augmentation stands where it
        stood.
        """
        done = self.batches
        seed_everything(self.config.seed, self.name, self.epoch, rank())
        batches = iter(loader)
        for number in count():
            if number:  # with the first batch comes what is drawn once: it has the epoch's own seed
                seed_everything(self.config.seed, self.name, self.epoch, rank(), number)
            batch = next(batches, None)
            if batch is None:
                return
            if number >= done:
                yield batch

    def stepped(self, losses: Mapping[str, Tensor]) -> None:
        """Count a batch and its losses; write a checkpoint where one is due.

        Raises:
            Stopped: a signal asked for it.
        """
        self.batches += 1
        self.sums = {name: self.sums.get(name, 0) + loss.double() for name, loss in losses.items()}
        if self.clock.stepped():
            self._tell_what_is_left()
        if self.batches % self.config.checkpoint_every == 0:
            self.save()
        self._stop_if_asked()

    def means(self) -> dict[str, float]:
        """Mean of each loss over the present epoch's steps so far, and how many were left out if any were."""
        sums = mean_over_processes(torch.stack(list(self.sums.values()))).tolist()
        losses = dict(zip(self.sums, sums, strict=True))
        skipped = round(losses.pop(SKIPPED))
        taken = self.batches - skipped
        means = {name: loss / taken for name, loss in losses.items()} if taken else {}
        return means | ({SKIPPED: skipped} if skipped else {})

    def save(self) -> None:
        """Write a checkpoint, if there is a run folder and the last step was a sound one."""
        if self.config.output is None or not self.optimization.is_sound():
            return
        state = {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "epoch": self.epoch,
            "batches": self.batches,
            "sums": self.sums,
            "setbacks": self.setbacks,
            "steps_per_epoch": self.steps_per_epoch,
            "config": to_dict(self.config),
            "code": code_versions(),
        }
        # An epoch that ended is newer than its last batch: otherwise chance decides which of the two is resumed from.
        place = self.epoch * (self.steps_per_epoch + 1) + self.batches
        folder = Path(self.config.output) / CHECKPOINT_FOLDER
        save_checkpoint(folder, self.name, place, state, self.config.keep_checkpoints)

    def _load(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.epoch, self.batches = state["epoch"], state["batches"]
        self.setbacks = max(state["setbacks"], self.setbacks)
        self.sums = {name: total.to(self.optimization.device) for name, total in state["sums"].items()}

    def _tell_what_is_left(self) -> None:
        epochs, later = self.config.epochs - self.epoch, self.later_epochs
        if self.tells and epochs:
            steps = epochs * self.steps_per_epoch - self.batches, later * self.steps_per_epoch
            print(in_lines(describe_estimate(self.clock, self.name, steps, (epochs, later))), flush=True)

    def _stop_if_asked(self) -> None:
        number = 0 if self.requests is None else self.requests.asked()
        if number:
            self.save()
            raise Stopped(number)


def through_setbacks(attempt: Callable[[TrainingConfig, int], Result], config: TrainingConfig) -> Result:
    """Run a stage; where it diverges, again from its last sound checkpoint with half the learning rate.

    Args:
        attempt: the stage, given the config and the number of setbacks so far.
        config: of the run; without a run folder there is nothing to go back to.

    Raises:
        FloatingPointError: it diverged once too often.
    """
    for setbacks in range(SETBACKS + 1):
        try:
            return attempt(config, setbacks)
        except Diverged as error:
            advice = f"lower the learning rate (--lr, --finetune-lr) or clip the gradient (--clip-grad 1): {error}"
            if config.output is None or setbacks == SETBACKS:
                raise FloatingPointError(f"{'still ' if setbacks else ''}diverged; {advice}") from None
            print(in_lines(f"setback {setbacks + 1} of {SETBACKS}: {error}"), flush=True)
            print(f"going on from the last checkpoint, with {0.5 ** (setbacks + 1):g} of the learning rate", flush=True)
            config = replace(config, resume=True)
    raise AssertionError("unreachable")


def _state_to_resume(config: TrainingConfig, name: str, steps_per_epoch: int) -> dict[str, Any] | None:
    state = load_checkpoint(Path(config.output) / CHECKPOINT_FOLDER, name)
    if state is None:
        return None
    for option, value in to_dict(config).items():
        if option not in FREE_ON_RESUME and not _same(option, state["config"].get(option), value):
            raise ValueError(
                f"{option}: the run in {config.output} was started with {state['config'].get(option)}, got {value}; "
                "leave the option out, or start a new run"
            )
    if state["steps_per_epoch"] != steps_per_epoch:
        raise ValueError(
            f"data: the run in {config.output} was started with {state['steps_per_epoch']} batches an epoch, got "
            f"{steps_per_epoch}; give it the same images, or start a new run"
        )
    if state["code"] != code_versions() and not config.allow_other_code:
        was, now = (", ".join(f"{k} {v}" for k, v in versions.items()) for versions in (state["code"], code_versions()))
        raise ValueError(
            f"resume: the run in {config.output} was last written by {was}; this is {now}. Go back to that, or add "
            "--allow-other-code if you know that they compute the same"
        )
    return state


def _same(option: str, was: Any, now: Any) -> bool:
    """Whether an option is what it was. A folder may be another one where one of the two is gone: it has moved."""
    if option not in PATHS or was is None or now is None:
        return was == now
    moved = any(os.path.isabs(path) and not os.path.exists(path) for path in (was, now))
    return moved or os.path.abspath(was) == os.path.abspath(now)
