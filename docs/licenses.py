"""Write docs/LICENSES.md, the licence of everything that an install brings: python -m docs.licenses."""

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "ofb-kernels"
EXTRAS = ("", "cli", "export", "transformers", "wandb", "benchmark", "examples")  # "" is the plain install
NOT_IN_METADATA = {"cuda-toolkit": "LicenseRef-NVIDIA-Proprietary", "torchao": "BSD-3-Clause"}
PAGE = Path(__file__).with_name("LICENSES.md")
INTRODUCTION = """# Licences

What `pip install ofb-kernels` and its extras bring on Linux, in the versions of
[requirements.lock](../requirements.lock). NVIDIA's libraries come with torch. Written by `python -m docs.licenses` from
the packages' metadata.

| package | version | licence | needed by |
|---|---|---|---|
"""


def main() -> None:
    PAGE.write_text(page())
    print(PAGE)


def page() -> str:
    """The page, a row for each package that is needed."""
    rows = (
        f"| {name} | {distribution(name).version} | {license_of(name)} | {', '.join(extras) or 'the plain install'} |"
        for name, extras in sorted(dependencies().items())
    )
    return INTRODUCTION + "\n".join(rows) + "\n"


def dependencies() -> dict[str, list[str]]:
    """Packages that are needed on this machine, and the extras that need them; none for those of the plain install."""
    found: dict[str, list[str]] = {}
    for extra in EXTRAS:
        for name in _closure(extra):
            found.setdefault(name, []).append(extra)
    return {name: [] if "" in extras else extras for name, extras in found.items()}


def license_of(package: str) -> str:
    """What an installed package says its licence is; "" where it says nothing.

    Its SPDX expression, or else its classifiers, or else a line of its own.
    """
    metadata = distribution(package).metadata
    licenses = [line for line in metadata.get_all("Classifier", []) if line.startswith("License ::")]
    line = metadata.get("License") or ""
    said = metadata.get("License-Expression") or ", ".join(each.rpartition(" :: ")[2] for each in licenses)
    return said or (line if len(line.splitlines()) == 1 else "") or NOT_IN_METADATA.get(package, "")


def _closure(extra: str) -> set[str]:
    """Names of all packages that the project with an extra needs, and that these need in turn."""
    seen, waiting = set(), [(PROJECT, extra)]
    while waiting:
        package, extra = waiting.pop()
        for requirement in map(Requirement, distribution(package).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = {(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)}
                waiting += needed - seen
                seen |= needed
    return {name for name, _ in seen}


if __name__ == "__main__":
    main()
