"""What every kernel takes of a GPU in every shipped configuration, found by compiling it: no GPU is needed.

    python -m benchmarks.resources [--arch 90 80] [--json]

The package's own launchers run on meta tensors while Triton believes in a GPU of that architecture and is held to
compiling, so that argument types, alignments and constants are exactly those of a real launch.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from ofb_kernels.kernels import (
    bimask,
    local_norm,
    masked_attention,
    masked_layer_norm,
    masked_linear,
    masked_mlp,
    tuning,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Resources:
    """One kernel compiled for one launch: registers per thread, stack and shared memory in bytes."""

    kernel: str
    arch: int
    dtype: str
    options: dict
    registers: int
    stack: int
    shared: int
    instructions: list[str]  # which of INSTRUCTIONS occur
    warps: int  # of one block
    occupancy: float  # share of a multiprocessor's warps that its registers and shared memory allow


CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTIONS = ("wgmma", "mma.sync", ".f64")


def launch_masked_linear(dtype: torch.dtype) -> None:
    x, weight, bias, mask = meta(1024, 384, dtype=dtype), meta(1536, 384, dtype=dtype), meta(1536), meta(1536)
    for activation in ("gelu", "gelu_tanh", "relu", "silu", None):
        out, pre = masked_linear.forward(x, weight, bias, mask, activation, save_pre=True)
        masked_linear.backward(out, pre, mask, activation)
    masked_linear.forward(x, weight, None, mask, "gelu", save_pre=False)


def launch_masked_mlp(dtype: torch.dtype) -> None:
    grad_out, fc2_weight = meta(1024, 384, dtype=dtype), meta(384, 1536, dtype=dtype)
    for activation in ("gelu", "gelu_tanh", "relu", "silu", None):
        masked_mlp.backward(grad_out, fc2_weight, meta(1024, 1536, dtype=dtype), meta(1536), activation)


def launch_masked_attention(dtype: torch.dtype) -> None:
    for head_dim in (16, 24, 64, 128):
        qkv, mask = meta(4, 197, 3, 6, head_dim, dtype=dtype), meta(6, head_dim)
        out, log_sum_exp = masked_attention.forward(qkv, mask, 0.125)
        masked_attention.backward(out, qkv, mask, out, log_sum_exp, 0.125)
    for head_dim in (32, 64, 128):  # with a bias, on windows of 49 tokens
        qkv, mask, bias = meta(64, 49, 3, 6, head_dim, dtype=dtype), meta(6, head_dim), meta(4, 6, 49, 49)
        out, log_sum_exp = masked_attention.forward(qkv, mask, 0.125, bias)
        masked_attention.backward(out, qkv, mask, out, log_sum_exp, 0.125, bias)
        masked_attention.backward_bias(out, qkv, mask, out, log_sum_exp, 0.125, bias)


def launch_masked_layer_norm(dtype: torch.dtype) -> None:
    for width in masked_layer_norm.FORWARD_CONFIGURATIONS:
        x, weight, bias, mask = meta(1024, width, dtype=dtype), meta(width), meta(width), meta(width)
        for optional_bias in (bias, None):
            out, _, mean, rstd = masked_layer_norm.forward(x, weight, optional_bias, mask, 1e-6, dtype)
            masked_layer_norm.backward(out, x, weight, optional_bias, mask, mean, rstd, 1e-6)
        for stream in (x, meta(1024, width)):  # the residual stream is float32 under autocast
            branch = masked_layer_norm.Branch(x, mask, meta(8), 128)
            out, stream, mean, rstd = masked_layer_norm.forward(stream, weight, bias, mask, 1e-6, dtype, branch)
            for grad_out, grad_stream in ((out, stream), (out, None), (None, stream)):  # None: that output was not used
                masked_layer_norm.backward(grad_out, stream, weight, bias, mask, mean, rstd, 1e-6, grad_stream, branch)


def launch_bimask(dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        return  # the op hands its kernels float32 whatever the dtype of the scores
    for stack in ((12, 6, 64, 3, 7), (12, 12, 64, 6, 7), (13, 1, 3072, 1, 33), (12, 1, 3072, 1, 7)):
        submodules, heads, channels, *counts = stack
        score, alpha, lam = meta(submodules, heads, channels), meta(submodules, *counts), meta()
        alive = meta(submodules, *counts, dtype=torch.bool)
        head_counts, channel_counts = (meta(submodules, count, dtype=torch.int64) for count in counts)
        arguments = score, alpha, head_counts, channel_counts, lam, alive
        mask, head_rank, channel_rank = bimask.forward(*arguments)
        bimask.backward(mask, *arguments, head_rank, channel_rank)


def launch_local_norm(dtype: torch.dtype) -> None:
    local_norm.forward(meta(2, 3, 224, 224, dtype=dtype), 47, 1e-6)


LAUNCHES = (
    launch_bimask,
    launch_masked_linear,
    launch_masked_mlp,
    launch_masked_attention,
    launch_masked_layer_norm,
    launch_local_norm,
)


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has, from the CUDA C++ Programming Guide's table of compute capabilities."""

    shared: int  # bytes, a KiB of which each block takes for itself
    registers: int = 65_536  # given to a warp in portions of 256
    warps: int = 64
    blocks: int = 32

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Share of the warps that can be resident with blocks of `warps` warps of 32 threads."""
        registers_of_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // registers_of_warp // warps
        by_shared = self.shared // (shared + 1024)
        return min(by_registers, by_shared, self.warps // warps, self.blocks) * warps / self.warps


MULTIPROCESSORS = {80: Multiprocessor(shared=164 * 1024), 90: Multiprocessor(shared=228 * 1024)}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class CompilingDriver:
    """Stands for a GPU of one architecture, as far as Triton's compiler asks about it."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps one cache of compiled kernels for each device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_all(arch: int) -> list[Resources]:
    """Resources of every kernel in every launch, for compute capability `arch` (90: H100 and H200; 80: A100)."""
    compiled: dict[str, tuple] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.hash, (self, kernel, dtype, options))

    def choose_each(kernel, candidates, sizes, like, launch):
        for configuration in candidates[1:]:
            launch(configuration)
        return candidates[0]

    driver.set_active(CompilingDriver(arch))
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(tuning, "choose", choose_each):
        for dtype in DTYPES:
            for launch in LAUNCHES:
                launch(dtype)
    return [_measure(arch, *entry) for entry in compiled.values()]


