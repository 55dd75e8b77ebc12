"""A training step as one CUDA graph: the host launches once what it would launch piece by piece."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

WARMUP_STEPS = 3  # steps outside the graph, in which kernels compile and the allocator finds its blocks

Step = Callable[[Tensor, Tensor], dict[str, Tensor]]


class StepGraph:
    """Runs a step as a graph that is captured after `WARMUP_STEPS` ordinary ones, and again after every change.

    The learning rates, host numbers that the schedule sets, are copied into device scalars before each replay. A batch
    of another shape than the captured one runs as an ordinary step. Where capture fails, all further steps do, and one
    line says so.

    Args:
        step: forward, backward and update on (images, targets); it leaves no gradient behind.
        optimizer: what the step updates with, made with `capturable=True`.
        revision: a number that changes whenever a tensor the step reads or writes was replaced.
    """

    def __init__(self, step: Step, optimizer: Optimizer, revision: Callable[[], int]) -> None:
        self.step, self.optimizer, self.revision_of = step, optimizer, revision
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
                return self._beside(images, targets)
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

    def _beside(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """An ordinary step on the stream that the graph will be captured from."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            losses = self.step(images, targets)
        torch.cuda.current_stream().wait_stream(self.stream)
        return losses

    def _capture(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.losses = self.step(self.images, self.targets)
            self.graph = graph
        except RuntimeError as error:
            self.possible = False
            self.optimizer.zero_grad()
            print(f"cuda_graph: steps run without one: {str(error).splitlines()[0]}", flush=True)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype
