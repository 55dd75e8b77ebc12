"""What a search step costs the host: how many launches, and the time it takes to come to them; no GPU is needed.

    python -m benchmarks.host [--model deit_small deit_base] [--names] [--rounds 30]

Launches are counted while a real step runs on CPU tensors. What PyTorch's operators put on a GPU is counted by their
names, what Triton launches in Triton's own run. No Triton kernel runs: the numbers that a step computes mean nothing,
and nothing but its course is looked at. A block's launches are the difference of two depths. A profile counts more:
1,125 in a step of DeiT-S at batch 256 on an H200 (commit bed2e9b, benchmarks/README.md) where this counts 995. What
cuBLAS and cuDNN add depends on the shape (62 launches from batch 64 to 256), and PyTorch fills memory before long sums.

Times are those of tiny networks, in which the arithmetic is next to nothing: Python, PyTorch's dispatcher and Triton's
binder. What the driver takes for a launch, 3 to 5 µs, is not in them.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import JITFunction, driver

from benchmarks import ops, step
from benchmarks.compile_only import Driver, cpu_as_gpu
from benchmarks.floors import MODELS, TINY, Sizes
from benchmarks.measure import interleave
from ofb.supernet.families import layers, vit
from ofb_kernels.dispatch import INTERPRETED

ARCH = 90  # H100 and H200
VARIANTS = ("dense", "triton")
PHASES = ("forward", "backward", "optimizer")
DEPTHS = (12, 6)
BATCH = 2
Launches = Counter[tuple[str, str]]  # by phase and name

# They allocate, or look at what the host knows. Most views are told by their signatures.
NO_LAUNCH = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_same_size"}
    | {"promote_types", "_unsafe_view"}
)
# Operators that launch several kernels on CUDA. All others launch one.
SEVERAL = {
    **dict.fromkeys(["index_add", "masked_fill", "scatter", "scatter_add"], 2),  # a copy, and the same in place
    **dict.fromkeys(["select_backward", "slice_backward"], 2),  # zeros, and the copy of a part
    "topk": 2,  # the greatest, then their order
    "sort": 3,  # copies of values and indices, then the sort in place
    "nll_loss_backward": 2,  # zeros, then the gradient
    "native_layer_norm_backward": 2,  # the input's gradient; the parameters'
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,  # cuDNN: dout · out, the gradients, dq to bfloat16
    "convolution": 2,  # the product; the bias
    "convolution_backward": 2,  # of the weight; of the bias
}
# One launch over many tensors takes so many of them, and so many programs of CHUNK entries.
CHUNK, MOST_PROGRAMS = 65_536, 320
MOST_TENSORS = {"_fused_adamw_": 36, "_foreach_add_": 110, "_foreach_copy_": 64}
OPTIMIZER = ("_fused_adamw_", "_foreach_add_")


def main() -> None:
    arguments = parse_arguments()
    if INTERPRETED:
        raise SystemExit("TRITON_INTERPRET: expected 0 or nothing, got 1; the interpreter makes no launches")
    torch.set_num_threads(1)
    with host_only():
        for model in arguments.model:
            print_launches(model, arguments.names)
        print_times(arguments.rounds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["deit_small"])
    parser.add_argument("--names", action="store_true", help="print how often each operator and kernel is launched")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each step; ten times as many of an op")
    return parser.parse_args()


# ---- a GPU that runs nothing ----


class Kernel:
    """Stands for a compiled Triton kernel: its launches are counted.

    Args:
        name: of the kernel.
    """

    function = packed_metadata = None
    launched: Launches = Counter()

    def __init__(self, name: str) -> None:
        self.name = name

    def launch_metadata(self, *_) -> None:
        return None

    def run(self, *_) -> None:
        Kernel.launched[phase_of(self.name), self.name] += 1


@contextmanager
def host_only() -> Iterator[None]:
    """Inside, CPU tensors take the way of CUDA tensors, in bfloat16 autocast, and Triton launches nothing.

    Triton keeps believing in a GPU: use a process of its own.
    """

    def do_not_compile(function: JITFunction, key: str, *_, **__) -> Kernel:
        name = f"{function.fn.__module__.rsplit('.', 1)[-1]}.{function.fn.__name__}"
        return function.device_caches[ARCH][0].setdefault(key, Kernel(name))

    def autocast(_device: str) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def project_patches(model: nn.Module, images: Tensor) -> Tensor:
        return layers.project_patches(model.patch_embed.proj, images)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p > 0 else x

    driver.set_active(Driver(ARCH))
    with (
        cpu_as_gpu(),
        mock.patch.object(JITFunction, "_do_compile", do_not_compile),
        mock.patch.object(step, "mixed_precision", autocast),
        mock.patch.object(ops, "mixed_precision", autocast),
        mock.patch.object(vit, "patch_embeddings", project_patches),
        mock.patch.object(import_module("ofb_kernels.ops.checks"), "on_host", lambda tensor: False),
        mock.patch.object(F, "dropout", dropout),
    ):
        yield


def phase_of(name: str) -> str:
    """The phase of a step in which something is launched now."""
    if torch._C._current_graph_task_id() >= 0:
        return "backward"
    return "optimizer" if name in OPTIMIZER else "forward"


# ---- launches ----


class Counted(TorchDispatchMode):
    """Inside, the launches of PyTorch's operators are counted, also of those that the package's own operators call."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Launches = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == "ofb_kernels":
            with self:  # its Python, on which the dispatcher would leave this mode off
                return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        name = op._schema.name.removeprefix("aten::")
        is_view = any(each.alias_info and not each.alias_info.is_write for each in op._schema.returns)
        if op.namespace == "aten" and not is_view and name not in NO_LAUNCH:
            self.launched[phase_of(name), name] += launches_of(name, args)
        return op(*args, **kwargs)


