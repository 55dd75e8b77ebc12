"""What a run is about to do, told before anything is trained: a fact a line, in 80 columns."""

import os
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from ofb.engine.checkpoint import newest_step
from ofb.engine.config import SearchConfig, TrainingConfig
from ofb.engine.data import Loaders, data_config
from ofb.engine.device import describe_precision, no_cuda_graph, pick_device
from ofb.engine.distributed import processes
from ofb.engine.run_folder import CHECKPOINT_FOLDER
from ofb.engine.search import describe_reach
from ofb.engine.shards import Loader
from ofb.engine.splits import count_classes
from ofb.export import count_params
from ofb.supernet import Supernet
from ofb.supernet.cost import readable
from ofb.supernet.families import count_macs
from ofb.supernet.targets import describe_limits
from ofb.supernet.timing import device_name
from ofb_kernels.dispatch import BACKEND_VARIABLE, choose_backend

WIDTH, LABEL = 80, 13  # columns of a line, and of what stands in front of a fact
GAP = "   "  # between the figures of a line that `describe_reach` writes


def describe_plan(
    config: TrainingConfig,
    model: nn.Module,
    loaders: Loaders,
    teacher: nn.Module | None,
    supernet: Supernet | None = None,
) -> str:
    """The plan of a run.

    Args:
        config: of the run, its folder named.
        model: what it starts from.
        loaders: of its images.
        teacher: what it learns from.
        supernet: of a search.
    """
    device, steps = pick_device(config), len(loaders.train)
    facts = [("data", _data(config)), ("images", _images(loaders, model)), ("model", _model(config, model))]
    facts += [("start", _start(config)), ("cost", f"{readable(count_macs(model))} MACs")]
    if supernet is not None:
        facts += _targets(supernet)
    facts += [("teacher", _teacher(config, model, teacher)), ("device", _device(device))]
    facts += [("precision", describe_precision(config, device)), *_graph(config, device), ("batch", _batch(config))]
    if supernet is not None:
        facts.append(("ops", _ops(config, device)))
    facts += [(words, _length(len(names), epochs, steps)) for words, names, epochs in _stages(config)]
    facts.append(("run folder", config.output))
    if config.resume:
        facts.append(("goes on", _place(config, steps)))
    if config.dry_run:
        facts.append(("dry run", "nothing is trained or written"))
    return "\n".join(line for label, fact in facts for line in _lines(label, fact))


def _lines(label: str, fact: str) -> Iterator[str]:
    """A fact behind its label, on as many lines as it takes; figures that a gap divides stay whole."""
    room = WIDTH - LABEL
    breaks = {"break_long_words": False, "break_on_hyphens": False}  # a path stays whole, to be copied
    packed = _packed(fact.split(GAP), room) if GAP in fact else [fact]
    wrapped = [part for line in packed for part in textwrap.wrap(line, room, **breaks)]
    for number, part in enumerate(wrapped):
        yield f"{'' if number else label:{LABEL}}{part}"


