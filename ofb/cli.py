"""`ofb search | train | evaluate | export`: the options are the dataclasses of ofb.engine.config."""

import copy
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

import ofb
from ofb.engine.checkpoint import write_text
from ofb.engine.config import (
    EvaluateConfig,
    ExportConfig,
    SearchConfig,
    TrainConfig,
    TrainingConfig,
    from_dict,
    to_dict,
)
from ofb.engine.data import create_loaders, create_model, create_teacher
from ofb.engine.presets import preset
from ofb.engine.search import make_supernet
from ofb.engine.train import pick_device, seed_everything
from ofb.export import ONNX_FILE, PROGRAM_FILE
from ofb.report import comparison_table, figures

USER_ERROR, INTERRUPTED = 2, 130
CONFIG_FILE, EXPORT_FOLDER = "config.yaml", "export"
EXPORTS = {"onnx": (ofb.export_onnx, ONNX_FILE), "program": (ofb.export_program, PROGRAM_FILE)}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own if None) and return its exit code.

    A mistake of the user's is one line on standard error and exit code 2; --debug shows the traceback.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else USER_ERROR
    try:
        if args[0] not in COMMANDS:
            raise ValueError(f"command: expected one of {', '.join(COMMANDS)}, got {args[0]!r}")
        run, config_class = COMMANDS[args[0]]
        run(parse(args[0], config_class, args[1:]))
    except KeyboardInterrupt as interrupt:
        print(f"\nofb: interrupted; {interrupt or 'nothing is half written'}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if debug:
            raise
        print(f"ofb: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


def usage() -> str:
    lines = [f"  {name:9} {cls.__doc__}" for name, (_, cls) in COMMANDS.items()]
    return "\n".join(["usage: ofb COMMAND [OPTIONS]    (ofb COMMAND --help lists the options)", "", *lines])


def parse(command: str, config_class: type, args: Sequence[str]) -> Any:
    """The config of a command line; the defaults are those of its preset, or with --resume those of the run.

    Raises:
        SystemExit: an option is wrong, or help was asked for.
        ValueError: a value is out of range, or there is no such run.
    """
    import tyro

    def read(**default: Any) -> Any:
        settings = (tyro.conf.PositionalRequiredArgs,)
        return tyro.cli(config_class, args=args, prog=f"ofb {command}", config=settings, **default)

    config = read()
    if getattr(config, "resume", False):
        return read(default=_started_with(config))
    if getattr(config, "preset", None) is not None:
        # A preset's data set is refused without a folder, which is given beside it: checked once both are known.
        options = preset(config.preset) | {"preset": config.preset, "data_dir": config.data_dir or ""}
        config = read(default=config_class(**options))
        return dataclasses.replace(config, data_dir=config.data_dir or None)
    return config


def run_train(config: TrainConfig) -> None:
    config = _with_run_folder("train", config)
    model = _starting_model(config)
    loaders = create_loaders(config, model, pick_device(config))
    with _run("train", config):
        teacher = _teacher(config, model, None)
        model = ofb.train(model, loaders.train, loaders.val, config, teacher=teacher)
        ofb.save(model, Path(config.output) / EXPORT_FOLDER)
        print(f"test  {_shown(ofb.evaluate(model, loaders.test, config))}")
    print(f"run folder: {config.output}")


def run_search(config: SearchConfig) -> None:
    config = _with_run_folder("search", config)
    dense = _starting_model(config)
    loaders = create_loaders(config, dense, pick_device(config))
    supernet = make_supernet(copy.deepcopy(dense), config, len(loaders.train))
    is_trained = config.checkpoint is not None or config.pretrained
    if not is_trained:
        print("note: neither --checkpoint nor --pretrained is given: the search starts from random weights")
    with _run("search", config):
        teacher, export = _teacher(config, dense, dense if is_trained else None), Path(config.output) / EXPORT_FOLDER
        found = ofb.search_targets(supernet, loaders.train, loaders.val, config, teacher=teacher)
        for target, network in found.items():
            ofb.save(network, export if config.targets is None else export / target)
        networks = {"dense": dense} | (found if config.targets else {"compressed": found[config.target]})
        top1 = {name: ofb.evaluate(network, loaders.test, config)["top1"] for name, network in networks.items()}
    print(f"\n{comparison_table(figures(networks, top1))}\n\nrun folder: {config.output}")


def run_evaluate(config: EvaluateConfig) -> None:
    model = ofb.load(_network_folder(config.checkpoint))
    loaders = create_loaders(config, model, pick_device(config))
    print(f"{config.split}  {_shown(ofb.evaluate(model, getattr(loaders, config.split), config))}")


def run_export(config: ExportConfig) -> None:
    folder, (write, name) = _network_folder(config.checkpoint), EXPORTS[config.format]
    path = Path(config.output or folder / name)
    difference = write(ofb.load(folder), path)
    print(f"{path}  logits within {difference:.1g} of the network's")
    if config.push_to_hub is not None:
        print(ofb.push_to_hub(folder, config.push_to_hub, config.hub_private))


COMMANDS = {
    "search": (run_search, SearchConfig),
    "train": (run_train, TrainConfig),
    "evaluate": (run_evaluate, EvaluateConfig),
    "export": (run_export, ExportConfig),
}


def _with_run_folder(command: str, config: TrainingConfig) -> TrainingConfig:
    """The config with its run folder settled: one that is new or empty, unless the run is resumed."""
    start = Path(config.checkpoint).name if config.checkpoint else config.model
    output = config.output or f"runs/{command}-{start}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not config.resume and Path(output).exists() and not (Path(output).is_dir() and not any(Path(output).iterdir())):
        raise ValueError(f"output: expected a new or empty folder, got {output}; add --resume to continue its run")
    return dataclasses.replace(config, output=output)


@contextmanager
def _run(command: str, config: TrainingConfig) -> Iterator[None]:
    """Everything a run does to its folder; Ctrl-C says how to carry on."""
    import yaml

    if not config.resume:
        text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
        write_text(Path(config.output) / CONFIG_FILE, text)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with: ofb {command} --resume --output {config.output}") from None


def _started_with(config: TrainingConfig) -> TrainingConfig:
    """The options that a run to resume was started with."""
    import yaml

    path = Path(config.output) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"resume: expected a run folder with {CONFIG_FILE}, got {config.output}; leave --resume out")
    try:
        return from_dict(type(config), yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _starting_model(config: TrainingConfig) -> nn.Module:
    seed_everything(config.seed, "model", 0)
    return create_model(config) if config.checkpoint is None else ofb.load(_network_folder(config.checkpoint))


def _teacher(config: TrainingConfig, model: nn.Module, default: nn.Module | None) -> nn.Module | None:
    """The network to distil from, `default` where none is named; None where the config does not distil."""
    if config.distillation is None:
        return None
    if config.teacher is None:
        return default
    folder = _network_folder(config.teacher)
    return ofb.load(folder) if folder.is_dir() else create_teacher(config, model)


def _network_folder(checkpoint: str) -> Path:
    """The folder of a saved network, which for a run is its export folder."""
    folder = Path(checkpoint)
    return folder / EXPORT_FOLDER if (folder / EXPORT_FOLDER).is_dir() else folder


def _shown(metrics: Mapping[str, float]) -> str:
    return f"top-1 {metrics['top1']:.2f} %  top-5 {metrics['top5']:.2f} %  loss {metrics['loss']:.4f}"
