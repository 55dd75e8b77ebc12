"""Several processes, one run: what torchrun starts does what a single process would (torch.distributed, DDP).

All processes hold the same network and take the same decisions; each sees its share of every batch. Outside such a job
every function here does nothing, or what is left to do for a single process.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Result = TypeVar("Result")
LossOf = Callable[[Tensor, Tensor], dict[str, Tensor]]


# ---- the job ----


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, until the block ends; without torchrun, or once joined, do nothing.

    Tensors on the CPU travel by gloo, those on GPUs by NCCL, and each process of a machine gets a GPU of its own. The
    standard output of all processes but the first is silenced.

    Raises:
        ValueError: torchrun may start the job anew, but not in a way in which the processes would find each other.
    """
    if in_job() or not _by_torchrun():
        yield
        return
    gpu = int(os.environ["LOCAL_RANK"])
    if gpu < torch.cuda.device_count():
        torch.cuda.set_device(gpu)
    store, number, count = _meeting_place()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_main() else nowhere):
        yield
    # Not after an error: the others may be in the middle of an exchange that will never end.
    dist.destroy_process_group()


def in_job() -> bool:
    """Whether this process has joined others, or might have: torchrun may start a single one."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if in_job() else 0


def processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if in_job() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def may_restart() -> bool:
    """Whether torchrun starts the job anew when a process fails."""
    return _by_torchrun() and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0


def was_restarted() -> bool:
    """Whether torchrun has started the job anew because a process failed; all processes have to ask."""
    # Only the machine of the process that failed counts a restart.
    restarts = float(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if in_job() else 0.0
    return sum_over_processes(torch.tensor(restarts)).item() > 0


def check_device(device: torch.device) -> None:
    """Refuse a GPU that several processes would share.

    Raises:
        ValueError: there are fewer GPUs of that name than processes on this machine.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if in_job() else 1
    gpus = torch.cuda.device_count() if device.index is None else 1
    if device.type == "cuda" and local > gpus:
        raise ValueError(
            f"device: expected a GPU for each of the {local} processes, got {gpus} ({device}); "
            "give torchrun fewer processes (--nproc-per-node), or ofb --device cuda or cpu"
        )


def _by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _meeting_place() -> tuple["dist.Store", int, int]:
    """Where the processes exchange their addresses, number of this one, and how many there are.

    From torch 2.5 on, torchrun keeps this store when it starts the job anew, and with it the addresses of the dead
    (pytorch/pytorch#135712). On one machine a prefix tells the living from them.
    """
    one_machine = os.environ["GROUP_WORLD_SIZE"] == "1"
    if not one_machine and may_restart() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment on every machine, got none; "
            "without it, processes on several machines do not find each other again after a restart; set it"
        )
    store, number, count = next(dist.rendezvous("env://"))
    if one_machine:
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, number, count


# ---- exchange ----


def on_main(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in the first process only; its result, or its error, is that of all processes."""
    if not in_job():
        return function(*args)
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = function(*args)
        except (Exception, SystemExit) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a tensor over the processes."""
    if in_job():
        values = values.clone()
        dist.all_reduce(values)
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over the processes."""
    return sum_over_processes(values) / processes()


def start_alike(module: nn.Module) -> None:
    """Give every process the parameters of the first."""
    if in_job():
        parameters = list(module.parameters())
        values = parameters_to_vector(parameters).detach()
        dist.broadcast(values, src=0)
        for parameter, part in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
            parameter.data.copy_(part.view_as(parameter))


def average_gradients(module: nn.Module) -> None:
    """Replace all gradients by their mean over the processes."""
    if in_job():
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        vector_to_parameters(mean_over_processes(parameters_to_vector(gradients)), gradients)


def check_alike(parts: Mapping[str, Iterable[Tensor]], when: str) -> None:
    """Make sure that tensors are the same in all processes, bit for bit.

    Args:
        parts: named groups of tensors, of any shapes.
        when: for the error message.

    Raises:
        RuntimeError: they are not; it names the groups, and is raised in all processes.
    """
    if not in_job():
        return
    digests: list[dict[str, str]] = [{}] * processes()
    dist.all_gather_object(digests, {name: _digest(tensors) for name, tensors in parts.items()})
    for number, other in enumerate(digests):
        differing = [name for name, digest in digests[0].items() if other.get(name) != digest]
        if differing:
            raise RuntimeError(
                f"processes disagree {when}: expected the same {', '.join(differing)} everywhere, got others in "
                f"process {number} than in process 0; make sure that all of them run the same code and versions on the "
                "same kind of device and change nothing of the supernet by themselves, then go on from the last "
                "checkpoint with --resume"
            )


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- gradients ----


class Averaged:
    """Losses of a share of the batch, whose backward pass leaves gradients that are averaged over the processes.

    DDP does it, sending one part of the network's gradients while the next is computed. It keeps buffers of the
    parameters' sizes, so the parameters are wrapped anew after every prune.

    Args:
        loss_of: named losses of images and targets; "loss" is the one to differentiate.
        parameters: what it depends on, the same objects for good.
        revision: a number that changes whenever the parameters' tensors were replaced, where they may be; of those,
            some wait for their turn, such as the scales of open submodules.
    """

    def __init__(self, loss_of: LossOf, parameters: Iterable[nn.Parameter], revision: Callable[[], int] | None) -> None:
        self.module, self.searches = _Losses(loss_of, parameters), revision is not None
        self.revision_of = revision or (lambda: 0)
        self.wrapped: DistributedDataParallel | None = None
        self.revision = self.revision_of()

    def __call__(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return self._wrapped()(images, targets)

    def no_sync(self) -> AbstractContextManager:
        """Within the block, gradients add up in each process by itself."""
        return self._wrapped().no_sync()

    def _wrapped(self) -> DistributedDataParallel:
        if self.revision != self.revision_of():
            self.revision, self.wrapped = self.revision_of(), None  # the old one's hooks must go first
        if self.wrapped is None:
            self.wrapped = DistributedDataParallel(
                self.module, find_unused_parameters=self.searches, broadcast_buffers=False, init_sync=False
            )
        return self.wrapped


class _Losses(nn.Module):
    """A loss function as the module that DDP asks for."""

    def __init__(self, loss_of: LossOf, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.loss_of, self.involved = loss_of, nn.ParameterList(parameters)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return self.loss_of(images, targets)


def averaged(loss_of: LossOf, parameters: Iterable[nn.Parameter], revision: Callable[[], int] | None) -> LossOf:
    """`Averaged` in a job, the losses as they are outside one."""
    return Averaged(loss_of, parameters, revision) if in_job() else loss_of


def without_exchange(loss_of: LossOf) -> AbstractContextManager:
    """Within the block, the gradients of `averaged` losses are not exchanged: more parts of the batch will follow."""
    return loss_of.no_sync() if isinstance(loss_of, Averaged) else nullcontext()
