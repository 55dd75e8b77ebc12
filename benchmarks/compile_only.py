"""Compiling what would be launched: Triton believes in a GPU of some architecture, and no kernel runs.

    with launches(90) as recorder:
        recorder.source = "masked_linear"
        masked_linear.forward(...)      # on tensors of any device, also "meta"
    recorder.compiled                   # one entry for each specialisation

A launch goes through Triton's own binder. Which argument is 1, which is divisible by 16 and which pointer is aligned
are therefore those of the real launch. Triton keeps believing in that GPU: use a process of its own.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from ofb_kernels import dispatch
from ofb_kernels.kernels import tuning

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "cp.async", ".f64")  # looked for in the PTX
KIB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """One multiprocessor's limits, from the CUDA C++ Programming Guide's table of compute capabilities."""

    shared: int  # bytes, a KiB of which each block takes for itself
    shared_of_block: int  # bytes
    warps: int
    blocks: int
    registers: int = 65_536  # given to a warp in portions of 256

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Share of the warps that can be resident with blocks of `warps` warps of 32 threads."""
        registers_of_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // registers_of_warp // warps
        by_shared = self.shared // (shared + KIB)
        return min(by_registers, by_shared, self.warps // warps, self.blocks) * warps / self.warps


MULTIPROCESSORS = {
    80: Multiprocessor(shared=164 * KIB, shared_of_block=163 * KIB, warps=64, blocks=32),
    86: Multiprocessor(shared=100 * KIB, shared_of_block=99 * KIB, warps=48, blocks=16),
    89: Multiprocessor(shared=100 * KIB, shared_of_block=99 * KIB, warps=48, blocks=24),
    90: Multiprocessor(shared=228 * KIB, shared_of_block=227 * KIB, warps=64, blocks=32),
    100: Multiprocessor(shared=228 * KIB, shared_of_block=227 * KIB, warps=64, blocks=32),
    120: Multiprocessor(shared=100 * KIB, shared_of_block=99 * KIB, warps=48, blocks=24),
}


@dataclass(frozen=True)
class Compiled:
    """One specialisation of a kernel and what it takes: registers a thread, stack and shared memory in bytes."""

    kernel: str
    arch: int
    source: str  # the first launch that asked for it
    key: str  # Triton's own: argument types, which of them are 1, divisible by 16 or aligned, and all options
    dtype: str  # of the first tensor
    options: dict  # constants of the kernel, absent arguments, warps and stages
    registers: int = 0
    stack: int = 0
    shared: int = 0
    warps: int = 0  # of one block
    occupancy: float = 0.0  # share of a multiprocessor's warps that registers and shared memory allow
    access: int = 0  # widest access to global memory, in bytes a thread
    instructions: tuple[str, ...] = ()  # which of INSTRUCTIONS occur
    seconds: float = 0.0  # to compile; little where Triton's cache on disk had it
    error: str | None = None


class Recorder:
    """Recorder: compiles each launch's specialisation once, or with `count` only notes it."""

    def __init__(self, arch: int, count: bool):
        self.arch, self.count = arch, count
        self.source = ""
        self.compiled: dict[tuple[str, str], Compiled] = {}
        self._new_key: str | None = None

    def before_compilation(self, *, key: str, **_) -> bool:
        """Triton's hook: runs where its own cache has no such specialisation. True stops the compilation."""
        self._new_key = key
        return self.count

    def launch(self, run, function: JITFunction, *args, **options) -> None:
        """Compile one launch; what Triton has compiled before in this process is passed over."""
        self._new_key, start = None, time.perf_counter()
        kernel, error = None, None
        try:
            kernel = run(function, *args, **options)
        except Exception as exception:  # it belongs to this launch, and the next one follows
            error = f"{type(exception).__name__}: {exception}"
        seconds = time.perf_counter() - start
        name = f"{function.module.rsplit('.', 1)[-1]}.{function.fn.__name__}"
        key = self._new_key or error
        if key is None or (name, key) in self.compiled:
            return
        self.compiled[name, key] = Compiled(
            kernel=name,
            arch=self.arch,
            source=self.source,
            key=key,
            dtype=_dtype_of(args),
            options=_options(function, args, options),
            seconds=seconds,
            error=error,
            **({} if kernel is None else figures_of(kernel, self.arch)),
        )


@contextmanager
def launches(arch: int, count: bool = False) -> Iterator[Recorder]:
    """Inside the `with` block every launch is compiled for compute capability `arch` (90: H100, H200), and not run.

    Args:
        arch: one of MULTIPROCESSORS.
        count: note the specialisations without compiling them.
    """
    recorder, run = Recorder(arch, count), JITFunction.run

    def compile_only(function, *args, grid, warmup, **options) -> None:
        recorder.launch(run, function, *args, grid=grid, warmup=True, **options)

    driver.set_active(Driver(arch))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", recorder.before_compilation),
    ):
        yield recorder


@contextmanager
def cpu_as_gpu() -> Iterator[None]:
    """Inside, CPU tensors pass for those of a GPU, in the dtypes that a GPU takes."""
    with (
        mock.patch.object(dispatch, "INTERPRETED", True),
        mock.patch.object(dispatch, "_INTERPRETED_DTYPES", dispatch._CUDA_DTYPES),
    ):
        yield


@contextmanager
def every_configuration() -> Iterator[None]:
    """Inside, a kernel is launched in every configuration that is shipped for it, not in the chosen one alone."""

    def choose_each(kernel, candidates, sizes, like, launch):
        for configuration in candidates[1:]:
            launch(configuration)
        return candidates[0]

    with mock.patch.object(tuning, "choose", choose_each):
        yield


def figures_of(kernel, arch: int) -> dict:
    """Figures of a compiled kernel, by their names in `Compiled`."""
    ptx, shared, warps = kernel.asm["ptx"], kernel.metadata.shared, kernel.metadata.num_warps
    registers, stack = _usage(kernel.asm["cubin"])
    return {
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "warps": warps,
        "occupancy": MULTIPROCESSORS[arch].occupancy(registers, shared, warps),
        "access": widest_access(ptx),
        "instructions": tuple(name for name in INSTRUCTIONS if name in ptx),
    }


def widest_access(ptx: str) -> int:
    """Bytes of the widest access that one thread makes to global memory."""
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?\],\s*(0x\w+|\d+)", ptx)]
    vectors = re.findall(r"(?:ld|st)\.global(?:\.\w+(?:::\w+)?)*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return max(copies + [int(lanes or 1) * int(bits) // 8 for lanes, bits in vectors], default=0)


class Driver:
    """Stands for a GPU of one architecture, as far as Triton's compiler asks about it."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps one cache of compiled kernels for each device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def _usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return registers, stack


def _dtype_of(args: tuple) -> str:
    tensors = (getattr(arg, "base", arg) for arg in args)  # a descriptor's tensor is its base
    return next(str(tensor.dtype).removeprefix("torch.") for tensor in tensors if hasattr(tensor, "data_ptr"))


def _options(function: JITFunction, args: tuple, options: dict) -> dict:
    """Of a launch: absent tensors as None, and what it passes by name, but for objects of Triton's."""
    absent = {name: None for name, arg in zip(function.arg_names, args, strict=False) if arg is None}
    plain = {name: value for name, value in options.items() if isinstance(value, (int, float, str, type(None)))}
    return absent | {name: value for name, value in plain.items() if name != "warmup"}
