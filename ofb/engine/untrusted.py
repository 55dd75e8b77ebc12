"""JSON and YAML that a stranger may have written: out come plain values, or one ValueError."""

import json
from typing import Any

from ofb.engine.extras import check_extras

MOST_NESTED = 32  # levels of YAML, whose reader takes long for more


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """What YAML says, without aliases: a few lines of these can stand for more than fits any memory.

    Raises:
        ValueError: it is none, is nested too deeply, or has an alias.
        ModuleNotFoundError: PyYAML is not installed.
    """
    check_extras("yaml")
    import yaml

    try:
        level = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("expected every value in full, got an alias (*NAME)")
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > MOST_NESTED:
                raise ValueError("nested too deeply")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
