"""The run on a card: rehearsed on a CPU, and held against processes that crash, hang, and find no space."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import measure, process
from benchmarks.card import __main__ as card
from benchmarks.card import estimate, parts, processes, search_time
from benchmarks.card.processes import Job, Part, run_part
from benchmarks.card.smoke import checked_in_one_line, launch_others
from benchmarks.floors import TINY, Sizes
from benchmarks.measure import read_csv
from benchmarks.ops import Case, cases, forms_of, measure_pass
from ofb_kernels.kernels import masked_linear
from tests.fake_cuda import FakeCuda

ROOT = Path(__file__).parents[1]
WELL = "import sys\nprint('ready')\nseconds = sys.stdin.readline()\nprint('=> well, within', round(float(seconds)))"


def python(name: str, code: str, **options) -> Job:
    return Job(name, [sys.executable, "-c", f"import os, time\n{code}"], **options)


def make(target: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """`make card` as a user types it, in a rehearsal."""
    variables |= {"PYTHON": sys.executable, "DEVICE": "cpu", "OUT": str(folder)}
    words = [f"{name}={value}" for name, value in variables.items()]
    ours = ("TRITON_INTERPRET", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of these tests, and of the make that runs them
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(["make", target, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


# ---- rehearsals ----


@pytest.mark.parametrize("target", ["card", "card-more"])
def test_rehearsal(target, tmp_path):
    """The whole of it, with interpreted kernels: nothing is wrong, results are there, and the verdicts come last."""
    done = make(target, tmp_path / "out", SECONDS_IN_ALL="420")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "-- nothing wrong" and len(lines) <= card.MOST_LINES
    names = {"card": ["machine", "smoke", "tests", "step", "times"], "card-more": [
        "compiled steps", "other networks", "search", "memcheck", "racecheck", "other compiled steps", "compiled ops",
    ]}[target]  # fmt: skip
    assert [line.removeprefix("-- ").rsplit(",", 1)[0] for line in lines if line.startswith("-- ")][1:-1] == names
    assert not any("left out" in line for line in lines), done.stdout
    copies = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {
        "card": {"card-first.log", "ops.csv", "step-tiny-2-full-stream.csv"},
        "card-more": {"card-more.log", "ops.csv", "search.csv", "step-tiny-2-half-stream.csv"},
    }[target]
    assert expected <= copies and len(copies) <= card.MOST_COPIES
    variants = {row["variant"] for name in copies if name.endswith(".csv") for row in read_csv(tmp_path / "out" / name)}
    assert "triton" in variants


def test_plan():
    done = make("card", Path("unused"), DRY="1", PARTS="times")
    assert done.returncode == 0, done.stderr
    assert "times: at most 110 s" in done.stdout and "step" not in done.stdout
    assert re.search(r"one kernel takes \d\.\d+ s here", done.stdout), done.stdout


def test_estimate(monkeypatch):
    """Specialisations × seconds ÷ processes; how they are counted is tested with the sweep, in test_resources.py."""
    numbers = {"card": 140, "tests": 640}
    monkeypatch.setattr(estimate, "compile_all", lambda kinds, *_, count: [None] * numbers[kinds[0]])
    monkeypatch.setattr(estimate, "seconds_each", lambda: 0.5)
    _, smoke, tests = estimate.compile_estimate(["smoke", "times", "tests"]).splitlines()
    assert smoke.strip() == "smoke: 140 specialisations × 0.50 s ÷ 10 processes = 7 s"
    assert tests.strip() == "tests: 640 specialisations × 0.50 s ÷ 16 processes = 20 s"


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ({"PARTS": "speed"}, "PARTS: expected some of machine, smoke, tests, step, times, got speed"),
        ({"DEVICE": "gpu"}, "DEVICE: expected cuda or cpu, got gpu"),
        ({"SECONDS_IN_ALL": "-1"}, "SECONDS_IN_ALL: expected a number greater than 0, got -1"),
    ],
)
def test_wrong_variables(variable, message, monkeypatch, capsys):
    for name, value in ({"DEVICE": "cpu"} | variable).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["card", "first"])
    with pytest.raises(SystemExit):
        card.parse_arguments()
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["card", "first", "--device", "cuda"])
    with pytest.raises(SystemExit):
        card.parse_arguments()
    assert "expected a GPU that torch sees, got none" in capsys.readouterr().err


# ---- what goes wrong costs its own part ----


def run(monkeypatch, tmp_path, *tried: Part, seconds: float = 60.0, results: Path | None = None) -> tuple[int, str]:
    """The exit code and the summary of a run of these parts."""
    printed = []
    monkeypatch.setitem(parts.RUNS, "first", lambda settings: list(tried))
    options = ["--seconds", str(seconds), "--results", str(results or tmp_path / "results"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["card", "first", "--device", "cpu", *options])
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    code = card.main()
    return code, "\n".join(printed)


@pytest.mark.parametrize("in_turns", [False, True])
def test_crash_overrun_and_absence(in_turns, monkeypatch, tmp_path):
    """A child that kills itself, one that hangs with a child of its own, one that is not there: the others go on."""
    child = tmp_path / "child"
    start_child = "subprocess.Popen(['sleep', '60']).pid"
    hanging = f"import subprocess\nopen({str(child)!r}, 'w').write(str({start_child}))\ntime.sleep(60)"
    jobs = [
        python("first", WELL),
        python("crashing", "print('about to', flush=True)\nos.kill(os.getpid(), 9)"),
        python("hanging", hanging),
        python("failing", "raise SystemExit('no good')"),
        Job("absent", ["/no/such/tool"]),
        python("last", WELL),
    ]
    good = Part("good", [python("third", WELL)], 5, 1)
    code, text = run(monkeypatch, tmp_path, Part("bad", jobs, 5, 1, in_turns), good)
    assert code == 1
    assert text.count("well, within") == 3
    assert "DIED bad crashing: by signal 9; its last line: about to" in text
    assert "OVERRAN bad hanging" in text
    assert "DIED bad failing: with exit code 1; its last line: no good" in text
    assert "DIED bad absent: not started; its last line: cannot be started" in text
    assert text.splitlines()[-5] == "-- 4 wrong"
    state = Path("/proc", child.read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # killed, and perhaps not yet waited for


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_by_a_signal(monkeypatch, tmp_path, number):
    """What was said until then is shown, nothing runs on, and no later part begins."""
    pid = tmp_path / "pid"
    code = f"open({str(pid)!r}, 'w').write(str(os.getpid()))\nprint('=> said', flush=True)\ntime.sleep(60)"

    def interrupt(running, until):
        while "=> said" not in running[0].lines:
            time.sleep(0.05)
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError(f"expected {number!r} to interrupt; is it ignored, as in a shell's background?")

    monkeypatch.setattr(processes, "_run_together", interrupt)
    later = Part("later", [python("third", WELL)], 5, 1)
    code, text = run(monkeypatch, tmp_path, Part("slow", [python("slow", code)], 30, 1), later)
    assert code == 130 and "said" in text and "later" not in text and "OVERRAN" not in text
    assert text.splitlines()[-1] == "-- ended by a signal; what was measured until then is written"
    assert not Path("/proc", pid.read_text()).exists()


def test_no_time_left(monkeypatch, tmp_path):
    """A part takes no more than leaves the later ones their least; one for which too little is left is left out."""
    slow = python("slow", "time.sleep(60)")
    parts_ = [Part("slow", [slow], 30, 2), Part("short", [python("third", WELL)], 5, 3), Part("long", [slow], 90, 20)]
    code, text = run(monkeypatch, tmp_path, *parts_, seconds=20)
    assert code == 1 and "OVERRAN slow slow" in text and "well, within" in text
    assert re.search(r"left out: long, \d+ s were left and it takes 20", text)


def test_no_space_for_results(monkeypatch, tmp_path):
    """Where a folder should be there is a file: it is said, and every part runs."""
    (tmp_path / "file").touch()
    tried = Part("good", [python("third", WELL)], 5, 1), Part("other", [python("fourth", WELL)], 5, 1)
    code, text = run(monkeypatch, tmp_path, *tried, results=tmp_path / "file" / "results")
    assert code == 1 and text.count("well, within") >= 2
    assert text.count("FAILED to write results") >= 2


def test_a_benchmark_that_cannot_write_goes_on(tmp_path, capsys):
    (tmp_path / "file").touch()
    row = dict.fromkeys(measure.COLUMNS, "")
    measure.keep([row], tmp_path / "file" / "ops.csv")
    assert "is not written: File exists" in capsys.readouterr().out


def test_full_disk(tmp_path, capsys):
    """A limit on the size of files stands for a disk that is full: what was written before stays whole."""
    code = (
        "import resource, signal\nfrom pathlib import Path\nfrom benchmarks.measure import COLUMNS, keep\n"
        "path, row = Path('ops.csv'), dict.fromkeys(COLUMNS, 'before')\nkeep([row], path)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "keep([dict.fromkeys(COLUMNS, 'x' * 999)], path)\nprint('on')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "on", done.stderr
    assert "ops.csv is not written: File too large" in done.stdout
    assert [row["variant"] for row in read_csv(tmp_path / "ops.csv")] == ["before"]


def test_the_summary_keeps_what_is_wrong(monkeypatch, tmp_path):
    many = "for number in range(400): print('=> line', number)\nprint('=> WRONG the last')"
    code, text = run(monkeypatch, tmp_path, Part("wordy", [python("many", many)], 5, 1))
    assert code == 1 and len(text.splitlines()) <= card.MOST_LINES
    assert text.count("WRONG the last") == 2 and re.search(r"and \d+ more lines in the log", text)


def test_wrong_op(monkeypatch):
    """An op whose result is off is told with its error; one that raises, with what it raised."""
    case = next(case for case in cases(Sizes(2, **TINY), "cpu") if case.op == "masked_layer_norm")
    assert checked_in_one_line(case, "full", torch.float32).startswith("ok    masked_layer_norm full float32: 0.")
    import ofb_kernels

    op = ofb_kernels.masked_layer_norm

    def off(*, backend, **arguments):
        return op(backend=backend, **arguments) * (1.01 if backend == "triton" else 1.0)

    monkeypatch.setattr(ofb_kernels, "masked_layer_norm", off)
    line = checked_in_one_line(case, "full", torch.float32)
    assert line.startswith("WRONG masked_layer_norm full float32") and "exceeds the bound" in line
    monkeypatch.setattr(ofb_kernels, "masked_layer_norm", None)
    assert checked_in_one_line(case, "full", torch.float32).startswith("FAILED masked_layer_norm full float32: Type")


# ---- turns ----


def test_a_turn_begins_when_it_is_told(monkeypatch):
    """Not when the process was ready: it may have waited for long."""

    class Told:
        def readline(self):
            time.sleep(0.3)
            return "5\n"

    monkeypatch.setenv(process._TURN_ENDS, "")
    monkeypatch.delenv(process._TURN_ENDS)
    monkeypatch.setattr(sys, "stdin", Told())
    until = process.take_turn(Namespace(turn=True, device="cpu", seconds=math.inf))
    assert until - time.monotonic() > 4.9


# ---- a failed variant costs its own row ----


def test_variants_that_fail(capsys):
    """While one is made, at its first call, and in the middle of timing."""
    calls = []

    def in_the_third_call():
        calls.append(0)
        assert len(calls) < 3, "the third call"

    makers = {
        "fine": lambda: lambda: None,
        "not made": lambda: {}["no such key"],
        "not called": lambda: lambda: torch.zeros(2) @ torch.zeros(3),
        "not for long": lambda: in_the_third_call,
    }
    runs = measure.that_run(makers)
    assert list(runs) == ["fine", "not for long"]
    about = {"benchmark": "op", "subject": "sum", "batch_size": 1, "size": "full", "pass": "forward"}
    rows = measure.measure(runs, "not for long", "cpu", 5, None, about)
    assert [(row["variant"], row["base"]) for row in rows] == [("fine", "fine")]
    out = capsys.readouterr().out
    assert "=> FAILED not made: KeyError: 'no such key'" in out and "FAILED not for long: AssertionError" in out


def test_an_unusable_device_begins_again_without_the_variant(monkeypatch, capsys):
    begun = []

    def refuse():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(process, "synchronize", refuse)
    monkeypatch.setattr(os, "execv", lambda program, words: begun.append(words))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.ops", "--device", "cuda"])
    with process.own_row("triton (graph)"):
        refuse()
    assert begun == [[sys.executable, "-m", "benchmarks.ops", "--device", "cuda", "--without", "triton (graph)"]]


def test_what_is_left_out_is_not_called():
    """Neither timed nor launched to see its configurations: else the command would begin again for ever."""

    class Unusable(Case):
        def run(self, backend):
            assert backend != "triton", "called"
            return super().run(backend)

    found = next(case for case in cases(Sizes(2, **TINY), "cpu") if case.op == "masked_mlp")
    case = Unusable(found.op, found.inputs, found.options)
    forms, choices = forms_of(case, "both", "cpu", compiled=False, without=["triton"])
    assert list(forms) == ["folded", "reference"] and choices == {}
    launch_others(case, "full", ["masked_mlp full"])
    with pytest.raises(AssertionError, match="called"):
        case.run("triton")


def test_configurations_hold_in_the_backward_too(monkeypatch):
    """Each timed form of a pass runs the one kernel that it names in the configuration that it names."""
    launched = []
    kernel = masked_linear._backward_kernel

    class Noted:
        def __getitem__(self, grid):
            return lambda *tensors, **options: launched.append(options["BLOCK_N"]) or kernel[grid](*tensors, **options)

    monkeypatch.setattr(masked_linear, "_backward_kernel", Noted())
    case = next(case for case in cases(Sizes(2, **TINY), "cpu") if case.op == "masked_linear")
    arguments = Namespace(device="cpu", no_compile=True, without=[], rounds=1)
    monkeypatch.setattr("benchmarks.ops.that_run", lambda makers, _: {name: make() for name, make in makers.items()})
    seen = {}
    monkeypatch.setattr("benchmarks.ops.measure", lambda runs, *_, **__: seen.update(runs) or [])
    measure_pass(case, "both", arguments, None, {}, math.inf)
    defaults, others = masked_linear.BACKWARD_CONFIGURATIONS[:1], masked_linear.BACKWARD_CONFIGURATIONS[1:]
    expected = {"triton": defaults[0]["BLOCK_N"]}
    expected |= {f"triton, backward {c['BLOCK_M']}×{c['BLOCK_N']}×{c['STEPS']} w4 s2": c["BLOCK_N"] for c in others}
    for name, block in expected.items():
        launched.clear()
        seen[name]()
        assert launched == [block]


def test_an_exception_in_a_captured_region(monkeypatch, capsys):
    """The next capture and the next random draw work, on a fake of torch.cuda that breaks as the real one does."""
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    failing = iter([False] * 3 + [True])  # after the three calls that warm up
    streams = []

    def run():
        streams.append(cuda.stream)
        cuda.draw()
        if next(failing, False):
            raise AssertionError("inside the captured region")

    runs = measure.with_graphs({"failing": run, "fine": cuda.draw}, ["failing", "fine"])
    assert list(runs) == ["failing", "fine", "fine (graph)"]
    assert "FAILED failing (graph): AssertionError: inside the captured region" in capsys.readouterr().out
    cuda.draw()
    assert cuda.stream is cuda.default_stream and not cuda.open_pools
    assert len(streams) == 4 and len(set(map(id, streams))) == 1  # warmed up where it is captured


def test_turns(monkeypatch, tmp_path):
    """Nobody measures while another does; who never gets ready has no turn."""
    log = tmp_path / "log"
    turn = (
        "import sys\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        f"for word in ('begin', 'end'):\n    open({str(log)!r}, 'a').write(word + ' ')\n    time.sleep(0.1)"
    )
    jobs = [python(str(number), turn) for number in range(3)] + [python("never ready", "time.sleep(60)")]
    outcome = run_part(Part("turns", jobs, 6, 1, in_turns=True), 6)
    assert log.read_text().split() == ["begin", "end"] * 3
    assert [line.split(":")[0] for line in outcome.verdicts] == ["OVERRAN turns never ready"]


def test_test_pieces_are_the_whole():
    """Every attention test runs in exactly one of the processes."""
    assert all((ROOT / which[0]).exists() for which in parts.TESTS.values())
    pieces = [list(which) for which in parts.TESTS.values() if which[0] == parts.ATTENTION]
    code = (
        "import json, sys, pytest\nfound = []\n"
        "class Collect:\n    def pytest_collection_finish(self, session):\n"
        "        found.append([item.nodeid for item in session.items])\n"
        "for which in json.loads(sys.argv[1]):\n"
        "    pytest.main(['--collect-only', '-q', *which], plugins=[Collect()])\n"
        "print('\\n' + json.dumps(found))"
    )
    command = [sys.executable, "-c", code, json.dumps([[parts.ATTENTION], *pieces])]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    whole, *found = json.loads(printed.splitlines()[-1])
    assert len(whole) > 100 and sorted(test for piece in found for test in piece) == sorted(whole)


def test_a_search_is_compared_after_as_many_pruning_events():
    clocks = moments({"triton": [1.0, 2.0, 4.0], "reference": [4.0, 9.0]})
    assert search_time.after_events(clocks) == {"triton": (4.0, 1.0, 2), "reference": (9.0, 4.5, 1)}
    assert search_time.compared(clocks) == [
        "search, after 1 pruning event: reference takes 4.5 × the time of triton, its step 4.50 ×"
    ]
    ahead = moments({"triton": [1.0, 2.0], "folded + compile": [3.0, 5.0, 9.0]})
    assert search_time.after_events(ahead)["folded + compile"] == (5.0, 2.5, 1)
    assert search_time.steps_after_events(ahead, "folded + compile") == [
        (pytest.approx(0.3), pytest.approx(3.0), 0),
        (pytest.approx(0.5), pytest.approx(2.5), 1),
    ]


def moments(clocks: dict[str, list[float]]) -> dict[str, list[search_time.Moment]]:
    """Steps that take a tenth of the clock."""
    return {name: [search_time.Moment(each, each / 10) for each in seconds] for name, seconds in clocks.items()}
