"""The bar of a stage: how far it is, how fast, how long still, and what goes on."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")
SPEED_SECONDS = 300  # over which the rate is taken: validation between epochs belongs to the time left


class Rate(ProgressColumn):
    """Steps in a second, or seconds for a step."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.3g} steps/s" if speed >= 1 else f"{1 / speed:.3g} s/step", style="progress.data.speed")


class StageBar(Progress):
    """Two bars, of the epoch and of the stage, and lines of figures below.

    Args:
        stage: names the second bar.
        console: where it is drawn; standard output if None.
    """

    def __init__(self, stage: str, console: Console | None = None) -> None:
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(24), MofNCompleteColumn(), Rate(), TimeRemainingColumn(elapsed_when_finished=True))
        self.lines: list[str] = []
        super().__init__(*columns, console=console, transient=True, speed_estimate_period=SPEED_SECONDS)
        self.epoch = self.add_task("", visible=False)
        self.stage = self.add_task(stage, total=None, visible=False)

    def start_epoch(self, title: str, steps: int, epochs_done: int, epochs: int) -> None:
        """Show an epoch of so many steps."""
        self.reset(self.epoch, description=title, total=steps, visible=True)
        self.update(self.stage, total=steps * epochs, completed=steps * epochs_done, visible=True)

    def track_steps(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches, each of them a step forward."""
        for batch in batches:
            yield batch
            self.advance(self.epoch)
            self.advance(self.stage)

    def show(self, *lines: str) -> None:
        """Show these lines below the bars."""
        self.lines = [line for line in lines if line]

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(line, style="dim") for line in self.lines)
