"""What a run tells of itself: a line an epoch, metrics.jsonl, TensorBoard, and a progress bar where someone watches."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from ofb.engine.checkpoint import write_text
from ofb.engine.distributed import is_main

Item = TypeVar("Item")
Note = Callable[[Mapping[str, float]], None]


class Journal:
    """Records one stage of a run, an entry an epoch.

    Args:
        folder: run folder, None to write no files.
        stage: "train", "search" or "finetune".
        start_epoch: the epoch the stage starts or resumes at; entries of a lost later epoch are dropped.
    """

    def __init__(self, folder: str | Path | None, stage: str, start_epoch: int = 0) -> None:
        self.stage = stage
        self.path = None if folder is None or not is_main() else Path(folder) / "metrics.jsonl"
        self.entries = []
        self.tensorboard = None
        if self.path is None:
            return
        if self.path.exists():
            entries = [json.loads(line) for line in self.path.read_text().splitlines()]
            self.entries = [e for e in entries if e["stage"] != stage or e["epoch"] < start_epoch]
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(Path(folder) / "tensorboard" / stage), purge_step=start_epoch)

    def record(self, epoch: int, epochs: int, metrics: dict[str, Any]) -> None:
        """Print and write the metrics of a finished epoch (counted from 0)."""
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        print(f"{self.stage} {epoch + 1}/{epochs}  {_line(numbers)}", flush=True)
        if self.path is not None:
            self.entries.append({"stage": self.stage, "epoch": epoch, **metrics})
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, epoch)
            self.tensorboard.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()

    @contextmanager
    def progress(self, batches: Iterable[Item], total: int, title: str) -> Iterator[tuple[Iterable[Item], Note]]:
        """An epoch's batches under a bar, and a function that notes metrics beside it.

        Silent where no terminal listens or rich is not installed.
        """
        if not sys.stdout.isatty() or find_spec("rich") is None:
            yield batches, lambda metrics: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), transient=True) as bar:
            task = bar.add_task(f"{self.stage} {title}", total=total, note="")
            yield bar.track(batches, task_id=task), lambda metrics: bar.update(task, note=_line(metrics))


def _line(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {_short(value)}" for key, value in metrics.items())


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
