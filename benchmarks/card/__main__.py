"""A few minutes on a card, spent well: is every op right, how fast are ops, steps and a search.

    make card             # or: python -m benchmarks.card first
    make card-more        # or: python -m benchmarks.card more

Both end within --seconds by their own clock, whatever crashes or hangs, and print at most 150 lines, the verdicts last.
Results are written as they come: to benchmarks/results/<device>, and copied to the folder that --out names. docs/gpu.md
says what each line means.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.card.estimate import compile_estimate
from benchmarks.card.parts import RUNS, Settings
from benchmarks.card.processes import BAD, Outcome, Part, run_part
from benchmarks.decide import propose
from benchmarks.measure import results_folder

LOGS = Path("build/card")
OVERHEAD = 10.0  # seconds to start and for the summary
MOST_LINES = 150
MOST_COPIES = 8  # the log is one of them
MOST_REPEATED = 15  # of what is wrong, at the end
USUAL_SECONDS = 300.0


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside it ends its processes too
    settings = Settings(arguments.device, arguments.results or _usual_results(arguments.device))
    parts = [part for part in RUNS[arguments.run](settings) if part.name in (arguments.parts or [part.name])]
    if arguments.dry:
        print(plan(parts, arguments))
        print(compile_estimate([part.name for part in parts]))
        return 0
    outcomes: list[Outcome] = []
    began = time.time()
    for outcome in run_all(parts, arguments.seconds):
        outcomes.append(outcome)
        collect(outcomes, settings, arguments, began)
        if outcome.interrupted:
            break
    if settings.rehearsal:
        print("-- a rehearsal on a CPU: its times mean nothing")
    print(summary(outcomes))
    if outcomes[-1].interrupted:
        print("-- ended by a signal; what was measured until then is written")
        return 130
    return 1 if any(line.startswith(BAD) for outcome in outcomes for line in outcome.verdicts) else 0


def parse_arguments() -> argparse.Namespace:
    variables = os.environ
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", choices=list(RUNS), help="which of the two runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=variables.get("DEVICE") or "cuda", help="DEVICE")
    seconds = variables.get("SECONDS_IN_ALL") or USUAL_SECONDS
    parser.add_argument("--seconds", type=float, default=seconds, help="SECONDS_IN_ALL: for all; parts grow with it")
    parser.add_argument("--out", type=Path, default=variables.get("OUT") or None, help="OUT: a folder for copies")
    parser.add_argument("--parts", type=_listed, default=variables.get("PARTS") or None, help="PARTS: these, by comma")
    parser.add_argument("--dry", action="store_true", default=variables.get("DRY") == "1", help="DRY=1: the plan alone")
    parser.add_argument("--results", type=Path, help="folder of the CSVs; default: benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    if arguments.device not in ("cpu", "cuda"):
        parser.error(f"DEVICE: expected cuda or cpu, got {arguments.device}")
    if arguments.device == "cuda" and not arguments.dry and not torch.cuda.is_available():
        parser.error("DEVICE: expected a GPU that torch sees, got none; DEVICE=cpu rehearses with interpreted kernels")
    names = [part.name for part in RUNS[arguments.run](Settings(arguments.device, Path()))]
    if unknown := set(arguments.parts or ()) - set(names):
        parser.error(f"PARTS: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if not arguments.seconds > 0:
        parser.error(f"SECONDS_IN_ALL: expected a number greater than 0, got {arguments.seconds:g}")
    return arguments


def run_all(parts: list[Part], seconds: float) -> Iterator[Outcome]:
    """The outcome of each part; a part that time does not suffice for is left out, and says so."""
    began = time.monotonic()
    for number, part in enumerate(parts):
        scale = max(1.0, seconds / USUAL_SECONDS)
        later = sum(each.least for each in parts[number + 1 :] if not each.spare)
        left = seconds - OVERHEAD - (time.monotonic() - began)
        limit = min(part.most * scale, max(left - later, min(left, part.least)))
        if limit < part.least:
            yield Outcome(part.name, [f"left out: {part.name}, {left:.0f} s were left and it takes {part.least:.0f}"])
            continue
        print(f"== {time.monotonic() - began:3.0f} s: {part.name}, at most {limit:.0f} s", flush=True)
        yield run_part(part, limit)


def collect(outcomes: list[Outcome], settings: Settings, arguments: argparse.Namespace, began: float) -> None:
    """After each part: its log, the proposed table of what is fastest, and copies of what this run wrote."""
    log = (arguments.out or LOGS) / f"card-{arguments.run}.log"
    try:
        for folder in (log.parent, settings.results):
            folder.mkdir(parents=True, exist_ok=True)
        log.write_text("\n".join(line for outcome in outcomes for line in outcome.log) + "\n")
        propose(settings.results)
        if arguments.out is not None:
            files = sorted(path for path in settings.results.iterdir() if path.suffix in (".csv", ".json"))
            written = [path for path in files if path.stat().st_mtime >= began - 1]
            for path in written[: MOST_COPIES - 1]:
                shutil.copy(path, arguments.out)
    except OSError as error:
        outcomes[-1].verdicts.append(f"FAILED to write results: {error}")


def plan(parts: list[Part], arguments: argparse.Namespace) -> str:
    lines = [f"make card{'' if arguments.run == 'first' else '-more'}: {arguments.seconds:.0f} s in all"]
    for part in parts:
        how = "one after the other" if part.in_turns else "at once"
        lines.append(f"  {part.name}: at most {part.most:.0f} s, {len(part.jobs)} processes {how}")
        lines += [f"    {job.name}: {' '.join(map(str, job.command[1:]))}" for job in part.jobs]
    return "\n".join(lines)


def summary(outcomes: list[Outcome]) -> str:
    """All verdicts, part by part, and once more those that something is wrong: MOST_LINES at most, the worst kept."""
    bad = [line for outcome in outcomes for line in outcome.verdicts if line.startswith(BAD)]
    closing = [f"-- {len(bad)} wrong" if bad else "-- nothing wrong", *bad[:MOST_REPEATED]]
    for most in range(MOST_LINES, 0, -1):  # of a part
        lines = [line for outcome in outcomes for line in _shown(outcome, most)]
        if len(lines) + len(closing) + len(outcomes) + 2 <= MOST_LINES:  # progress comes before, and notes around them
            break
    return "\n".join([*lines, *closing])


def _shown(outcome: Outcome, most: int) -> list[str]:
    first_bad = sorted(range(len(outcome.verdicts)), key=lambda i: not outcome.verdicts[i].startswith(BAD))
    shown = [outcome.verdicts[i] for i in sorted(first_bad[:most])]
    left_out = len(outcome.verdicts) - len(shown)
    more = [f"   and {left_out} more lines in the log"] if left_out else []
    return [f"-- {outcome.name}, {outcome.seconds:.0f} s", *shown, *more]


def _usual_results(device: str) -> Path:
    """Where results belong; those of a rehearsal mean nothing and stay out of the repository."""
    return results_folder(device) if device == "cuda" and torch.cuda.is_available() else LOGS / "rehearsal"


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


if __name__ == "__main__":
    sys.exit(main())
