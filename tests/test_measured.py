"""The table of decisions: nearest measured sizes win, and the benchmark writes what it measured."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import ofb_kernels
from benchmarks.decide import configurations, decisions, propose
from benchmarks.floors import TINY, Sizes
from benchmarks.measure import COLUMNS, write_csv
from benchmarks.ops import cases, forms_of
from ofb_kernels import dispatch, eager
from ofb_kernels.measured import PATH, nearest, sizes_of
from tests.fake_cuda import pretend_cuda

ENTRIES = [[[1000, 384, 1536], "eager"], [[50_000, 384, 1536], "triton"]]


@pytest.mark.parametrize(("rows", "expected"), [(10, "eager"), (6000, "eager"), (8000, "triton"), (10**6, "triton")])
def test_nearest_sizes_decide(rows, expected):
    """The middle of 1,000 and 50,000 rows on a logarithmic scale is 7,071."""
    assert nearest(ENTRIES, (rows, 384, 1536)) == expected


def test_nothing_measured():
    assert nearest([], (10, 384, 1536)) is None
    assert nearest(ENTRIES, (10, 384)) is None
    assert nearest(ENTRIES, (0, 384, 1536)) == "eager"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiler_follows_the_sizes(dynamic):
    """The decision is part of the graph; sizes at which it is another one are traced anew."""

    def decide(x, mask):
        return x.sum() * 0 + (1 if nearest(ENTRIES, sizes_of({"x": x, "mask": mask})) == "triton" else 0)

    torch._dynamo.reset()
    compiled = torch.compile(decide, fullgraph=True, dynamic=dynamic, backend="eager")
    mask = torch.ones(1536)
    assert [compiled(torch.ones(rows, 2, 384), mask).item() for rows in (500, 20_000, 600)] == [0, 1, 0]


def test_sizes_are_rows_columns_and_the_mask():
    x, mask = torch.empty(8, 197, 384), torch.empty(1536)
    assert sizes_of({"x": x, "mask": mask}) == (8 * 197, 384, 1536)
    assert sizes_of({"qkv": torch.empty(2, 5, 3, 4, 16), "mask": torch.empty(4, 16)}) == (2 * 5 * 3 * 4, 16, 4, 16)
    assert sizes_of({"images": torch.empty(2, 3, 8, 9)}) == (2 * 3 * 8, 9)


def test_only_a_bias_of_attention_counts_beside_them():
    """A decision that was measured without such a bias is none for a call with it; layers have biases of their own."""
    inputs = {"x": torch.empty(8, 49, 96), "mask": torch.empty(3, 32)}
    layer = inputs | {"weight": torch.empty(288, 96), "bias": torch.empty(288)}
    biased = layer | {"attention_bias": torch.empty(4, 3, 49, 49)}
    assert sizes_of(inputs) == sizes_of(layer) == (8 * 49, 96, 3, 32)
    assert sizes_of(biased) == (8 * 49, 96, 3, 32, 4, 3, 49, 49)
    assert nearest([[sizes_of(inputs), "eager"]], sizes_of(biased)) is None


def test_the_benchmark_and_the_ops_see_the_same_sizes(monkeypatch):
    """A decision is looked up by what the op hands to dispatch, and written by what the benchmark takes of the case."""
    seen = {}

    def spy(op, backend, inputs, limits=None):
        seen[op] = sizes_of(inputs)
        return "eager"

    for case in cases(Sizes(2, width=16, heads=2, head_dim=16, hidden=32, depth=2, tokens=5), "cpu"):
        module = getattr(ofb_kernels, case.op).__module__
        monkeypatch.setattr(sys.modules[module], "choose_backend", spy)
        case.run("eager")
        assert seen[case.op] == sizes_of(case.inputs), case.op


def test_shipped_table_is_valid():
    for capability, decided in json.loads(PATH.read_text()).items():
        assert float(capability) >= 7 and decided.keys() == {"backends", "configurations"}
        for entries in decided["backends"].values():
            assert all(backend in dispatch.BACKENDS and all(size > 0 for size in sizes) for sizes, backend in entries)
        for entries in decided["configurations"].values():
            assert all("num_warps" in found and all(size > 0 for size in sizes) for sizes, found in entries)


def test_dispatch_follows_the_table(monkeypatch):
    """On a CPU there is nothing to dispatch: the tensor only claims to be on a GPU."""
    monkeypatch.setattr(dispatch, "TABLE", {"9.0": {"backends": {"masked_mlp": ENTRIES}}})
    monkeypatch.setattr(dispatch, "capability_of", lambda index: "9.0")
    monkeypatch.setattr(dispatch, "triton_refusal", lambda inputs, limits: None)
    few, many = (_OnGpu(shape=torch.Size((rows, 384))) for rows in (1000, 50_000))
    mask = torch.empty(1536)
    assert dispatch.choose_backend("masked_mlp", None, {"x": few, "mask": mask}) == "eager"
    assert dispatch.choose_backend("masked_mlp", None, {"x": many, "mask": mask}) == "triton"
    assert dispatch.choose_backend("masked_linear", None, {"x": few, "mask": mask}) == "triton"


def test_attention_with_its_projection_goes_where_it_was_measured_faster(monkeypatch):
    """The Triton backend is asked for by name, or taken where nothing was measured, as with a bias on the scores."""
    entries = [[[2 * 5, 8, 2, 4], "eager"], [[2 * 500, 8, 2, 4], "triton"]]
    monkeypatch.setattr(dispatch, "TABLE", {"9.0": {"backends": {"masked_qkv_attention": entries}}})
    pretend_cuda(monkeypatch, "9.0")
    ran = []
    implementation = eager.masked_qkv_attention
    monkeypatch.setattr(eager, "masked_qkv_attention", lambda *args: ran.append("eager") or implementation(*args))
    weight, mask = torch.randn(24, 8), torch.rand(2, 4)
    for tokens, options, expected in (
        (5, {}, ["eager"]),
        (500, {}, []),
        (5, {"backend": "triton"}, []),
        (5, {"attention_bias": torch.randn(2, 5, 5)}, []),
    ):
        x = torch.randn(2, tokens, 8)
        out = ofb_kernels.masked_qkv_attention(x, weight, None, mask, **options)
        assert ran == expected
        exact = ofb_kernels.masked_qkv_attention(x, weight, None, mask, **(options | {"backend": "reference"}))
        torch.testing.assert_close(out, exact)
        ran.clear()


class _OnGpu(SimpleNamespace):
    is_cuda, device = True, SimpleNamespace(index=0)


def row(subject, variant, ms, which="both", graph="True", capability="9.0", configurations=()):
    row = dict.fromkeys(COLUMNS, "")
    values = {"subject": f"{subject} deit_small", "variant": variant, "ms": ms, "pass": which, "graph": graph}
    values |= {"shape": "1000x384x1536", "capability": capability, "configurations": json.dumps(configurations)}
    return row | values


def test_decisions():
    """Graphs decide, and forward with backward where there is one."""
    rows = [
        row("masked_mlp", "triton", 2.0),
        row("masked_mlp", "folded", 1.0),
        row("masked_mlp", "triton", 0.1, graph="False"),
        row("masked_mlp", "triton", 0.1, which="forward"),
        row("local_norm", "triton", 1.0, which="forward"),
        row("local_norm", "folded", 2.0, which="forward"),
        row("masked_linear", "folded", 2.0),
    ]
    sizes = [1000, 384, 1536]
    assert decisions(rows) == {"masked_mlp": [[sizes, "eager"]], "local_norm": [[sizes, "triton"]]}


SMALL, LARGE = {"BLOCK_M": 64, "num_warps": 4}, {"BLOCK_M": 128, "num_warps": 8}


def test_an_attention_with_its_projection_is_decided_by_itself():
    """The rows that benchmarks.ops writes of it: its sizes, and the default configurations of kernels it shares."""
    case = next(case for case in cases(Sizes(2, **TINY), "cpu") if case.op == "masked_qkv_attention")
    forms, choices = forms_of(case, "both", "cpu", compiled=False)
    assert list(forms) == ["folded", "triton", "reference"] and choices.keys() == {"triton"}
    shape = "x".join(map(str, sizes_of(case.inputs)))
    times = {"folded": 1.0, "triton": 2.0, "sdpa flash": 0.5, "reference": 9.0}
    rows = [row(case.op, name, ms) | {"shape": shape} for name, ms in times.items()]
    rows += [row(case.op, name, ms, which="forward") | {"shape": shape} for name, ms in times.items()]
    assert decisions(rows) == {"masked_qkv_attention": [[[20, 64, 4, 16], "eager"]]}
    assert configurations(rows) == {}


def test_configurations():
    """Of each kernel the fastest; a forward's kernels are decided by the forward."""
    first, second = ("op.forward 2 bytes", [1000, 384]), ("op.backward 2 bytes", [1000, 384])
    defaults = [[*first, SMALL], [*second, SMALL]]
    rows = [
        row("op", "triton", 2.0, "forward", configurations=defaults[:1]),
        row("op", "triton, forward 128 w8 s", 1.0, "forward", configurations=[[*first, LARGE]]),
        row("op", "triton, forward 128 w8 s", 9.0, "forward", graph="False", configurations=[[*first, LARGE]]),
        row("op", "triton", 5.0, configurations=defaults),
        row("op", "triton, backward 128 w8 s", 6.0, configurations=[[*second, LARGE]]),
        row("op", "folded", 0.1),
    ]
    assert configurations(rows) == {first[0]: [[first[1], LARGE]], second[0]: [[second[1], SMALL]]}


