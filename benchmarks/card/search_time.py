"""A short search on the clock: steps and pruning events, with the captures and compilations that new sizes cost.

    python -m benchmarks.card.search_time --device cuda

Every submodule loses its largest size at each event, so that all shapes change, as in the first half of a search. All
run the package's own training step as a CUDA graph: on Triton kernels, with folded masks compiled by Inductor, and as
the paper writes it. They share the time; two are compared after as many events as both have behind them.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.floors import MODELS, Sizes
from benchmarks.measure import COLUMNS, environment, keep, results_folder, synchronize
from benchmarks.process import add_process_options, own_row, take_turn, verdict
from benchmarks.step import lowest_target, shrink, timm_model
from ofb import SearchConfig, Supernet
from ofb.engine.optimization import Optimization, make_optimizer

RIVALS = {  # ops backend, compiled
    "triton": ("triton", False),
    "folded + compile": ("eager", True),
    "reference": ("reference", False),
}


def main() -> None:
    arguments = parse_arguments()
    until = take_turn(arguments)
    torch._dynamo.config.recompile_limit = 10 * arguments.prunes  # the default would give up at the eighth size
    with tempfile.TemporaryDirectory() as caches:  # what was compiled before would come for nothing
        os.environ |= {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        clocks = searches(arguments, until)
    for line in compared(clocks):
        verdict(line)


def searches(arguments: argparse.Namespace, until: float) -> dict[str, list[float]]:
    """Of each rival, seconds until the end of the steps behind each pruning event."""
    clocks: dict[str, list[float]] = {}
    names = [name for name in RIVALS if name not in arguments.without]
    for number, name in enumerate(names):
        backend, compiled = RIVALS[name]
        ends = time.monotonic() + (until - time.monotonic()) / (len(names) - number)
        with own_row(name):
            for seconds in prunes_on_the_clock(arguments, backend, compiled):
                clocks.setdefault(name, []).append(seconds)
                report(clocks, arguments)
                print(f"{name}: {seconds:.1f} s, {len(clocks[name]) - 1} pruning events", flush=True)
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
    parser.add_argument("--output", type=Path, help="folder of search.csv; default: benchmarks/results/<device>")
    add_process_options(parser)
    return parser.parse_args()


def prunes_on_the_clock(arguments: argparse.Namespace, backend: str, compiled: bool) -> Iterator[float]:
    """Seconds from the start to the end of the steps behind no pruning event, behind the first one, and so on."""
    device, on_gpu = torch.device(arguments.device), arguments.device == "cuda"
    torch.manual_seed(0)
    side = Sizes(1, **MODELS[arguments.model]).side
    images = torch.randn(arguments.batch_size, 3, side, side, device=device)
    targets = torch.randint(0, 1000, (arguments.batch_size,), device=device)
    supernet = Supernet(timm_model(arguments.model).to(device), target=lowest_target(arguments.model), backend=backend)
    config = SearchConfig(device=str(device), batch_size=arguments.batch_size, amp=on_gpu, cuda_graph=on_gpu)
    optimizer = make_optimizer(supernet.parameter_groups(), config, lr_at_256=2.5e-4)
    loss = torch.compile(supernet.loss) if compiled else supernet.loss

    def losses(images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": loss(images, targets).total}

    optimization = Optimization(optimizer, losses, config, 0, 1000, device, revision=lambda: supernet.revision)
    start = time.monotonic()
    for event in range(arguments.prunes + 1):
        if event:
            shrink(supernet, optimizer)
        for _ in range(arguments.steps):
            optimization.step(images, targets)
        synchronize()
        if on_gpu and (optimization.graph is None or optimization.graph.graph is None):
            raise RuntimeError("the step could not be captured: its time would not be that of a graph")
        yield time.monotonic() - start


def report(clocks: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    """A row of the schema for each, after as many pruning events as it and the first one have behind them."""
    device, base = arguments.device, next(iter(clocks))
    about = {"benchmark": "search", "subject": f"{arguments.model}, {arguments.steps} steps between pruning events"}
    about |= {"batch_size": arguments.batch_size, "size": "full", "pass": "search", "base": base}
    about |= {"graph": device == "cuda", "rounds": 1} | environment(device)
    rows = []
    for name, (seconds, ratio, events) in after_events(clocks).items():
        times = dict.fromkeys(("ms_20", "ms", "ms_80"), round(1e3 * seconds, 1))
        ratios = dict.fromkeys(("over_base_20", "over_base", "over_base_80"), round(ratio, 4))
        row = about | times | ratios | {"variant": name, "shape": f"{events} pruning events"}
        rows.append({column: row.get(column) for column in COLUMNS})
    keep(rows, (arguments.output or results_folder(device)) / "search.csv")


def after_events(clocks: dict[str, list[float]]) -> dict[str, tuple[float, float, int]]:
    """Of each: seconds, their ratio to the first one's, and the pruning events that both have behind them by then."""
    base = next(iter(clocks.values()))
    shared = {name: min(len(seconds), len(base)) - 1 for name, seconds in clocks.items()}
    return {name: (clocks[name][n], clocks[name][n] / base[n], n) for name, n in shared.items()}


def in_words(name: str, seconds: list[float], arguments: argparse.Namespace) -> str:
    whole = f"{len(seconds) - 1} of {arguments.prunes} pruning events, {arguments.steps} steps around each"
    return f"search {arguments.model} {arguments.batch_size} {name}: {seconds[-1]:.1f} s for {whole}"


def compared(clocks: dict[str, list[float]]) -> list[str]:
    base, *rivals = after_events(clocks).items()
    return [
        f"search, after {events} pruning events: {name} takes {ratio:.1f} × the time of {base[0]}"
        for name, (_, ratio, events) in rivals
    ]


if __name__ == "__main__":
    main()
