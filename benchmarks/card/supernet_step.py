"""A search step on the Triton backend: its loss and gradients, and its CUDA graph through a pruning event.

    python -m benchmarks.card.supernet_step --device cuda

Gradients are compared with those of the reference backend in float64. They may be off by twice what the reference
backend in the same precision is, and the rounding of their sums. The graph is that of `--cuda-graph`.
"""

import argparse
import time

import torch
from torch import Tensor

from benchmarks.floors import MODELS, Sizes
from benchmarks.process import add_process_options, own_row, take_turn, verdict
from benchmarks.step import halve, lowest_target, timm_model
from ofb import SearchConfig, Supernet
from ofb.engine.cuda_graph import WARMUP_STEPS
from ofb.engine.optimization import Optimization, make_optimizer

REPLAYS = 4
GRAPH_CHECK = "the step as a CUDA graph"
ALLOWED = 0.01  # of the loss: what rounding in half precision leaves after a few steps, and no wrong kernel does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(MODELS), default="deit_small")
    parser.add_argument("--batch-size", type=int, default=16)
    add_process_options(parser)
    arguments = parser.parse_args()
    take_turn(arguments)
    batch = random_batch(arguments)
    for dtype in (torch.float32, *([torch.bfloat16] if arguments.device == "cuda" else [])):
        name = f"loss and gradients, {dtype}"
        if name not in arguments.without:
            with own_row(name):
                verdict(compared_in_one_line(arguments.model, batch, dtype))
    if GRAPH_CHECK not in arguments.without:
        with own_row(GRAPH_CHECK):
            through_a_prune(arguments, batch)


def random_batch(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    side = Sizes(1, **MODELS[arguments.model]).side
    images = torch.randn(arguments.batch_size, 3, side, side, device=arguments.device)
    return images, torch.randint(0, 1000, (arguments.batch_size,), device=arguments.device)


def make_supernet(model: str, device: torch.device, backend: str) -> Supernet:
    """The same one each time; nothing in its loss is drawn at random."""
    torch.manual_seed(0)
    return Supernet(timm_model(model, drop_path_rate=0.0).to(device), target=lowest_target(model), backend=backend)


def loss_and_gradient(
    model: str, batch: tuple[Tensor, Tensor], backend: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The total loss, and all gradients as one vector, in float64; half precision is autocast."""
    images, targets = batch
    supernet = make_supernet(model, images.device, backend)
    if dtype == torch.float64:
        supernet, images = supernet.double(), images.double()
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        loss = supernet.loss(images, targets).total
    loss.backward()
    gradients = [p.grad.flatten().double() for p in supernet.parameters() if p.grad is not None]
    return loss.detach().double(), torch.cat(gradients)


def compared_in_one_line(model: str, batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> str:
    loss, gradient = loss_and_gradient(model, batch, "reference", torch.float64)
    errors = {}
    for backend in ("reference", "triton"):
        other_loss, other = loss_and_gradient(model, batch, backend, dtype)
        off = (other_loss - loss).abs() / loss.abs(), (other - gradient).norm() / gradient.norm()
        errors[backend] = torch.stack(off)
    rows = len(batch[0]) * Sizes(1, **MODELS[model]).tokens  # added up in the gradient of a weight
    bounds = 2 * errors["reference"] + torch.finfo(dtype).eps * rows**0.5
    word = "ok   " if bool((errors["triton"] <= bounds).all()) else "WRONG"  # NaN is no less than its bound
    figures = "; ".join(
        f"{name} off by {error:.1e}, reference {bound:.1e}"
        for name, error, bound in zip(("loss", "gradients"), errors["triton"], errors["reference"], strict=True)
    )
    return f"{word} search step {str(dtype).removeprefix('torch.')}: {figures}"


def through_a_prune(arguments: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> None:
    """Ordinary steps beside captured ones, a pruning event, and steps that are captured again."""
    plain, graphed = (Search(arguments, graph) for graph in (False, True))
    count = WARMUP_STEPS + REPLAYS if graphed.expects_graph else 2
    losses, others = plain.steps(batch, count), graphed.steps(batch, count)
    verdict(alike_in_one_line("graph", losses, others, graphed))
    sizes = graphed.sizes
    for search in (plain, graphed):
        halve(search.supernet, search.optimizer)
    if graphed.sizes == sizes:
        verdict("WRONG graph after a prune: no size has changed")
    losses, others = plain.steps(batch, count), graphed.steps(batch, count)
    verdict(alike_in_one_line("graph after a prune", losses, others, graphed))


def alike_in_one_line(name: str, losses: list[float], others: list[float], graphed: "Search") -> str:
    off = max(abs(a - b) / abs(a) for a, b in zip(losses, others, strict=True))
    wrong = not off <= ALLOWED or (graphed.expects_graph and not graphed.captured)
    captured = "captured" if graphed.captured else "not captured"
    return f"{'WRONG' if wrong else 'ok   '} {name}: {captured}, losses off by {off:.1e}, {graphed.seconds:.1f} s"


class Search:
    """A supernet that steps down its loss, as a CUDA graph if asked to."""

    def __init__(self, arguments: argparse.Namespace, graph: bool) -> None:
        on_gpu = arguments.device == "cuda"
        config = SearchConfig(device=arguments.device, batch_size=arguments.batch_size, amp=on_gpu, cuda_graph=graph)
        self.expects_graph = graph and on_gpu
        self.supernet = make_supernet(arguments.model, torch.device(arguments.device), "triton")
        self.optimizer = make_optimizer(self.supernet.parameter_groups(), config, lr_at_256=2.5e-4)
        self.optimization = Optimization(
            self.optimizer, self._losses, config, 0, 1000, torch.device(arguments.device),
            revision=lambda: self.supernet.revision,
        )  # fmt: skip
        self.seconds = 0.0

    def steps(self, batch: tuple[Tensor, Tensor], count: int) -> list[float]:
        """The loss before each of so many steps."""
        start = time.monotonic()
        losses = [self.optimization.step(*batch)["loss"].item() for _ in range(count)]
        self.seconds = time.monotonic() - start
        return losses

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {name: bimask.candidates.full for name, bimask in self.supernet.bimasks.items()}

    @property
    def captured(self) -> bool:
        return self.optimization.graph is not None and self.optimization.graph.graph is not None

    def _losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.supernet.loss(images, targets).total}


if __name__ == "__main__":
    main()
