"""Packages that pip installs as extras of this one, checked before a command does hours of work."""

from importlib.util import find_spec
from typing import Any

# The extra of setup.py that each module comes with.
EXTRAS = {
    "tyro": "cli",
    "yaml": "cli",
    "matplotlib": "cli",
    "sklearn": "cli",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
}
ONNX = ("onnx", "onnxruntime", "onnxscript")


def check_extras(*modules: str) -> None:
    """Make sure that these modules of `EXTRAS` can be imported.

    Raises:
        ModuleNotFoundError: one of them is not installed; says which extra brings it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        extras = ",".join(sorted({EXTRAS[module] for module in missing}))
        raise ModuleNotFoundError(
            f'expected {", ".join(missing)} to be installed, got no such module; pip install "ofb-kernels[{extras}]"'
        )


def modules_for(command: str, config: Any) -> tuple[str, ...]:
    """The modules of `EXTRAS` that a command of `ofb` with these options needs at any time."""
    needed = {"train": ("yaml",), "search": ("yaml", "matplotlib"), "report": ("matplotlib",)}.get(command, ())
    if getattr(config, "data", None) == "digits":
        needed = (*needed, "sklearn")
    return (*needed, *ONNX) if getattr(config, "format", None) == "onnx" else needed
