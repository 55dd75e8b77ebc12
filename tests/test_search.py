"""The search as a whole: it resumes as if never interrupted, meets its target and keeps the accuracy on real images."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ofb
from ofb.engine.config import SearchConfig, TrainConfig
from ofb.engine.data import create_loaders, create_model
from ofb.engine.history import in_order
from ofb.engine.optimization import Optimization
from ofb.engine.search import describe_choices, describe_costs, describe_reach, make_supernet
from ofb.engine.seeding import seed_everything
from ofb.supernet.families import count_macs
from tests.common import tiny_vit
from tests.test_train import assert_same_weights, interrupt_after

OPTIONS = {
    "epochs": 4,
    "finetune_epochs": 3,
    "batch_size": 16,
    "lr": 1e-3,
    "finetune_lr": 1e-3,
    "architecture_lr": 0.3,
    "one_hot_weight": 0.5,  # sizes are decided within four epochs
    "one_hot_delay": 0.0,
    "architecture_init": "random",
    "pace": 0.0,
    "device": "cpu",
}


@pytest.fixture
def loaders():
    data = TensorDataset(torch.randn(64, 3, 16, 16), torch.arange(64) % 5)
    return DataLoader(data, 16, shuffle=True, drop_last=True), DataLoader(data, 32)


def fresh_supernet(config: SearchConfig, seed=0) -> ofb.Supernet:
    torch.manual_seed(seed)
    return make_supernet(tiny_vit(), config, steps_per_epoch=4)


@pytest.mark.parametrize(
    ("stage", "module", "epochs", "opt"),
    [
        ("search", ofb.engine.search, 2, "adamw"),
        ("search", ofb.engine.search, 3, "adagrad"),
        ("search", ofb.engine.search, 3, "lookahead_adan"),
        ("finetune", ofb.engine.train, 1, "adamw"),
    ],
)
def test_resumed_equals_uninterrupted(loaders, tmp_path, monkeypatch, stage, module, epochs, opt):
    options = OPTIONS | {"opt": opt}
    config = SearchConfig(**options, output=str(tmp_path / "straight"))
    supernet = fresh_supernet(config)
    straight = ofb.search(supernet, *loaders, config)
    config = SearchConfig(**options, output=str(tmp_path / "resumed"))
    with monkeypatch.context() as patched:
        interrupt_after(patched, module, epochs)
        with pytest.raises(KeyboardInterrupt):
            ofb.search(fresh_supernet(config), *loaders, config)
    interrupted = json.loads((tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (interrupted["stage"], interrupted["epoch"]) == (stage, epochs - 1)
    if stage == "search":  # candidates have died by then: the state to load has other shapes than a fresh supernet
        assert interrupted["alive"] < sum(fresh_supernet(config).alive_candidates().values())
    config = SearchConfig(**options, output=str(tmp_path / "resumed"), resume=True)
    other = fresh_supernet(config, seed=1)
    resumed = ofb.search(other, *loaders, config)
    assert_same_weights(resumed, straight)
    assert other.choices == supernet.choices
    for name in ("metrics.jsonl", "history.jsonl", "found.json"):
        straight_file, resumed_file = ((tmp_path / run / name).read_text() for run in ("straight", "resumed"))
        assert straight_file == resumed_file


def test_search_without_a_run_folder_or_fine_tuning(loaders):
    config = SearchConfig(**OPTIONS | {"finetune_epochs": 0})
    supernet = fresh_supernet(config)
    model = ofb.search(supernet, *loaders, config)
    assert supernet.finished
    assert 0.98 * supernet.target_macs <= count_macs(model) <= supernet.target_macs


def test_a_search_that_ends_early_says_why(loaders, tmp_path, capsys):
    """Two candidates of one submodule are left to choose from: the first pruning event decides."""
    like = fresh_supernet(SearchConfig(**OPTIONS))
    sizes = {name: bimask.candidates.full for name, bimask in like.bimasks.items()}
    target = str(like.macs.total(sizes | {"mlp1": (1, 64)}))
    space = {"freeze": ("embed", "attn*", "mlp0"), "candidates": ("mlp1=64,128",)}
    options = OPTIONS | {"finetune_epochs": 0, "prune_threshold": 0.99, "macs_weight": 1e5} | space
    config = SearchConfig(**options, target=target, output=str(tmp_path))
    ofb.search(fresh_supernet(config), *loaders, config)
    epochs = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    shown = capsys.readouterr().out
    assert epochs < 4 and f"\nall sizes are final in epoch {epochs} of 4: the search is over\nsizes: " in shown


def test_a_search_of_full_length_says_nothing_of_its_end(loaders, capsys):
    config = SearchConfig(**OPTIONS | {"finetune_epochs": 0, "epochs": 1, "settling": 0.0})
    ofb.search(fresh_supernet(config), *loaders, dataclasses.replace(config))
    assert "the search is over" not in capsys.readouterr().out


@pytest.mark.parametrize(("options", "epochs"), [({}, 7), ({"finetune_epochs": 0}, 4), ({"cosine_epochs": 5}, 5)])
def test_the_cosine_ends_with_the_fine_tuning(loaders, monkeypatch, options, epochs):
    """The search's learning rate falls as if the two were one training, or as `cosine_epochs` says."""
    config = SearchConfig(**OPTIONS | {"warmup_epochs": 1.0, "min_lr": 1e-5} | options)
    rates, step = [], Optimization.step

    def noted(optimization, images, targets):
        rates.append(optimization.optimizer.param_groups[0]["lr"])
        return step(optimization, images, targets)

    monkeypatch.setattr(Optimization, "step", noted)
    ofb.search(fresh_supernet(config), *loaders, config)
    t, length = 4, 4 * epochs  # steps; the warm-up ends with the first epoch
    assert rates[t] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / length)) / 2)