def _measure(arch: int, function: JITFunction, kernel, dtype: torch.dtype, options: dict) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return Resources(
        kernel=f"{function.module.rsplit('.', 1)[-1]}.{function.fn.__name__}",
        arch=arch,
        dtype=str(dtype).removeprefix("torch."),
        options={name: option for name, option in options.items() if isinstance(option, (int, float, str))},
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        occupancy=MULTIPROCESSORS[arch].occupancy(registers, kernel.metadata.shared, kernel.metadata.num_warps),
        instructions=[name for name in INSTRUCTIONS if name in kernel.asm["ptx"]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[90, 80], choices=sorted(MULTIPROCESSORS), help="compute capabilities"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 replaces the kernels that are to be compiled; unset it")
    rows = [row for arch in arguments.arch for row in compile_all(arch)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"{'kernel':44} {'sm':>3} {'dtype':9} {'regs':>4} {'stack':>5} {'shared':>7} {'occupancy':>9}  tile")
    for row in rows:
        tile = " ".join(f"{k.lower()}={v}" for k, v in row.options.items() if k.startswith(("BLOCK", "num_", "STEPS")))
        print(
            f"{row.kernel:44} {row.arch:3} {row.dtype:9} {row.registers:4} {row.stack:5} {row.shared:7} "
            f"{row.occupancy:9.0%}  {tile} {row.options.get('ACTIVATION') or ''} {'+'.join(row.instructions)}"
        )


if __name__ == "__main__":
    main()