def test_decide_keeps_other_capabilities(tmp_path):
    table = tmp_path / "measured.json"
    table.write_text(json.dumps({"8.0": {"bimask": [[[1, 2], "eager"]]}, "9.0": {"bimask": [[[1, 2], "eager"]]}}))
    chosen = [["masked_mlp.backward 2 bytes", [1024, 384], LARGE]]
    rows = [row("masked_mlp", "triton", 2.0), row("masked_mlp", "folded", 1.0)]
    rows += [row("masked_mlp", "triton, backward 128 w8 s", 1.5, configurations=chosen)]
    write_csv(rows, tmp_path / "ops.csv")
    command = [sys.executable, "-m", "benchmarks.decide", tmp_path / "ops.csv", "--output", table]
    subprocess.run(command, check=True)
    found = json.loads(table.read_text())
    assert found.keys() == {"8.0", "9.0"}
    backends = {"masked_mlp": [[[1000, 384, 1536], "eager"]]}
    assert found["9.0"] == {"backends": backends, "configurations": {chosen[0][0]: [[[1024, 384], LARGE]]}}


def test_a_table_is_proposed_beside_a_gpus_results_only(tmp_path):
    propose(tmp_path)
    write_csv([row("masked_mlp", "folded", 1.0, capability="")], tmp_path / "ops.csv")
    propose(tmp_path)
    assert not (tmp_path / "measured.json").exists()
    write_csv([row("masked_mlp", "folded", 1.0), row("masked_mlp", "triton", 0.5)], tmp_path / "ops.csv")
    propose(tmp_path)
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found["9.0"]["backends"] == {"masked_mlp": [[[1000, 384, 1536], "triton"]]}


def test_decide_refuses_what_no_gpu_measured(tmp_path):
    write_csv([row("masked_mlp", "folded", 1.0, capability="")], tmp_path / "ops.csv")
    command = [sys.executable, "-m", "benchmarks.decide", tmp_path / "ops.csv"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "expected rows of one GPU" in run.stderr
