"""Every kernel launch compiled for sm_90: it fits the GPU, stays in registers, uses its units.

The launches are those of benchmarks/launch_shapes.py, of a run on a card and of the op tests.
Triton's cache on disk keeps what it compiled: only the first run takes minutes. `make compile-sweep` does other
architectures.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from filelock import FileLock

import ofb_kernels.kernels
from benchmarks.compile_only import KIB, MULTIPROCESSORS, widest_access
from ofb_kernels.kernels import masked_attention, product

PERSISTENT_KERNELS = {"masked_linear._persistent_forward_kernel", "masked_mlp._persistent_backward_kernel"}
PRODUCT_KERNELS = {
    *PERSISTENT_KERNELS,
    "masked_linear._forward_kernel",
    "masked_mlp._backward_kernel",
    "masked_attention._forward_kernel",
    "masked_attention._backward_query_kernel",
    "masked_attention._backward_key_value_kernel",
    "masked_attention._backward_bias_kernel",
}
ATTENTION_KERNELS = {
    "masked_attention._forward_kernel": "forward",
    "masked_attention._backward_query_kernel": "backward_query",
    "masked_attention._backward_key_value_kernel": "backward_key_value",
    "masked_attention._backward_bias_kernel": "backward_bias",
}

OP_TESTS = "op tests"

# Bytes of stack that a kernel may use in the launches of one label; every other one may use none.
SPILLS = {
    # Rows that are no multiples of 16 elements, or start between two of them, are read element by element: each of a
    # tile's addresses takes registers.
    ("masked_linear._forward_kernel", "odd"): 528,
    ("masked_linear._forward_kernel", "unaligned"): 384,
    # the candidates that are held to 128 registers
    ("masked_attention._forward_kernel", "unaligned"): 40,
    ("masked_attention._backward_query_kernel", "unaligned"): 24,
    ("masked_attention._backward_query_kernel", "strided"): 8,
    ("masked_layer_norm._forward_kernel", "odd"): 16,
    # Odd sizes and strides in every configuration, as above
    ("masked_linear._forward_kernel", OP_TESTS): 896,
    ("masked_mlp._backward_kernel", OP_TESTS): 184,
    ("masked_attention._backward_query_kernel", OP_TESTS): 8,
    ("masked_layer_norm._backward_kernel", OP_TESTS): 8,
    ("masked_reconstruction_loss._forward_kernel", OP_TESTS): 8,
    # TF32 with a bias and heads of 128 channels
    ("masked_attention._backward_bias_kernel", "windows"): 8,
    # All candidates of a submodule are in registers at once, and 1,024 is the most that fits.
    ("bimask._forward_kernel", "4,096 candidates"): 2496,
    ("bimask._forward_kernel", OP_TESTS): 2432,  # the test of as many
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> list[dict]:
    """What benchmarks.resources prints, once for all workers of pytest-xdist: the first one to come compiles it."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "resources.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            processes = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")  # the others will soon wait for this one
            command = [sys.executable, "-m", "benchmarks.resources", "--json"]
            output = subprocess.run([*command, "--processes", processes], stdout=subprocess.PIPE, text=True).stdout
            path.write_text(output)
    return json.loads(path.read_text())


def kernel_modules() -> dict:
    path, prefix = ofb_kernels.kernels.__path__, "ofb_kernels.kernels."
    return {module.name: importlib.import_module(prefix + module.name) for module in pkgutil.iter_modules(path)}


def shipped_configurations(module) -> Iterator[dict]:
    """All configurations of a module but those of float64, which is only ever interpreted."""

    def leaves(entry: dict | tuple) -> Iterator[dict]:
        if isinstance(entry, tuple):
            yield from entry
        elif "num_warps" in entry:
            yield entry
        else:
            for key, value in entry.items():
                if key != 8 and not (isinstance(key, tuple) and key[0] == 8):
                    yield from leaves(value)

    for name, table in vars(module).items():
        if name.endswith(("CONFIGURATION", "CONFIGURATIONS")):
            yield from leaves(table)


