"""A stage writes its checkpoints when it should, and goes on from any of them."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ofb
from ofb.engine import stage
from ofb.engine.checkpoint import save_checkpoint
from ofb.engine.config import TrainConfig
from ofb.engine.optimization import Optimization, make_optimizer
from tests.test_train import OPTIONS, assert_same_weights, fresh_model

STEPS = 5


@pytest.fixture
def loaders():
    data = TensorDataset(torch.randn(16 * STEPS, 3, 16, 16), torch.arange(16 * STEPS) % 5)
    return DataLoader(data, 16, shuffle=True, drop_last=True), DataLoader(data, 32)


@pytest.fixture
def saved(monkeypatch):
    """The places, epoch and batches, of the checkpoints that are written."""
    places, steps = [], []

    def noted(folder, name, step, state, keep):
        places.append((state["epoch"], state["batches"]))
        steps.append(step)
        assert steps == sorted(set(steps)), "two states of one age: chance would decide which one is the newest"
        save_checkpoint(folder, name, step, state, keep)
        if state["epoch"] == 2:
            steps.clear()

    monkeypatch.setattr(stage, "save_checkpoint", noted)
    return places


def config(folder, **options) -> TrainConfig:
    return TrainConfig(**OPTIONS | {"epochs": 2, "output": str(folder)} | options)


def test_when_checkpoints_are_written(loaders, saved, tmp_path):
    ofb.train(fresh_model(), *loaders, config(tmp_path / "two", checkpoint_every=2, keep_checkpoints=3))
    assert saved == [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 3
    saved.clear()
    ofb.train(fresh_model(), *loaders, config(tmp_path / "none", checkpoint_every=1000))
    assert saved == [(0, 0), (1, 0), (2, 0)]
    saved.clear()
    ofb.train(fresh_model(), *loaders, config(tmp_path / "each", checkpoint_every=STEPS))
    assert saved == [(0, 0), (0, STEPS), (1, 0), (1, STEPS), (2, 0)]


@pytest.mark.parametrize("batches", [1, 3, STEPS])
def test_it_goes_on_from_the_middle_of_an_epoch(loaders, tmp_path, monkeypatch, batches):
    """Without doing again what was done: only the steps that are left are taken."""
    straight = ofb.train(fresh_model(), *loaders, config(tmp_path / "straight"))

    def stop_there(self, losses):
        step(self, losses)
        if (self.epoch, self.batches) == (1, batches):
            raise KeyboardInterrupt

    step = stage.Stage.stepped
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stage.Stage, "stepped", stop_there)
        ofb.train(fresh_model(), *loaders, config(tmp_path / "run", checkpoint_every=1))
    taken = []
    monkeypatch.setattr(stage.Stage, "stepped", lambda self, losses: taken.append(self.batches) or step(self, losses))
    torch.manual_seed(1)
    resumed = ofb.train(fresh_model(), *loaders, config(tmp_path / "run", resume=True))
    assert taken == list(range(batches, STEPS))
    assert_same_weights(resumed, straight)
    metrics = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("straight", "run")]
    assert metrics[0] == metrics[1]


def test_means_are_those_of_the_steps_that_were_taken():
    config = TrainConfig(**OPTIONS | {"drop_path": 0.0})
    model = fresh_model()
    optimization = Optimization(
        make_optimizer(model, config, 1e-3),
        lambda images, targets: {"loss": torch.nn.functional.cross_entropy(model(images), targets)},
        config,
        0,
        4,
        torch.device("cpu"),
    )
    running, taken = stage.Stage(config, "train", 4, optimization, {}), []
    for scale in (1.0, torch.nan, 3.0, torch.inf):
        losses = optimization.step(scale * torch.ones(5, 3, 16, 16), torch.arange(5))
        running.stepped(losses)
        taken += [losses["loss"].item()] if losses["skipped"] == 0 else []
    assert len(taken) == 2
    assert running.means() == {"loss": pytest.approx(sum(taken) / 2), "skipped": 2}
