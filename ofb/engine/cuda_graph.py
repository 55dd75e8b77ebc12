"""CUDA graphs: the host launches once what it would launch piece by piece, such as a whole training step."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

WARMUP_STEPS = 3  # steps outside the graph, in which kernels compile and the allocator finds its blocks

Result = TypeVar("Result")
Step = Callable[[Tensor, Tensor], dict[str, Tensor]]

_failed: list[torch.cuda.CUDAGraph] = []  # kept, for PyTorch's allocator of pinned memory goes on reading them


def run_on(stream: torch.cuda.Stream, run: Callable[[], Result]) -> Result:
    """What `run` returns, run on `stream` after all work launched so far and before all work launched later.

    A graph is captured from the stream on which its work ran before: warm up with this.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = run()
    current.wait_stream(stream)
    return result


def capture(run: Callable[[], Result], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of what `run` launches, captured on `stream`, and what it returned, to be filled by each replay.

    Whatever it raises, streams, generator and memory pools are as they were before. Other threads may call CUDA
    meanwhile, as those do that pin memory. An earlier graph keeps the generator state it was captured with, so its
    random numbers may repeat those of this one.

    Args:
        run: launches work whose tensors stay where they are; it ran on `stream` before, see `run_on`.
        stream: any but the default one.

    Raises:
        BaseException: what `run` raised, or else the capture.
    """
    streams = torch.cuda.current_stream(stream.device), torch.cuda.current_stream()
    generator, pool = torch.cuda.default_generators[stream.device.index], torch.cuda.graph_pool_handle()
    state = generator.graphsafe_get_state()
    # A failed capture spoils the state it draws from. So it gets a copy, which stays only if the capture is good.
    generator.graphsafe_set_state(state.clone_state())
    graph = torch.cuda.CUDAGraph()
    context = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
    try:
        context.__enter__()
        try:
            result = run()
        except BaseException:
            with suppress(RuntimeError):  # where `run` spoiled the capture: its own error says more
                context.__exit__(None, None, None)
            raise
        context.__exit__(None, None, None)
    except BaseException:
        for each in streams:
            torch.cuda.set_stream(each)
        generator.graphsafe_set_state(state)
        _close(pool, graph, stream.device.index)
        raise
    return graph, result


def _close(pool: tuple[int, int], graph: torch.cuda.CUDAGraph, device: int) -> None:
    """End allocation to a pool that a failed capture left open, and give its memory back."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it is not open; where the capture closed it, the graph gives the memory back
        return
    torch._C._cuda_releasePool(device, pool)
    _failed.append(graph)


class StepGraph:
    """Runs a step as a graph that is captured after `WARMUP_STEPS` ordinary ones, and again after every change.

    The learning rates, host numbers that the schedule sets, are copied into device scalars before each replay. A batch
    of another shape than the captured one runs as an ordinary step. Where capture fails, all further steps do, and one
    line says so.

    Args:
        step: forward, backward and update on (images, targets); it leaves no gradient behind.
        abandon: makes the host forget a step that broke off halfway, its gradients included.
        optimizer: what the step updates with, made with `capturable=True`.
        revision: a number that changes whenever a tensor the step reads or writes was replaced.
    """

    def __init__(
        self, step: Step, abandon: Callable[[], None], optimizer: Optimizer, revision: Callable[[], int]
    ) -> None:
        self.step, self.abandon, self.optimizer, self.revision_of = step, abandon, optimizer, revision
        device = optimizer.param_groups[0]["params"][0].device
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.revision, self.warm_steps, self.possible = revision(), 0, True

    def __call__(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The step's losses; they are overwritten by the next call."""
        self._set_rates()
        if not self.possible:
            return self.step(images, targets)
        if self.revision != self.revision_of():
            self.revision, self.graph, self.warm_steps = self.revision_of(), None, 0
        if self.graph is None:
            if self.warm_steps < WARMUP_STEPS:
                self.warm_steps += 1
                return run_on(self.stream, lambda: self.step(images, targets))
            self._capture(images, targets)
        if self.graph is None or not _alike(images, self.images) or not _alike(targets, self.targets):
            return self.step(images, targets)
        self.images.copy_(images)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.losses

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _capture(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images.clone(), targets.clone()
        try:
            self.graph, self.losses = capture(lambda: self.step(self.images, self.targets), self.stream)
        except Exception as error:
            self.possible = False
            self.abandon()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"cuda_graph: steps run without one: {reason}", flush=True)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype
