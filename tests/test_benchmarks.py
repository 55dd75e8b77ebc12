"""The benchmarks measure what they say, and the results page says what was measured."""

import subprocess
import sys
from argparse import Namespace

import pytest
import timm
import torch
import torch.nn.functional as F

import ofb_kernels
from benchmarks import floors, page, scaling
from benchmarks.floors import SIZES, TINY, Rates, Sizes
from benchmarks.measure import (
    COLUMNS,
    ROOT,
    heaviest,
    interleave,
    launches,
    measure,
    quantiles,
    ratio_to,
    read_csv,
    that_run,
    write_csv,
)
from benchmarks.ops import PASSES, SHAPES, cases, forms_of, pass_of
from benchmarks.step import VARIANTS, halve, make_network, make_step, make_steps, shrink, timm_model
from ofb import Supernet
from ofb.supernet.families import count_macs


def test_quantiles_and_ratios():
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)
    assert ratio_to({"a": [1.0, 4.0], "b": [2.0, 2.0]}, "b")["a"] == pytest.approx((0.8, 1.25, 1.7))


def test_variants_run_in_turn():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleave(runs, "cpu", rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_rows_follow_the_schema(tmp_path):
    runs = {"base": lambda: sum(range(1000)), "slow": lambda: sum(range(100_000))}
    about = {"benchmark": "op", "subject": "sum", "batch_size": 1, "size": "full", "pass": "forward"}
    rows = measure(runs, "base", "cpu", 5, None, about)
    write_csv(rows, tmp_path / "some-cpu" / "ops.csv")
    base, slow = read_csv(tmp_path / "some-cpu" / "ops.csv")
    assert tuple(base) == COLUMNS
    assert float(base["over_base"]) == 1 and float(slow["over_base"]) > 10
    text = page.page(tmp_path)
    assert "| slow |" in text and "Not measured" in text


def test_attention_floor_is_that_of_paper_and_pencil():
    """B 256, H 6, N 197, d 64: 155 MB and 15.3 GFLOP forward, 310 MB and 38 GFLOP backward."""
    (forward,), (backward,) = floors.masked_attention(Sizes(256, **SIZES["deit_small"]))
    assert forward.bytes == pytest.approx(155e6, rel=0.01) and forward.operations == pytest.approx(15.3e9, rel=0.01)
    assert backward.bytes == pytest.approx(310e6, rel=0.01) and backward.operations == pytest.approx(38.2e9, rel=0.01)
    assert forward.seconds(Rates()) == pytest.approx(36e-6, rel=0.01)


@pytest.mark.parametrize("model", list(SIZES))
def test_step_floor_counts_the_macs_of_the_network(model):
    """Forward and both gradients: 6 operations a MAC, the images' gradient left out, the decoder put in."""
    sizes = Sizes(4, **SIZES[model])
    network = timm.create_model(f"{model}_patch16_224")
    operations = sum(group.operations for group in floors.step(sizes))
    assert operations == pytest.approx(6 * 4 * count_macs(network), rel=0.03)


@pytest.mark.parametrize("model", list(SIZES))
def test_halve_prunes_to_the_sizes_of_the_floor(model):
    supernet = Supernet(timm.create_model(f"{model}_patch16_224"), target="15%")
    halve(supernet)
    half = Sizes(1, **SIZES[model]).halved()
    expected = {"embed": (1, half.width), "attn": (half.heads, half.head_dim), "mlp": (1, half.hidden)}
    found = {name: bimask.candidates.full for name, bimask in supernet.bimasks.items()}
    assert found == {name: expected[name.rstrip("0123456789")] for name in found}
    assert not supernet.finished


@pytest.mark.parametrize("name", ["dense", "reference", "folded", "triton", "package"])
@pytest.mark.parametrize("size", ["full", "half"])
def test_every_step_trains(size, name):
    arguments = Namespace(device="cpu", residual_mask="stream")
    torch.manual_seed(0)
    variant = VARIANTS[name]
    network = make_network("tiny", size, variant, arguments)
    before = network.get_parameter("blocks.0.mlp.fc1.weight" if name == "dense" else "model.blocks.0.mlp.fc1.weight")
    copy = before.detach().clone()
    make_step(network, variant, torch.randn(1, 3, 48, 48), torch.zeros(1, dtype=torch.long))()
    assert not torch.equal(before, copy) and before.isfinite().all()


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.compile_mode is not None])
def test_every_compiled_step_trains(name, monkeypatch, capsys):
    """As the command runs them; Inductor itself is tested in test_compile.py and in the rehearsal of test_card.py."""
    modes = []

    def compile(function, *, mode):
        modes.append(mode)
        return torch._dynamo.optimize("aot_eager", nopython=True)(function)

    monkeypatch.setattr(torch, "compile", compile)
    arguments = Namespace(device="cpu", residual_mask="stream", variants=["dense", name], without=[])
    steps = that_run(make_steps("tiny", 2, "full", arguments))
    assert list(steps) == ["dense", name], capsys.readouterr().out
    assert modes == [VARIANTS[name].compile_mode]


