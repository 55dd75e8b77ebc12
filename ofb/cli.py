"""`ofb search | train | evaluate | …`: the command line. The options are the dataclasses of ofb.engine.config.

Nothing here imports torch before a command runs: help comes at once.
"""

import dataclasses
import difflib
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any, Union

from ofb.arguments import given, help_text
from ofb.engine.config import SearchConfig, TrainConfig, TrainingConfig
from ofb.engine.extras import check_extras, modules_for
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
# In the order in which one comes to them: a network from its training to its use, then the machine.
GROUPS: dict[str, dict[str, type]] = {
    "from a dense network to a smaller one": {
        "train": TrainConfig,
        "search": SearchConfig,
        "evaluate": EvaluateConfig,
        "report": ReportConfig,
        "profile": ProfileConfig,
        "export": ExportConfig,
    },
    "this machine": {"doctor": DoctorConfig, "completion": CompletionConfig},
}
COMMANDS = {name: config for group in GROUPS.values() for name, config in group.items()}


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
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else "ofb --help says what each does"
            raise ValueError(f"command: expected one of {', '.join(COMMANDS)}, got {args[0]!r}; {hint}")
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
        hint = "" if _is_ours(error) else "; add --debug to see where"
        print(f"ofb{process}: {_in_one_line(error)}{hint}", file=sys.stderr)
        return USER_ERROR


def _run(command: str, args: Sequence[str]) -> int:
    """Run a command with its options; its help needs neither torch nor the other processes of a job."""
    if {"-h", "--help"} & set(args):
        print(help_text(command, COMMANDS[command]), flush=True)
        return 0
    if not args and issubclass(COMMANDS[command], TrainingConfig):  # hours of work, which nobody described
        print(help_text(command, COMMANDS[command]), flush=True)
        return USER_ERROR
    if command == "completion":
        print_completion(parse(command, args).shell)
        return 0
    from ofb import commands  # it takes seconds to import torch and timm
    from ofb.engine.distributed import on_main, process_group, was_restarted
    from ofb.engine.signals import sigterm_raises

    with sigterm_raises(), process_group():
        config = on_main(parse, command, args, was_restarted())
        check_extras(*modules_for(command, config))
        return getattr(commands, f"run_{command}")(config) or 0


def usage() -> str:
    """The commands, as wide as the terminal."""
    lines = ["usage: ofb COMMAND [OPTIONS]    (ofb COMMAND --help lists the options)"]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        for name, config_class in group.items():
            text = " ".join(config_class.__doc__.split())
            width, indent = get_terminal_size().columns, " " * 14
            lines += textwrap.wrap(f"  {name:11} {text}", width, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


def parse(command: str, args: Sequence[str], restarted: bool = False) -> Any:
    """The config of a command line. Defaults are those of its preset, over these the options of its --config file; or
    with --resume those of the run.

    What was `restarted` after a failure is resumed without asking, once there is something to resume.

    Raises:
        ValueError: an option is wrong or out of range, or there is no such run.
    """
    config_class = COMMANDS[command]
    options = given(command, config_class, args)
    if issubclass(config_class, TrainingConfig) and "output" in options:
        if options.get("resume") or restarted and _has_begun(options["output"]):
            begun = _started_with(config_class, options["output"])
            return dataclasses.replace(begun, **options | {"resume": True})
    if options.get("config") is not None:
        options = given(command, config_class, [*_arguments_of_file(config_class, options["config"]), *args])
    if options.get("preset") is not None:
        options = preset(options["preset"]) | options
    if config_class is EvaluateConfig:
        return from_dict(EvaluateConfig, _options_of_run(options) | options)
    return config_class(**options)


def print_completion(shell: str) -> None:
    """The completion script of a shell."""
    check_extras("tyro")
    import tyro

    commands = (Annotated[cls, tyro.conf.subcommand(name, description=cls.__doc__)] for name, cls in COMMANDS.items())
    tyro.cli(Union[tuple(commands)], args=["--tyro-print-completion", shell], prog="ofb")  # noqa: UP007


def _has_begun(output: str) -> bool:
    from ofb.engine.run_folder import CONFIG_FILE

    return (Path(output) / CONFIG_FILE).is_file()


def _started_with(config_class: type[TrainingConfig], output: str) -> TrainingConfig:
    """The options that a run to resume was started with."""
    from ofb.engine.run_folder import CONFIG_FILE

    path = Path(output) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"resume: expected a run folder with {CONFIG_FILE}, got {output}; leave --resume out")
    options = read_options("resume", path)
    try:
        return from_dict(config_class, options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"resume: expected options of this command in {path}, got others: {error}") from error


def _options_of_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a network is evaluated with where the command line does not say: what its run was; empty if it has none."""
    from ofb.engine.run_folder import CONFIG_FILE, run_of

    run = run_of(given["checkpoint"])
    if run is None:
        return {}
    options = {name: value for name, value in read_options("run", run / CONFIG_FILE).items() if name in OF_THE_RUN}
    data, folder = options.get("data"), str(options.get("data_dir"))
    if given.get("data_dir") is not None:  # the same data in another place, but the digits have none
        options["data"] = None if data == "digits" else data
    elif given.get("data") not in (None, data):  # the run's folder is not theirs
        options["data_dir"] = None
    elif os.path.isabs(folder) and not os.path.exists(folder):
        raise ValueError(f"data_dir: expected the images of {run} in {folder}, which has gone; add --data-dir FOLDER")
    return options


def _arguments_of_file(config_class: type, path: str) -> list[str]:
    """A YAML file of options as a command line, without those of other commands and what belongs to one run alone.

    As text, since a YAML reader takes 1e-3 for a word and 12:30 for a number: the command line knows the types.
    """
    fields = dataclasses.fields(config_class)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    known = defaults.keys() - {"config", "output", "resume"} - ({"target"} if config_class is EvaluateConfig else set())
    elsewhere = {field.name for other in COMMANDS.values() for field in dataclasses.fields(other)}
    arguments = []
    for name, value in read_options("config", Path(path)).items():
        if name.replace("-", "_") not in known | elsewhere:
            raise ValueError(f"config: expected options of ofb in {path}, got {name!r}; ofb COMMAND --help lists them")
        if name.replace("-", "_") in known:
            option = f"--{name.replace('_', '-')}"
            if value is None and defaults[name.replace("-", "_")] is None:
                continue
            if isinstance(value, bool):
                arguments.append(option if value else option.replace("--", "--no-", 1))
            else:
                values = [str(each) for each in (value if isinstance(value, list) else [value])]
                if any(each.startswith("--") for each in values):
                    raise ValueError(f"config: expected values of {name} in {path}, got what looks like options")
                arguments += [option, *values]
    return arguments


def _is_ours(error: Exception) -> bool:
    """Whether this package raised an error: then its message says what to do."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _in_one_line(error: Exception) -> str:
    """What went wrong; without the traceback, if a worker process sent it along."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split()).removesuffix(".")


def _rank() -> int:
    """Of this process in its job; 0 before torch is there."""
    if "torch" not in sys.modules:
        return 0
    from ofb.engine.distributed import rank

    return rank()
