"""The command line as a user meets it: a whole run, and every mistake told in one line."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import ofb
from ofb.arguments import MANY, help_text
from ofb.cli import COMMANDS, main, parse
from ofb.engine.checkpoint import load_checkpoint
from ofb.engine.config import SearchConfig
from ofb.engine.options import from_dict
from ofb.export import count_params, model_card
from ofb.network_latency import NetworkLatency
from ofb.supernet.families import count_macs
from tests.test_train import assert_same_weights

MODEL = "--model vit_tiny_patch16_224 --model-kwargs embed_dim=32 depth=1 num_heads=2 --device cpu"
TRAIN = f"train {MODEL} --batch-size 128 --epochs 2 --lr 2e-3"
SEARCH = "search --batch-size 128 --epochs 3 --finetune-epochs 1 --lr 1e-3 --architecture-lr 0.3 --device cpu"


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("runs") / "dense")
    assert main([*TRAIN.split(), "--output", folder]) == 0
    return folder


def run(command: str, *more: str) -> int:
    return main([*command.split(), *more])


def test_train_search_evaluate_export(dense_run, tmp_path, capsys):
    folder = tmp_path / "search"
    assert run(SEARCH, "--checkpoint", dense_run, "--target", "60%", "--output", str(folder)) == 0
    shown = capsys.readouterr().out
    assert "satisfiable: yes" in shown and "top-1 %" in shown and f"run folder: {folder}" in shown
    assert shown.index("satisfiable") < shown.index("search 1/3") < shown.index("finetune 1/1") < shown.index("top-1 %")
    found = {path.name for path in folder.iterdir()}
    written = {"config.yaml", "checkpoints", "metrics.jsonl", "history.jsonl", "found.json", "importance.json"}
    assert found == written | {".lock", "figures.json", "tensorboard", "export", "report"}
    assert f"report: {folder}/report/index.html" in shown
    figures = json.loads((folder / "figures.json").read_text())
    dense, compressed = (NetworkLatency(**figures[name]["latency"]) for name in ("dense", "compressed"))
    page = (folder / "report" / "index.html").read_text()
    for cell in (dense.beside(dense), compressed.beside(dense), compressed.quantiles, f"latency: {dense.on}; "):
        assert cell in shown and cell in page, "one measurement, in every table"
    share = count_macs(ofb.load(folder / "export")) / count_macs(ofb.load(f"{dense_run}/export"))
    assert 0.588 <= share <= 0.6

    assert run("evaluate", str(folder)) == 0
    evaluated = capsys.readouterr().out
    assert evaluated.startswith("60%  test  300 images  top-1 ")
    assert run("evaluate", str(folder / "export"), "--split", "val") == 0
    assert capsys.readouterr().out.startswith("60%  val  300 images  top-1 ")

    assert run("export", str(folder), "--output", str(tmp_path / "model.onnx")) == 0
    assert (tmp_path / "model.onnx").stat().st_size > 1000
    assert run("export", str(folder), "--format", "program") == 0
    path = folder / "export" / "model.pt2"
    assert path.exists() and f"{path}  logits within " in capsys.readouterr().out
    assert "inside a trained network by one search (target 60%)" in model_card(folder / "export", "me/small")


def test_wished_sizes(dense_run, tmp_path, capsys):
    folder = str(tmp_path / "search")
    sizes = range(32, 97, 2)
    wishes = ("--freeze", "embed", "--round-to", "4", "--bounds", "attn*=0.25:1")
    wishes += ("--candidates", f"mlp0={','.join(map(str, sizes))}")
    assert run(SEARCH, "--checkpoint", dense_run, "--target", "60%", *wishes, "--output", folder) == 0
    block = ofb.load(f"{folder}/export").blocks[0]
    assert block.attn.qkv.in_features == 32 and block.mlp.fc1.out_features in sizes
    text = (tmp_path / "search" / "config.yaml").read_text()
    assert "round_to: 4" in text and "freeze:\n- embed" in text and "- attn*=0.25:1" in text
    capsys.readouterr()
    assert run("search --resume", "--output", folder) == 0
    assert "sizes: " in capsys.readouterr().out


def test_several_targets(dense_run, tmp_path, capsys):
    folder = tmp_path / "search"
    more = ("--checkpoint", dense_run, "--targets", "60%,40%", "--output", str(folder))
    assert run(SEARCH, *more) == 0
    shown = capsys.readouterr().out
    assert "finetune-60% 1/1" in shown and "finetune-40% 1/1" in shown
    assert {path.name for path in (folder / "export").iterdir()} == {"60%", "40%"}
    macs = {target: count_macs(ofb.load(folder / "export" / target)) for target in ("60%", "40%")}
    assert macs["60%"] > macs["40%"]


def test_several_budgets(dense_run, tmp_path, capsys):
    folder = tmp_path / "search"
    assert run(SEARCH, "--checkpoint", dense_run, "--target", "macs=60%,params=55%", "--output", str(folder)) == 0
    shown = capsys.readouterr().out
    assert shown.count("satisfiable: yes") == 2 and "MACs (60%)" in shown and "parameters (55%)" in shown
    dense, found = ofb.load(f"{dense_run}/export"), ofb.load(folder / "export")
    shares = [count(found) / count(dense) / limit for count, limit in ((count_macs, 0.6), (count_params, 0.55))]
    assert 0.98 <= max(shares) <= 1


def test_a_search_learns_from_the_trained_network_it_starts_from(dense_run, tmp_path, monkeypatch):
    teachers = []

    def search_targets(*loaders, teacher, **_):
        teachers.append(teacher)
        raise ValueError("seen")

    monkeypatch.setattr(ofb, "search_targets", search_targets)
    start = ("--checkpoint", dense_run)
    for i, options in enumerate([start, (*start, "--distillation", "None"), tuple(MODEL.split())]):
        assert run(SEARCH, *options, "--output", str(tmp_path / str(i))) == 2
    taught, *untaught = teachers
    assert untaught == [None, None]  # distillation is off, and the start has random weights
    trained = ofb.load(f"{dense_run}/export").state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in taught.state_dict().items())


def test_teacher_that_is_not_there(dense_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(SEARCH, "--checkpoint", dense_run, "--distillation", "hard", "--teacher", "resnet51") == 2
    assert "teacher: expected a run folder or a timm model name, got 'resnet51'" in capsys.readouterr().err
    assert run(TRAIN, "--distillation", "soft") == 2
    assert "teacher: expected a network for soft distillation, got none" in capsys.readouterr().err


def test_finished_run_resumes_to_the_same_network(dense_run, capsys):
    before = ofb.load(f"{dense_run}/export").state_dict()
    assert run("train --resume", "--output", dense_run) == 0  # model and recipe come from the run folder
    after = ofb.load(f"{dense_run}/export").state_dict()
    assert all((after[name] == tensor).all() for name, tensor in before.items())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fly", "command: expected one of train, search, evaluate, report, profile, export, doctor, completion, got"),
        ("serch", "got 'serch'; did you mean search?"),
        ("search --target 3%", "target: expected between"),
        ("search --target half", "target: expected MACs such as"),
        ("search --target 50% --freeze head", "freeze: expected a pattern of embed, attn0, mlp0, got 'head'"),
        ("train --model vit_tinny_patch16_224", "model: expected a timm model name, got 'vit_tinny_patch16_224'"),
        ("search --model vit_tiny_patch16_224 --model-kwargs depth=1 attn_drop_rate=0.1", "model: cannot be searched"),
        ("train --model resnet18", "model: expected a Vision Transformer of timm's ViT, EVA or Swin family, which can"),
        ("search --target 30", "got 30; did you mean 30%?"),
        ("train --device gpu", "device: expected one of this machine"),
        ("train --resume --output no/such/run", "resume: expected a run folder with config.yaml, got no/such/run"),
        ("search --checkpoint no/such/network", "found no config.json"),
        ("evaluate no/such/network", "found no config.json"),
        ("export no/such/network", "found no config.json"),
        ("report no/such/run", "run: expected a run folder with config.yaml or metrics.jsonl, got no/such/run"),
    ],
)
def test_mistakes_are_told_in_one_line(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = MODEL.split() if command.startswith("search --target") else []
    assert main([*command.split(), *small]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ofb: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "runs").exists(), "a command that never started leaves no run folder"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search --epohcs 3", "arguments: expected ofb search [OPTIONS], got --epohcs; did you mean --epochs?"),
        ("search --no-ampp", "got --no-ampp; did you mean --amp?"),
        ("train --epoch 3", "got --epoch; did you mean --epochs?"),
        ("train --colour red", "got --colour; ofb train --help lists them"),
        ("train epochs 3", "got epochs; did you mean --epochs?"),
        ("evaluate one two", "arguments: expected ofb evaluate CHECKPOINT [OPTIONS], got two"),
        ("search --epochs three", "epochs: expected a whole number, got 'three'"),
        ("train --lr fast", "lr: expected a number, got 'fast'"),
        ("search --residual-mask all", "residual_mask: expected one of stream, input, got 'all'"),
        ("completion fish", "shell: expected one of bash, zsh, tcsh, got 'fish'"),
        ("train --epochs", "epochs: expected a value, got none"),
        ("train --amp=yes", "amp: expected no value, got 'yes'"),
        ("train --epochs 0", "epochs: expected at least 1, got 0"),
        ("train --opt adamm", "opt: expected a timm optimizer, got 'adamm'; did you mean adam"),
        ("train --data imagenet", "data: expected `digits`, a timm data set with a prefix"),
        ("train --resume", "resume: expected the run folder as well; add --output FOLDER"),
        ("evaluate", "checkpoint: expected a run folder, or its export folder, got none; ofb evaluate CHECKPOINT"),
    ],
)
def test_wrong_options(command, message, capsys):
    assert run(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("ofb: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error


def test_options_as_they_may_be_written():
    config = parse("search", "--batch_size 32 --lr=1e-3 --freeze embed mlp0 --no-model-ema --distillation None".split())
    assert (config.batch_size, config.lr, config.freeze, config.model_ema) == (32, 1e-3, ("embed", "mlp0"), False)
    assert config.distillation is None
    assert parse("evaluate", ["--split", "val", "runs/x"]).checkpoint == "runs/x"
    assert parse("train", ["--lr", "None", "--model-kwargs"]).model_kwargs == ()
    with pytest.raises(ValueError, match="lr: expected a positive number, got -1.0"):
        parse("train", ["--lr", "-1"])


def test_an_error_of_others_names_debug(monkeypatch, capsys):
    """What this package did not raise may need a traceback to be understood."""
    assert run("export no/such/network") == 2
    assert "--debug" not in capsys.readouterr().err
    monkeypatch.setattr(ofb, "load", lambda path: subprocess.check_output(["no-such-program"]))
    assert run("export no/such/network") == 2
    error = capsys.readouterr().err
    assert error.endswith("; add --debug to see where\n") and error.count("\n") == 1


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(ofb, "load", lambda path: {}["missing"])
    with pytest.raises(KeyError):
        run("export no/such/network")


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError, match="found no config.json"):
        run("evaluate no/such/network --debug")


def test_a_run_is_not_overwritten(dense_run, capsys):
    assert run(TRAIN, "--output", dense_run) == 2
    assert "output: expected a new or empty folder" in capsys.readouterr().err


def test_resuming_with_another_option(dense_run, capsys):
    assert run("train --resume --epochs 5", "--output", dense_run) == 2
    assert "epochs: the run in" in capsys.readouterr().err


def test_damaged_network(dense_run, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert run("evaluate", str(tmp_path)) == 2
    assert "is damaged" in capsys.readouterr().err


def test_options_from_a_file(dense_run, tmp_path, capsys):
    path, folder = tmp_path / "search.yaml", tmp_path / "run"
    lines = ["lr: 1e-3", "epochs: 5", "finetune-epochs: 1", "batch_size: 128", "amp: false", "freeze: [attn0]"]
    lines += [f"checkpoint: {dense_run}", "target: 60%", "device: cpu", "architecture_lr: 0.3", "output: elsewhere"]
    path.write_text("\n".join([*lines, "split: val"]))
    assert run("search --epochs 2", "--config", str(path), "--output", str(folder)) == 0
    assert "search 1/2" in capsys.readouterr().out
    config = from_dict(SearchConfig, yaml.safe_load((folder / "config.yaml").read_text()))
    assert (config.lr, config.epochs, config.freeze, config.amp, config.target) == (1e-3, 2, ("attn0",), False, "60%")
    again = tmp_path / "again"
    assert run("search", "--config", str(folder / "config.yaml"), "--output", str(again)) == 0
    assert_same_weights(ofb.load(folder / "export"), ofb.load(again / "export"))
    assert run("evaluate", str(again), "--config", str(again / "config.yaml")) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config: expected a YAML file of options, got"),
        ("- 3", "config: expected a YAML file of options such as `epochs: 100`"),
        ("{", "config: expected a YAML file of options, got"),
        ('model_kwargs: ["--output=x", a=1]', "config: expected values of model_kwargs in"),
        ("epoch: 3", "config: expected options of ofb in"),
        ("preset: deit", "preset: expected one of deit-tiny-imagenet"),
    ],
)
def test_damaged_file_of_options(text, message, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    if text is not None:
        path.write_text(text)
    assert run("search", "--config", str(path)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_preset_in_a_file(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("preset: deit-tiny-imagenet\nepochs: 30\n")
    config = parse("search", ["--config", str(path), "--data-dir", "somewhere", "--lr", "0.5"])
    assert (config.model, config.epochs, config.lr, config.settling) == ("deit_tiny_patch16_224", 30, 0.5, 0.0)


def test_profile(dense_run, tmp_path, capsys):
    folder = str(tmp_path / "search")
    assert run(SEARCH, "--checkpoint", dense_run, "--target", "60%", "--output", folder) == 0
    capsys.readouterr()
    assert run("profile --device cpu", folder) == 0
    header, *rows = capsys.readouterr().out.partition("\nlatency: cpu, ")[0].splitlines()
    assert header.split()[:5] == ["layer", "dense:", "MACs", "params", "ms"] and "compressed: MACs" in header
    assert [row.split()[0] for row in rows] == ["patch_embed", "blocks.0.attn", "blocks.0.mlp", "head", "the", "total"]
    assert "(59%)" in rows[-1] or "(60%)" in rows[-1]
    assert run("profile --device cpu", dense_run) == 0
    assert run("profile --device cpu vit_tiny_patch16_224") == 0
    assert "vit_tiny_patch16_224: MACs" in capsys.readouterr().out
    assert run("profile no/such") == 2
    assert "network: expected a run folder or the name of a timm model" in capsys.readouterr().err


def test_completion_knows_commands_and_options(capsys):
    for shell in ("bash", "zsh"):
        with pytest.raises(SystemExit) as stop:
            run(f"completion {shell}")
        assert stop.value.code in (0, None)
        script = capsys.readouterr().out
        assert "--finetune-epochs" in script and "doctor" in script


def test_a_reader_that_stops_early_is_no_mistake():
    command = f"{sys.executable} -m ofb search --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("usage: ofb search")


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_usage(arguments, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(arguments) == (0 if arguments else 2)
    shown = capsys.readouterr().out
    order = [line.split()[0] for line in shown.splitlines() if re.match(r"  \w", line)]
    assert order == ["train", "search", "evaluate", "report", "profile", "export", "doctor", "completion"]
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option_in_its_group(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(f"{command} --help") == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if re.match("  (-|[A-Z])", line)]
    names = [re.match(r"  (?:--)?([\w-]+)", line)[1].replace("-", "_").lower() for line in lines]
    fields = [field.name for field in dataclasses.fields(COMMANDS[command])]
    assert sorted(names) == sorted([*fields, "debug", "_h"]) and max(map(len, shown.splitlines())) <= 80
    if len(fields) >= MANY:
        groups = dict(re.findall(r"^([a-z :-]+):\n((?:  .*\n)+)", shown, re.MULTILINE))
        assert re.findall("^  (-+[a-z]+)", groups["options"], re.MULTILINE) == ["--debug", "-h"], "the rest has groups"
        assert "  --mixup " in groups.get("augmentation", "  --mixup ") and "  --data-dir " in groups["data"]


def test_help_says_what_an_option_is_and_its_default():
    shown = " ".join(help_text("train", COMMANDS["train"]).split())
    assert "--epochs INT Length of the training. (default: 300)" in shown, "text of the parent, default of its own"
    assert "--layer-decay FLOAT Learning rate of each layer as a share of the next one's." in shown
    assert "--layer-decay FLOAT In fine-tuning" in " ".join(help_text("search", COMMANDS["search"]).split())


def test_interrupt_leaves_a_run_to_resume(tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "ofb",
        *TRAIN.replace("--epochs 2", "--epochs 400").split(),
        "--output",
        str(folder),
    ]
    # A shell's background jobs ignore Ctrl-C, and so would what they start, this test included.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **heeds) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("checkpoints/train-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    told, _, last = error.strip().partition("\n\n")
    assert told == "ofb: finishing a step and saving it; once more to stop at once"
    assert last == f"ofb: interrupted; continue with: ofb train --resume --output {folder}"
    assert load_checkpoint(folder / "checkpoints", "train")["parts"]["optimization"]["steps"] > 0


def test_handlers_of_signals_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run("train --resume --output no/such/run") == 2
    assert run(TRAIN, "--output", str(tmp_path / "run")) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("arguments", [["--help"], [], ["search", "--help"], ["completion", "bash"]])
def test_help_comes_without_torch(arguments):
    """So that it comes at once: torch and timm take seconds to import."""
    code = f"""
import sys
sys.argv[0] = "/usr/bin/ofb"
from ofb.cli import main
try:
    main({arguments})
except SystemExit:
    pass
assert not {{"torch", "timm"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "ofb" in done.stdout, done.stderr


def test_timm_knows_the_architecture_as_soon_as_ofb_is_imported():
    code = "import ofb, timm\nassert timm.is_model('ofb_network')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
