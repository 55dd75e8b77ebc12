"""The journal: one line an epoch, and a resumed stage replaces what was lost."""

import json

from ofb.engine.journal import Journal


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_entries_and_lines(tmp_path, capsys):
    with Journal(tmp_path, "search") as journal:
        journal.record(0, 2, {"loss": 1.23456, "expected_macs": 3.84e6, "alive_candidates": {"embed": 2}})
    assert capsys.readouterr().out == "search 1/2  loss 1.235  expected_macs 3.84M\n"
    assert entries(tmp_path) == [
        {"stage": "search", "epoch": 0, "loss": 1.23456, "expected_macs": 3.84e6, "alive_candidates": {"embed": 2}}
    ]


def test_a_resumed_stage_replaces_its_lost_epochs_alone(tmp_path):
    with Journal(tmp_path, "search") as journal:
        journal.record(0, 1, {"loss": 1})
    with Journal(tmp_path, "finetune") as journal:
        for epoch in range(3):
            journal.record(epoch, 4, {"loss": epoch})
    with Journal(tmp_path, "finetune", start_epoch=2) as journal:
        journal.record(2, 4, {"loss": 20})
    found = [(entry["stage"], entry["epoch"], entry["loss"]) for entry in entries(tmp_path)]
    assert found == [("search", 0, 1), ("finetune", 0, 0), ("finetune", 1, 1), ("finetune", 2, 20)]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Journal(None, "train") as journal:
        journal.record(0, 1, {"loss": 1})
        with journal.progress([1, 2], 2, "1/1") as (batches, note):
            note({"loss": 0.5})
            assert list(batches) == [1, 2]
    assert list(tmp_path.iterdir()) == []
