"""The networks that a run saved, by name: what every command that reads a saved network starts from."""

from pathlib import Path

from ofb.engine.options import read_options, split_targets
from ofb.engine.run_folder import CONFIG_FILE, EXPORT_FOLDER, command_of, resume_command, run_of
from ofb.export.folder import ARCHITECTURE
from ofb.report.run import how_to_finish

TRAINED = "trained"  # the network of a dense training


def saved_networks(path: str | Path, target: str | None = None) -> dict[str, Path]:
    """The folders of saved networks, by name: those of a run are called by its targets, in their order.

    Args:
        path: a run folder, its export folder, one of the folders in there, or any folder that `ofb.save` wrote.
        target: the one network to give, all if None.

    Raises:
        ValueError: the run is not finished, or has no such target.
    """
    run = run_of(path)
    found = _saved_apart(Path(path)) if run is None else _saved_by(run, Path(path))
    if target is None:
        return found
    if target not in found:
        raise ValueError(f"target: expected one of {', '.join(found)} in {path}, got {target!r}")
    return {target: found[target]}


def only_network(argument: str, path: str | Path) -> Path:
    """The folder of the one network that a path stands for.

    Raises:
        ValueError: the run is not finished, or has several; the message begins with `argument`.
    """
    folder, *others = (found := saved_networks(path)).values()
    if others:
        raise ValueError(f"{argument}: expected one network, got {', '.join(found)} in {path}; say which: {folder}")
    return folder


def _saved_by(run: Path, path: Path) -> dict[str, Path]:
    """The networks of a run, or the one of them that a path is."""
    options, export = read_options("run", run / CONFIG_FILE), run / EXPORT_FOLDER
    if options.get("targets") is None:
        folders = {str(options.get("target", TRAINED)): export}
    else:  # which anyone may have written: no folder outside
        names = (name for name in split_targets(str(options["targets"])) if Path(name).name == name)
        folders = {name: export / name for name in names}
    if path.resolve() not in (run.resolve(), export.resolve()):
        return {path.resolve().name: path}
    if not folders or not all((folder / ARCHITECTURE).is_file() for folder in folders.values()):
        again = f"whose networks are gone; save them again with: {resume_command(command_of(options), run)}"
        state = how_to_finish(run) or again
        raise ValueError(f"run: expected a finished run, got {run}, {state}")
    return folders


def _saved_apart(path: Path) -> dict[str, Path]:
    """A network that is in no run, or several in a folder of theirs."""
    folder = path / EXPORT_FOLDER if (path / EXPORT_FOLDER).is_dir() else path
    if (folder / ARCHITECTURE).is_file():
        return {str(path): folder}
    below = sorted(file.parent for file in folder.glob(f"*/{ARCHITECTURE}"))
    return {each.name: each for each in below} or {str(path): folder}
