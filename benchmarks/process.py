"""A benchmark as one process of several: its turn on the device, its verdicts, and failures that cost one row.

`benchmarks.card` starts such processes side by side. Each prepares, says that it is ready, and measures when it is told
how many seconds it has; so nothing else runs on the device meanwhile, and importing and compiling go on in parallel.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

READY = "ready"
VERDICT = "=> "  # begins the lines that the summary of all processes repeats
_TURN_ENDS = "OFB_BENCHMARK_TURN_ENDS"  # in the environment: by time.monotonic(), which all processes share


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """What a benchmark takes besides its own options when it is one of several."""
    parser.add_argument("--seconds", type=float, default=math.inf, help="measure no longer than that")
    parser.add_argument("--without", action="append", default=[], help="leave this variant out; may be repeated")
    parser.add_argument(
        "--turn", action="store_true", help="when ready say so, and wait for the seconds it may take on standard input"
    )


def take_turn(arguments: argparse.Namespace) -> float:
    """`time.monotonic()` at which measuring has to end, after waiting for the turn where there are turns."""
    if arguments.device == "cuda":
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda"))  # it takes seconds to begin to compute
        synchronize()
    if arguments.turn and _TURN_ENDS not in os.environ:  # a command that begins again goes on with its turn
        print(READY, flush=True)
        seconds = float(sys.stdin.readline() or 0)  # it waits here, so the clock is read afterwards
        os.environ[_TURN_ENDS] = str(time.monotonic() + seconds)
    turn_ends = float(os.environ.get(_TURN_ENDS, math.inf)) if arguments.turn else math.inf
    return min(time.monotonic() + arguments.seconds, turn_ends)


def verdict(line: str) -> None:
    """Print what the summary of all processes shows."""
    print(VERDICT + line, flush=True)


@contextmanager
def own_row(variant: str) -> Iterator[None]:
    """Whatever is raised inside costs this variant's row and nothing else.

    After an illegal access CUDA refuses all further work in the process: then the command begins again, without the
    variant.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        verdict(f"FAILED {variant}: {type(error).__name__}: {reason}"[:300])
        try:
            synchronize()
        except RuntimeError:
            print(f"  the device is unusable now: once more without {variant}", flush=True)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--without", variant.split(":")[0]])


def synchronize() -> None:
    """Wait for the device, and raise what went wrong there; memory that nobody holds is given back."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