def test_every_op_has_a_case_and_every_case_runs(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda form, **options: form)  # compiling is tested with each op
    found = list(cases(Sizes(1, **TINY), "cpu"))
    ops = set(ofb_kernels.__all__) - {"use_backend"}
    assert {case.op for case in found} == ops
    for case in found:
        for which in PASSES if case.leaves() else PASSES[:1]:
            forms, choices = forms_of(case, which, "cpu", compiled=True)
            others = {"reference", "folded", "reference + compile", "folded + compile"}
            others |= {"without mask"} if (case.op, which) == ("masked_linear", "forward") else set()
            assert forms.keys() == others | choices.keys() and "triton" in choices
            for form in forms.values():
                pass_of(form, case, which)()


def test_a_row_is_timed_beside_the_same_layer_without_its_mask():
    case = next(case for case in cases(Sizes(1, **SHAPES["row"]), "cpu") if case.op == "masked_linear")
    x, weight, bias = (case.inputs[name] for name in ("x", "weight", "bias"))
    assert (x.shape, weight.shape) == ((1, 1, 4096), (4096, 4096))
    forms, _ = forms_of(case, "forward", "cpu", compiled=False, without=["triton"])
    torch.testing.assert_close(forms["without mask"](), F.gelu(F.linear(x, weight, bias)))


def test_the_page_shows_graphs_and_the_best_configuration():
    def row(variant, ms, graph, peak=""):
        return {"benchmark": "op", "variant": variant, "ms": ms, "graph": str(graph), "peak_bytes": peak}

    plain = [row("folded", "3.0", False, "7"), row("triton", "2.0", False, "5")]
    slow, fast = row("triton, forward 64×64 w4 s2", "2.5", True), row("triton, forward 128×64 w8 s3", "1.2", True)
    graphs = [row("folded", "2.9", True), row("triton", "1.9", True), slow, fast]
    shown = page.worth_showing(plain + graphs)
    assert [(row["variant"], row["ms"], row["peak_bytes"]) for row in shown] == [
        (fast["variant"], "1.2", ""), ("triton", "1.9", "5"), ("folded", "2.9", "7")
    ]  # fmt: skip
    assert page.worth_showing(plain) == plain


def test_the_page_is_that_of_the_results():
    assert (ROOT / "README.md").read_text() == page.page(ROOT / "results")


