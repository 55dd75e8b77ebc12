"""The table of decisions: nearest measured sizes win, and the benchmark writes what it measured."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.decide import decisions
from benchmarks.measure import COLUMNS, write_csv
from benchmarks.ops import cases
from ofb_kernels import dispatch
from ofb_kernels.measured import PATH, fastest_backend, sizes_of

TABLE = {"9.0": {"masked_mlp": [[[1000, 384, 1536], "eager"], [[50_000, 384, 1536], "triton"]]}}


@pytest.mark.parametrize(("rows", "expected"), [(10, "eager"), (6000, "eager"), (8000, "triton"), (10**6, "triton")])
def test_nearest_sizes_decide(rows, expected):
    """The middle of 1,000 and 50,000 rows on a logarithmic scale is 7,071."""
    assert fastest_backend("masked_mlp", (rows, 384, 1536), "9.0", TABLE) == expected


def test_nothing_measured():
    assert fastest_backend("masked_mlp", (10, 384, 1536), "8.0", TABLE) is None
    assert fastest_backend("masked_linear", (10, 384, 1536), "9.0", TABLE) is None
    assert fastest_backend("masked_mlp", (10, 384), "9.0", TABLE) is None
    assert fastest_backend("masked_mlp", (0, 384, 1536), "9.0", TABLE) == "eager"


def test_sizes_are_rows_columns_and_the_mask():
    x, mask = torch.empty(8, 197, 384), torch.empty(1536)
    assert sizes_of({"x": x, "mask": mask}) == (8 * 197, 384, 1536)
    assert sizes_of({"qkv": torch.empty(2, 5, 3, 4, 16), "mask": torch.empty(4, 16)}) == (2 * 5 * 3 * 4, 16, 4, 16)
    assert sizes_of({"images": torch.empty(2, 3, 8, 9)}) == (2 * 3 * 8, 9)


def test_the_benchmark_and_the_ops_see_the_same_sizes(monkeypatch):
    """A decision is looked up by what the op hands to dispatch, and written by what the benchmark takes of the case."""
    from benchmarks.floors import Sizes

    seen = {}

    def spy(op, backend, inputs, limits=None):
        seen[op] = sizes_of(inputs)
        return "eager"

    for case in cases(Sizes(2, width=16, heads=2, head_dim=16, hidden=32, depth=2, tokens=5), "cpu"):
        monkeypatch.setattr(sys.modules[f"ofb_kernels.ops.{case.op}"], "choose_backend", spy)
        case.run("eager")
        assert seen[case.op] == sizes_of(case.dispatched()), case.op


def test_shipped_table_is_valid():
    for capability, ops in json.loads(PATH.read_text()).items():
        assert float(capability) >= 7
        for entries in ops.values():
            assert all(backend in dispatch.BACKENDS and all(size > 0 for size in sizes) for sizes, backend in entries)


def row(subject, variant, ms, which="both", graph="False", capability="9.0"):
    row = dict.fromkeys(COLUMNS, "")
    values = {"subject": f"{subject} deit_small", "variant": variant, "ms": ms, "pass": which, "graph": graph}
    return row | values | {"shape": "1000x384x1536", "capability": capability}


def test_decisions():
    rows = [
        row("masked_mlp", "triton", 2.0),
        row("masked_mlp", "folded", 1.0),
        row("masked_mlp", "triton", 0.1, graph="True"),
        row("masked_mlp", "triton", 0.1, which="forward"),
        row("local_norm", "triton", 1.0, which="forward"),
        row("local_norm", "folded", 2.0, which="forward"),
        row("masked_linear", "folded", 2.0),
    ]
    sizes = [1000, 384, 1536]
    assert decisions(rows) == {"masked_mlp": [[sizes, "eager"]], "local_norm": [[sizes, "triton"]]}


def test_decide_keeps_other_capabilities(tmp_path):
    table = tmp_path / "measured.json"
    table.write_text(json.dumps({"8.0": {"bimask": [[[1, 2], "eager"]]}, "9.0": {"bimask": [[[1, 2], "eager"]]}}))
    write_csv([row("masked_mlp", "triton", 2.0), row("masked_mlp", "folded", 1.0)], tmp_path / "ops.csv")
    command = [sys.executable, "-m", "benchmarks.decide", tmp_path / "ops.csv", "--output", table]
    subprocess.run(command, check=True)
    found = json.loads(table.read_text())
    assert found.keys() == {"8.0", "9.0"}
    assert found["9.0"] == {"masked_mlp": [[[1000, 384, 1536], "eager"]]}


def test_decide_refuses_what_no_gpu_measured(tmp_path):
    write_csv([row("masked_mlp", "folded", 1.0, capability="")], tmp_path / "ops.csv")
    command = [sys.executable, "-m", "benchmarks.decide", tmp_path / "ops.csv"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "expected rows of one GPU" in run.stderr
