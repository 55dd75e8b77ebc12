"""benchmarks.host counts what a search step launches, and the launches of a step do not grow."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import pytest
import torch

from benchmarks import floors, host, ops
from benchmarks.floors import TINY, Sizes
from ofb.supernet.families import vit
from ofb_kernels.kernels.column_sums import column_sums


@pytest.fixture(scope="module")
def in_own_process():
    """Calls functions of this module where Triton is not interpreted and may believe in a GPU."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "0")
        yield lambda function: pool.submit(function).result()


def test_a_step_of_deit_small_launches_no_more_than_predicted(in_own_process):
    """The bounds are those of the predicted step; `python -m benchmarks.host --names` says what there is."""
    _, block, outside = in_own_process(deit_small_launches)
    assert total(block) <= floors.LAUNCHES_IN_A_BLOCK
    assert total(outside) <= floors.LAUNCHES_OUTSIDE


def test_another_launch_in_each_block_is_seen(in_own_process):
    _, block, outside = in_own_process(tiny_launches)
    _, more_in_block, as_much_outside = in_own_process(launches_with_a_copy_in_each_block)
    assert more_in_block - block == Counter({("forward", "clone"): 1})
    assert as_much_outside == outside


def test_what_an_op_launches_inside_is_counted(in_own_process):
    """Triton's launches in the bodies of the package's ops, those below other ops too, and PyTorch's beside them."""
    sums, mlp = in_own_process(op_launches)
    assert sums == {("forward", "column_sums._column_sums_kernel"): 2, ("forward", "zero_"): 1}
    assert mlp["forward", "linear"] == mlp["forward", "masked_linear._persistent_forward_kernel"] == 1
    assert mlp["backward", "fold._unfold_kernel"] == mlp["backward", "masked_mlp._persistent_backward_kernel"] == 1
    assert mlp["backward", "column_sums._column_sums_kernel"] == 1  # fc2's bias; fc1's sums end in the unfolding


@pytest.mark.parametrize(
    ("sizes", "launched"),
    [([5], 1), ([5] * 36, 1), ([5] * 37, 2), ([320 * host.CHUNK], 1), ([320 * host.CHUNK + 1], 2)],
)
def test_the_fused_optimizer_launches_by_tensors_and_by_their_sizes(sizes, launched):
    tensors = [torch.empty(size, device="meta") for size in sizes]
    assert host.launches_of("_fused_adamw_", (tensors,)) == launched


def test_times_are_those_of_every_op_and_of_the_step(in_own_process):
    lines = in_own_process(printed_times).splitlines()
    for name in ("dense", "triton", "masked_mlp", "masked_attention"):
        times = next(line.split()[1:] for line in lines if line.split()[:1] == [name])
        assert times and all(float(each) > 0 for each in times), name


def total(launches: Counter) -> int:
    return sum(launches.values())


# ---- what runs in the other process ----


def deit_small_launches() -> tuple[Counter, Counter, Counter]:
    with host.host_only():
        return host.launches("deit_small", "triton", (12, 6))


def tiny_launches() -> tuple[Counter, Counter, Counter]:
    with host.host_only():
        return host.launches("tiny", "triton", (3, 2))


def launches_with_a_copy_in_each_block() -> tuple[Counter, Counter, Counter]:
    def block_and_a_copy(*inputs):
        x, normalized = block(*inputs)
        return x.clone(), normalized

    block = vit._block
    with mock.patch.object(vit, "_block", block_and_a_copy):
        return tiny_launches()


def op_launches() -> tuple[Counter, Counter]:
    """Of a sum over rows, and of an MLP's forward and backward."""
    with host.host_only():
        matrix = torch.ones(5000, 8)  # more rows than one launch takes
        sums = host.counted(lambda: column_sums(matrix).zero_())
        case = next(each for each in ops.cases(Sizes(2, **TINY), "cpu", torch.bfloat16) if each.op == "masked_mlp")
        return sums, host.counted(ops.pass_of(lambda: case.run("triton"), case, "both"))


def printed_times() -> str:
    with host.host_only(), mock.patch("builtins.print") as printed:
        host.print_times(rounds=3)
    return "\n".join(str(call.args[0]) for call in printed.call_args_list if call.args)