THREE_TARGETS = OPTIONS | {"epochs": 6, "targets": "60%, 40%, 25%"}


def test_one_search_passes_several_targets(loaders, capsys):
    config = SearchConfig(**THREE_TARGETS | {"finetune_epochs": 1})
    supernet = fresh_supernet(config)
    networks = ofb.search_targets(supernet, *loaders, config)
    assert list(networks) == ["60%", "40%", "25%"]
    shown = capsys.readouterr().out
    for passed, epoch, following in (("60%", 2, "40%"), ("40%", 4, "25%")):
        assert f"{passed}: its network is taken after epoch {epoch}; on to {following}\n" in shown
    for target, network in networks.items():
        share = float(target.rstrip("%")) / 100
        assert 0.98 * share <= count_macs(network) / supernet.dense_macs <= share


@pytest.mark.parametrize(("module", "epochs"), [(ofb.engine.search, 3), (ofb.engine.train, 4)])
def test_search_of_several_targets_resumes(loaders, tmp_path, monkeypatch, module, epochs):
    """Interrupted between the first target and the second, and in the second network's fine-tuning."""
    config = SearchConfig(**THREE_TARGETS, output=str(tmp_path / "straight"))
    straight = ofb.search_targets(fresh_supernet(config), *loaders, config)
    config = SearchConfig(**THREE_TARGETS, output=str(tmp_path / "resumed"))
    with monkeypatch.context() as patched:
        interrupt_after(patched, module, epochs)
        with pytest.raises(KeyboardInterrupt):
            ofb.search_targets(fresh_supernet(config), *loaders, config)
    config = SearchConfig(**THREE_TARGETS, output=str(tmp_path / "resumed"), resume=True)
    resumed = ofb.search_targets(fresh_supernet(config, seed=1), *loaders, config)
    for target, network in straight.items():
        assert_same_weights(resumed[target], network)
        assert resumed[target].pretrained_cfg == network.pretrained_cfg


