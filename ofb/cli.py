"""`ofb search | train | evaluate | …`: the command line. The options are the dataclasses of ofb.engine.config.

Nothing here imports torch before a command runs: help comes at once.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union

from ofb.engine.config import SearchConfig, TrainConfig, TrainingConfig
from ofb.engine.options import from_dict, read_options
from ofb.engine.presets import preset
from ofb.engine.tool_config import (
    OF_THE_RUN,
    CompletionConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    ProfileConfig,
    ReportConfig,
)

USER_ERROR = 2
SIGNALLED = 128  # and the number of the signal
COMMANDS: dict[str, type] = {
    "search": SearchConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "profile": ProfileConfig,
    "doctor": DoctorConfig,
    "completion": CompletionConfig,
}


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
        return _run(args[0], args[1:])
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        if _rank() == 0:
            print(f"\nofb: interrupted; {interrupt or 'nothing is half written'}", file=sys.stderr)
        return SIGNALLED + getattr(interrupt, "number", signal.SIGINT)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, MemoryError) as error:
        if debug:
            raise
        process = f" (process {_rank()})" if _rank() else ""
        print(f"ofb{process}: {_in_one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _run(command: str, args: Sequence[str]) -> int:
    """Run a command with its options; its help needs neither torch nor the other processes of a job."""
    if command == "completion" or {"-h", "--help"} & set(args):
        config = parse(command, args)
        print_completion(config.shell)
        return 0
    from ofb import commands  # it takes seconds to import torch and timm
    from ofb.engine.distributed import on_main, process_group, was_restarted
    from ofb.engine.signals import sigterm_raises

    with sigterm_raises(), process_group():
        config = on_main(parse, command, args, was_restarted())
        return getattr(commands, f"run_{command}")(config) or 0


def usage() -> str:
    lines = [f"  {name:11} {cls.__doc__}" for name, cls in COMMANDS.items()]
    return "\n".join(["usage: ofb COMMAND [OPTIONS]    (ofb COMMAND --help lists the options)", "", *lines])


def parse(command: str, args: Sequence[str], restarted: bool = False) -> Any:
    """The config of a command line. Defaults are those of its preset, over these the options of its --config file; or
    with --resume those of the run.

    What was `restarted` after a failure is resumed without asking, once there is something to resume.

    Raises:
        SystemExit: an option is wrong, or help was asked for.
        ValueError: a value is out of range, or there is no such run.
    """
    import tyro

    config_class = COMMANDS[command]

    def read(args: Sequence[str], **default: Any) -> Any:
        settings = (tyro.conf.PositionalRequiredArgs,)
        return tyro.cli(config_class, args=args, prog=f"ofb {command}", config=settings, **default)

    config = read(args)
    if isinstance(config, TrainingConfig) and (config.resume or restarted and _has_begun(config)):
        return dataclasses.replace(read(args, default=_started_with(config)), resume=True)
    if getattr(config, "config", None) is not None:
        args = [*_arguments_of_file(config_class, config.config), *args]
        config = read(args)
    if isinstance(config, EvaluateConfig):
        options = _options_of_run(config)
        if not options:
            return config
        default = from_dict(EvaluateConfig, options | {"checkpoint": config.checkpoint})
        return read(args, default=dataclasses.replace(default, checkpoint=tyro.MISSING))  # given by its position
    if getattr(config, "preset", None) is not None:
        # A preset's data set is refused without a folder, which is given beside it: checked once both are known.
        options = preset(config.preset) | {"preset": config.preset, "data_dir": config.data_dir or ""}
        config = read(args, default=config_class(**options))
        return dataclasses.replace(config, data_dir=config.data_dir or None)
    return config


def print_completion(shell: str) -> None:
    """The completion script of a shell."""
    import tyro

    commands = (Annotated[cls, tyro.conf.subcommand(name, description=cls.__doc__)] for name, cls in COMMANDS.items())
    tyro.cli(Union[tuple(commands)], args=["--tyro-print-completion", shell], prog="ofb")  # noqa: UP007


def _has_begun(config: TrainingConfig) -> bool:
    from ofb.engine.run_folder import CONFIG_FILE

    return config.output is not None and (Path(config.output) / CONFIG_FILE).is_file()


def _started_with(config: TrainingConfig) -> TrainingConfig:
    """The options that a run to resume was started with."""
    from ofb.engine.run_folder import CONFIG_FILE

    path = Path(config.output) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"resume: expected a run folder with {CONFIG_FILE}, got {config.output}; leave --resume out")
    try:
        return from_dict(type(config), read_options("resume", path))
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _options_of_run(config: EvaluateConfig) -> dict[str, Any]:
    """What a network is evaluated with where the command line does not say: what its run was; empty if it has none."""
    from ofb.engine.run_folder import CONFIG_FILE, run_of

    run = run_of(config.checkpoint)
    if run is None:
        return {}
    options = {name: value for name, value in read_options("run", run / CONFIG_FILE).items() if name in OF_THE_RUN}
    data, folder = options.get("data"), str(options.get("data_dir"))
    if config.data_dir is not None:  # the same data in another place, but the digits have none
        options |= {"data_dir": config.data_dir, "data": config.data if data == "digits" else data}
    elif config.names_data and config.data != data:  # the run's folder is not theirs
        options |= {"data_dir": None, "data": config.data}
    elif os.path.isabs(folder) and not os.path.exists(folder):
        raise ValueError(f"data_dir: expected the images of {run} in {folder}, which has gone; add --data-dir FOLDER")
    return options


def _arguments_of_file(config_class: type, path: str) -> list[str]:
    """A YAML file of options as a command line, without those of other commands and what belongs to one run alone.

    As text, since a YAML reader takes 1e-3 for a word and 12:30 for a number: the command line knows the types.
    """
    options = {field.name for field in dataclasses.fields(config_class) if field.default is not dataclasses.MISSING}
    known = options - {"config", "output", "resume"} - ({"target"} if config_class is EvaluateConfig else set())
    elsewhere = {field.name for other in COMMANDS.values() for field in dataclasses.fields(other)}
    arguments = []
    for name, value in read_options("config", Path(path)).items():
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


def _in_one_line(error: Exception) -> str:
    """What went wrong; without the traceback, if a worker process sent it along."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split())


def _rank() -> int:
    """Of this process in its job; 0 before torch is there."""
    if "torch" not in sys.modules:
        return 0
    from ofb.engine.distributed import rank

    return rank()
