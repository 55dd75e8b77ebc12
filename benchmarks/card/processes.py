"""Parts of a time-boxed run: processes that end in time, whatever they do, and what they had to say.

A process that crashes, hangs or prints nonsense costs its own job and nothing else: each one has a session of its own,
is read by a thread and is killed with all that it started when its time is over.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.process import READY, VERDICT

BAD = ("WRONG", "FAILED", "DIED", "OVERRAN")  # begin the verdicts that something is wrong
LEAVING = 6.0  # seconds that a process gets to end by itself after its time


@dataclass(frozen=True)
class Job:
    """One process.

    Args:
        name: what its verdicts are about.
        command: what runs.
        environment: variables besides those of this process.
        read: verdicts from the lines it printed and its exit code, None where it was ended.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[list[str], int | None], list[str]] = lambda lines, code: marked(lines)


@dataclass(frozen=True)
class Part:
    """Jobs that belong together, and their time.

    Args:
        name: of the part.
        jobs: all at once, or in turns.
        most: seconds it may take.
        least: seconds under which it is not worth beginning.
        in_turns: the jobs prepare at once; then one after the other measures, alone on the device.
        spare: it takes what time is left over; no part before it is cut short for it.
    """

    name: str
    jobs: Sequence[Job]
    most: float
    least: float
    in_turns: bool = False
    spare: bool = False


@dataclass
class Outcome:
    """What came of a part: its verdicts, every line that was printed, seconds, and whether Ctrl-C ended it."""

    name: str
    verdicts: list[str]
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def run_part(part: Part, limit: float) -> Outcome:
    """Run a part within so many seconds; no process of it is left afterwards, whatever happens."""
    began, interrupted = time.monotonic(), False
    running: list[Running] = []
    try:
        for job in part.jobs:
            running.append(Running(job))
        (_take_turns if part.in_turns else _run_together)(running, began + limit)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for each in running:
            each.end()
    verdicts = [line for each in running for line in each.verdicts(part.name, interrupted)]
    log = [line for each in running for line in (f"== {part.name} {each.job.name}", *each.lines)]
    return Outcome(part.name, verdicts, log, time.monotonic() - began, interrupted)


def _run_together(running: "list[Running]", until: float) -> None:
    for each in running:
        each.begin(until - time.monotonic() - LEAVING)
    for each in running:
        each.wait(until)


def _take_turns(running: "list[Running]", until: float) -> None:
    """Whoever is not ready after two thirds of the time has no turn. The others share what is left."""
    prepared_by = time.monotonic() + (until - time.monotonic()) * 2 / 3
    for each in running:
        if not each.is_ready(prepared_by):
            each.end()
    waiting = [each for each in running if not each.ended]
    for number, each in enumerate(waiting):
        share = (until - time.monotonic()) / (len(waiting) - number)
        each.begin(share - LEAVING)
        each.wait(time.monotonic() + share)
        each.end()


def marked(lines: list[str]) -> list[str]:
    """The verdicts among a process's lines."""
    return [line.removeprefix(VERDICT) for line in lines if line.startswith(VERDICT)]


class Running:
    """A job's process, its output as it comes."""

    def __init__(self, job: Job) -> None:
        self.job, self.lines, self.ended = job, [], False
        self._ready, self._closed = threading.Event(), threading.Event()
        self.process: subprocess.Popen | None = None
        try:
            self.process = subprocess.Popen(
                job.command, env=os.environ | {"PYTHONUNBUFFERED": "1"} | job.environment, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
            threading.Thread(target=self._read, daemon=True).start()
        except OSError as error:
            self.lines.append(f"cannot be started: {error}")
            self._closed.set()

    def is_ready(self, until: float) -> bool:
        """Whether it said so by then."""
        return self._ready.wait(max(0.0, until - time.monotonic())) and not self._closed.is_set()

    def begin(self, seconds: float) -> None:
        """Tell it how long it may take."""
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.close()
        except (OSError, AttributeError):  # it is gone, or never was: its verdict says so
            pass

    def wait(self, until: float) -> None:
        self._closed.wait(max(0.0, until - time.monotonic()))

    def end(self) -> None:
        """Kill it, with all that it started, if it has not ended by itself."""
        if self.process is None or self.ended:
            return
        self.ended = not self._closed.is_set()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # what it started may be left also when it ended by itself
        except ProcessLookupError:
            pass
        self.process.wait()

    def verdicts(self, part: str, interrupted: bool) -> list[str]:
        """What its lines say, and what its end says unless the user ended it."""
        code = None if self.process is None or self.ended else self.process.returncode
        said, last = self.job.read(self.lines, code), next((line for line in reversed(self.lines) if line.strip()), "")
        if self.ended and interrupted:
            pass
        elif self.ended:
            said = [*said, f"OVERRAN {part} {self.job.name}: ended; its last line: {last}"]
        elif code is None or code < 0:
            how = "not started" if code is None else f"by signal {-code}"
            said = [*said, f"DIED {part} {self.job.name}: {how}; its last line: {last}"]
        elif code != 0 and not any(line.startswith(BAD) for line in said):
            said = [*said, f"DIED {part} {self.job.name}: with exit code {code}; its last line: {last}"]
        return [line[:240] for line in said]

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.strip() == READY:
                self._ready.set()
        self.process.wait()
        self._closed.set()
        self._ready.set()
