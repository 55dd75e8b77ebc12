"""Dense training: it learns, delivers its best epoch, and a resumed run equals an uninterrupted one."""

import json

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ofb
from ofb.engine.config import RunConfig, TrainConfig
from ofb.engine.device import pick_device
from ofb.engine.optimization import Optimization, make_optimizer
from ofb.engine.train import set_drop_path
from tests.common import tiny_vit

OPTIONS = {"epochs": 4, "batch_size": 16, "lr": 2e-3, "warmup_epochs": 0.5, "model_ema": True, "device": "cpu"}


@pytest.fixture
def loaders():
    """Five classes of noise images, told apart by their brightness in the middle."""
    targets = torch.arange(64) % 5
    images = 0.3 * torch.randn(64, 3, 16, 16)
    images[:, :, 4:12, 4:12] += targets[:, None, None, None] / 2 - 1
    data = TensorDataset(images, targets)
    return DataLoader(data, 16, shuffle=True, drop_last=True), DataLoader(data, 32)


def fresh_model():
    torch.manual_seed(0)
    return tiny_vit(embed_dim=16, depth=1)


def interrupt_after(monkeypatch, module, epochs: int):
    """Ctrl-C in the middle of an epoch, after `epochs` whole ones."""
    run_epoch, count = module.run_epoch, 0

    def interrupted(loader, stage, *rest):
        nonlocal count
        count += 1
        if count <= epochs:
            return run_epoch(loader, stage, *rest)
        optimization = stage.optimization
        calls, loss_of = iter(range(2)), optimization.loss_of

        def loss_then_interrupt(images, targets):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return loss_of(images, targets)

        optimization.loss_of = loss_then_interrupt
        return run_epoch(loader, stage, *rest)

    monkeypatch.setattr(module, "run_epoch", interrupted)


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_training_learns(loaders):
    model = ofb.train(
        fresh_model(),
        *loaders,
        TrainConfig(**OPTIONS | {"epochs": 60, "lr": 5e-3, "mixup": 0.0, "cutmix": 0.0, "seed": 1}),
    )
    assert ofb.evaluate(model, loaders[1])["top1"] > 90


@pytest.mark.parametrize("amp", [False, True])
def test_resumed_equals_uninterrupted(loaders, tmp_path, monkeypatch, amp):
    options = OPTIONS | {"amp": amp}
    straight = ofb.train(fresh_model(), *loaders, TrainConfig(**options, output=str(tmp_path / "straight")))
    with monkeypatch.context() as patched:
        interrupt_after(patched, ofb.engine.train, 2)
        with pytest.raises(KeyboardInterrupt):
            ofb.train(fresh_model(), *loaders, TrainConfig(**options, output=str(tmp_path / "resumed")))
    torch.manual_seed(1)  # nothing of the process that was interrupted is left
    model = tiny_vit(embed_dim=16, depth=1)
    resumed = ofb.train(model, *loaders, TrainConfig(**options, output=str(tmp_path / "resumed"), resume=True))
    assert_same_weights(resumed, straight)
    metrics = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("straight", "resumed")]
    assert metrics[0] == metrics[1]
    assert [json.loads(line)["epoch"] for line in metrics[0].splitlines()] == [0, 1, 2, 3]


def test_a_batch_in_parts_is_the_same_step(loaders):
    """SGD without noise: the mean over the parts is the mean over the batch."""
    options = OPTIONS | {"opt": "sgd", "lr": 0.1, "clip_grad": 1.0, "drop_path": 0.0, "model_ema": False}
    models = [
        ofb.train(fresh_model().double(), *doubled(loaders), TrainConfig(**options, grad_accum_steps=parts))
        for parts in (1, 4)
    ]
    for whole, in_parts in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("images", [8, 6, 3, 1])
def test_a_batch_that_parts_do_not_divide(images):
    """In four parts its gradient is that of the mean loss: the parts count by their sizes, and none is empty."""
    config = TrainConfig(**OPTIONS | {"opt": "sgd"}, grad_accum_steps=4)
    model = fresh_model().double()
    sizes = []

    def loss_of(images, targets):
        sizes.append(len(images))
        return {"loss": torch.nn.functional.cross_entropy(model(images), targets)}

    optimization = Optimization(make_optimizer(model, config, 1e-3), loss_of, config, 0, 1, torch.device("cpu"))
    batch = torch.randn(images, 3, 16, 16, dtype=torch.float64), torch.arange(images) % 5
    loss = optimization._backward(*batch)["loss"]
    assert sizes == {8: [2, 2, 2, 2], 6: [2, 2, 1, 1], 3: [1, 1, 1], 1: [1]}[images]
    whole = loss_of(*batch)["loss"]
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=1e-12)
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


