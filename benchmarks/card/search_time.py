"""A short search on the clock: steps and pruning events, with the captures and compilations that new sizes cost.

    python -m benchmarks.card.search_time --device cuda

Every submodule loses its largest size at each event, so that all shapes change, as in the first half of a search. All
run the package's own training step as a CUDA graph: on Triton kernels, with folded masks and plain norms compiled by
Inductor, and as the paper writes it. They share the time; two are compared after as many events as both have behind
them. Beside the clock stands what one step takes at each size, once it is captured.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.floors import MODELS, Sizes
from benchmarks.measure import COLUMNS, environment, keep, results_folder, synchronize
from benchmarks.process import add_process_options, own_row, take_turn, verdict
from benchmarks.step import VARIANTS, Variant, lowest_target, plain_norms, shrink, timm_model
from ofb import SearchConfig, Supernet
from ofb.engine.optimization import Optimization, make_optimizer

RIVALS = ("triton", "folded + plain norm + compile", "reference")


class Moment(NamedTuple):
    """The end of the steps behind a pruning event, or before the first one: seconds from the start, and of a step."""

    seconds: float
    step: float


def main() -> None:
    arguments = parse_arguments()
    until = take_turn(arguments)
    torch._dynamo.config.recompile_limit = 10 * arguments.prunes  # the default would give up at the eighth size
    with tempfile.TemporaryDirectory() as caches:  # what was compiled before would come for nothing
        os.environ |= {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        clocks = searches(arguments, until)
    for line in compared(clocks):
        verdict(line)


def searches(arguments: argparse.Namespace, until: float) -> dict[str, list[Moment]]:
    """Of each rival, the moments behind its pruning events, as many as time allows."""
    clocks: dict[str, list[Moment]] = {}
    names = [name for name in arguments.variants if name not in arguments.without]
    for number, name in enumerate(names):
        ends = time.monotonic() + (until - time.monotonic()) / (len(names) - number)
        with own_row(name):
            for moment in prunes_on_the_clock(arguments, VARIANTS[name]):
                clocks.setdefault(name, []).append(moment)
                report(clocks, arguments)
                events = counted(len(clocks[name]) - 1)
                print(f"{name}: {moment.seconds:.1f} s, {events}, a step {1e3 * moment.step:.2f} ms", flush=True)
                if time.monotonic() > ends:
                    break
            verdict(in_words(name, clocks[name], arguments))
    return clocks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(MODELS), default="deit_small")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--prunes", type=int, default=8, help="pruning events")
    parser.add_argument("--steps", type=int, default=20, help="steps before each event and after the last one")
    parser.add_argument("--variants", nargs="+", choices=RIVALS, default=RIVALS, help="these, the first is the base")
    parser.add_argument("--output", type=Path, help="folder of search.csv; default: benchmarks/results/<device>")
    add_process_options(parser)
    return parser.parse_args()


def prunes_on_the_clock(arguments: argparse.Namespace, variant: Variant) -> Iterator[Moment]:
    """The moments behind no pruning event, behind the first one, and so on. The second half of the steps before each
    is timed: by then the step is captured."""
    device, on_gpu = torch.device(arguments.device), arguments.device == "cuda"
    torch.manual_seed(0)
    side = Sizes(1, **MODELS[arguments.model]).side
    images = torch.randn(arguments.batch_size, 3, side, side, device=device)
    targets = torch.randint(0, 1000, (arguments.batch_size,), device=device)
    model, target = timm_model(arguments.model).to(device), lowest_target(arguments.model)
    supernet = Supernet(model, target=target, backend=variant.backend)
    config = SearchConfig(device=str(device), batch_size=arguments.batch_size, amp=on_gpu, cuda_graph=on_gpu)
    optimizer = make_optimizer(supernet.parameter_groups(), config, lr_at_256=2.5e-4)
    loss = torch.compile(supernet.loss) if variant.compile_mode else supernet.loss

    def losses(images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with plain_norms() if variant.plain_norm else nullcontext():
            return {"loss": loss(images, targets).total}

    optimization = Optimization(optimizer, losses, config, 0, 1000, device, revision=lambda: supernet.revision)
    start = time.monotonic()
    for event in range(arguments.prunes + 1):
        if event:
            shrink(supernet, optimizer)
        timed = (arguments.steps + 1) // 2
        for step in range(arguments.steps):
            if step == arguments.steps - timed:
                synchronize()
                step_start = time.monotonic()
            optimization.step(images, targets)
        synchronize()
        if on_gpu and (optimization.graph is None or optimization.graph.graph is None):
            raise RuntimeError("the step could not be captured: its time would not be that of a graph")
        yield Moment(time.monotonic() - start, (time.monotonic() - step_start) / timed)


def report(clocks: dict[str, list[Moment]], arguments: argparse.Namespace) -> None:
    """Rows of the schema: each one's clock after as many pruning events as it and the first one have behind them, and
    its step at each of these sizes."""
    device, base = arguments.device, next(iter(clocks))
    about = {"benchmark": "search", "subject": f"{arguments.model}, {arguments.steps} steps between pruning events"}
    about |= {"batch_size": arguments.batch_size, "size": "full", "base": base}
    about |= {"graph": device == "cuda", "rounds": 1} | environment(device)
    timed = [("search", name, *after) for name, after in after_events(clocks).items()]
    timed += [("a step of the search", name, *step) for name in clocks for step in steps_after_events(clocks, name)]
    rows = []
    for what, name, seconds, ratio, events in timed:
        times = dict.fromkeys(("ms_20", "ms", "ms_80"), round(1e3 * seconds, 3))
        ratios = dict.fromkeys(("over_base_20", "over_base", "over_base_80"), round(ratio, 4))
        row = about | times | ratios | {"pass": what, "variant": name, "shape": counted(events)}
        rows.append({column: row.get(column) for column in COLUMNS})
    keep(rows, (arguments.output or results_folder(device)) / "search.csv")


def after_events(clocks: dict[str, list[Moment]]) -> dict[str, tuple[float, float, int]]:
    """Of each: seconds, their ratio to the first one's, and the pruning events that both have behind them by then."""
    base = next(iter(clocks.values()))
    last = {name: min(len(moments), len(base)) - 1 for name, moments in clocks.items()}
    return {name: (clocks[name][n].seconds, clocks[name][n].seconds / base[n].seconds, n) for name, n in last.items()}


