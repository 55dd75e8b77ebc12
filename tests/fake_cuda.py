"""As much of torch.cuda as a graph's capture uses, without a GPU: it fails, and is left broken, as the real one is.

A capture that something spoiled cannot be ended: `capture_end` raises, before `torch.cuda.graph` leaves its stream,
before the generator's state stops capturing and before the memory pool is closed. After that a random draw raises.
"""

import copy
import sys

import pytest
import torch

from ofb_kernels import dispatch, eager

DEVICE = torch.device("cuda", 0)


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    """Until the test ends, every tensor says that it is on a GPU of this compute capability to whoever chooses a form.

    That is the choice of a backend, and of a plain form. To interpreted kernels it says where it is.
    """
    fooled = {dispatch.__name__, eager.__name__}
    really = torch.Tensor.is_cuda

    def is_cuda(tensor: torch.Tensor) -> bool:
        return sys._getframe(1).f_globals["__name__"] in fooled or really.__get__(tensor)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(is_cuda))
    monkeypatch.setattr(dispatch, "capability_of", lambda index: capability)


class Stream:
    """A stream that runs whatever is launched on it at once."""

    def __init__(self, device: object = None) -> None:
        self.device = DEVICE

    def wait_stream(self, stream: "Stream") -> None:
        pass


class State:
    """A generator's: how much was drawn, and whether a capture draws from it."""

    def __init__(self) -> None:
        self.drawn, self.capturing = 0, False


class Generator:
    """A handle of a state."""

    def __init__(self) -> None:
        self.state = State()

    def graphsafe_get_state(self) -> "Generator":
        return copy.copy(self)

    def graphsafe_set_state(self, other: "Generator") -> None:
        self.state = other.state

    def clone_state(self) -> "Generator":
        clone = Generator()
        clone.state.drawn = self.state.drawn
        return clone


class FakeCuda:
    """One device; `torch.cuda` speaks to it until the test ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default_stream = self.stream = Stream()
        self.generator = Generator()
        self.capturing: Graph | None = None
        self.open_pools: set[tuple[int, int]] = set()
        self.held_pools: set[tuple[int, int]] = set()
        self.handles = 0
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": lambda: Graph(self),
            "current_stream": lambda device=None: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "stream": lambda stream: OnStream(self, stream),
            "synchronize": lambda device=None: self.wait(),
            "empty_cache": lambda: None,
            "graph_pool_handle": self.new_pool,
            "default_generators": (self.generator,),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.end_pool(pool))
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.held_pools.remove(pool))

    def wait(self) -> None:
        """Wait for the device, which spoils a capture."""
        if self.capturing is not None:
            self.capturing.spoiled = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def call_from_another_thread(self) -> None:
        """What a thread that pins memory does; it spoils a capture that watches all threads."""
        if self.capturing is not None and self.capturing.mode == "global":
            self.capturing.spoiled = True
            raise RuntimeError("CUDA error: operation would make the legacy stream depend on a capturing stream")

    def draw(self) -> None:
        """A random number."""
        if self.generator.state.capturing != (self.capturing is not None):
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.generator.state.drawn += 1

    def new_pool(self) -> tuple[int, int]:
        self.handles += 1
        return 0, self.handles

    def end_pool(self, pool: tuple[int, int]) -> None:
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.remove(pool)


class OnStream:
    """The context in which a stream is the current one."""

    def __init__(self, cuda: FakeCuda, stream: Stream) -> None:
        self.cuda, self.stream = cuda, stream

    def __enter__(self) -> None:
        self.before, self.cuda.stream = self.cuda.stream, self.stream

    def __exit__(self, *args: object) -> None:
        self.cuda.stream = self.before


class Graph:
    """A CUDA graph; what is launched while it captures runs at once, and again at no replay."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.spoiled, self.ended = cuda, False, False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str = "global") -> None:
        assert self.cuda.stream is not self.cuda.default_stream and self.cuda.capturing is None
        self.mode, self.memory, self.state = capture_error_mode, pool, self.cuda.generator.state
        self.state.capturing, self.cuda.capturing = True, self
        self.cuda.open_pools.add(pool)
        self.cuda.held_pools.add(pool)

    def capture_end(self) -> None:
        self.cuda.capturing = None
        if self.spoiled:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.cuda.end_pool(self.memory)
        self.state.capturing, self.ended = False, True

    def pool(self) -> tuple[int, int]:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self.memory

    def replay(self) -> None:
        if not self.ended or self.state.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
