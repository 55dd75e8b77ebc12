"""Is one op right: forward and backward against float64, at whole and at pruned sizes, in each dtype.

    python -m benchmarks.card.smoke masked_mlp --device cuda

The inputs are those of a search step. Half precision is bfloat16 under autocast on a GPU, and float16 in Triton's
interpreter, which knows no bfloat16. Afterwards every other shipped configuration is launched once, at the sizes that
are timed later: what does not compile or fit shows here, and the compiler's cache holds it.
"""

import argparse
import time
from collections.abc import Collection

import torch
from torch import Tensor

import ofb_kernels
from benchmarks.configurations import defaults_and_others, with_defaults
from benchmarks.floors import MODELS, Sizes
from benchmarks.measure import synchronize
from benchmarks.ops import ALL_LATENCY, OF_IMAGES, SHARES_KERNELS_OF, Case, cases, pass_of
from benchmarks.process import add_process_options, own_row, take_turn, verdict
from ofb_kernels.testing import check_op, error_bound

BATCHES = {"deit_small": (16, 256), "tiny": (2, 2)}  # to check, where float64 and six runs have to fit, and to launch


def main() -> None:
    arguments = parse_arguments()
    until = take_turn(arguments)
    checked, launched = BATCHES[arguments.model]
    low = torch.bfloat16 if arguments.device == "cuda" else torch.float16
    sizes_of_name = ("full",) if arguments.op in OF_IMAGES else ("full", "pruned")
    dtypes = (torch.float32,) if arguments.op in ALL_LATENCY else (low, torch.float32)
    for size in sizes_of_name:
        for dtype in dtypes:
            torch.manual_seed(0)
            case = case_of(arguments.op, Sizes(checked, **MODELS[arguments.model]).named(size), arguments.device)
            verdict(checked_in_one_line(case, size, dtype))
    for size in sizes_of_name:
        case = case_of(arguments.op, Sizes(launched, **MODELS[arguments.model]).named(size), arguments.device)
        if time.monotonic() < until:
            launch_others(case, size, arguments.without)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("op", help="a public op")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(BATCHES), default="deit_small")
    add_process_options(parser)
    return parser.parse_args()


def case_of(op: str, sizes: Sizes, device: str) -> Case:
    return next(case for case in cases(sizes, device) if case.op == op)


def checked_in_one_line(case: Case, size: str, dtype: torch.dtype) -> str:
    """ok with the error as a share of its bound, or WRONG with what is."""
    name, start = f"{case.op} {size} {str(dtype).removeprefix('torch.')}", time.monotonic()
    try:
        share = check(case, dtype, "triton")
        synchronize()
    except Exception as error:
        kind = "WRONG" if isinstance(error, AssertionError) else "FAILED"
        return f"{kind} {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return f"ok    {name}: {share:.2f} of the error bound, {time.monotonic() - start:.1f} s"


def check(case: Case, dtype: torch.dtype, backend: str) -> float:
    """The largest error of an op and its gradients against float64, as a share of its bound.

    Raises:
        AssertionError: an error exceeds its bound.
    """
    function = getattr(ofb_kernels, case.op)
    inputs = {name: tensor.detach() for name, tensor in case.inputs.items()}  # on a GPU activations are in bfloat16
    if dtype == torch.float32:
        inputs = {name: tensor.float() for name, tensor in inputs.items()}
    device = next(iter(inputs.values())).device.type

    def joined(**arguments) -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            result = function(**arguments)
        return torch.cat(result, -1) if isinstance(result, tuple) else result

    if not case.leaves() or case.op == "bimask":  # no gradients, or ranks that would change if an input moved
        return check_result(joined, inputs, case.options, backend)
    rows = max(tensor.shape[:-1].numel() for tensor in inputs.values())
    columns = max(tensor.shape[-1] for tensor in inputs.values())
    return check_op(joined, inputs, case.options, backend, reduction=max(rows, columns))


def check_result(joined, inputs: dict[str, Tensor], options: dict, backend: str) -> float:
    """The same of the result and, where there are any, of the gradients, with no input moved."""

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs.values()]
        fitting = {n: o.to(dtype) if isinstance(o, Tensor) and o.is_floating_point() else o for n, o in options.items()}
        result = joined(**dict(zip(inputs, leaves, strict=True)), **fitting, backend=backend)
        generator = torch.Generator(result.device).manual_seed(0)
        if not result.requires_grad:
            return [result]
        cotangent = torch.randn(result.shape, generator=generator, device=result.device).to(result.dtype)
        return [result.detach(), *torch.autograd.grad(result, leaves, cotangent)]

    shares = []
    runs = run(backend, torch.float32), run("reference", torch.float32), run("reference", torch.float64)
    for number, (actual, same_dtype, exact) in enumerate(zip(*runs, strict=True)):
        bound = error_bound(exact, same_dtype, [exact], reduction=max(tensor.numel() for tensor in inputs.values()))
        error = (actual.double() - exact).abs().max().item()
        assert error <= bound, f"{backend} {number}: error {error:.3e} against float64 exceeds the bound {bound:.3e}"
        shares.append(error / bound if error else 0.0)
    return max(shares)


def launch_others(case: Case, size: str, without: Collection[str]) -> None:
    """Every shipped configuration of the op's own kernels once, forward and backward."""
    name = f"{case.op} {size}"
    if name in without or case.op in SHARES_KERNELS_OF:
        return
    with own_row(name):
        triton = pass_of(lambda: case.run("triton"), case, "both" if case.leaves() else "forward")
        for choice in defaults_and_others(triton)[1]:
            if f"{name} {choice}" not in without:
                with own_row(f"{name} {choice}"):
                    with_defaults(triton, choice)()
                    synchronize()


if __name__ == "__main__":
    main()
