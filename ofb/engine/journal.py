"""What a run tells of itself: a line an epoch, its files, TensorBoard, and a progress bar where someone watches."""

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ofb.engine.checkpoint import write_text
from ofb.engine.config import TrainingConfig
from ofb.engine.distributed import is_main
from ofb.engine.history import History, describe_pruned, in_order
from ofb.engine.run_folder import HISTORY_FILE, METRICS_FILE, read_entries
from ofb.engine.terminal import items_in_lines
from ofb.engine.trackers import TensorBoard, WeightsAndBiases
from ofb.supernet.targets import UNITS, describe_amount

NAMES = {"macs": "budget", "alive": "candidates alive", "top1": "top-1", "top5": "top-5"}
Item = TypeVar("Item")
Note = Callable[[Mapping[str, float]], None]


class Entries:
    """A file of JSON lines, each an entry of a stage's epoch; on disk it is always whole.

    Args:
        path: the file; None to keep none.
        stage: the stage that is written.

    Raises:
        ValueError: the file is there and damaged.
    """

    def __init__(self, path: Path | None, stage: str) -> None:
        self.path, self.stage = path, stage
        self.all = [] if path is None else read_entries(path)

    def add(self, epoch: int, entry: Mapping[str, Any]) -> None:
        """Write an entry; those of the stage for this epoch and later ones are of epochs that were lost, and go."""
        if self.path is not None:
            self.all = [each for each in self.all if each["stage"] != self.stage or each["epoch"] < epoch]
            self.all.append({"stage": self.stage, "epoch": epoch, **entry})
            write_text(self.path, "".join(json.dumps(each) + "\n" for each in self.all))


class Journal:
    """Records one stage of a run, an entry an epoch.

    Args:
        config: its run folder, None to write no files; its epochs; whether Weights & Biases is told.
        stage: "train", "search" or "finetune".
        start_epoch: the epoch the stage starts or resumes at.
        status: gives figures to show below the bar beside the losses; called now and then while someone watches.
        unshown: gives the names of losses that are written and not shown at present.

    Raises:
        ValueError: Weights & Biases does not start, or a file of earlier epochs is damaged.
    """

    def __init__(
        self,
        config: TrainingConfig,
        stage: str,
        start_epoch: int = 0,
        status: Callable[[], Mapping[str, object]] = dict,
        unshown: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.stage, self.epochs, self.epoch = stage, config.epochs, start_epoch
        self.status, self.unshown = status, unshown
        folder = Path(config.output) if config.output is not None and is_main() else None
        self.metrics = Entries(folder and folder / METRICS_FILE, stage)
        self.history = Entries(folder and folder / HISTORY_FILE, stage)
        self.trackers: list[TensorBoard | WeightsAndBiases] = []
        if folder is not None and find_spec("tensorboard") is not None:
            self.trackers.append(TensorBoard(folder, stage, start_epoch))
        if config.log_wandb and is_main():
            others = sum(entry["stage"] != stage for entry in self.metrics.all)
            self.trackers.append(WeightsAndBiases(config, stage, others))
        self.numbers: Mapping[str, float] = {}  # of the last epoch
        self.bar = None

    def record(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Print and write the metrics of a finished epoch (counted from 0)."""
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        print(items_in_lines(f"{self.stage} {epoch + 1}/{self.epochs}  ", self._items(numbers)), flush=True)
        self.metrics.add(epoch, metrics)
        self.epoch, self.numbers = epoch + 1, numbers
        for tracker in self.trackers:
            tracker.numbers(epoch, numbers)

    def record_history(self, epoch: int, history: History) -> None:
        """Write how the supernet stands after an epoch, and what was pruned in it; epoch -1 is before the first."""
        looks = history.looks()
        entry = history.entry(looks)
        if entry["pruned"]:
            pruned = describe_pruned(entry["pruned"], in_order(history.supernet))
            print(items_in_lines("  pruned: ", pruned, ", ", indent=" " * 4), flush=True)
        self.history.add(epoch, entry)
        for tracker in self.trackers if epoch >= 0 else ():
            tracker.looks(epoch, looks)

    def record_picture(self, epoch: int, name: str, picture: Tensor) -> None:
        """Show a picture (C, H, W) with values in 0 to 1."""
        for tracker in self.trackers:
            tracker.picture(epoch, name, picture)

    def __enter__(self) -> "Journal":
        if sys.stdout.isatty() and find_spec("rich") is not None:
            from ofb.engine.bar import StageBar

            self.bar = StageBar(self.stage)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        for tracker in self.trackers:
            tracker.close()

    def progress(self, batches: Iterable[Item], total: int, title: str) -> tuple[Iterable[Item], Note]:
        """An epoch's batches under a bar, and a function that shows losses below it.

        Silent where no terminal listens or rich is not installed.
        """
        if self.bar is None:
            return batches, lambda losses: None
        self.bar.start_epoch(f"{self.stage} {title}", total, self.epoch, self.epochs)
        self._show(self.numbers)
        return self.bar.track_steps(batches), self._show

    def _show(self, losses: Mapping[str, float]) -> None:
        self.bar.show("  ".join(self._items(losses)), "  ".join(self._items(self.status())))

    def _items(self, figures: Mapping[str, object]) -> list[str]:
        """The figures in words, those of the validation images as one item."""
        off, items = self.unshown(), []
        shown = ((key, value) for key, value in figures.items() if key not in off)
        for is_val, group in groupby(shown, lambda figure: figure[0].startswith("val_")):
            words = [_item(key.removeprefix("val_"), value) for key, value in group]
            items += [f"val {', '.join(words)}"] if is_val else words
        return items


def _item(key: str, value: object) -> str:
    """A figure with its name, in digits that suit it."""
    kind = key.removeprefix("expected_")
    if kind != key and kind in UNITS:
        return f"expected {describe_amount(kind, value)}"
    if key in ("top1", "top5"):
        value = f"{value:.2f} %"
    elif key == "decided":
        value = f"{100 * value:.0f} %"
    elif isinstance(value, float):
        value = _loss(value)
    return f"{NAMES.get(key, key)} {value}"


def _loss(value: float) -> str:
    """Four digits, never an exponent."""
    if 0 < abs(value) < 1e-3:
        return "<0.001"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:#.4g}".rstrip(".")
