"""`ofb search | train | evaluate | …`: the options are the dataclasses of ofb.engine.config."""

import copy
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any, Union

import timm
from torch import nn

import ofb
from ofb.doctor import diagnose
from ofb.engine.advice import advice_on
from ofb.engine.checkpoint import write_text
from ofb.engine.class_names import check_label_names, set_label_names
from ofb.engine.config import SearchConfig, TrainConfig, TrainingConfig
from ofb.engine.data import Loaders, create_loaders, create_model, create_teacher
from ofb.engine.device import pick_device
from ofb.engine.distributed import is_main, may_restart, on_main, process_group, rank, was_restarted
from ofb.engine.options import from_dict, to_dict
from ofb.engine.presets import preset
from ofb.engine.run_folder import CONFIG_FILE, EXPORT_FOLDER, FIGURES_FILE, is_empty, locked
from ofb.engine.search import make_supernet
from ofb.engine.seeding import seed_everything
from ofb.engine.signals import Stopped, sigterm_raises
from ofb.engine.tool_config import (
    CompletionConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    ProfileConfig,
    ReportConfig,
)
from ofb.engine.untrusted import parse_yaml
from ofb.export import ONNX_FILE, PROGRAM_FILE, count_params
from ofb.network_latency import latency_note, latency_targets_note
from ofb.profile import TOTAL, profile_networks, profile_table
from ofb.report import comparison_table, figures, latencies_of, write_report
from ofb.supernet.families import count_macs, sizes_of

UNWELL, USER_ERROR = 1, 2
SIGNALLED = 128  # and the number of the signal
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
        with sigterm_raises(), process_group():
            return run(on_main(parse, args[0], config_class, args[1:], was_restarted())) or 0
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT
        if is_main():
            print(f"\nofb: interrupted; {interrupt or 'nothing is half written'}", file=sys.stderr)
        return SIGNALLED + number
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, MemoryError) as error:
        if debug:
            raise
        process = f" (process {rank()})" if rank() else ""
        print(f"ofb{process}: {_in_one_line(error)}", file=sys.stderr)
        return USER_ERROR


def usage() -> str:
    lines = [f"  {name:11} {cls.__doc__}" for name, (_, cls) in COMMANDS.items()]
    return "\n".join(["usage: ofb COMMAND [OPTIONS]    (ofb COMMAND --help lists the options)", "", *lines])


def parse(command: str, config_class: type, args: Sequence[str], restarted: bool = False) -> Any:
    """The config of a command line. Defaults are those of its preset, over these the options of its --config file; or
    with --resume those of the run.

    What was `restarted` after a failure is resumed without asking, once there is something to resume.

    Raises:
        SystemExit: an option is wrong, or help was asked for.
        ValueError: a value is out of range, or there is no such run.
    """
    import tyro

    def read(args: Sequence[str], **default: Any) -> Any:
        settings = (tyro.conf.PositionalRequiredArgs,)
        return tyro.cli(config_class, args=args, prog=f"ofb {command}", config=settings, **default)

    config = read(args)
    if isinstance(config, TrainingConfig) and (config.resume or restarted and _has_begun(config)):
        return dataclasses.replace(read(args, default=_started_with(config)), resume=True)
    if getattr(config, "config", None) is not None:
        args = [*_arguments_of_file(config_class, config.config), *args]
        config = read(args)
    if getattr(config, "preset", None) is not None:
        # A preset's data set is refused without a folder, which is given beside it: checked once both are known.
        options = preset(config.preset) | {"preset": config.preset, "data_dir": config.data_dir or ""}
        config = read(args, default=config_class(**options))
        return dataclasses.replace(config, data_dir=config.data_dir or None)
    return config


def run_train(config: TrainConfig) -> None:
    config = on_main(_with_run_folder, "train", config)
    model = _starting_model(config)
    loaders = _loaders(config, model)
    _tell(set_label_names(model, loaders.train.dataset))
    with _run("train", config):
        teacher = _teacher(config, model, None)
        model = ofb.train(model, loaders.train, loaders.val, config, teacher=teacher)
        ofb.save(model, Path(config.output) / EXPORT_FOLDER)
        metrics = ofb.evaluate(model, loaders.test, config)
        print(f"test  {_shown(metrics)}")
        costs = {"macs": count_macs(model), "params": count_params(model)}
        _write_figures(config, {"trained": model}, {"trained": metrics | costs})
    _tell_skipped(loaders)
    print(f"run folder: {config.output}")


