"""What is run on a card, in which order and for how long: two runs of five minutes each.

`first` says whether everything is right and how fast ops and steps are; `more` brings the compiled rivals, larger and
pruned networks, a whole search on the clock, and the memory checker. On a CPU the same parts run at tiny sizes, with
interpreted kernels: a rehearsal.
"""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.card.processes import Job, Part
from benchmarks.floors import OPS

ALL_OPS = ("bimask", "candidate_statistics", *OPS)
# The strongest rivals first, and apart: five compilers at once keep 16 cores busy for more than two minutes.
RIVALS = ("dense + compile", "folded + compile", "folded + plain norm + compile")
OTHERS_COMPILED = ("triton + compile", "folded + compile max-autotune")
ATTENTION = "tests/test_masked_attention.py"
# What each process of the op tests runs; long modules in pieces that together are the whole.
TESTS = {
    **{name: (f"tests/test_{name}.py",) for name in (
        "bimask", "candidate_statistics", "masked_linear", "masked_mlp", "masked_layer_norm", "masked_add_layer_norm",
        "local_norm", "masked_reconstruction_loss", "dispatch", "eager", "nn", "deit_shapes", "tuning", "cuda_graph",
        "resume_on_a_gpu",
    )},
    "attention, head widths": (ATTENTION, "-k", "every_head_dim"),
    "attention, shapes": (ATTENTION, "-k", "any_shape and not every_head_dim"),
    "attention, biases": (ATTENTION, "-k", "(bias or window or hidden) and not any_shape and not every_head_dim"),
    "attention, others": (ATTENTION, "-k", "not (bias or window or hidden or any_shape or every_head_dim)"),
    "supernet": ("tests/test_supernet.py", "-k", "agrees or autocast"),
}  # fmt: skip
REHEARSED_TESTS = {"dispatch": TESTS["dispatch"]}
COUNTS = re.compile(r"\d+ (passed|failed|skipped|error|deselected).* in ")
SANITIZED = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


@dataclass(frozen=True)
class Settings:
    """What the parts depend on.

    Args:
        device: "cuda", or "cpu" to rehearse.
        results: folder of the CSVs.
    """

    device: str
    results: Path

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    def module(self, name: str, module: str, *arguments: str) -> Job:
        """A benchmark of this package as a job that takes its turn."""
        environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if self.rehearsal else {}
        command = [sys.executable, "-m", module, *arguments, "--device", self.device, "--turn"]
        return Job(name, command, environment)

    @property
    def model(self) -> list[str]:
        return ["--model", "tiny" if self.rehearsal else "deit_small"]

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that are timed and watched; in a rehearsal one, the others would do the same."""
        return ("masked_linear",) if self.rehearsal else ALL_OPS

    @property
    def into(self) -> list[str]:
        return ["--output", str(self.results)]


def first(settings: Settings) -> list[Part]:
    """Right, then fast: everything that needs no compiler but Triton's."""
    checked_ops = ("bimask", *settings.ops) if settings.rehearsal else ALL_OPS  # bimask is checked in another way
    smoke = [settings.module(op, "benchmarks.card.smoke", op, *settings.model) for op in checked_ops]
    batches = ["2"] if settings.rehearsal else ["256", "64"]
    variants = ["--variants", "dense", "folded", "triton", "reference"]
    steps = [_step(settings, f"batch {batch}", "--batch-size", batch, *variants) for batch in batches]
    few = ["--batch-size", "2"] if settings.rehearsal else ["--batch-size", "16"]
    checked = settings.module("gradients and graph", "benchmarks.card.supernet_step", *settings.model, *few)
    times = [_times(settings, op, "--no-compile", "--size", "full", "pruned") for op in settings.ops]
    return [
        Part("machine", [settings.module("machine", "benchmarks.card.machine")], most=40, least=5),
        Part("smoke", smoke, most=75, least=20),
        Part("tests", _tests(settings), most=110, least=25),
        Part("step", [checked, *steps], most=80, least=45, in_turns=True),
        Part("times", times, most=110, least=40, in_turns=True),
    ]


