"""What each command of `ofb` does, given its options."""

import copy
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

import timm
from torch import nn

import ofb
from ofb.doctor import diagnose
from ofb.engine.advice import advice_on
from ofb.engine.checkpoint import write_text
from ofb.engine.class_names import check_label_names, set_label_names
from ofb.engine.config import PATHS, SearchConfig, TrainConfig, TrainingConfig
from ofb.engine.data import Loaders, create_loaders, create_model, create_teacher
from ofb.engine.device import pick_device, with_precision
from ofb.engine.distributed import may_restart, on_main
from ofb.engine.options import from_dict, read_options, to_dict
from ofb.engine.run_folder import (
    CONFIG_FILE,
    EXPORT_FOLDER,
    FIGURES_FILE,
    command_of,
    is_empty,
    locked,
    resume_command,
    run_of,
)
from ofb.engine.search import make_supernet
from ofb.engine.seeding import seed_everything
from ofb.engine.terminal import in_lines
from ofb.engine.tool_config import DoctorConfig, EvaluateConfig, ExportConfig, ProfileConfig, ReportConfig
from ofb.export import ONNX_FILE, PROGRAM_FILE, count_params
from ofb.network_latency import latency_note, latency_targets_note
from ofb.plan import describe_plan
from ofb.profile import TOTAL, profile_networks, profile_table
from ofb.report import comparison_table, dense_training, dense_training_note, figures, latencies_of, write_report
from ofb.report.run import how_to_finish
from ofb.run_networks import only_network, saved_networks
from ofb.supernet.families import count_macs, sizes_of

UNWELL = 1
EXPORTS = {"onnx": (ofb.export_onnx, ONNX_FILE), "program": (ofb.export_program, PROGRAM_FILE)}


def run_train(config: TrainConfig) -> None:
    config = on_main(_with_run_folder, "train", config)
    model = _starting_model(config)
    loaders = _loaders(config, model)
    _tell(set_label_names(model, loaders.train.dataset))
    teacher = _teacher(config, model, None)
    print(f"{describe_plan(config, model, loaders, teacher)}\n", flush=True)
    if config.dry_run:
        return
    with _run("train", config):
        model = ofb.train(model, loaders.train, loaders.val, config, teacher=teacher)
        ofb.save(model, Path(config.output) / EXPORT_FOLDER)
        metrics = ofb.evaluate(model, loaders.test, config)
        print(f"test  {_shown(metrics)}")
        costs = {"macs": count_macs(model), "params": count_params(model)}
        _write_figures(config, {"trained": model}, {"trained": metrics | costs})
    _tell_skipped(loaders)
    print(f"run folder: {config.output}")


def run_search(config: SearchConfig) -> None:
    config = on_main(_with_run_folder, "search", config)
    dense = _starting_model(config)
    loaders = _loaders(config, dense)
    _tell(set_label_names(dense, loaders.train.dataset))
    supernet = make_supernet(copy.deepcopy(dense), config, len(loaders.train))
    is_trained = config.checkpoint is not None or config.pretrained
    teacher, export = _teacher(config, dense, dense if is_trained else None), Path(config.output) / EXPORT_FOLDER
    print(f"{describe_plan(config, dense, loaders, teacher, supernet)}\n", flush=True)
    if config.dry_run:
        return
    with _run("search", config):
        found = ofb.search_targets(supernet, loaders.train, loaders.val, config, teacher=teacher)
        for target, network in found.items():
            ofb.save(network, export if config.targets is None else export / target)
        networks = {"dense": dense} | (found if config.targets else {"compressed": found[config.target]})
        metrics = {name: ofb.evaluate(network, loaders.test, config) for name, network in networks.items()}
        compared = on_main(figures, networks, metrics, config.latency_batch_size, pick_device(config))
        compared["dense"]["training"] = on_main(dense_training, config.checkpoint, config.pretrained)
        _write_figures(config, networks, compared)
    table_ms = supernet.dense_costs.get("latency_ms")
    against_targets = latency_targets_note(latencies_of(compared), supernet.targets, table_ms)
    print("", comparison_table(compared), *([against_targets] if against_targets else []), sep="\n")
    _tell(dense_training_note(compared))
    print()
    _tell_skipped(loaders)
    print(f"report: {on_main(write_report, config.output)}\nrun folder: {config.output}")


