"""What every kernel takes of a GPU in every launch of a list, of a run on a card and of the op tests: no GPU is needed.

    python -m benchmarks.resources [--arch 90] [--launches card shapes tests] [--processes 2] [--json]
    python -m benchmarks.resources --count          # how many specialisations there are, without compiling one

Triton's cache on disk keeps what was compiled: a second run takes seconds.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context

from benchmarks.compile_only import MULTIPROCESSORS, Compiled, launches

KINDS = ("card", "shapes", "tests")


@dataclass(frozen=True)
class Piece:
    """What one process compiles at a time: one op in one precision at the shapes, one module of tests."""

    kind: str
    names: tuple[str, ...]
    arch: int
    count: bool

    def run(self) -> list[Compiled]:
        from benchmarks.launch_card import run_card
        from benchmarks.launch_shapes import run_shapes
        from benchmarks.launch_tests import run_tests

        with launches(self.arch, self.count) as recorder:
            {"shapes": run_shapes, "card": run_card, "tests": run_tests}[self.kind](*self.names, recorder)
        return list(recorder.compiled.values())


def pieces(kinds: list[str], arch: int, count: bool) -> Iterator[Piece]:
    from benchmarks.launch_card import RUNS
    from benchmarks.launch_shapes import LAUNCHES, PRECISIONS
    from benchmarks.launch_tests import MODULES

    names = {
        "shapes": [(op, precision) for op in LAUNCHES for precision in PRECISIONS],
        "card": [(run,) for run in RUNS],
        "tests": [(module,) for module in MODULES],
    }
    return (Piece(kind, each, arch, count) for kind in kinds for each in names[kind])


def compile_all(kinds: list[str], arch: int, processes: int = 1, count: bool = False) -> list[Compiled]:
    """Every specialisation that these launches ask for, once, on compute capability `arch` (90: H100 and H200)."""
    os.environ["TRITON_INTERPRET"] = "0"  # in the processes below: an interpreted kernel cannot be compiled
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        rows = chain.from_iterable(pool.map(Piece.run, pieces(kinds, arch, count)))
        compiled: dict[tuple[str, str], Compiled] = {}
        for row in rows:
            compiled.setdefault((row.kernel, row.key), row)
    return list(compiled.values())


def main() -> None:
    arguments = parse_arguments()
    options = arguments.processes, arguments.count
    rows = [row for arch in arguments.arch for row in compile_all(arguments.launches, arch, *options)]
    if arguments.count:
        print(len(rows))
    elif arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print_table(rows)
    if any(row.error for row in rows):
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[90], choices=sorted(MULTIPROCESSORS), help="compute capabilities"
    )
    parser.add_argument("--launches", nargs="+", default=list(KINDS), choices=KINDS, help="which launches to compile")
    parser.add_argument("--processes", type=int, default=1, help="compile in so many processes")
    parser.add_argument("--count", action="store_true", help="print the number of specialisations, compile none")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def print_table(rows: list[Compiled]) -> None:
    """One line for each specialisation, then for each architecture what stands out."""
    print(f"{'kernel':44} {'sm':>3} {'dtype':9} {'regs':>4} {'stack':>5} {'shared':>7} {'occupancy':>9} {'access':>6}")
    for row in rows:
        figures = f"{row.registers:4} {row.stack:5} {row.shared:7} {row.occupancy:9.0%} {row.access:6}"
        tile = " ".join(f"{k.lower()}={v}" for k, v in row.options.items() if k.startswith(("BLOCK", "num_", "STEPS")))
        instructions = "+".join(row.instructions)
        print(f"{row.kernel:44} {row.arch:3} {row.dtype:9} {figures}  {tile} {instructions} ({row.source})")
    for row in rows:
        if row.error:
            print(f"FAILED {row.kernel} sm_{row.arch}, {row.source}: {row.error}")
    for arch, number in Counter(row.arch for row in rows).items():
        found = [row for row in rows if row.arch == arch]
        limit = MULTIPROCESSORS[arch].shared_of_block
        print(
            f"sm_{arch}: {number} specialisations, {sum(row.error is not None for row in found)} failures, "
            f"{sum(row.stack > 0 for row in found)} with a stack, {sum(row.shared > limit for row in found)} larger "
            f"than the {limit // 1024} KiB of shared memory a block may have; "
            f"{sum(row.seconds for row in found):.0f} s to compile"
        )


if __name__ == "__main__":
    main()
