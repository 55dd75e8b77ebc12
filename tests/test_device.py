"""Determinism where a config asks for it, and only there; precision and CUDA graph by default where a GPU has them."""

import dataclasses

import pytest
import torch

import ofb
from ofb.cli import main, parse
from ofb.engine.checkpoint import load_checkpoint
from ofb.engine.config import TrainConfig
from ofb.engine.device import determinism, no_cuda_graph, uses_amp
from ofb.engine.optimization import Optimization, make_optimizer
from tests.test_train import OPTIONS, fresh_model, loaders  # noqa: F401


@pytest.mark.parametrize("asked", [False, True])
def test_determinism_ends_with_the_block(asked):
    with pytest.raises(KeyboardInterrupt), determinism(TrainConfig(deterministic=asked)):
        assert torch.are_deterministic_algorithms_enabled() == asked
        raise KeyboardInterrupt
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_is_within_it(loaders, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr("ofb.engine.train.evaluate", lambda *_: asked.append(_asked()) or {"top1": 0.0, "loss": 0.0})
    for deterministic in (True, False):
        ofb.train(fresh_model(), *loaders, TrainConfig(**OPTIONS | {"epochs": 1}, deterministic=deterministic))
    assert asked == [True, False]


def _asked() -> bool:
    return torch.are_deterministic_algorithms_enabled()


# ---- defaults that fit a GPU: torch.cuda says what the test tells it to ----

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def capability(monkeypatch):
    """Sets the compute capability of the GPU that is not there."""
    return lambda *version: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)


@pytest.mark.parametrize(
    ("options", "version", "expected"),
    [
        ({}, (8, 0), True),
        ({}, (9, 0), True),
        ({}, (7, 5), False),  # which would emulate bfloat16
        ({"amp_dtype": "float16"}, (7, 5), True),
        ({"amp": False}, (9, 0), False),
        ({"amp": True}, (7, 5), True),
    ],
)
def test_mixed_precision_where_the_gpu_has_it(capability, options, version, expected):
    capability(*version)
    assert uses_amp(TrainConfig(**options), GPU) is expected
    assert uses_amp(TrainConfig(**options), CPU) is options.get("amp", False), "nothing changes on a CPU"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"cuda_graph": True, "deterministic": True}, None),
        ({"cuda_graph": False}, "--no-cuda-graph"),
        ({"opt": "sgd"}, "only adamw can be captured, not sgd"),
        ({"amp_dtype": "float16"}, "float16 loss scaling decides on the host"),
        ({"deterministic": True}, "--deterministic"),
    ],
)
def test_cuda_graph_where_the_optimizer_allows_it(capability, options, reason):
    capability(9, 0)
    assert no_cuda_graph(TrainConfig(**options), GPU) == reason
    assert no_cuda_graph(TrainConfig(), CPU) == "the device is cpu"


@pytest.mark.parametrize(
    ("graph", "device", "capturable"), [(None, GPU, True), (False, GPU, False), (None, CPU, False)]
)
def test_optimizer_is_one_that_can_be_captured(capability, monkeypatch, graph, device, capturable):
    capability(9, 0)
    made = []
    monkeypatch.setattr("ofb.engine.optimization.pick_device", lambda config: device)
    monkeypatch.setattr("ofb.engine.optimization.create_optimizer_v2", lambda *_, **options: made.append(options))
    make_optimizer(fresh_model(), TrainConfig(cuda_graph=graph), 1e-3)
    assert made[0]["capturable"] is capturable


def test_the_default_is_silent_where_there_is_no_graph(loaders, capsys):  # noqa: F811
    ofb.train(fresh_model(), *loaders, TrainConfig(**OPTIONS | {"epochs": 1, "opt": "sgd"}))
    assert "cuda_graph" not in capsys.readouterr().out


def test_an_optimizer_can_be_captured_wherever_its_run_began():
    """A checkpoint from a CPU must not keep a GPU from capturing, nor the other way round."""
    config = TrainConfig(**OPTIONS)
    model = fresh_model()

    def loss_of(images, targets):
        return {"loss": model(images).square().mean()}

    optimizations = [Optimization(make_optimizer(model, config, 1e-3), loss_of, config, 0, 4, CPU) for _ in range(2)]
    optimizations[0].step(torch.randn(4, 3, 16, 16), torch.arange(4))
    state = optimizations[0].state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["capturable"] = True
    optimizations[1].load_state_dict(state)
    assert {group["capturable"] for group in optimizations[1].optimizer.param_groups} == {False}
    assert optimizations[1].steps == 1


def test_a_run_keeps_its_precision_on_another_device(loaders, tmp_path, monkeypatch):  # noqa: F811
    """Begun with the default where that is bf16, gone on with where it is fp32: told, not changed silently."""
    config = TrainConfig(**OPTIONS | {"epochs": 1}, output=str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr("ofb.engine.device.uses_amp", lambda config, device: config.amp is None or config.amp)
        ofb.train(fresh_model(), *loaders, config)
    assert load_checkpoint(tmp_path / "checkpoints", "train")["config"]["amp"] is True
    resumed = dataclasses.replace(config, resume=True)
    with pytest.raises(ValueError, match="amp: the run in .* was started with True, got False"):
        ofb.train(fresh_model(), *loaders, resumed)
    ofb.train(fresh_model(), *loaders, dataclasses.replace(resumed, amp=True))


def test_a_resumed_command_keeps_its_precision(tmp_path, monkeypatch):
    command = "train --model vit_tiny_patch16_224 --model-kwargs embed_dim=32 depth=1 num_heads=2 --epochs 1"
    folder = ("--output", str(tmp_path / "run"))
    with monkeypatch.context() as patched:
        patched.setattr("ofb.engine.device.uses_amp", lambda config, device: config.amp is None or config.amp)
        assert main([*command.split(), "--device", "cpu", *folder]) == 0
    assert "amp: true\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert parse("train", ["--resume", *folder]).amp is True
    assert main(["train", "--resume", *folder]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--lr 1", (None, None)),
        ("--amp --no-cuda-graph", (True, False)),
        ("--cuda_graph --lr 1 --no-amp", (False, True)),
    ],
)
def test_flags_decide(arguments, expected):
    config = parse("train", arguments.split())
    assert (config.amp, config.cuda_graph) == expected


@pytest.mark.parametrize(("line", "expected"), [("amp: true", True), ("amp: false", False), ("amp: null", None)])
def test_files_of_earlier_runs(line, expected, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"{line}\ncuda_graph: false\nepochs: 3\n")
    config = parse("search", ["--config", str(path)])
    assert (config.amp, config.cuda_graph, config.epochs) == (expected, False, 3)
    assert parse("evaluate", ["--config", str(path), "--amp", "runs/x"]).amp is True