def run_evaluate(config: EvaluateConfig) -> None:
    networks = _load_all(saved_networks(config.checkpoint, config.target))
    if not config.names_data:
        raise ValueError(
            f"data: expected the images to evaluate on, since {config.checkpoint} is in no run folder that knows them; "
            "add --data-dir FOLDER, or --data digits"
        )
    loaders = _loaders(config, next(iter(networks.values())))
    loader = getattr(loaders, config.split)
    _tell(_not_held_out(config))
    for name, network in networks.items():
        _tell(check_label_names(network, loader.dataset))
        metrics = ofb.evaluate(network, loader, config)
        print(f"{name}  {config.split}  {len(loader.dataset)} images  {_shown(metrics)}")
    _tell_skipped(loaders)


def run_export(config: ExportConfig) -> None:
    folders, (write, name) = saved_networks(config.checkpoint, config.target), EXPORTS[config.format]
    for option in ("output", "push_to_hub"):
        if len(folders) > 1 and getattr(config, option) is not None:
            raise ValueError(f"{option}: expected one network, got {', '.join(folders)}; choose one with --target")
    for folder in folders.values():
        path = Path(config.output or folder / name)
        difference = write(ofb.load(folder), path)
        print(f"{path}  logits within {difference:.1g} of the network's")
        if config.push_to_hub is not None:
            print(ofb.push_to_hub(folder, config.push_to_hub, config.hub_private))


def run_profile(config: ProfileConfig) -> None:
    device, run = pick_device(config), run_of(config.network)
    if run is not None or Path(config.network).is_dir():
        found = _load_all(saved_networks(config.network, config.target))
        dense = _dense_network(run, next(iter(found.values())).num_classes)
        if len(found) == 1 and config.target is None:
            found = {"compressed" if dense else config.network: network for network in found.values()}
        networks = dense | found
    elif config.target is not None:
        raise ValueError(f"target: expected a run to choose a network of, got {config.network!r}")
    elif timm.is_model(config.network.split(".")[0]):
        networks = {config.network: timm.create_model(config.network)}
    else:
        raise ValueError(f"network: expected a run folder or the name of a timm model, got {config.network!r}")
    costs = profile_networks(networks, config.batch_size, device)
    note = latency_note({name: layers[TOTAL].latency for name, layers in costs.items()})
    print(f"{profile_table(costs)}\n{in_lines(note)}")


def run_doctor(config: DoctorConfig) -> int:
    text, well = diagnose(pick_device(config))
    print(text)
    return 0 if well else UNWELL


def run_report(config: ReportConfig) -> None:
    print(write_report(config.run))
    left = how_to_finish(config.run)
    _tell(left and f"the run is not finished: {left}")


def _with_run_folder(command: str, config: TrainingConfig) -> TrainingConfig:
    """The config with its run folder settled, one that is new or empty unless the run is resumed, and paths that hold
    from any folder."""
    if config.output is None and may_restart():
        raise ValueError("output: expected a folder where a job that restarts finds its run again; add --output FOLDER")
    output = config.output or _new_folder(command, config)
    if not config.resume and Path(output).exists() and not is_empty(Path(output)):
        raise ValueError(f"output: expected a new or empty folder, got {output}; add --resume to continue its run")
    paths = {name: path for name in PATHS if (path := getattr(config, name, None)) and os.path.exists(path)}
    paths = {name: os.path.abspath(path) for name, path in paths.items()}
    return with_precision(dataclasses.replace(config, output=output, **paths))


def _new_folder(command: str, config: TrainingConfig) -> str:
    """A folder that does not exist, named for command, model and time."""
    start = Path(config.checkpoint).name if config.checkpoint else config.model
    name = f"runs/{command}-{start}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered = (f"{name}-{number}" for number in count(2))
    return next(folder for folder in chain([name], numbered) if not Path(folder).exists())