def label_of(row: dict) -> str:
    """The label of a launch in benchmarks/launch_shapes.py or launch_card.py, or that it is one of the op tests'."""
    return OP_TESTS if row["source"].startswith("tests/") else row["source"].split(": ")[1]


def shared_bound(row: dict) -> int:
    """The shared memory that the choice of a configuration counts with, for a kernel of PRODUCT_KERNELS."""
    size, options = getattr(torch, row["dtype"]).itemsize, row["options"]
    if row["kernel"] not in ATTENTION_KERNELS:
        return product.shared_bytes(options, size)
    kernel = ATTENTION_KERNELS[row["kernel"]]
    if "bias_ptr" not in options and kernel != "backward_bias":
        kernel = f"biased_{kernel}"
    return masked_attention.shared_bytes(kernel, options, options["BLOCK_D"], size)


def test_everything_compiles(compiled):
    assert [row for row in compiled if row["error"] is not None] == []


def test_no_kernel_is_forgotten(compiled):
    kernels = {
        f"{module_name}.{name}"
        for module_name, module in kernel_modules().items()
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert kernels == {row["kernel"] for row in compiled}


def test_a_run_on_a_card_launches_every_kernel(compiled):
    on_a_card = {row["kernel"] for row in compiled if " on a card: " in row["source"]}
    assert on_a_card == {row["kernel"] for row in compiled}


def test_no_configuration_is_forgotten(compiled):
    for name, module in kernel_modules().items():
        launched = [row["options"].items() for row in compiled if row["kernel"].startswith(f"{name}.")]
        for configuration in shipped_configurations(module):
            assert any(configuration.items() <= options for options in launched), f"{name}: {configuration}"


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > MULTIPROCESSORS[90].shared_of_block] == []


def test_shared_memory_is_within_what_the_choice_counts_with(compiled):
    products = [row for row in compiled if row["kernel"] in PRODUCT_KERNELS]
    assert [row for row in products if row["shared"] > shared_bound(row)] == []


def test_a_configuration_fits_a_workstation(compiled):
    """Of each kernel, dtype and head width at least one takes no more than the 99 KiB of sm_86, sm_89 and sm_120.

    Where a persistent kernel does not fit, the plain one of the same product is taken.
    """
    most: dict[tuple, dict[tuple, int]] = defaultdict(lambda: defaultdict(int))
    for row in (row for row in compiled if row["kernel"] not in PERSISTENT_KERNELS):
        tile = tuple(value for name, value in row["options"].items() if name.startswith(("BLOCK_M", "BLOCK_N", "num")))
        taken = most[row["kernel"], row["dtype"], row["options"].get("BLOCK_D")]
        taken[tile] = max(taken[tile], row["shared"])
    assert {name: taken for name, taken in most.items() if min(taken.values()) > 99 * KIB} == {}


def test_spills_are_the_known_ones(compiled):
    spilled: dict[tuple[str, str], int] = defaultdict(int)
    for row in compiled:
        case = row["kernel"], label_of(row)
        spilled[case] = max(spilled[case], row["stack"])
    assert {case: stack for case, stack in spilled.items() if stack > SPILLS.get(case, 0)} == {}


def test_products_run_on_tensor_cores(compiled):
    half = [row for row in compiled if row["kernel"] in PRODUCT_KERNELS and row["dtype"] != "float32"]
    assert {row["kernel"] for row in half} == PRODUCT_KERNELS
    assert [row for row in half if "wgmma" not in row["instructions"]] == []


def test_no_double_precision(compiled):
    assert [row for row in compiled if ".f64" in row["instructions"]] == []


def test_occupancy():
    sm_90 = MULTIPROCESSORS[90]
    assert sm_90.occupancy(registers=255, shared=0, warps=8) == 8 / 64  # 65,536 registers hold one such block
    assert sm_90.occupancy(registers=128, shared=0, warps=4) == 16 / 64
    assert sm_90.occupancy(registers=32, shared=113 * 1024, warps=4) == 8 / 64  # two blocks of 114 KiB
    assert sm_90.occupancy(registers=16, shared=0, warps=1) == 32 / 64  # no more blocks than 32
    assert MULTIPROCESSORS[86].occupancy(registers=16, shared=0, warps=8) == 1  # all of its 48 warps


