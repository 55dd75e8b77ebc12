"""A step as a CUDA graph does what the ordinary step does, and a capture that fails leaves nothing behind.

The first half runs anywhere, on a fake of torch.cuda that fails as the real one does; the second needs a GPU.
"""

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ofb
from ofb.engine.config import SearchConfig, TrainConfig
from ofb.engine.cuda_graph import WARMUP_STEPS, StepGraph, capture, run_on
from ofb.engine.optimization import Optimization, make_optimizer
from ofb.engine.search import make_supernet
from tests.common import assert_same_training, tiny_vit
from tests.fake_cuda import FakeCuda

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIONS = {"batch_size": 16, "lr": 1e-3, "drop_path": 0.0, "device": "cuda", "clip_grad": 1.0}


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture
def loaders():
    data = TensorDataset(torch.randn(160, 3, 16, 16), torch.arange(160) % 5)
    return DataLoader(data, 16), DataLoader(data, 32)


# ---- on the fake ----


def test_without_help_a_failed_capture_leaves_everything_broken(cuda):
    """What the fake is for: PyTorch's own context gives back neither stream nor generator nor pool."""
    stream = torch.cuda.Stream()
    with pytest.raises(RuntimeError, match="previous error during capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), stream):
            cuda.wait()
    assert cuda.stream is stream and cuda.open_pools and cuda.held_pools
    with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
        cuda.draw()


class OwnError(Exception):
    """What a step may raise of its own."""


def raise_own_error(cuda):
    cuda.draw()
    raise OwnError


def interrupt(cuda):
    cuda.capturing.spoiled = True
    raise KeyboardInterrupt


def spoil_unseen(cuda):
    cuda.capturing.spoiled = True


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (FakeCuda.wait, RuntimeError, "operation not permitted when stream is capturing"),
        (spoil_unseen, RuntimeError, "operation failed due to a previous error during capture"),
        (raise_own_error, OwnError, None),
        (interrupt, KeyboardInterrupt, None),
    ],
)
def test_failed_capture_leaves_nothing_behind(cuda, run, error, message):
    stream, before = torch.cuda.Stream(), cuda.stream
    earlier, _ = capture(cuda.draw, stream)
    held = set(cuda.held_pools)
    state, drawn = cuda.generator.state, cuda.generator.state.drawn
    with pytest.raises(error, match=message):
        capture(lambda: run(cuda), stream)
    assert cuda.stream is before
    assert cuda.open_pools == set()
    assert cuda.held_pools == held or error is OwnError  # whose graph is whole, and lives as long as the error
    assert cuda.generator.state is state and state.drawn == drawn
    cuda.draw()
    earlier.replay()
    later, result = capture(lambda: "launched", stream)
    later.replay()
    assert result == "launched" and cuda.stream is before


def test_what_a_failed_step_made_goes_with_its_error(cuda):
    """Its activations may fill the device: they must not wait for the garbage collector."""
    made = []

    def run():
        activation = torch.ones(3)
        made.append(weakref.ref(activation))
        cuda.wait()

    gc.disable()
    try:
        with suppress(RuntimeError):
            capture(run, torch.cuda.Stream())
        assert made[0]() is None
    finally:
        gc.enable()


def test_capture_hands_on_the_generator(cuda):
    """The graph and whoever draws outside of it go on from one state."""
    cuda.draw()
    graph, _ = capture(cuda.draw, torch.cuda.Stream())
    assert graph.state is cuda.generator.state and graph.state.drawn == 2
    cuda.draw()


def test_other_threads_may_call_cuda_during_a_capture(cuda):
    graph, _ = capture(cuda.call_from_another_thread, torch.cuda.Stream())
    graph.replay()


def test_warm_up_runs_on_the_stream_of_the_capture(cuda):
    stream, before = torch.cuda.Stream(), cuda.stream
    assert run_on(stream, lambda: cuda.stream) is stream
    assert capture(lambda: cuda.stream, stream)[1] is stream
    assert cuda.stream is before