def _packed(figures: Iterable[str], room: int) -> list[str]:
    lines = [""]
    for figure in figures:
        longer = GAP.join(filter(None, [lines[-1], figure]))
        if len(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(figure)
    return lines


def _data(config: TrainingConfig) -> str:
    if config.data_dir is None or not config.data:
        return _near(config.data_dir) if config.data_dir else config.data
    return f"{config.data} in {_near(config.data_dir)}"


def _near(path: str) -> str:
    """A path as it is from here, where it is below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _images(loaders: Loaders, model: nn.Module) -> str:
    parts = {"train": loaders.train, "val": loaders.val, "test": loaders.test}
    counted = ", ".join(f"{name} {_count(loader)}" for name, loader in parts.items())
    return f"{counted}; {count_classes(loaders.train.dataset) or model.num_classes} classes"


def _count(loader: Loader) -> str:
    """How many images a loader has; a stream may not know."""
    try:
        return f"{len(loader.dataset):,}"
    except TypeError:
        return "?"


def _model(config: TrainingConfig, model: nn.Module) -> str:
    name = config.model if config.checkpoint is None else type(model).__name__
    size = " × ".join(map(str, data_config(model)["input_size"]))
    return f"{name}, {readable(count_params(model))} parameters, images of {size}"


def _start(config: TrainingConfig) -> str:
    if config.checkpoint is not None:
        return f"weights of {_near(config.checkpoint)}"
    if config.pretrained:
        return "pretrained weights of timm"
    return "random weights: neither --pretrained nor --checkpoint is given"


def _targets(supernet: Supernet) -> Iterator[tuple[str, str]]:
    if len(supernet.targets) > 1:
        yield "targets", ", then ".join(map(describe_limits, supernet.targets))
    for line in describe_reach(supernet).splitlines():
        yield "target", line


def _teacher(config: TrainingConfig, model: nn.Module, teacher: nn.Module | None) -> str:
    if config.distillation is None:
        return "none: --distillation None"
    if teacher is None:
        return "none"
    name = "the network that the search starts from" if teacher is model else _near(config.teacher)
    return f"{name} ({'soft' if config.distillation == 'auto' else config.distillation})"


def _device(device: torch.device) -> str:
    many = processes()
    return f"{device_name(device)}{f', {many} processes' if many > 1 else ''}"


def _graph(config: TrainingConfig, device: torch.device) -> list[tuple[str, str]]:
    """Whether steps become a CUDA graph, where that is a question."""
    if device.type != "cuda" and not config.cuda_graph:
        return []
    reason = no_cuda_graph(config, device)
    return [("CUDA graph", "yes" if reason is None else f"no: {reason}")]


def _batch(config: TrainingConfig) -> str:
    parts = config.grad_accum_steps
    return f"{config.batch_size:,} images a step{f', in {parts} parts' if parts > 1 else ''}"


def _ops(config: SearchConfig, device: torch.device) -> str:
    """Their backend, and who chose it.

    Raises:
        ValueError: the backend asked for does not run here.
    """
    chosen = choose_backend("ops", config.backend, {"the tensors": torch.empty(1, 1, device=device)})
    if config.backend is not None:
        return f"{chosen} (--backend)"
    if os.environ.get(BACKEND_VARIABLE):
        return f"{chosen} ({BACKEND_VARIABLE})"
    return f"{chosen}, or eager where that was measured to be faster" if chosen == "triton" else chosen


def _stages(config: TrainingConfig) -> list[tuple[str, list[str], int]]:
    """In words, names and epochs of the stages of each kind."""
    if not isinstance(config, SearchConfig):
        return [("training", ["train"], config.epochs)]
    several = config.targets is not None
    finetune = [f"finetune-{target}" for target in config.all_targets()] if several else ["finetune"]
    return [("search", ["search"], config.epochs), ("fine-tuning", finetune, config.finetune_epochs)]


def _length(stages: int, epochs: int, steps: int) -> str:
    if not epochs:
        return "none"
    length = f"{_counted(epochs, 'epoch')} of {_counted(steps, 'step')}, {_counted(epochs * steps, 'optimizer step')}"
    return f"{length}, for each of {stages} targets" if stages > 1 else length


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _place(config: TrainingConfig, steps: int) -> str:
    """Where a resumed run goes on, as the name of its newest checkpoint says."""
    folder = Path(config.output) / CHECKPOINT_FOLDER
    stages = [(name, epochs) for _, names, epochs in _stages(config) for name in names]
    for name, epochs in reversed(stages):
        newest = newest_step(folder, name)
        if newest is not None:
            epoch, batch = divmod(newest, steps + 1)
            more = f" and {_counted(batch, 'step')} of the next" if batch else ""
            return f"after epoch {epoch} of {epochs} of stage {name}{more}"
    return "from the beginning: there is no checkpoint yet"