@pytest.mark.parametrize("missing", [False, True])
def test_a_model_without_a_pretrained_cfg(loaders, tmp_path, missing):
    """Its networks have none either, also those of the first target after the search goes on from a checkpoint."""
    options = OPTIONS | {"epochs": 2, "finetune_epochs": 0, "targets": "80%,50%", "output": str(tmp_path)}
    for resume in (False, True):
        config = SearchConfig(**options, resume=resume)
        torch.manual_seed(0)
        model = tiny_vit()
        model.pretrained_cfg = model.default_cfg = None
        if missing:
            del model.pretrained_cfg, model.default_cfg
        networks = ofb.search_targets(make_supernet(model, config, 4), *loaders, config)
        for name, network in networks.items():
            assert getattr(network, "pretrained_cfg", None) is None
            ofb.save(network, tmp_path / name)
            assert count_macs(ofb.load(tmp_path / name)) == count_macs(network)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("25%, 50%", "give the largest first"),
        ("50%, 49.5%", "at least 2% below"),
        ("50%, 1%", "target: expected between"),
    ],
)
def test_targets_that_make_no_sense(targets, message):
    with pytest.raises(ValueError, match=message):
        fresh_supernet(SearchConfig(**OPTIONS, targets=targets))


def test_more_targets_than_epochs():
    with pytest.raises(ValueError, match="targets: expected at most one an epoch"):
        SearchConfig(**OPTIONS | {"epochs": 2}, targets="60%,40%,30%")


def test_several_targets_need_their_own_function(loaders):
    config = SearchConfig(**THREE_TARGETS)
    with pytest.raises(ValueError, match="ofb.search_targets searches several"):
        ofb.search(fresh_supernet(config), *loaders, config)
    one = SearchConfig(**OPTIONS | {"epochs": 6})
    with pytest.raises(ValueError, match="later_targets"):
        ofb.search_targets(fresh_supernet(one), *loaders, config)


def test_importance_is_reported(loaders, tmp_path, capsys):
    config = SearchConfig(**OPTIONS | {"finetune_epochs": 0}, output=str(tmp_path))
    ofb.search(fresh_supernet(config), *loaders, config)
    entries = json.loads((tmp_path / "importance.json").read_text())
    assert entries and all(-1 <= entry["rank_correlation"] <= 1 for entry in entries.values())
    assert all(len(entry["importance"]) == len(entry["loss_change"]) >= 3 for entry in entries.values())
    assert "importance against the loss without a unit: rank correlation" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_learns_from_the_teacher_in_both_stages(loaders, kind):
    """Weight 1 on a teacher that knows one class: both stages must learn to say it, whatever the labels."""

    class Teacher(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[9.0, 0, 0, 0, 0]]).expand(len(images), 5)

    for stage in ({"finetune_epochs": 0, "epochs": 12}, {"finetune_epochs": 12, "epochs": 1}):
        options = OPTIONS | stage | {"mixup": 0.0, "cutmix": 0.0, "lr": 3e-3, "finetune_lr": 3e-3, "model_ema": False}
        config = SearchConfig(**options, distillation=kind, distillation_alpha=0.99)
        torch.manual_seed(0)
        model = ofb.search(make_supernet(tiny_vit(), config, 4), *loaders, config, teacher=Teacher())
        predicted = model(torch.randn(32, 3, 16, 16)).argmax(1)
        assert (predicted == 0).float().mean() > 0.9


def test_distillation_without_a_teacher(loaders):
    config = SearchConfig(**OPTIONS, distillation="soft")
    with pytest.raises(ValueError, match="teacher: expected a network for soft distillation, got none"):
        ofb.search(fresh_supernet(config), *loaders, config)


def test_mixed_precision(loaders):
    config = SearchConfig(**OPTIONS | {"epochs": 2, "finetune_epochs": 1, "amp": True})
    model = ofb.search(fresh_supernet(config), *loaders, config)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_supernet_of_another_length(loaders):
    config = SearchConfig(**OPTIONS)
    with pytest.raises(ValueError, match="supernet: expected one for 4 epochs of 4 steps, got one for 8 steps"):
        ofb.search(ofb.Supernet(tiny_vit(), epochs=2, steps_per_epoch=4), *loaders, config)