def make_optimization(graph: bool) -> Optimization:
    """Training of a tiny network on the CPU, its steps to be captured where the fake stands for CUDA."""
    torch.manual_seed(0)
    config = TrainConfig(**OPTIONS | {"device": "cpu", "epochs": 2})
    model = tiny_vit(embed_dim=16, depth=1)
    optimizer = make_optimizer(model, config, config.lr)

    def loss_of(images, targets):
        return {"loss": torch.nn.functional.cross_entropy(model(images), targets)}

    optimization = Optimization(optimizer, loss_of, config, 0, 10, torch.device("cpu"))
    if graph:
        optimization.graph = StepGraph(optimization._descend, optimization._abandon, optimizer, lambda: 0)
    return optimization


@pytest.mark.parametrize("part", ["loss_of", "optimizer"])
def test_training_goes_on_where_a_step_cannot_be_captured(cuda, monkeypatch, capsys, part):
    """Whichever part of the step waits for the device: before the gradients, or when they are scaled already."""
    plain, optimization = make_optimization(graph=False), make_optimization(graph=True)
    loss_of, update = optimization.loss_of, optimization.optimizer.step

    def waits(function):
        def waiting(*args, **options):
            cuda.wait()
            return function(*args, **options)

        return waiting

    if part == "loss_of":
        optimization.loss_of = waits(loss_of)
    else:
        monkeypatch.setattr(optimization.optimizer, "step", waits(update))
    stream, batches = cuda.stream, [(torch.randn(16, 3, 16, 16), torch.arange(16) % 5) for _ in range(WARMUP_STEPS + 3)]
    for batch in batches:
        expected, got = plain.step(*batch)["loss"], optimization.step(*batch)["loss"]
        torch.testing.assert_close(got, expected)
        assert cuda.stream is stream
    for parameter in optimization.parameters:
        assert parameter.grad is None
    reason = "RuntimeError: CUDA error: operation not permitted when stream is capturing"
    assert capsys.readouterr().out.splitlines() == [f"cuda_graph: steps run without one: {reason}"]


# ---- on a GPU ----


@needs_gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_training(loaders, amp, parts):
    options = OPTIONS | {"epochs": 3, "mixup": 0.0, "cutmix": 0.0, "amp": amp, "grad_accum_steps": parts}
    models = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        models.append(ofb.train(tiny_vit(), *loaders, TrainConfig(**options, cuda_graph=cuda_graph)))
    assert_same_training(*models)


@needs_gpu
def test_search_captures_again_after_a_prune(loaders, monkeypatch):
    captures = []
    capture = StepGraph._capture

    def counted(self, images, targets):
        capture(self, images, targets)
        captures.append(self.revision)
        assert self.graph is not None, "the capture failed"

    monkeypatch.setattr(StepGraph, "_capture", counted)
    config = SearchConfig(**OPTIONS, epochs=6, finetune_epochs=0, architecture_lr=0.5, amp=False, cuda_graph=True)
    torch.manual_seed(0)
    supernet = make_supernet(tiny_vit(), config, len(loaders[0]))
    model = ofb.search(supernet, *loaders, config)
    assert supernet.finished and all(parameter.isfinite().all() for parameter in model.parameters())
    assert len(captures) == len(set(captures)) >= 1


@needs_gpu
def test_learning_rate_reaches_the_graph():
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=0.0)

    def step(images, targets):
        loss = (weight * images).sum()
        loss.backward()
        with torch.no_grad():
            weight.sub_(optimizer.param_groups[0]["lr"] * weight.grad)
        optimizer.zero_grad()
        return {"loss": loss.detach()}

    graph, images = StepGraph(step, optimizer.zero_grad, optimizer, lambda: 0), torch.ones(4, device="cuda")
    for _ in range(WARMUP_STEPS + 1):
        graph(images, images)
    assert torch.equal(weight, torch.ones_like(weight))
    for rate in (1.0, 0.5):
        optimizer.param_groups[0]["lr"] = rate
        graph(images, images)
    assert torch.equal(weight, torch.full_like(weight, -0.5))


@needs_gpu
def test_failed_capture_on_a_gpu():
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    numbers = torch.zeros(2**20, device="cuda")
    earlier, drawn = capture(lambda: torch.rand(8, device="cuda"), stream)
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        capture(lambda: (numbers + 1).sum().item(), stream)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved
    assert torch.cuda.current_stream() == before
    assert torch.rand(8, device="cuda").unique().numel() == 8
    earlier.replay()
    assert drawn.unique().numel() == 8
    graph, result = capture(lambda: numbers + 1, stream)
    numbers.fill_(2)
    graph.replay()
    assert torch.equal(result, torch.full_like(result, 3))