def test_two_blocks_hide_each_others_latency(compiled):
    """A multiprocessor holds two blocks of every half-precision kernel, or one of at least eight warps."""
    half = [row for row in compiled if row["dtype"] != "float32"]
    assert [row for row in half if row["occupancy"] * 64 < max(8, row["warps"])] == []


def test_a_small_last_tile_of_queries_costs_no_block(compiled):
    """Four blocks stay resident: so many as without the code of a second size of tile."""
    with_tail = [row for row in compiled if "TAIL_M" in row["options"]]
    small = [row for row in with_tail if row["options"]["TAIL_M"] < row["options"]["BLOCK_M"]]
    kernels = {"masked_attention._forward_kernel", "masked_attention._backward_query_kernel"}
    assert {row["kernel"] for row in small if label_of(row) == "timed"} == kernels
    assert [row for row in small if row["occupancy"] * 64 < 4 * row["warps"]] == []


def test_multiples_of_8_are_read_in_full_width(compiled):
    """16 bytes a thread, but for heads of fewer than 16 channels."""
    plain = PRODUCT_KERNELS - PERSISTENT_KERNELS  # those copy whole tiles
    wide = [row for row in compiled if row["kernel"] in plain and row["options"].get("HEAD_DIM", 16) >= 16]
    for label in ("timed", "multiples of 8"):
        rows = [row for row in wide if label_of(row) == label]
        assert {row["kernel"] for row in rows} >= plain - {"masked_attention._backward_bias_kernel"}
        assert [row for row in rows if row["access"] < 16] == []


def test_norms_of_multiples_of_8_are_read_in_full_width(compiled):
    norms = [row for row in compiled if row["kernel"].startswith("masked_layer_norm")]
    narrow = [row for row in norms if label_of(row) == "multiples of 8" and row["access"] < 16]
    assert narrow == []


def test_folded_weights_of_multiples_of_8_are_read_in_full_width(compiled):
    folds = [row for row in compiled if row["kernel"].startswith("fold.") and label_of(row) == "multiples of 8"]
    assert {row["kernel"] for row in folds} == {"fold._fold_kernel", "fold._unfold_kernel"}
    assert [row for row in folds if row["access"] < 16] == []


def test_attention_streams_multiples_of_8(compiled):
    """Heads of 24, 40, 56 channels come 16 bytes at a time and ahead of their use, like those of 64."""
    half = [row for row in compiled if row["kernel"] in ATTENTION_KERNELS and row["dtype"] != "float32"]
    pruned = [row for row in half if label_of(row) == "multiples of 8" and row["options"].get("WHOLE_ROW") is False]
    streamed = [row for row in pruned if row["options"]["num_stages"] > 1]
    assert {row["kernel"] for row in streamed} == set(ATTENTION_KERNELS) - {"masked_attention._backward_bias_kernel"}
    assert [row for row in streamed if row["access"] < 16 or "cp.async" not in row["instructions"]] == []


def test_widest_access():
    copy = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;\n"
    load, store = "ld.global.b16 { %rs1 }, [ %rd2 + 0 ];\n", "st.global.v2.b32 [ %rd3 + 0 ], { %r4, %r5 };\n"
    assert [widest_access(ptx) for ptx in (load, load + store, load + copy, "")] == [2, 8, 16, 0]


def test_launches_of_the_op_tests_are_found(compiled):
    """Of one module: forward and backward in the dtypes of a GPU, and not in the interpreter's float64."""
    rows = [row for row in compiled if row["source"].startswith("tests/test_masked_linear.py")]
    of_the_op = {name.removeprefix("masked_linear.") for name in (row["kernel"] for row in rows) if "linear" in name}
    assert of_the_op == {"_forward_kernel", "_persistent_forward_kernel", "_backward_kernel"}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16", "float32"}