def test_floors_and_predictions_print_without_a_gpu():
    command = [sys.executable, "-m", "benchmarks.floors", "--model", "deit_small", "--batch-size", "256"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert any("masked_attention forward" in line for line in lines)
    full = Sizes(256, **SIZES["deit_small"])
    for size in ("full", "half"):
        (printed,) = [line.split()[-3:] for line in lines if line.split()[2:4] == [size, "step"]]
        seconds = [floors.seconds(floors.step(full.named(size)), Rates())]
        seconds += [floors.predicted_seconds(full.named(size), card) for card in floors.CARDS.values()]
        assert [float(each) for each in printed] == pytest.approx([1e3 * each for each in seconds], rel=1e-3)


@pytest.mark.parametrize(
    ("model", "batch", "size", "measured"),
    [
        ("deit_small", 256, "full", 27.2),  # what the prediction learned from
        ("deit_small", 64, "full", 9.87),
        ("deit_small", 256, "half", 12.8),
        ("deit_base", 128, "full", 38.6),
    ],
)
def test_the_predicted_step_is_that_which_was_measured(model, batch, size, measured, monkeypatch):
    """Within a tenth, in ms on an H200, commits 2ace869 to bed2e9b.

    Those launched more, summed the gradients of biases in passes of their own, and cast gradients as well as weights.
    """

    def besides(s):
        summed = floors.HALF * s.rows * (3 * s.attention_width + 2 * s.width)
        sums = [floors.Group("column sums", 0, summed)] * s.depth
        gradients = (floors.FULL + floors.HALF) * floors.parameters(s)
        return [*sums, *floors_of_now(s), floors.Group("casts", 0, gradients)]

    floors_of_now = floors.besides
    monkeypatch.setattr(floors, "besides", besides)
    monkeypatch.setitem(floors.REACH, "column sums", 0.49)  # 18 of 37 µs
    sizes = Sizes(batch, **SIZES[model]).named(size)
    seconds = floors.predicted_seconds(sizes, floors.CARDS["H200"], launches=(58, 302))
    assert 1e3 * seconds == pytest.approx(measured, rel=0.1)


def test_every_reach_belongs_to_a_group_of_the_step():
    """A group that is renamed would be predicted as a plain product."""
    sizes = Sizes(1, **TINY)
    names = {group.name for group in [*floors.step(sizes), *floors.besides(sizes)]}
    assert names >= floors.REACH.keys() | floors.REACH_ON_CHIP.keys()


def test_a_slower_memory_slows_what_waits_for_it():
    """Less than in proportion: products and what waits for its own instructions take as long."""
    sizes = Sizes(256, **SIZES["deit_small"])
    fast, slow = (floors.predicted_seconds(sizes, Rates(bytes=bandwidth)) for bandwidth in (4.3e12, 3.0e12))
    assert 1.05 * fast < slow < 1.3 * fast


def test_scaling_times_each_step():
    arguments = Namespace(device="cpu", batch_size=2, amp=False, model="vit_tiny_patch16_224", steps=2)
    seconds = scaling.step_seconds(arguments)
    assert len(seconds) == 2 and min(seconds) > 0


def test_heaviest_kernels_first():
    launched = {"copy": [1.0], "product": [40.0, 41.0], "norm": [5.0] * 3}
    lines = heaviest(launched, most=2).splitlines()
    assert [line.split() for line in lines] == [
        ["81", "us", "2", "launches", "product"], ["15", "us", "3", "launches", "norm"]
    ]  # fmt: skip
    assert heaviest(launches(lambda: None, "cpu")) == ""


def test_steps_of_several_processes_stand_side_by_side():
    """Each variant once, the fastest first, graphs apart."""

    def row(variant, over, graph="False", beside="step"):
        about = {"benchmark": "step", "subject": "deit_small", "batch_size": "8", "size": "full", "pass": beside}
        return about | {"variant": variant, "over_base": str(over), "graph": graph}

    first = [row("dense", 1.0, beside="step beside x"), row("x", 0.6, beside="step beside x")]
    second = [row("dense", 1.0), row("triton", 1.9), row("triton", 0.5, graph="True")]
    found = page.side_by_side([*first, *second, row("triton", 1.8, beside="step beside x")])
    assert {each["pass"] for each in found} == {"step"}
    shown = [(each["variant"], each["over_base"]) for each in found]
    assert shown == [("x", "0.6"), ("dense", "1.0"), ("triton", "1.9"), ("triton", "0.5")]


def test_every_open_submodule_shrinks_and_keeps_all_smaller_sizes():
    """Otherwise a search on the clock would change one shape at an event, and no compiler had much to do."""
    supernet = Supernet(timm_model("tiny"), target="40%", backend="eager")
    for _ in range(3):
        before = {name: (bimask.candidates, int(bimask.alive.sum())) for name, bimask in supernet.bimasks.items()}
        shrink(supernet)
        for name, bimask in supernet.bimasks.items():
            (heads, channels), alive = (before[name][0].heads, before[name][0].channels), before[name][1]
            assert (bimask.candidates.heads, bimask.candidates.channels) == (heads, channels[:-1]), name
            assert int(bimask.alive.sum()) >= alive - len(heads), "only the largest died"
