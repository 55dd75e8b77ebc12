"""Every kernel in every shipped configuration, compiled ahead of time: fits the GPU, spills nothing, uses its units."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

import ofb_kernels.kernels
from benchmarks.resources import MULTIPROCESSORS

# Shared memory of one block, in bytes.
SHARED_LIMITS = {90: 232_448, 80: 166_912}
TENSOR_CORES = {90: "wgmma", 80: "mma.sync"}
PRODUCT_KERNELS = {
    "masked_linear._forward_kernel",
    "masked_mlp._backward_kernel",
    "masked_attention._forward_kernel",
    "masked_attention._backward_query_kernel",
    "masked_attention._backward_key_value_kernel",
    "masked_attention._backward_bias_kernel",
}


@pytest.fixture(scope="module", params=[90, 80], ids=["sm_90", "sm_80"])
def compiled(request) -> list[dict]:
    """In a process of its own: here the kernels may be decorated for the interpreter, which compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.resources", "--arch", str(request.param), "--json"]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


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


def test_no_kernel_is_forgotten(compiled):
    kernels = {
        f"{module_name}.{name}"
        for module_name, module in kernel_modules().items()
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert kernels == {row["kernel"] for row in compiled}


def test_no_configuration_is_forgotten(compiled):
    for name, module in kernel_modules().items():
        launched = [row["options"].items() for row in compiled if row["kernel"].startswith(f"{name}.")]
        for configuration in shipped_configurations(module):
            assert any(configuration.items() <= options for options in launched), f"{name}: {configuration}"


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > SHARED_LIMITS[row["arch"]]] == []


def test_nothing_spills(compiled):
    assert [row for row in compiled if row["stack"] > 0] == []


def test_products_run_on_tensor_cores(compiled):
    half = [row for row in compiled if row["kernel"] in PRODUCT_KERNELS and row["dtype"] != "float32"]
    assert {row["kernel"] for row in half} == PRODUCT_KERNELS
    assert [row for row in half if TENSOR_CORES[row["arch"]] not in row["instructions"]] == []


def test_no_double_precision(compiled):
    assert [row for row in compiled if ".f64" in row["instructions"]] == []


def test_occupancy():
    sm_90 = MULTIPROCESSORS[90]
    assert sm_90.occupancy(registers=255, shared=0, warps=8) == 8 / 64  # 65,536 registers hold one such block
    assert sm_90.occupancy(registers=128, shared=0, warps=4) == 16 / 64
    assert sm_90.occupancy(registers=32, shared=113 * 1024, warps=4) == 8 / 64  # two blocks of 114 KiB
    assert sm_90.occupancy(registers=16, shared=0, warps=1) == 32 / 64  # no more blocks than 32


def test_two_blocks_hide_each_others_latency(compiled):
    """A multiprocessor holds two blocks of every half-precision kernel, or one of at least eight warps."""
    half = [row for row in compiled if row["dtype"] != "float32"]
    assert [row for row in half if row["occupancy"] * 64 < max(8, row["warps"])] == []
