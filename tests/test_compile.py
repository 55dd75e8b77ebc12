"""A compiled search step is one graph, computes what the plain one does, and is traced anew after a prune alone."""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from ofb.supernet import Supernet
from ofb.supernet.losses import Losses
from tests import test_supernet, test_swin
from tests.common import BACKENDS

LossOf = Callable[[Tensor, Tensor], Losses]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CountGraphs:
    """A compiler for `torch.compile` that runs graphs as they are, and counts those of forward and backward."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        return aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)(graph, inputs)

    def _forward(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.forward += 1
        return make_boxed_func(graph.forward)

    def _backward(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.backward += 1
        return make_boxed_func(graph.forward)


def exact_dtype(device: str) -> torch.dtype:
    """In float64 whatever is not rounding shows; the kernels take it where they are interpreted."""
    return torch.float32 if device == "cuda" else torch.float64


def make_supernet(backend: str, device: str, dtype: torch.dtype, **options) -> Supernet:
    torch.manual_seed(0)
    options |= {"model_options": {"depth": 1}, "one_hot_delay": 0.0}
    return test_supernet.make_supernet(backend=backend, device=device, dtype=dtype, **options)


def make_batch(supernet: Supernet, size: int = 2) -> tuple[Tensor, Tensor]:
    weight = next(supernet.model.parameters())
    return test_supernet.make_batch(weight.device, weight.dtype, size)


def gradients_of(loss_of: LossOf, supernet: Supernet, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """All losses of a step, and its gradients; drawn are the same areas to mask each time."""
    torch.manual_seed(0)
    losses = loss_of(*batch)
    losses.total.backward()
    found = vars(losses) | {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
    supernet.zero_grad()
    return found


def assert_computes_the_same(loss_of: LossOf, supernet: Supernet, batch: tuple[Tensor, Tensor]) -> None:
    expected, got = (gradients_of(each, supernet, batch) for each in (supernet.loss, loss_of))
    tolerance = 1e-3 if supernet.lam.dtype == torch.float32 else 1e-9
    assert got.keys() == expected.keys()
    for name, value in got.items():
        error = (value - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < tolerance, name


def train_a_step(loss_of: LossOf, supernet: Supernet) -> None:
    """A step that changes all that may change from one to the next: weights, schedules, the draw of masked areas."""
    loss_of(*make_batch(supernet)).total.backward()
    torch.optim.AdamW(supernet.parameter_groups(architecture_lr=1e-3), lr=1e-3).step()
    supernet.zero_grad()
    supernet.steps += 1
    supernet._set_schedules()


def prune(supernet: Supernet) -> None:
    """Width and attention become smaller; all stays open."""
    for name in ("embed", "attn0"):
        alive = supernet.bimasks[name].alive.clone()
        alive[:, alive.shape[1] // 2 :] = False
        supernet._keep_candidates(name, alive, None, how="pruned")
    assert not any(bimask.final for bimask in supernet.bimasks.values())


def decide_mlp(supernet: Supernet) -> None:
    """The MLP's size becomes final; the others stay open."""
    decide(supernet, "mlp0")
    assert [name for name, bimask in supernet.bimasks.items() if bimask.final] == ["mlp0"]


def decide_the_rest(supernet: Supernet) -> None:
    """All sizes are final."""
    decide(supernet, "embed", "attn0")
    assert supernet.finished


def decide(supernet: Supernet, *names: str) -> None:
    for name in names:
        alive = torch.zeros_like(supernet.bimasks[name].alive)
        alive[0, 1] = True
        supernet._keep_candidates(name, alive, None, how="pruned")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_for_each_set_of_sizes(backend, device):
    """Masked image modelling included; from one prune to the next no step is compiled again."""
    supernet, graphs = make_supernet(backend, device, exact_dtype(device)), CountGraphs()
    compiled = torch.compile(supernet.loss, fullgraph=True, backend=graphs)
    changes = (), (prune, decide_mlp), (decide_the_rest,)
    for number, events in enumerate(changes, start=1):
        for change in events:
            change(supernet)
        train_a_step(compiled, supernet)
        assert_computes_the_same(compiled, supernet, make_batch(supernet))
        assert (graphs.forward, graphs.backward) == (number, number)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_one_graph_for_all_batch_sizes(backend, device):
    supernet, graphs = make_supernet(backend, device, exact_dtype(device)), CountGraphs()
    compiled = torch.compile(supernet.loss, fullgraph=True, dynamic=True, backend=graphs)
    for size in (2, 5):
        assert_computes_the_same(compiled, supernet, make_batch(supernet, size))
    assert (graphs.forward, graphs.backward) == (1, 1)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_inductor(backend):
    """Without masked images, which Inductor draws otherwise; its code stays unoptimized, so that it compiles soon."""
    no_masks = {"mask_ratio_start": 0.0, "mask_ratio_end": 0.0}
    supernet, graphs = make_supernet(backend, "cpu", torch.float32, **no_masks), CompileCounterWithBackend("inductor")
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True, "cpp.simdlen": 1}):
        compiled = torch.compile(supernet.loss, fullgraph=True, backend=graphs)
        train_a_step(compiled, supernet)
        assert_computes_the_same(compiled, supernet, make_batch(supernet))
    assert graphs.frame_count == 1


def test_swin_is_one_graph():
    options = {"depths": (2, 1)}  # the second block's windows are shifted
    supernet, graphs = test_swin.make_supernet(torch.float64, options, backend="eager"), CountGraphs()
    compiled = torch.compile(supernet.loss, fullgraph=True, backend=graphs)
    batch = test_swin.images_of(supernet.model), torch.tensor([0, 3])
    assert_computes_the_same(compiled, supernet, batch)
    assert (graphs.forward, graphs.backward) == (1, 1)
