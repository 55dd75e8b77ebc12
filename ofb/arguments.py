"""The config classes as arguments of the commands: what a command line gives, and the help."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

MANY = 10  # options of a command that are listed in groups
# What options are about, in the order of the help. A group is for those commands that have its first option; an option
# in two of them is in the later one.
GROUPS = {
    "data": (
        "data", "data_dir", "train_split", "val_split", "test_split", "split", "val_share", "test_share",
        "batch_size", "skip_broken", "workers",
    ),
    "model": ("model", "model_kwargs", "pretrained", "checkpoint"),
    "run folder and resuming": (
        "output", "dry_run", "resume", "checkpoint_every", "keep_checkpoints", "allow_other_code", "log_wandb",
        "wandb_project",
    ),
    "options from elsewhere": ("config", "preset"),
    "training": (
        "epochs", "opt", "lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "layer_decay", "clip_grad",
        "grad_accum_steps", "drop_path", "smoothing", "model_ema", "model_ema_decay",
    ),
    "distillation": ("distillation", "teacher", "distillation_alpha", "distillation_tau"),
    "augmentation": ("mixup", "cutmix", "aa", "aug_repeats", "reprob"),
    "search: target": ("target", "targets", "latency_table", "latency_batch_size"),
    "search: space": ("round_to", "freeze", "candidates", "bounds", "tokens"),
    "search: schedule and losses": (
        "lam_start", "lam_end", "residual_mask", "mask_ratio_start", "mask_ratio_end", "score_init",
        "architecture_init", "score_mean", "architecture_lr", "score_lr", "one_hot_weight", "one_hot_delay",
        "macs_weight", "pace", "settling", "prunes_per_epoch", "prune_threshold", "cosine_epochs",
    ),
    "fine-tuning": (
        "finetune_epochs", "finetune_lr", "finetune_warmup_epochs", "finetune_weight_decay", "layer_decay",
        "model_ema", "model_ema_decay",
    ),
    "device and precision": ("device", "amp", "amp_dtype", "deterministic", "cuda_graph", "backend", "seed"),
}  # fmt: skip
NAMES = {str: "STR", int: "INT", float: "FLOAT"}
IN_OUR_WORDS = {"one argument": "a value, got none", "ignored explicit argument": "expected no value, got"}
NUMBERS = {int: "a whole number", float: "a number"}


def given(command: str, config_class: type, args: Sequence[str]) -> dict[str, Any]:
    """The options that a command line gives, by the names of the config's fields.

    Raises:
        ValueError: an option is unknown, lacks its value or has one of the wrong type, or an argument is missing.
    """
    parser = _parser(command, config_class)
    args = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), arg) for arg in args]
    try:
        values, unknown = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        name = error.argument_name.split("/")[0].lstrip("-").replace("-", "_").lower()
        message = error.message
        for theirs, ours in IN_OUR_WORDS.items():
            message = message.replace(theirs, ours)
        raise ValueError(f"{name}: {message}") from None
    if unknown:
        first = next((each for each in unknown if each.startswith("-")), unknown[0])
        raise ValueError(_unknown(parser, config_class, first.partition("=")[0]))
    for field in dataclasses.fields(config_class):
        if _is_required(field) and field.name not in values:
            text = _texts(config_class)[field.name].rstrip(".")
            raise ValueError(f"{field.name}: expected {text[0].lower()}{text[1:]}, got none; {parser.usage}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items()}


def help_text(command: str, config_class: type) -> str:
    """What a command does, and all of its options, as wide as the terminal."""
    return _parser(command, config_class).format_help().rstrip()


class _Formatter(argparse.HelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # options have hyphens


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser(command: str, config_class: type) -> _Parser:
    fields, kinds, texts = dataclasses.fields(config_class), get_type_hints(config_class), _texts(config_class)
    names = [field.name for field in fields]
    known = GROUPS if len(names) >= MANY else {}
    group_of = {name: title for title, group in known.items() if group[0] in names for name in group}
    required = [field.name.upper() for field in fields if _is_required(field)]
    parser = _Parser(
        prog=f"ofb {command}",
        usage=" ".join([f"ofb {command}", *required, "[OPTIONS]"]),
        description=config_class.__doc__,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
        formatter_class=_Formatter,
    )
    titles = ["arguments", *GROUPS, "options"]
    groups = {title: parser.add_argument_group(title) for title in titles}
    for field in sorted(fields, key=lambda field: _place(field.name, group_of)):
        text = (texts[field.name] + _default(field)).replace("%", "%%")
        if _is_required(field):
            argument = groups["arguments"].add_argument(field.name, help=text, **_value(kinds[field.name]))
            argument.metavar, argument.required = field.name.upper(), False  # `given` says what it is
        else:
            group = groups[group_of.get(field.name, "options")]
            group.add_argument(f"--{field.name.replace('_', '-')}", help=text, **_value(kinds[field.name]))
    groups["options"].add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    groups["options"].add_argument("-h", "--help", action="help", help="Show this.")
    return parser


def _place(name: str, group_of: dict[str, str]) -> int:
    group = GROUPS.get(group_of.get(name, ""), ())
    return group.index(name) if name in group else len(group)


def _value(kind: Any) -> dict[str, Any]:
    """How argparse is to read a value of a field's type."""
    kinds = [each for each in get_args(kind) if each is not type(None)] if type(None) in get_args(kind) else [kind]
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    (kind,), optional = kinds, kinds != [kind]
    if get_origin(kind) is tuple:
        return {"nargs": "*", **_value(get_args(kind)[0])}
    if get_origin(kind) is Literal:
        choices = [*get_args(kind), *(["None"] if optional else [])]
        return {"type": partial(_one_of, choices), "metavar": f"{{{','.join(choices)}}}"}
    return {"type": partial(_read, kind, optional), "metavar": NAMES[kind]}


def _one_of(choices: Sequence[str], text: str) -> str | None:
    if text not in choices:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text!r}")
    return None if text == "None" else text


def _read(kind: Callable[[str], Any], optional: bool, text: str) -> Any:
    if optional and text == "None":
        return None
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {NUMBERS[kind]}, got {text!r}") from None


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field) -> str:
    """The default, where the text does not say it: what is not given is off."""
    if _is_required(field) or field.default is None or field.default is False or field.default == ():
        return ""
    return f" (default: {'on' if field.default is True else field.default})"


def _texts(config_class: type) -> dict[str, str]:
    """The text below each field; below that of a parent, where a class gives a field another default alone."""
    texts = {}
    for parent in reversed(config_class.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        for statement, below in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[statement.target.id] = " ".join(ast.literal_eval(below.value).split())
    return texts


def _unknown(parser: argparse.ArgumentParser, config_class: type, name: str) -> str:
    options = [field.name.replace("_", "-") for field in dataclasses.fields(config_class) if not _is_required(field)]
    close = difflib.get_close_matches(name.lstrip("-").removeprefix("no-"), options, n=1)
    hint = f"did you mean --{close[0]}?" if close else f"{parser.prog} --help lists them"
    return f"arguments: expected {parser.usage}, got {name}; {hint}"
