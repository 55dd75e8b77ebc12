"""A step as a CUDA graph does what the ordinary step does; on a machine without a GPU nothing of it can run."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ofb
from ofb.engine.config import SearchConfig, TrainConfig
from ofb.engine.graph import WARMUP_STEPS, StepGraph
from ofb.engine.search import make_supernet
from tests.common import tiny_vit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIONS = {"batch_size": 16, "lr": 1e-3, "drop_path": 0.0, "device": "cuda", "clip_grad": 1.0}


@pytest.fixture
def loaders():
    data = TensorDataset(torch.randn(160, 3, 16, 16), torch.arange(160) % 5)
    return DataLoader(data, 16), DataLoader(data, 32)


def weights_close(first, second):
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_training(loaders, amp, parts):
    options = OPTIONS | {"epochs": 3, "mixup": 0.0, "cutmix": 0.0, "amp": amp, "grad_accum_steps": parts}
    models = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        models.append(ofb.train(tiny_vit(), *loaders, TrainConfig(**options, cuda_graph=cuda_graph)))
    weights_close(*models)


def test_search_captures_again_after_a_prune(loaders, monkeypatch):
    captures = []
    capture = StepGraph._capture

    def counted(self, images, targets):
        capture(self, images, targets)
        captures.append(self.revision)
        assert self.graph is not None, "the capture failed"

    monkeypatch.setattr(StepGraph, "_capture", counted)
    config = SearchConfig(**OPTIONS, epochs=6, finetune_epochs=0, architecture_lr=0.5, cuda_graph=True)
    torch.manual_seed(0)
    supernet = make_supernet(tiny_vit(), config, len(loaders[0]))
    model = ofb.search(supernet, *loaders, config)
    assert supernet.finished and all(parameter.isfinite().all() for parameter in model.parameters())
    assert len(captures) == len(set(captures)) >= 1


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

    graph, images = StepGraph(step, optimizer, lambda: 0), torch.ones(4, device="cuda")
    for _ in range(WARMUP_STEPS + 1):
        graph(images, images)
    assert torch.equal(weight, torch.ones_like(weight))
    for rate in (1.0, 0.5):
        optimizer.param_groups[0]["lr"] = rate
        graph(images, images)
    assert torch.equal(weight, torch.full_like(weight, -0.5))