@contextmanager
def _run(command: str, config: TrainingConfig) -> Iterator[None]:
    """Everything a run does to its folder; what ends it says how to carry on."""
    with locked(config.output):
        if not config.resume:
            on_main(_write_config, config)
        try:
            yield
        except KeyboardInterrupt as interrupt:
            interrupt.args = (f"continue with: {resume_command(command, config.output)}",)
            raise
        except RuntimeError as error:
            advice = advice_on(error, config)
            if advice is None:
                raise
            raise MemoryError(f"{advice}; continue with: {resume_command(command, config.output)}") from error


def _write_config(config: TrainingConfig) -> None:
    """The options of a new run, once its folder is locked: another run may have begun there in the meantime."""
    import yaml

    path = Path(config.output) / CONFIG_FILE
    if path.exists():
        raise ValueError(f"output: expected a new or empty folder, got {config.output}, where another run just began")
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def _write_figures(
    config: TrainingConfig, networks: Mapping[str, nn.Module], compared: Mapping[str, Mapping[str, float]]
) -> None:
    """Keep the networks' figures and sizes in the run folder."""
    kept = {name: {**compared[name], "sizes": sizes_of(network)} for name, network in networks.items()}
    write_text(Path(config.output) / FIGURES_FILE, json.dumps(kept, indent=1) + "\n")


def _starting_model(config: TrainingConfig) -> nn.Module:
    seed_everything(config.seed, "model", 0)
    if config.checkpoint is None:
        return create_model(config)
    return ofb.load(only_network("checkpoint", config.checkpoint))


def _tell(note: str) -> None:
    if note:
        print(in_lines(f"note: {note}"))


def _loaders(config: TrainingConfig | EvaluateConfig, model: nn.Module) -> Loaders:
    loaders = create_loaders(config, model, pick_device(config))
    for note in loaders.notes:
        _tell(note)
    return loaders


def _tell_skipped(loaders: Loaders) -> None:
    skipped = loaders.skipped()
    if skipped:
        print(f"skipped {len(skipped)} image files that cannot be read, such as {skipped[0]}")


def _load_all(folders: Mapping[str, Path]) -> dict[str, nn.Module]:
    return {name: ofb.load(folder) for name, folder in folders.items()}


def _not_held_out(config: EvaluateConfig) -> str:
    """A note where images to evaluate on are chosen otherwise than by the run, which may have trained on them."""
    run, of_training = run_of(config.checkpoint), config.split == "val" and config.val_split is None
    if config.data == "digits":
        return ""
    if run is None:
        others = "its run is not known" if of_training else ""
    else:
        options = read_options("run", run / CONFIG_FILE)
        names = ["train_split", "test_share"] + ["val_split", "val_share", "seed"] * of_training
        changed = [name for name in names if options.get(name) != getattr(config, name)]
        others = changed and f"its run had {', '.join(f'{name} {options.get(name)}' for name in changed)}"
    return f"the network may have been trained on some of these images: {others}" if others else ""


def _dense_network(run: Path | None, classes: int) -> dict[str, nn.Module]:
    """The dense network, by its name in a table, that a search started from; empty where there is none, or it is gone.

    Its weights may be others: costs do not depend on them.
    """
    try:
        options = {} if run is None else read_options("network", run / CONFIG_FILE)
        if command_of(options) != "search":
            return {}
        config = from_dict(SearchConfig, options)
        kwargs = (*config.model_kwargs, f"num_classes={classes}")
        return {"dense": _starting_model(dataclasses.replace(config, pretrained=False, model_kwargs=kwargs))}
    except (ValueError, OSError) as error:
        _tell(f"no dense network to compare with: {' '.join(str(error).split())}")
        return {}


def _teacher(config: TrainingConfig, model: nn.Module, default: nn.Module | None) -> nn.Module | None:
    """The network to distil from, `default` where none is named; None where the config does not distil."""
    if config.distillation is None:
        return None
    if config.teacher is None:
        return default
    if not Path(config.teacher).is_dir():
        return create_teacher(config, model)
    return ofb.load(only_network("teacher", config.teacher))


def _shown(metrics: Mapping[str, float]) -> str:
    return f"top-1 {metrics['top1']:.2f} %  top-5 {metrics['top5']:.2f} %  loss {metrics['loss']:.4f}"