def test_a_loader_whose_last_batch_is_small(loaders):
    data = TensorDataset(*(tensor[:22] for tensor in loaders[0].dataset.tensors))
    ofb.train(
        fresh_model(), DataLoader(data, 16), loaders[1], TrainConfig(**OPTIONS | {"epochs": 1}, grad_accum_steps=4)
    )


def test_mixup_needs_pairs(loaders):
    odd = DataLoader(TensorDataset(*(tensor[:21] for tensor in loaders[0].dataset.tensors)), 16)
    message = "train_loader: expected an even number of images in each batch, .* got 5; give it drop_last=True, or set"
    with pytest.raises(ValueError, match=message):
        ofb.train(fresh_model(), odd, loaders[1], TrainConfig(**OPTIONS | {"epochs": 1}))
    none = OPTIONS | {"epochs": 1, "mixup": 0.0, "cutmix": 0.0}
    ofb.train(fresh_model(), odd, loaders[1], TrainConfig(**none, grad_accum_steps=4))


def doubled(loaders):
    """The same images in float64, in a fixed order."""
    images, targets = loaders[0].dataset.tensors
    data = TensorDataset(images.double(), targets)
    return DataLoader(data, 16), DataLoader(data, 32)


def test_parts_divide_the_batch():
    with pytest.raises(ValueError, match="grad_accum_steps: expected a divisor of batch_size 16, got 3"):
        TrainConfig(**OPTIONS, grad_accum_steps=3)


def test_no_cuda_graph_on_a_cpu(loaders, capsys):
    """One line says why, and training goes on as it would without."""
    options = OPTIONS | {"epochs": 1}
    plain = ofb.train(fresh_model(), *loaders, TrainConfig(**options))
    asked = ofb.train(fresh_model(), *loaders, TrainConfig(**options, cuda_graph=True))
    assert_same_weights(asked, plain)
    assert capsys.readouterr().out.count("cuda_graph: steps run without one: the device is cpu\n") == 1


def test_best_epoch_is_delivered(loaders, tmp_path):
    config = TrainConfig(**OPTIONS | {"lr": 3e-2, "output": str(tmp_path)})
    model = ofb.train(fresh_model(), *loaders, config)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ofb.evaluate(model, loaders[1])["top1"] == max(entry["val_top1"] for entry in entries)


def test_resuming_with_other_options(loaders, tmp_path):
    ofb.train(fresh_model(), *loaders, TrainConfig(**OPTIONS | {"epochs": 1}, output=str(tmp_path)))
    with pytest.raises(ValueError, match="epochs: the run in .* was started with 1, got 4"):
        ofb.train(fresh_model(), *loaders, TrainConfig(**OPTIONS, output=str(tmp_path), resume=True))


def test_loss_that_is_not_finite(loaders):
    model = fresh_model()
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    problem = "diverged; lower the learning rate .* not finite in 4 steps: loss nan; .* weights in 1 of 20 tensors"
    with pytest.raises(FloatingPointError, match=problem):
        ofb.train(model, *loaders, TrainConfig(**OPTIONS))


def test_evaluate_counts_every_image(loaders):
    model = fresh_model().eval()
    images, targets = loaders[1].dataset.tensors
    logits = model(images).detach()
    exact = RunConfig(amp=False)
    metrics = ofb.evaluate(model, DataLoader(loaders[1].dataset, 7), exact)  # 64 is no multiple of 7
    assert metrics["top1"] == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item(), abs=1e-4)
    assert metrics["top5"] == pytest.approx(100)
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_no_such_device():
    with pytest.raises(ValueError, match="device: expected one of this machine such as cpu, got 'gpu'"):
        pick_device(RunConfig(device="gpu"))


def test_drop_path_grows_over_the_blocks():
    model = tiny_vit(depth=3)
    set_drop_path(model, 0.2)
    assert isinstance(model.blocks[0].drop_path1, torch.nn.Identity)
    assert [round(block.drop_path2.drop_prob, 6) for block in model.blocks[1:]] == [0.1, 0.2]
    set_drop_path(model, 0.0)
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in model.blocks)