def more(settings: Settings) -> list[Part]:
    """The rivals that a compiler makes, larger and smaller networks, a search on the clock, the memory checker."""
    rivals, others = (
        [_step(settings, name, "--variants", "dense", name, "triton") for name in names]
        for names in ((RIVALS[:1], OTHERS_COMPILED[:1]) if settings.rehearsal else (RIVALS, OTHERS_COMPILED))
    )
    base = [] if settings.rehearsal else [_step(settings, "deit_base", "--model", "deit_base", "--batch-size", "128")]
    half = _step(settings, "half", "--size", "half", "--variants", "dense", "folded", "triton")
    short = ["--batch-size", "2", "--prunes", "1", "--steps", "1"] if settings.rehearsal else []
    search = settings.module("search", "benchmarks.card.search_time", *settings.model, *settings.into, *short)
    compiled_ops = [_times(settings, op, "--size", "full") for op in settings.ops]
    memcheck, racecheck = (
        [_sanitized(settings, tool, op) for op in settings.ops] for tool in ("memcheck", "racecheck")
    )
    return [
        Part("compiled steps", rivals, most=160, least=60, in_turns=True),
        Part("other networks", [*base, half], most=45, least=20, in_turns=True),
        Part("search", [search], most=100, least=45, in_turns=True),
        Part("memcheck", memcheck, most=60, least=35),
        Part("racecheck", racecheck, most=60, least=35, spare=True),
        Part("other compiled steps", others, most=160, least=60, in_turns=True, spare=True),
        Part("compiled ops", compiled_ops, most=100, least=50, in_turns=True, spare=True),
    ]


def _times(settings: Settings, op: str, *options: str) -> Job:
    few = ["--batch-size", "2", "--rounds", "1"] if settings.rehearsal else []
    usual = ["--op", op, "--quick", *settings.model, *settings.into, *few]
    return settings.module(op, "benchmarks.ops", *usual, *options)


def _step(settings: Settings, name: str, *options: str) -> Job:
    usual = ["--quick", *settings.model, *settings.into]
    if settings.rehearsal:
        usual += ["--batch-size", "2", "--rounds", "1"]
    return settings.module(name, "benchmarks.step", *usual, *options)


def _tests(settings: Settings) -> list[Job]:
    chosen = REHEARSED_TESTS if settings.rehearsal else TESTS
    options = ["-q", "-p", "no:cacheprovider", "--maxfail", "15", "--tb", "short", "-r", "fE"]
    environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "250"}  # of the terminal: how much of a failure is told
    return [
        Job(name, [sys.executable, "-m", "pytest", *options, *which], environment, partial(_read_tests, name))
        for name, which in chosen.items()
    ]


def _read_tests(name: str, lines: list[str], code: int | None) -> list[str]:
    """The closing line, and each failure with what its assertion said."""
    failed = [f"FAILED {line.split(' ', 1)[1]}" for line in lines if line.startswith(("FAILED tests", "ERROR tests"))]
    counts = [line.strip("= ") for line in lines if COUNTS.search(line)]
    return [f"{'ok   ' if code == 0 else '     '} tests, {name}: {line}" for line in counts[-1:]] + failed


def _sanitized(settings: Settings, tool: str, op: str) -> Job:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    watch = [] if settings.rehearsal else [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command = [*watch, sys.executable, "-m", "benchmarks.card.tiny_case", op, "--device", settings.device]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that the tool sees where each tensor ends
    if settings.rehearsal:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return Job(op, command, environment, partial(_read_sanitizer, tool, op))


def _read_sanitizer(tool: str, op: str, lines: list[str], code: int | None) -> list[str]:
    found = [int(next(filter(None, match.groups()))) for match in map(SANITIZED.search, lines) if match]
    if code == 0:
        return [f"ok    {tool} {op}"]
    return [f"WRONG {tool} {op}: {sum(found)} errors"] if code == 9 else []


RUNS: dict[str, Callable[[Settings], list[Part]]] = {"first": first, "more": more}