def launches_of(name: str, args: tuple) -> int:
    """How many kernels an operator launches on CUDA."""
    if name not in MOST_TENSORS:
        return SEVERAL.get(name, 1)
    launched = held = programs = 0
    for tensor in args[0]:
        held += 1
        chunks = -(-tensor.numel() // CHUNK)
        for chunk in range(1, chunks + 1):
            programs, last = programs + 1, chunk == chunks
            if programs == MOST_PROGRAMS or (last and held == MOST_TENSORS[name]):
                launched, programs, held = launched + 1, 0, 0 if last else 1
    return launched + (programs > 0)


def counted(run: Callable[[], object]) -> Launches:
    """The launches of one call."""
    before = Counter(Kernel.launched)
    with Counted() as counts:
        run()
    return counts.launched + (Kernel.launched - before)


def launches(model: str, variant: str, depths: tuple[int, int] = DEPTHS) -> tuple[Launches, Launches, Launches]:
    """Those of a step, of what each of its blocks adds, and of what is left outside the blocks.

    The first block has no drop path, and the optimizer walks over all parameters at once: outside is what this leaves.

    Args:
        model: a name of `floors.MODELS`.
        variant: one of VARIANTS.
        depths: blocks of the network, and of the one it is compared with.
    """
    found = []
    for depth in depths:
        run = make_step(model, variant, depth)
        run()  # makes the optimizer's state
        found.append(counted(run))
    whole, other = found
    added = {key: (whole[key] - other[key]) // (depths[0] - depths[1]) for key in whole if key[0] != "optimizer"}
    block = Counter({key: number for key, number in added.items() if number})
    return whole, block, Counter({key: number - depths[0] * block[key] for key, number in whole.items()})


def make_step(model: str, variant: str, depth: int) -> Callable[[], None]:
    network, chosen = step.timm_model(model, depth=depth), step.VARIANTS[variant]
    if variant != "dense":
        network = step.search(network, "50%", "stream", chosen.backend)
    side = Sizes(BATCH, **MODELS[model]).side
    images, targets = torch.randn(BATCH, 3, side, side), torch.randint(0, 1000, (BATCH,))
    return step.make_step(network, chosen, images, targets)


def print_launches(model: str, names: bool) -> None:
    print(_row(f"launches in a step of {model}, {DEPTHS[0]} blocks", [*PHASES, "all"]))
    for variant in VARIANTS:
        whole, block, outside = launches(model, variant)
        for part, found in {"a block": block, "outside the blocks": outside, "whole step": whole}.items():
            numbers = [sum(number for (at, _), number in found.items() if at == phase) for phase in PHASES]
            print(_row(f"{variant}: {part}", [*numbers, sum(numbers)]))
        for key in sorted(whole, key=lambda key: (PHASES.index(key[0]), -whole[key])) if names else ():
            numbers = f"{block[key]:4} a block, {outside[key]:3} outside"
            print(f"  {whole[key]:5}: {numbers}, {key[0]} {key[1]}")
    print("A step: forward with losses, backward, fused AdamW, zero_grad. Not counted: what cuBLAS and cuDNN add for")
    print("a shape, and the fills before PyTorch's long sums; dense attention counts as cuDNN's.")


# ---- the host's time ----


def print_times(rounds: int) -> None:
    print()
    print(_row(f"host's ms for a step, {DEPTHS[0]} blocks, no CUDA graph", ["least", "median"]))
    steps = {variant: make_step("tiny", variant, DEPTHS[0]) for variant in VARIANTS}
    for variant, taken in interleave(steps, "cpu", rounds).items():
        print(_row(variant, [f"{1e3 * each:.1f}" for each in (min(taken), statistics.median(taken))]))
    print()
    print(_row("host's least µs for an op", ["forward", "backward", "eager's", "eager's"]))
    for case in ops.cases(Sizes(BATCH, **TINY), "cpu", torch.bfloat16):
        times = op_seconds(case, 10 * rounds)
        print(_row(case.op, ["" if each is None else f"{1e6 * each:.0f}" for each in times]))
    print("In these times: PyTorch's CPU kernels on tiny tensors. Not in them: the driver's 3 to 5 µs for each launch.")


def op_seconds(case: ops.Case, rounds: int) -> Iterator[float | None]:
    """Least seconds of an op's forward and backward (None without one) on Triton, then those of its eager form."""
    passes = ops.PASSES if case.leaves() else ops.PASSES[:1]
    forms = {backend: partial(case.run, backend) for backend in ("triton", "eager")}
    runs = {(backend, which): ops.pass_of(forms[backend], case, which) for backend in forms for which in passes}
    least = {name: min(taken) for name, taken in interleave(runs, "cpu", rounds).items()}
    for backend in forms:
        forward, *both = (least[backend, which] for which in passes)
        yield forward
        yield both[0] - forward if both else None


def _row(name: str, cells: list[object]) -> str:
    return f"{name:44}" + "".join(f"{cell:>10}" for cell in cells)


if __name__ == "__main__":
    main()
