"""A run remembers its data: what evaluate, export, profile and report do with a run folder and nothing else."""

import json
import re
import shutil

import pytest
import yaml

import ofb
from ofb.cli import main, parse
from ofb.engine.run_folder import run_of
from tests.test_augmentation import MODEL, write_classes

CLASSES = ("ant", "bee", "cat")
DENSE = f"train --model {MODEL['model']} --model-kwargs {' '.join(MODEL['model_kwargs'])} --epochs 3 --lr 5e-3"
SEARCH = "search --epochs 4 --finetune-epochs 2 --finetune-lr 5e-3 --architecture-lr 0.3 --round-to 1"
# All of them other than the defaults, so that a default in use changes which images are evaluated, or how.
OPTIONS = "--data-dir images --val-share 0.3 --test-share 0.25 --seed 3 --batch-size 8 --workers 0 --device cpu --amp"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, where the runs `dense`, `one` (of one target) and `two` (of two) were started."""
    folder = tmp_path_factory.mktemp("place")
    write_classes(folder / "images", CLASSES, count=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            f"{DENSE} --output dense",
            f"{SEARCH} --checkpoint dense --target 70% --output one",
            f"{SEARCH} --checkpoint dense --targets 80%,60% --output two",
        ):
            assert main([*command.split(), *OPTIONS.split()]) == 0
    return folder


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """So that what a command tells is not broken into lines."""
    monkeypatch.setenv("COLUMNS", "1000")


def told(capsys, *command: str, code: int = 0) -> list[str]:
    """The lines that a command prints: to standard output, or its error."""
    capsys.readouterr()
    assert main(list(command)) == code
    shown = capsys.readouterr()
    return (shown.err if code else shown.out).splitlines()


def lines_of(networks: dict[str, dict], split: str, images: int, prefix: str = "") -> list[str]:
    """What evaluate prints of networks with these figures."""
    return [
        f"{name}  {split}  {images} images  top-1 {each[f'{prefix}top1']:.2f} %  top-5 {each[f'{prefix}top5']:.2f} %  "
        f"loss {each[f'{prefix}loss']:.4f}"
        for name, each in networks.items()
    ]


def best_epoch(run, stage: str) -> dict:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max((each for each in entries if each["stage"] == stage), key=lambda e: (e["val_top1"], -e["val_loss"]))


RUNS = {
    "dense": {"trained": ("trained", "train")},
    "one": {"70%": ("compressed", "finetune")},
    "two": {"80%": ("80%", "finetune-80%"), "60%": ("60%", "finetune-60%")},
}


@pytest.mark.parametrize("name", RUNS)
def test_evaluate_says_what_the_run_says(place, name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = place / name
    figures = json.loads((run / "figures.json").read_text())
    note, *shown = told(capsys, "evaluate", str(run), "--device", "cpu")
    assert "has no splits: 63 of its images train, 27 choose the best epoch" in note
    assert shown == lines_of({target: figures[figure] for target, (figure, _) in RUNS[name].items()}, "test", 30)
    best = {target: best_epoch(run, stage) for target, (_, stage) in RUNS[name].items()}
    shown = told(capsys, "evaluate", str(run), "--device", "cpu", "--split", "val")[1:]
    assert shown == lines_of(best, "val", 27, prefix="val_")
    assert told(capsys, "evaluate", str(run / "export"), "--device", "cpu", "--split", "val")[1:] == shown


def test_one_of_several_targets(place, capsys):
    both = told(capsys, "evaluate", str(place / "two"), "--device", "cpu")[1:]
    assert told(capsys, "evaluate", str(place / "two"), "--target", "60%", "--device", "cpu")[1:] == both[1:]
    assert told(capsys, "evaluate", str(place / "two/export/60%"), "--device", "cpu")[1:] == both[1:]
    assert told(capsys, "evaluate", str(place / "one"), "--target", "70%", "--device", "cpu")[1].startswith("70%  test")
    for command in ("evaluate", "export", "profile"):
        for run, there in (("two", "80%, 60%"), ("one", "70%"), ("dense", "trained")):
            (error,) = told(capsys, command, str(place / run), "--target", "50%", code=2)
            assert error == f"ofb: target: expected one of {there} in {place / run}, got '50%'"
    (error,) = told(capsys, "search", "--checkpoint", str(place / "two"), code=2)
    assert error.startswith("ofb: checkpoint: expected one network, got 80%, 60% in ")


def test_the_command_line_wins(place, capsys, tmp_path):
    run = str(place / "dense")
    shown = told(capsys, "evaluate", run, "--device", "cpu", "--split", "val", "--seed", "4", "--val-share", "0.5")
    note = "note: the network may have been trained on some of these images: its run "
    assert f"{note}had val_share 0.3, seed 3" in shown
    assert "val  45 images" in shown[-1]
    shown = told(capsys, "evaluate", run, "--device", "cpu", "--seed", "4")
    assert not any("may have been trained" in line for line in shown), "test images do not depend on it"
    assert parse("evaluate", [run]).amp and not parse("evaluate", [run, "--no-amp"]).amp
    write_classes(tmp_path / "moved", CLASSES, count=20, seed=9)
    shown = told(capsys, "evaluate", run, "--device", "cpu", "--data-dir", str(tmp_path / "moved"))
    assert "test  15 images" in shown[-1]


def test_other_data_than_the_runs(place, capsys, tmp_path):
    run = str(place / "dense")
    assert "digits are images of 1 × 8 × 8" in told(capsys, "evaluate", run, "--data", "digits", code=2)[0]
    digits = tmp_path / "digits"
    more = "--model-kwargs embed_dim=16 depth=1 num_heads=2 --epochs 1 --device cpu --batch-size 128"
    told(capsys, *f"train --model {MODEL['model']} --workers 0 {more}".split(), "--output", str(digits))
    assert told(capsys, "evaluate", str(digits), "--device", "cpu")[0].startswith("trained  test  300 images")
    images = str(place / "images")
    assert images in told(capsys, "evaluate", str(digits), "--data-dir", images, "--device", "cpu")[0]


def test_a_network_outside_of_its_run(place, capsys, tmp_path):
    alone = shutil.copytree(place / "dense/export", tmp_path / "alone")
    assert run_of(alone) is None
    (error,) = told(capsys, "evaluate", str(alone), code=2)
    assert "data: expected the images to evaluate on" in error and "add --data-dir FOLDER, or --data digits" in error
    data = ("--data-dir", str(place / "images"), "--workers", "0", "--device", "cpu")
    assert told(capsys, "evaluate", str(alone), *data)[-1].startswith(f"{alone}  test  12 images")
    note = "note: the network may have been trained on some of these images: its run is not known"
    assert note in told(capsys, "evaluate", str(alone), *data, "--split", "val", "--val-share", "0.2")
    several = shutil.copytree(place / "two/export", tmp_path / "several")
    names = [line.partition("  ")[0] for line in told(capsys, "evaluate", str(several), *data)[1:]]
    assert names == ["60%", "80%"]


def test_images_that_have_gone(place, capsys, tmp_path):
    run = shutil.copytree(place / "dense", tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data_dir"] == str(place / "images"), "from whatever folder it is used"
    gone = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"data_dir": gone}))
    (error,) = told(capsys, "evaluate", str(run), "--device", "cpu", code=2)
    assert error == f"ofb: data_dir: expected the images of {run} in {gone}, which has gone; add --data-dir FOLDER"
    moved = shutil.copytree(place / "images", tmp_path / "moved")
    for split in ("val", "test"):
        evaluate = ("evaluate", "--device", "cpu", "--split", split)
        again = told(capsys, *evaluate, str(run), "--data-dir", str(moved))
        assert again[-1] == told(capsys, *evaluate, str(place / "dense"))[-1]


def test_resuming_where_the_images_have_moved(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "images", CLASSES, count=40)
    told(capsys, *f"{DENSE} --output run".split(), *OPTIONS.split())
    resume = ("train", "--resume", "--output", "run", "--data-dir")
    assert told(capsys, *resume, "images")[-1] == "run folder: run", "as it was given the first time"
    shutil.copytree(tmp_path / "images", tmp_path / "others")
    assert "data_dir: the run in run was started with" in told(capsys, *resume, "others", code=2)[0]
    (tmp_path / "images").rename(tmp_path / "moved")
    assert told(capsys, *resume, "moved")[-1] == "run folder: run"


def test_export_and_profile_take_all_networks(place, capsys, tmp_path):
    two = shutil.copytree(place / "two", tmp_path / "two")
    shown = told(capsys, "export", str(two), "--format", "program")
    paths = [two / "export" / target / "model.pt2" for target in ("80%", "60%")]
    assert [line.partition("  ")[0] for line in shown] == [str(path) for path in paths]
    assert all(path.is_file() for path in paths)
    (error,) = told(capsys, "export", str(two), "--output", str(tmp_path / "x.pt2"), code=2)
    assert error == "ofb: output: expected one network, got 80%, 60%; choose one with --target"
    one = ("--format", "program", "--target", "60%", "--output", str(tmp_path / "x.pt2"))
    assert len(told(capsys, "export", str(two), *one)) == 1 and (tmp_path / "x.pt2").is_file()
    columns = re.compile(r"(\S+): MACs")
    assert columns.findall(told(capsys, "profile", str(two), "--device", "cpu")[0]) == ["dense", "80%", "60%"]
    shown = told(capsys, "profile", str(two), "--device", "cpu", "--target", "60%")[0]
    assert columns.findall(shown) == ["dense", "60%"]
    assert "target: expected a run" in told(capsys, "profile", MODEL["model"], "--target", "60%", code=2)[0]


def test_profile_needs_no_images(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "images", CLASSES, count=40)
    command = f"{DENSE.replace('train', 'search')} --finetune-epochs 0 --round-to 1 --target 80% --output run"
    told(capsys, *command.split(), *OPTIONS.split())
    (tmp_path / "images").rename(tmp_path / "moved")
    shown = told(capsys, "profile", "run", "--device", "cpu")[0]
    assert "dense: MACs" in shown and "compressed: MACs" in shown


@pytest.fixture
def unfinished(place, tmp_path):
    """A search as it is before its last epoch of fine-tuning ends."""
    run = shutil.copytree(place / "two", tmp_path / "a run", ignore=shutil.ignore_patterns("figures.json", "60%"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    return run


def test_an_unfinished_run(place, unfinished, capsys, tmp_path):
    left = "1 of 2 epochs of stage finetune-60% are done; continue with: ofb search --resume --output"
    for command in ("evaluate", "export", "profile"):
        assert told(capsys, command, str(unfinished), code=2) == [
            f"ofb: run: expected a finished run, got {unfinished}, {left} '{unfinished}'"
        ]
    page, note = told(capsys, "report", str(unfinished))
    assert page == f"{unfinished}/report/index.html"
    assert note == f"note: the run is not finished: {left} '{unfinished}'"
    assert told(capsys, "report", str(place / "dense")) == [f"{place}/dense/report/index.html"]
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(place / "dense/config.yaml", begun)
    resume = f"no epoch is finished yet; continue with: ofb train --resume --output {begun}"
    (error,) = told(capsys, "evaluate", str(begun), code=2)
    assert error == f"ofb: run: expected a finished run, got {begun}, {resume}"


def test_networks_that_are_gone(place, capsys, tmp_path):
    run = shutil.copytree(place / "dense", tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    (error,) = told(capsys, "export", str(run), code=2)
    assert error.endswith(f"whose networks are gone; save them again with: ofb train --resume --output {run}")
    told(capsys, "train", "--resume", "--output", str(run))
    assert ofb.load(run / "export")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "colour: red\n",
            "resume: expected options of this command in {}, got others: config: .* has no option colour; ",
        ),
        (
            "epochs: two\n",
            "resume: expected options of this command in {}, got others: epochs: expected int, got 'two'",
        ),
        ("epochs: .nan\n", "resume: expected options of this command in {}, got others: epochs: expected int, got nan"),
        (
            "lr: .inf\n",
            "resume: expected options of this command in {}, got others: lr: expected a finite number, got inf",
        ),
        ("lr: [\n", "resume: expected a YAML file of options, got {}: .* line "),
    ],
)
def test_resuming_with_damaged_options(place, capsys, tmp_path, text, message):
    """The error names the file, not only the option, which nobody gave."""
    run = shutil.copytree(place / "dense", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with (run / "config.yaml").open("a") as file:
        file.write(text)
    (error,) = told(capsys, "train", "--resume", "--output", str(run), code=2)
    assert re.match("ofb: " + message.format(run / "config.yaml"), error)


def test_resuming_with_a_damaged_line(place, capsys, tmp_path):
    run = shutil.copytree(place / "dense", tmp_path / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_text(f"garbage\n{metrics.read_text()}")
    (error,) = told(capsys, "train", "--resume", "--output", str(run), code=2)
    assert error == f"ofb: run: {metrics} is damaged: line 1: Expecting value; remove this line"


def test_targets_of_a_stranger_stay_in_the_run(place, capsys, tmp_path):
    run = shutil.copytree(place / "two", tmp_path / "run")
    shutil.copytree(place / "dense/export", tmp_path / "outside")
    options = yaml.safe_load((run / "config.yaml").read_text()) | {"targets": "../../outside,60%"}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    assert len(told(capsys, "export", str(run), "--format", "program")) == 1
    assert not (tmp_path / "outside/model.pt2").exists()