def run_search(config: SearchConfig) -> None:
    config = on_main(_with_run_folder, "search", config)
    dense = _starting_model(config)
    loaders = _loaders(config, dense)
    _tell(set_label_names(dense, loaders.train.dataset))
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
        metrics = {name: ofb.evaluate(network, loaders.test, config) for name, network in networks.items()}
        compared = on_main(figures, networks, metrics, config.latency_batch_size, pick_device(config))
        _write_figures(config, networks, compared)
    table_ms = supernet.dense_costs.get("latency_ms")
    against_targets = latency_targets_note(latencies_of(compared), supernet.targets, table_ms)
    print("", comparison_table(compared), *([against_targets] if against_targets else []), "", sep="\n")
    _tell_skipped(loaders)
    print(f"report: {on_main(write_report, config.output)}\nrun folder: {config.output}")


def run_evaluate(config: EvaluateConfig) -> None:
    model = ofb.load(_network_folder(config.checkpoint))
    loaders = _loaders(config, model)
    loader = getattr(loaders, config.split)
    _tell(check_label_names(model, loader.dataset))
    print(f"{config.split}  {_shown(ofb.evaluate(model, loader, config))}")
    _tell_skipped(loaders)


def run_export(config: ExportConfig) -> None:
    folder, (write, name) = _network_folder(config.checkpoint), EXPORTS[config.format]
    path = Path(config.output or folder / name)
    difference = write(ofb.load(folder), path)
    print(f"{path}  logits within {difference:.1g} of the network's")
    if config.push_to_hub is not None:
        print(ofb.push_to_hub(folder, config.push_to_hub, config.hub_private))


def run_profile(config: ProfileConfig) -> None:
    device, folder = pick_device(config), _network_folder(config.network)
    if folder.is_dir():
        compressed = ofb.load(folder)
        dense = _dense_network(Path(config.network))
        networks = dense | {"compressed" if dense else config.network: compressed}
    elif timm.is_model(config.network.split(".")[0]):
        networks = {config.network: timm.create_model(config.network)}
    else:
        raise ValueError(f"network: expected a run folder or the name of a timm model, got {config.network!r}")
    costs = profile_networks(networks, config.batch_size, device)
    print(f"{profile_table(costs)}\n{latency_note({name: layers[TOTAL].latency for name, layers in costs.items()})}")


def run_doctor(config: DoctorConfig) -> int:
    text, well = diagnose(pick_device(config))
    print(text)
    return 0 if well else UNWELL


def run_completion(config: CompletionConfig) -> None:
    import tyro

    commands = (
        Annotated[cls, tyro.conf.subcommand(name, description=cls.__doc__)] for name, (_, cls) in COMMANDS.items()
    )
    tyro.cli(Union[tuple(commands)], args=["--tyro-print-completion", config.shell], prog="ofb")  # noqa: UP007


def run_report(config: ReportConfig) -> None:
    print(write_report(config.run))


COMMANDS = {
    "search": (run_search, SearchConfig),
    "train": (run_train, TrainConfig),
    "evaluate": (run_evaluate, EvaluateConfig),
    "export": (run_export, ExportConfig),
    "report": (run_report, ReportConfig),
    "profile": (run_profile, ProfileConfig),
    "doctor": (run_doctor, DoctorConfig),
    "completion": (run_completion, CompletionConfig),
}


def _with_run_folder(command: str, config: TrainingConfig) -> TrainingConfig:
    """The config with its run folder settled: one that is new or empty, unless the run is resumed."""
    if config.output is None and may_restart():
        raise ValueError("output: expected a folder where a job that restarts finds its run again; add --output FOLDER")
    output = config.output or _new_folder(command, config)
    if not config.resume and Path(output).exists() and not is_empty(Path(output)):
        raise ValueError(f"output: expected a new or empty folder, got {output}; add --resume to continue its run")
    return dataclasses.replace(config, output=output)


def _new_folder(command: str, config: TrainingConfig) -> str:
    """A folder that does not exist, named for command, model and time."""
    start = Path(config.checkpoint).name if config.checkpoint else config.model
    name = f"runs/{command}-{start}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (f"{name}-{number}" for number in count(2))
    return next(folder for folder in chain([name], numbered) if not Path(folder).exists())


@contextmanager
def _run(command: str, config: TrainingConfig) -> Iterator[None]:
    """Everything a run does to its folder; what ends it says how to carry on."""
    with locked(config.output):
        if not config.resume:
            on_main(_write_config, config)
        try:
            yield
        except KeyboardInterrupt as interrupt:
            interrupt.args = (f"continue with: {_to_continue(command, config)}",)
            raise
        except RuntimeError as error:
            advice = advice_on(error, config)
            if advice is None:
                raise
            raise MemoryError(f"{advice}; continue with: {_to_continue(command, config)}") from error


