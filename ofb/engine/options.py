"""The way of the config classes to and from text."""

import ast
import reprlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ofb.engine.untrusted import parse_yaml

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as numbers, strings and lists, fit for JSON and YAML."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """A config from what `to_dict` made of it.

    Raises:
        ValueError: an unknown option, or a value of another kind or out of range.
    """
    unknown = sorted(map(str, set(values) - {field.name for field in fields(cls)}))
    if unknown:
        raise ValueError(f"config: {cls.__name__} has no option {', '.join(unknown)}; remove it")
    kinds = get_type_hints(cls)
    for key, value in values.items():
        if not _fits(value, kinds[key]):
            raise ValueError(f"{key}: expected {_kind(kinds[key])}, got {reprlib.repr(value)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from a file is of a field's kind; lists stand for tuples, whole numbers for any."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, get_args(kind)[0]) for each in value)
    if get_args(kind):  # a union
        return any(_fits(value, each) for each in get_args(kind))
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _kind(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def read_options(argument: str, path: Path) -> dict[str, Any]:
    """The options in a YAML file, as the file says them."""
    try:
        options = parse_yaml(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: expected a YAML file of options, got {path}: {error}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"{argument}: expected a YAML file of options such as `epochs: 100`, got {path}")
    return options


def key_and_value(argument: str, pair: str) -> tuple[str, Any]:
    """Read key=value; the value is a Python literal, or else the text as it stands.

    Raises:
        ValueError: it does not look like that.
    """
    key, equals, value = pair.partition("=")
    if not key.isidentifier() or not equals:
        raise ValueError(f"{argument}: expected key=value, got {pair!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what ast says of odd and of deep ones
        return key, value


def split_targets(targets: str) -> list[str]:
    """The costs that `--targets` names, in their order."""
    return [target.strip() for target in targets.split(";" if ";" in targets else ",")]
