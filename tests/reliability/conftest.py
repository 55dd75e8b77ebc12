"""Night length, and the figures of docs/RELIABILITY.md."""

import json
import os
from collections.abc import Callable

import pytest

EVIDENCE = "OFB_EVIDENCE"  # file that figures are added to
NIGHT = "OFB_NIGHT"  # set for the long run


@pytest.fixture
def night() -> bool:
    """Whether there is time for thousands of cases instead of hundreds."""
    return NIGHT in os.environ


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Notes a figure for the page: `evidence("kills survived", 24)`. Numbers of one name in one module add up."""

    def note(what: str, figure: object) -> None:
        if EVIDENCE in os.environ:
            line = json.dumps({"module": request.module.__name__, "what": what, "figure": figure})
            with open(os.environ[EVIDENCE], "a") as file:
                file.write(line + "\n")

    return note