def _write_config(config: TrainingConfig) -> None:
    """The options of a new run, once its folder is locked: another run may have begun there in the meantime."""
    import yaml

    path = Path(config.output) / CONFIG_FILE
    if path.exists():
        raise ValueError(f"output: expected a new or empty folder, got {config.output}, where another run just began")
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def _to_continue(command: str, config: TrainingConfig) -> str:
    return f"ofb {command} --resume --output {shlex.quote(config.output)}"


def _has_begun(config: TrainingConfig) -> bool:
    return config.output is not None and (Path(config.output) / CONFIG_FILE).is_file()


def _write_figures(
    config: TrainingConfig, networks: Mapping[str, nn.Module], compared: Mapping[str, Mapping[str, float]]
) -> None:
    """Keep the networks' figures and sizes in the run folder."""
    kept = {name: {**compared[name], "sizes": sizes_of(network)} for name, network in networks.items()}
    write_text(Path(config.output) / FIGURES_FILE, json.dumps(kept, indent=1) + "\n")


def _started_with(config: TrainingConfig) -> TrainingConfig:
    """The options that a run to resume was started with."""
    path = Path(config.output) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"resume: expected a run folder with {CONFIG_FILE}, got {config.output}; leave --resume out")
    try:
        return from_dict(type(config), _read_options("resume", path))
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _arguments_of_file(config_class: type, path: str) -> list[str]:
    """A YAML file of options as a command line, without those of other commands and what belongs to one run alone.

    As text, since a YAML reader takes 1e-3 for a word and 12:30 for a number: the command line knows the types.
    """
    options = {field.name for field in dataclasses.fields(config_class) if field.default is not dataclasses.MISSING}
    known = options - {"config", "output", "resume"}
    elsewhere = {field.name for _, other in COMMANDS.values() for field in dataclasses.fields(other)}
    arguments = []
    for name, value in _read_options("config", Path(path)).items():
        if name.replace("-", "_") not in known | elsewhere:
            raise ValueError(f"config: expected options of ofb in {path}, got {name!r}; ofb COMMAND --help lists them")
        if name.replace("-", "_") in known:
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                arguments.append(option if value else option.replace("--", "--no-", 1))
            else:
                values = [str(each) for each in (value if isinstance(value, list) else [value])]
                if any(each.startswith("--") for each in values):
                    raise ValueError(f"config: expected values of {name} in {path}, got what looks like options")
                arguments += [option, *values]
    return arguments


def _read_options(argument: str, path: Path) -> dict[str, Any]:
    """The options in a YAML file, as the file says them."""
    try:
        options = parse_yaml(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: expected a YAML file of options, got {path}: {error}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{argument}: expected a YAML file of options such as `epochs: 100`, got {path}")
    return options


def _starting_model(config: TrainingConfig) -> nn.Module:
    seed_everything(config.seed, "model", 0)
    return create_model(config) if config.checkpoint is None else ofb.load(_network_folder(config.checkpoint))


def _in_one_line(error: Exception) -> str:
    """What went wrong; without the traceback, if a worker process sent it along."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split())


def _tell(note: str) -> None:
    if note:
        print(f"note: {note}")


def _loaders(config: TrainingConfig | EvaluateConfig, model: nn.Module) -> Loaders:
    loaders = create_loaders(config, model, pick_device(config))
    for note in loaders.notes:
        print(f"note: {note}")
    return loaders


def _tell_skipped(loaders: Loaders) -> None:
    skipped = loaders.skipped()
    if skipped:
        print(f"skipped {len(skipped)} image files that cannot be read, such as {skipped[0]}")


def _dense_network(run: Path) -> dict[str, nn.Module]:
    """The dense network, by its name in a table, that a search started from; empty where `run` is none, or it is gone.

    Its weights may be others: costs do not depend on them.
    """
    try:
        options = _read_options("network", run / CONFIG_FILE) if (run / CONFIG_FILE).is_file() else {}
        if "target" not in options:  # no run, or a dense training
            return {}
        config = dataclasses.replace(from_dict(SearchConfig, options), pretrained=False)
        return {"dense": _starting_model(config)}
    except (ValueError, OSError) as error:
        print(f"note: no dense network to compare with: {' '.join(str(error).split())}")
        return {}


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
