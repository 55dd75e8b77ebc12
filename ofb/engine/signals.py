"""SIGINT (Ctrl-C) and SIGTERM (Slurm, torchrun, docker stop): a step is finished and saved before a run ends."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ofb.engine.distributed import in_job, is_main, sum_over_processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within the block SIGTERM raises `Stopped`, so that no file stays half written."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    before = _set(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class StopRequests:
    """Within the block, a first signal is noted instead of obeyed; a second one does what it would have done before."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "StopRequests":
        self.before = {number: _set(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            if handler is not None:
                signal.signal(number, handler)

    def asked(self) -> int:
        """Number of the signal that came, in whichever process of the job; 0 if none. All processes have to ask."""
        if not in_job():
            return self.number
        came = sum_over_processes(torch.tensor(float(self.number != 0))).item() > 0
        return (self.number or signal.SIGTERM) if came else 0

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        self.__exit__()
        if is_main():  # print is not for signal handlers
            os.write(sys.stderr.fileno(), b"\nofb: finishing a step and saving it; once more to stop at once\n")


def _set(number: int, handler: object) -> object | None:
    """The handler before this one; None where none is set: outside the main thread, or if the signal is ignored."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is signal.SIG_IGN:
        return None
    return signal.signal(number, handler)