def steps_after_events(clocks: dict[str, list[Moment]], name: str) -> list[tuple[float, float, int]]:
    """Of one: seconds of a step, their ratio to the first one's, and the pruning events that both have behind them."""
    pairs = zip(clocks[name], next(iter(clocks.values())), strict=False)
    return [(own.step, own.step / base.step, events) for events, (own, base) in enumerate(pairs)]


def in_words(name: str, moments: list[Moment], arguments: argparse.Namespace) -> str:
    whole = f"{len(moments) - 1} of {arguments.prunes} pruning events, {arguments.steps} steps around each"
    steps = f"a step {1e3 * moments[0].step:.2f} ms at first, {1e3 * moments[-1].step:.2f} at last"
    return f"search {arguments.model} {arguments.batch_size} {name}: {moments[-1].seconds:.1f} s for {whole}; {steps}"


def compared(clocks: dict[str, list[Moment]]) -> list[str]:
    base, *rivals = after_events(clocks).items()
    lines = []
    for name, (_, ratio, events) in rivals:
        step = steps_after_events(clocks, name)[events][1]
        times = f"{name} takes {ratio:.1f} × the time of {base[0]}, its step {step:.2f} ×"
        lines.append(f"search, after {counted(events)}: {times}")
    return lines


def counted(events: int) -> str:
    return f"{events} pruning event" + "s" * (events != 1)


if __name__ == "__main__":
    main()
