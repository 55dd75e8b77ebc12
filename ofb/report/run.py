"""A run folder as it was left: finished, interrupted, or going on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ofb.engine.run_folder import (
    CONFIG_FILE,
    EXPORT_FOLDER,
    FIGURES_FILE,
    FOUND_FILE,
    HISTORY_FILE,
    IMPORTANCE_FILE,
    METRICS_FILE,
    RECONSTRUCTION_FILE,
    command_of,
    read_entries,
    resume_command,
)
from ofb.engine.untrusted import parse_json, parse_yaml
from ofb.export.folder import ARCHITECTURE

FINISHED = "finished"
SO_FAR = "so far"  # the name of what an unfinished search has come to

Sizes = Mapping[str, list[int]]  # [heads, channels] of each submodule


@dataclass(frozen=True)
class Run:
    """What a run folder holds; what it lacks is empty.

    Attributes:
        name: of the folder.
        config: its options.
        metrics: entries of metrics.jsonl.
        history: entries of history.jsonl.
        found: networks and choices of found.json.
        figures: of each network in figures.json.
        importance: of each submodule in importance.json.
        reconstruction: PNG of what the supernet rebuilt.
        label_names: of the classes, in the order of the logits.
    """

    name: str
    config: Mapping[str, Any]
    metrics: list[Mapping[str, Any]]
    history: list[Mapping[str, Any]]
    found: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Any]]
    importance: Mapping[str, Mapping[str, Any]]
    reconstruction: bytes
    label_names: list[str]

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Read a run folder.

        Raises:
            ValueError: it is none, or a file in it is damaged.
        """
        folder = Path(folder)
        if not (folder / CONFIG_FILE).is_file() and not (folder / METRICS_FILE).is_file():
            raise ValueError(f"run: expected a run folder with {CONFIG_FILE} or {METRICS_FILE}, got {folder}")
        return cls(
            folder.resolve().name,
            _read(folder / CONFIG_FILE, parse_yaml, {}),
            read_entries(folder / METRICS_FILE),
            read_entries(folder / HISTORY_FILE),
            _read(folder / FOUND_FILE, parse_json, {}),
            _read(folder / FIGURES_FILE, parse_json, {}),
            _read(folder / IMPORTANCE_FILE, parse_json, {}),
            (folder / RECONSTRUCTION_FILE).read_bytes() if (folder / RECONSTRUCTION_FILE).is_file() else b"",
            _label_names(folder / EXPORT_FOLDER),
        )

    @property
    def stages(self) -> dict[str, list[Mapping[str, Any]]]:
        """The metrics of each stage, in the order of the stages."""
        return {
            stage: [entry for entry in self.metrics if entry["stage"] == stage]
            for stage in dict.fromkeys(entry["stage"] for entry in self.metrics)
        }

    @cached_property
    def dense_sizes(self) -> Sizes:
        """Sizes of the network a search started from; of the one network of dense training."""
        if self.history:
            return {name: _full(submodule) for name, submodule in self.history[0]["submodules"].items()}
        return next((network["sizes"] for network in self.figures.values()), {})

    @cached_property
    def found_sizes(self) -> dict[str, Sizes]:
        """Sizes of each network a search found; before it is over, of the largest one still possible."""
        if self.found:
            return {target: network["sizes"] for target, network in self.found["networks"].items()}
        if self.history:
            return {SO_FAR: {name: _full(each) for name, each in self.history[-1]["submodules"].items()}}
        return {}

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        if self.figures:
            return FINISHED
        if not self.metrics:
            return "no epoch is finished yet"
        stage, done = self.metrics[-1]["stage"], self.metrics[-1]["epoch"] + 1
        epochs = self.config.get("finetune_epochs" if stage.startswith("finetune") else "epochs", "?")
        return f"{done} of {epochs} epochs of stage {stage} are done"


def how_to_finish(folder: str | Path) -> str:
    """How far a run is, and the command that goes on with it; "" where it is finished or no command started it.

    Raises:
        ValueError: there is no run, or a file of it is damaged.
    """
    run = Run.read(folder)
    try:
        if run.state == FINISHED or not run.config:
            return ""
        return f"{run.state}; continue with: {resume_command(command_of(run.config), folder)}"
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"run: {folder} holds files that this package did not write: {error!r}") from error


def _full(submodule: Mapping[str, Any]) -> list[int]:
    return [submodule["heads"][-1], submodule["channels"][-1]]


def _label_names(export: Path) -> list[str]:
    """The names that a saved network of the run knows, one of several targets for all."""
    path = next((path for path in sorted(export.rglob(ARCHITECTURE))), export / ARCHITECTURE)
    return _read(path, parse_json, {}).get("label_names", [])


def _read(path: Path, parse: Callable[[str], Any], missing: Any) -> Any:
    """What a file holds, or what stands for a file that is not there."""
    if not path.is_file():
        return missing
    try:
        found = parse(path.read_text())
        if not isinstance(found, type(missing)):
            raise ValueError(f"expected a {type(missing).__name__}, got {type(found).__name__}")
    except ValueError as error:
        raise ValueError(f"run: {path} is damaged: {error}; mend or remove it") from error
    return found
