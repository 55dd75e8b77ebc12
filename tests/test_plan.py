"""A run says what it will do before it does it, how long it takes once steps are timed, and what its figures mean."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

import ofb
from ofb.cli import main
from ofb.engine.config import SearchConfig, TrainConfig
from ofb.engine.estimate import StepClock, describe_estimate, describe_seconds, peak_memory
from ofb.engine.stage import Stage
from ofb.plan import describe_plan
from ofb.report import dense_training, dense_training_note
from ofb.report.run import Run
from ofb.report.sections import sections
from tests.common import tiny_vit
from tests.test_train import OPTIONS, assert_same_weights, fresh_model, loaders  # noqa: F401

MODEL = "--model vit_tiny_patch16_224 --model-kwargs embed_dim=32 depth=1 num_heads=2 --device cpu"
TRAIN = f"train {MODEL} --batch-size 128 --epochs 3 --lr 2e-3"
SEARCH = "search --batch-size 128 --epochs 3 --finetune-epochs 2 --lr 1e-3 --architecture-lr 0.3 --device cpu"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of real runs: `dense` training, and a `search` from it with what it printed in `search.txt`."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN.split(), "--output", str(folder / "dense")]) == 0
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    """The folder of runs as the present one: names in a plan are short."""
    monkeypatch.chdir(runs)
    return runs


def facts(plan: str) -> dict[str, str]:
    """What a plan says, by its labels, lines joined."""
    found, label = {}, ""
    for line in plan.splitlines():
        label = line[:13].strip() or label
        found[label] = f"{found.get(label, '')} {line[13:]}".strip()
    return found


# ---- the plan ----


def test_a_search_begins_with_its_plan(here, capsys):
    command = f"{SEARCH} --checkpoint dense --target macs=60%,params=55% --finetune-epochs 0 --output planned"
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    plan, blank, rest = shown.partition("\n\n")
    assert blank and all(len(line) <= 80 for line in plan.splitlines())
    assert rest.startswith("search 1/3") and shown.count("satisfiable: yes") == 2 and "satisfiable" not in rest
    said = facts(plan)
    expected = {
        "data": "digits",
        "images": "train 1,197, val 300, test 300; 10 classes",
        "model": "VisionTransformer, 13.8 K parameters, images of 1 × 8 × 8",
        "start": "weights of dense",
        "cost": "230 K MACs",
        "teacher": "the network that the search starts from (soft)",
        "precision": "fp32",
        "batch": "128 images a step",
        "ops": "eager",
        "search": "3 epochs of 9 steps, 27 optimizer steps",
        "fine-tuning": "none",
        "run folder": "planned",
    }
    assert {label: said[label] for label in expected} == expected
    assert said["device"].startswith("cpu, ") and "CUDA graph" not in said
    assert "138 K MACs (60%)" in said["target"] and "7.61 K parameters (55%)" in said["target"]


@pytest.mark.parametrize("command", [TRAIN, f"{SEARCH} {MODEL}", f"{SEARCH} {MODEL} --targets 60%,40%"])
def test_dry_run_leaves_nothing_behind(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stage, "run", None)  # nothing is trained
    assert main([*command.split(), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert shown.count("random weights") == 1 and "\ndry run      nothing is trained or written\n" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    if "--targets" in command:
        said = facts(shown)
        assert said["targets"] == "138 K MACs, then 91.9 K MACs"
        assert said["fine-tuning"] == "2 epochs of 9 steps, 18 optimizer steps, for each of 2 targets"


def test_dry_run_finds_what_the_run_would(here, capsys):
    assert main([*TRAIN.split(), "--dry-run", "--output", "dense"]) == 2
    assert "output: expected a new or empty folder, got dense" in capsys.readouterr().err
    assert main([*SEARCH.split(), "--checkpoint", "dense", "--dry-run", "--target", "1%"]) == 2
    assert "target: expected between" in capsys.readouterr().err


def test_plan_of_a_resumed_run_says_where_it_goes_on(here, capsys):
    before = {path: path.stat().st_mtime_ns for path in (here / "dense").rglob("*")}
    assert main("train --resume --output dense --dry-run".split()) == 0
    assert facts(capsys.readouterr().out)["goes on"] == "after epoch 3 of 3 of stage train"
    assert {path: path.stat().st_mtime_ns for path in (here / "dense").rglob("*")} == before
    (here / "broken-off" / "checkpoints").mkdir(parents=True)
    (here / "broken-off" / "config.yaml").write_text((here / "dense" / "config.yaml").read_text())
    assert main("train --resume --output broken-off --dry-run".split()) == 0
    assert facts(capsys.readouterr().out)["goes on"] == "from the beginning: there is no checkpoint yet"
    (here / "broken-off" / "checkpoints" / f"train-{1 * 10 + 4:09d}-{'0' * 16}.safetensors").touch()
    assert main("train --resume --output broken-off --dry-run".split()) == 0
    assert facts(capsys.readouterr().out)["goes on"] == "after epoch 1 of 3 of stage train and 4 steps of the next"


def test_plan_on_a_gpu(monkeypatch, loaders):  # noqa: F811
    """What a GPU would get by default; torch.cuda says what the test tells it to."""
    monkeypatch.setattr("ofb.plan.pick_device", lambda config: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    made = SimpleNamespace(train=loaders[0], val=loaders[1], test=loaders[1])

    def plan(**options):
        return facts(describe_plan(TrainConfig(**options, output="run"), tiny_vit(), made, None))

    assert plan()["device"] == "NVIDIA H200"
    assert (plan()["precision"], plan()["CUDA graph"]) == ("bf16", "yes")
    assert plan(opt="lamb")["CUDA graph"] == "no: only adamw can be captured, not lamb"
    assert plan(cuda_graph=False, amp=False)["CUDA graph"] == "no: --no-cuda-graph"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert plan()["precision"] == "fp32 (this GPU has no bfloat16: capability 8.0 or above has)"


def test_backend_that_does_not_run_here_is_told_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ofb_kernels.dispatch.INTERPRETED", False)
    folder = tmp_path / "run"
    assert main([*f"{SEARCH} {MODEL} --backend triton".split(), "--output", str(folder)]) == 2
    assert "backend='triton' cannot serve" in capsys.readouterr().err and not folder.exists()


@pytest.mark.parametrize("command", ["train", "search"])
def test_without_options_there_is_help_and_no_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([command]) == 2
    assert capsys.readouterr().out.startswith(f"usage: ofb {command}")
    assert list(tmp_path.iterdir()) == []


# ---- the estimate ----


def time_of(monkeypatch, clock: StepClock, epochs: list[list[float]], after: float) -> list[tuple[int, int]]:
    """When (epoch, step) a clock knows, given the seconds of each step and those after each epoch."""
    now, known = [0.0], []
    monkeypatch.setattr("ofb.engine.estimate.time.perf_counter", lambda: now[0])
    for epoch, steps in enumerate(epochs):
        for step, seconds in enumerate(steps, start=1):
            now[0] += seconds
            if clock.stepped():
                known.append((epoch, step))
        now[0] += after
        if clock.epoch_ended():
            known.append((epoch, 0))
    return known


def test_first_steps_do_not_spoil_the_estimate(monkeypatch):
    """They compile and capture; nor do slow ones later, which come too late."""
    clock = StepClock(torch.device("cpu"), 30)
    assert time_of(monkeypatch, clock, [[9.0] * 10 + [0.5] * 10 + [7.0] * 10] * 2, after=3.0) == [(0, 20)]
    assert (clock.step_seconds, clock.epoch_seconds) == (0.5, 0)


@pytest.mark.parametrize(("steps", "epoch"), [(5, 0), (2, 0), (1, 1)])
def test_short_epochs_are_timed_as_a_whole(monkeypatch, steps, epoch):
    clock = StepClock(torch.device("cpu"), steps)
    seconds = [[9.0] + [0.5] * (steps - 1)] + [[0.5] * steps] * 2
    assert time_of(monkeypatch, clock, seconds, after=2.0) == [(epoch, 0)]
    assert (clock.step_seconds, clock.epoch_seconds) == (0.5, 2.0)


def test_a_stage_that_goes_on_within_an_epoch_is_timed_in_the_next(monkeypatch):
    for steps in (5, 30):
        clock = StepClock(torch.device("cpu"), steps)
        known = time_of(monkeypatch, clock, [[9.0] * (steps // 2), [0.5] * steps], after=2.0)
        assert known == [(1, 0 if steps == 5 else 20)] and clock.step_seconds == 0.5


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_the_host_waits_for_the_device_twice(monkeypatch, steps):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    assert time_of(monkeypatch, StepClock(torch.device("cuda"), steps), [[1.0] * steps] * 4, after=1.0)
    assert len(waits) == 2


def test_estimate_in_words(monkeypatch):
    clock = StepClock(torch.device("cuda"), 1250)
    clock.step_seconds = 0.0272
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: int(9.2 * 2**30))
    assert describe_estimate(clock, "search", (125_000, 375_000), (100, 300)) == (
        "about 57 min for 100 epochs of search, 3 h 47 min with 300 of fine-tuning; 27.2 ms a step, validation not "
        "counted; peak memory 9.2 GiB"
    )
    clock = StepClock(torch.device("cuda"), 2)
    clock.step_seconds, clock.epoch_seconds = 1.25, 10.0
    assert describe_estimate(clock, "finetune-30%", (4, 0), (2, 0)) == (
        "about 25 s for 2 epochs of fine-tuning to 30%; 1.2 s a step; peak memory 9.2 GiB"
    )
    assert 2**20 < peak_memory(torch.device("cpu")) < 2**45


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (59.6, "1 min"),
        (90, "1 min 30 s"),
        (3400, "57 min"),
        (3599.7, "1 h"),
        (86399, "1 d"),
        (11400, "3 h 10 min"),
        (184000, "2 d 3 h"),
    ],
)
def test_seconds_in_words(seconds, words):
    assert describe_seconds(seconds) == words


def test_each_stage_says_once_how_long_it_takes(here, capsys):
    command = f"{SEARCH} --checkpoint dense --targets 60%,40% --epochs 4 --settling 0 --output told"
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith(("report:", "run folder")))
    # what does not fit goes on below, indented
    lines = [line for line in shown.replace("\n  ", " ").splitlines() if line.startswith("about ")]
    assert [line.partition(" for ")[2].partition(";")[0].partition(",")[0] for line in lines] == [
        "3 epochs of search",
        "1 epoch of fine-tuning to 60%",
        "1 epoch of fine-tuning to 40%",
    ]
    assert " with 4 of fine-tuning; " in lines[0] and " with 2 more of fine-tuning; " in lines[1]
    assert all("; peak memory " in line for line in lines)


def test_timing_changes_no_weight(loaders, monkeypatch):  # noqa: F811
    timed = ofb.train(fresh_model(), *loaders, TrainConfig(**OPTIONS))
    monkeypatch.setattr(StepClock, "stepped", lambda self: False)
    monkeypatch.setattr(StepClock, "epoch_ended", lambda self: False)
    assert_same_weights(timed, ofb.train(fresh_model(), *loaders, TrainConfig(**OPTIONS)))


# ---- what the figures of the dense network mean ----


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([10.0, 20.0, 30.0], "best epoch 3 of 3"),
        ([10.0, 30.0, 30.0], "best epoch 3 of 3"),  # of two as accurate ones that of the smaller loss, as it is chosen
        ([10.0, 30.0, 20.0], ""),
        ([*range(18), 50.0, 40.0], "best epoch 19 of 20"),
        ([*range(17), 50.0, 40.0, 40.0], ""),
    ],
)
def test_a_dense_network_that_was_still_learning(accuracies, expected, tmp_path):
    (tmp_path / "export" / "40%").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"stage": "train", "epoch": epoch, "val_top1": top1, "val_loss": 1 / (epoch + 1)}) + "\n"
            for epoch, top1 in enumerate(accuracies)
        )
    )
    for start in (tmp_path, tmp_path / "export", tmp_path / "export" / "40%"):
        training = dense_training(str(start), pretrained=False)
        assert training["epochs"] == len(accuracies)
        note = dense_training_note({"dense": {"training": training}, "compressed": {}})
        assert expected in note and bool(note) == bool(expected)


@pytest.mark.parametrize("text", ["{", '{"stage": "train", "epoch": 0}\n', "[1]\n", ""])
def test_metrics_that_say_nothing_do_not_stop_a_search(text, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert dense_training(str(tmp_path), pretrained=False) == {}
    assert dense_training(str(tmp_path / "no" / "run" / "here"), pretrained=False) == {}
    assert dense_training(None, pretrained=True) == {}
    assert dense_training_note({"dense": {"training": {}}}) == dense_training_note({"dense": {}}) == ""


def test_comparison_and_report_say_so(here, capsys):
    metrics = (here / "dense" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) | {"val_top1": 10.0 * number} for number, line in enumerate(metrics)]
    (here / "learning").mkdir()
    (here / "dense" / "export").rename(here / "learning" / "export")
    (here / "learning" / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    try:
        assert main([*SEARCH.split(), "--checkpoint", "learning", "--finetune-epochs", "0", "--output", "said"]) == 0
    finally:
        (here / "learning" / "export").rename(here / "dense" / "export")
    words = "the dense network was still learning when its training ended (best epoch 3 of 3): part of the difference"
    shown = capsys.readouterr().out
    shown = " ".join(shown.split())  # it goes on in the next line where the terminal ends
    assert shown.index("top-1 %") < shown.index(f"note: {words}") < shown.index("report: ")
    assert words in sections(Run.read(here / "said"))[0].text
    assert words in (here / "said" / "report" / "index.html").read_text()


def test_a_search_from_random_weights_says_so_beside_its_accuracy(here, capsys):
    assert main([*f"{SEARCH} {MODEL} --finetune-epochs 0".split(), "--output", "scratch"]) == 0
    plan, _, rest = capsys.readouterr().out.partition("\n\n")
    assert "random weights: neither --pretrained nor --checkpoint is given" in " ".join(plan.split())
    note = "note: the dense network was never trained (random weights): all of the difference"
    assert " ".join(rest.split()).count(note) == 1
    assert "was never trained" in sections(Run.read(here / "scratch"))[0].text


# ---- what a run keeps ----


def test_options_of_a_run_have_the_precision_it_began_with(here):
    options = yaml.safe_load((here / "dense" / "config.yaml").read_text())
    assert (options["amp"], options["cuda_graph"], options["dry_run"]) == (False, None, False)
    assert SearchConfig().amp is None and TrainConfig().cuda_graph is None
