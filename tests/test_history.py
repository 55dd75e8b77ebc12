"""What a search did to its supernet, as plain numbers."""

import json

import pytest
import torch

import ofb
from ofb.engine.history import History, describe_pruned, in_order
from tests.common import tiny_swin, tiny_vit


@pytest.fixture
def supernet() -> ofb.Supernet:
    return ofb.Supernet(tiny_vit(), epochs=2, steps_per_epoch=4, pace=0.0, settling=1.0)


def test_an_entry_says_where_everything_stands(supernet):
    history = History(supernet)
    entry = json.loads(json.dumps(history.entry(history.looks())))
    assert entry["costs"] == {
        "macs": {
            "dense": supernet.dense_macs,
            "target": supernet.target_macs,
            "expected": pytest.approx(supernet.expected_macs()),
        }
    }
    assert entry["pruned"] == [] and list(entry["submodules"]) == list(supernet.bimasks)
    for name, bimask in supernet.bimasks.items():
        found = entry["submodules"][name]
        assert (tuple(found["heads"]), tuple(found["channels"])) == (
            bimask.candidates.heads,
            bimask.candidates.channels,
        )
        assert torch.tensor(found["probabilities"]) == pytest.approx(bimask.probabilities().detach().numpy(), abs=1e-4)
        importance = bimask.score.sigmoid()
        assert found["importance"] == pytest.approx(
            torch.quantile(importance, torch.linspace(0, 1, 11)).tolist(), abs=1e-4
        )
        assert found["sparsity"][-1] == 1 and sorted(found["sparsity"]) == found["sparsity"]


def test_dead_candidates_have_no_probability(supernet):
    history, bimask = History(supernet), supernet.bimasks["mlp0"]
    bimask.alive[0, 0] = False
    row = history.looks()["mlp0"].summary()["probabilities"][0]
    assert row[0] is None and sum(row[1:]) == pytest.approx(1, abs=1e-3)


def test_pruning_events_are_noted_once(supernet):
    history = History(supernet)
    before = {name: (bimask.candidates.full, int(bimask.alive.sum())) for name, bimask in supernet.bimasks.items()}
    for _ in range(8):
        supernet.step()
        history.stepped()
    pruned = history.entry(history.looks())["pruned"]
    assert supernet.finished and history.entry(history.looks())["pruned"] == []
    for name, bimask in supernet.bimasks.items():
        events = [event for event in pruned if event["submodule"] == name]
        assert events[0]["from"] == list(before[name][0]) and events[-1]["to"] == list(bimask.candidates.full)
        alive = [before[name][1], *(event["alive"] for event in events)]
        assert alive == sorted(set(alive), reverse=True) and alive[-1] == 1
        steps = [event["step"] for event in events]
        assert steps == sorted(set(steps)) and steps[-1] <= 8
    assert {choice["submodule"]: choice["step"] for choice in supernet.choices} == {
        event["submodule"]: event["step"] for event in pruned if event["alive"] == 1
    }


def test_a_step_without_pruning_reads_nothing_from_the_device(supernet, monkeypatch):
    history = History(supernet)
    monkeypatch.setattr(type(supernet), "alive_candidates", None)
    supernet.steps += 1
    history.stepped()


def test_status_for_those_who_watch(supernet):
    history = History(supernet)
    assert set(history.status()) == {"expected macs", "candidates alive"}
    assert history.status()["candidates alive"] == str(sum(supernet.alive_candidates().values()))
    supernet.steps = 8
    supernet.finalize()
    history.stepped()
    assert "(1 left)" in history.status()["pruned at step 8"]


def test_pruning_in_words():
    events = [
        {"submodule": "mlp0", "from": [1, 384], "to": [1, 288], "alive": 4},
        {"submodule": "attn1", "from": [4, 24], "to": [4, 24], "alive": 9},
        {"submodule": "mlp0", "from": [1, 288], "to": [1, 192], "alive": 1},
    ]
    pruned = ["attn1 4×24 (9 left)", "mlp0 384 → 192 (1 left)"]
    assert describe_pruned(events, ("embed", "attn1", "mlp0")) == pruned


def test_submodules_in_the_order_of_the_network(supernet):
    assert in_order(supernet) == ["embed", "attn0", "mlp0", "attn1", "mlp1"]
    names = in_order(ofb.Supernet(tiny_swin(), epochs=2, steps_per_epoch=4))
    blocks = ["attn0", "mlp0", "attn1", "mlp1"], ["attn2", "mlp2", "attn3", "mlp3"]
    assert names == ["embed0", *blocks[0], "embed1", *blocks[1]]
    with_tokens = ofb.Supernet(tiny_vit(), epochs=2, steps_per_epoch=4, space=ofb.SearchSpace(tokens=True))
    assert sorted(in_order(with_tokens)) == sorted(with_tokens.bimasks)


def test_losses_that_say_nothing_are_not_shown():
    supernet = ofb.Supernet(tiny_vit(), epochs=2, steps_per_epoch=4)
    assert History(supernet).unshown() == {"loss", "one_hot", "reconstruction"}
    options = {"mask_ratio_end": 0.5, "macs_weight": 0.0}
    others = ofb.Supernet(tiny_vit(), epochs=2, steps_per_epoch=4, **options)
    assert History(others).unshown() == {"loss", "one_hot", "macs"}
