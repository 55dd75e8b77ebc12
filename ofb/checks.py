"""Checks of numbers that a user gives, as attributes of whatever holds them: a ValueError names the first wrong one."""

import math
from operator import index
from typing import Any, get_args, get_type_hints


def check_numbers(config: Any) -> None:
    """Make sure that the numbers among a dataclass's fields are of their kind and finite.

    Integers of any kind, such as NumPy's, become Python's, and so do floating-point numbers.
    """
    for name, kind in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(kind) or (kind,)
        if not {int, float} & set(kinds) or (value is None and type(None) in kinds):
            continue
        object.__setattr__(config, name, _whole(name, value) if int in kinds else _finite(name, value))


def finite(config: Any, *names: str) -> None:
    """Raise ValueError where an option is no finite number."""
    for name in names:
        _finite(name, getattr(config, name))


def at_least(config: Any, least: float, *names: str) -> None:
    """Raise ValueError where an option is below `least`."""
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(config, name)}")


def between(config: Any, least: float, most: float, *names: str) -> None:
    """Raise ValueError where an option is below `least`, or not below `most`."""
    for name in names:
        if not least <= getattr(config, name) < most:
            raise ValueError(f"{name}: expected at least {least} and less than {most}, got {getattr(config, name)}")


def within(config: Any, least: float, most: float, *names: str) -> None:
    """Raise ValueError where an option is given and below `least` or above `most`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def positive(config: Any, *names: str) -> None:
    """Raise ValueError where an option is given and not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def _whole(name: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}; round it, such as with int(...)") from None


def _finite(name: str, value: Any) -> float:
    try:
        if math.isfinite(value):
            return value if type(value) in (int, float) else float(value)
    except (TypeError, OverflowError):  # no number, or a whole one that no float holds
        pass
    raise ValueError(f"{name}: expected a finite number, got {value!r}")