def test_latency_is_measured_once(tmp_path, monkeypatch):
    """The table lies in the run folder, from where the same run or another one takes it."""
    table = ofb.measure_latency(tiny_vit())
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(table.to_dict()))
    monkeypatch.setattr("ofb.engine.search.measure_latency", None)  # it must not be called
    config = SearchConfig(**OPTIONS, target="latency_ms=100%", latency_table=str(path))
    with pytest.raises(ValueError, match=r"latency_batch_size: expected 1, with which .* got 8; give the same"):
        make_supernet(tiny_vit(), dataclasses.replace(config, latency_batch_size=8), 4)
    with pytest.raises(ValueError, match="latency_table: expected a latency.json that ofb wrote, got nowhere"):
        make_supernet(tiny_vit(), dataclasses.replace(config, latency_table="nowhere"), 4)
    supernet = make_supernet(tiny_vit(), config, 4)
    assert "batch size 1" in describe_reach(supernet) and " ms (100%)" in describe_reach(supernet)
    resumed = dataclasses.replace(config, latency_table=None, output=str(tmp_path), resume=True)
    assert make_supernet(tiny_vit(), resumed, 4).costs["latency_ms"].grids == supernet.costs["latency_ms"].grids


def test_target_out_of_reach():
    with pytest.raises(ValueError, match="target: expected between .*got .*1.0%.*; choose one within"):
        fresh_supernet(SearchConfig(**OPTIONS, target="1%"))


def test_reach_and_choices_in_words():
    supernet = fresh_supernet(SearchConfig(**OPTIONS))
    assert "(50%)" in describe_reach(supernet) and describe_reach(supernet).endswith("satisfiable: yes")
    two = describe_reach(fresh_supernet(SearchConfig(**OPTIONS, target="macs=50%,params=60%")))
    assert "parameters (60%)" in two and two.count("satisfiable: yes") == 2
    costs = describe_costs(supernet, supernet.extract(), supernet.target)
    assert costs.startswith("found: ") and "MACs (9" in costs or "MACs (100" in costs
    supernet.finalize()
    words = describe_choices(supernet)
    places = [words.index(f" {name} ") for name in in_order(supernet)]
    assert places == sorted(places) and words.startswith("sizes: embed ")
    assert f"{len(supernet.bimasks)} of {len(supernet.bimasks)} were still open at the end" in words


DIGITS_MODEL = ("embed_dim=64", "depth=3", "num_heads=4")
DIGITS = {"batch_size": 64, "drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "device": "cpu"}
# Test accuracies measured for seeds 0, 1, 2: 95.00, 95.67, 95.67 (the dense network, trained for 40 epochs: 92.33).
WORST_MEASURED, SLACK = 95.0, 3.0


@pytest.fixture(scope="module")
def dense_digits():
    """A small dense network trained on the digits, and its loaders."""
    config = TrainConfig(**DIGITS, epochs=40, lr=2e-3, model="vit_tiny_patch16_224", model_kwargs=DIGITS_MODEL)
    seed_everything(0, "model", 0)
    model = create_model(config)
    loaders = create_loaders(config, model, torch.device("cpu"))
    model = ofb.train(model, loaders.train, loaders.val, config)
    return model, loaders


@pytest.mark.parametrize("seed", [0, 1])
def test_digits_at_half_the_macs(dense_digits, seed):
    dense, loaders = dense_digits
    options = {"epochs": 25, "lr": 1e-3, "architecture_lr": 0.02, "finetune_epochs": 25, "finetune_lr": 1e-3}
    config = SearchConfig(**DIGITS, **options, layer_decay=None, model_ema=False, target="50%", seed=seed)
    supernet = make_supernet(copy.deepcopy(dense), config, len(loaders.train))
    compressed = ofb.search(supernet, loaders.train, loaders.val, config)
    assert 0.98 * supernet.target_macs <= count_macs(compressed) <= supernet.target_macs
    top1 = ofb.evaluate(compressed, loaders.test, config)["top1"]
    assert top1 >= WORST_MEASURED - SLACK
