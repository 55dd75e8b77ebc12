"""The search: train a supernet until every size is final, then fine-tune the network it found."""

import copy
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ofb.engine.checkpoint import write_text
from ofb.engine.config import SearchConfig
from ofb.engine.device import autocast, determinism, pick_device, with_precision
from ofb.engine.distributed import average_gradients, check_alike, on_main, rank, start_alike
from ofb.engine.history import History, in_order
from ofb.engine.journal import Journal
from ofb.engine.optimization import Optimization, make_optimizer
from ofb.engine.reconstruction import images_to_rebuild, record_reconstruction
from ofb.engine.run_folder import FOUND_FILE, IMPORTANCE_FILE, LATENCY_FILE, locked
from ofb.engine.seeding import seed_everything
from ofb.engine.shards import Loader, shard
from ofb.engine.stage import Stage, through_setbacks
from ofb.engine.terminal import in_lines, items_in_lines
from ofb.engine.train import evaluate, run_epoch, set_drop_path, teaching, train
from ofb.engine.untrusted import parse_json
from ofb.supernet import LatencyTable, Supernet, measure_latency
from ofb.supernet.families import build, describe, sizes_of
from ofb.supernet.importance import leave_one_out, rank_correlation
from ofb.supernet.targets import Limits, amounts, describe_amount

SEARCH_LR_AT_256 = 2.5e-4
SEARCH_WARMUP_SHARE = 0.2  # 20 of 100 epochs
SCORE_BATCHES = 16  # to rank the units on before the first step
IMPORTANCE_IMAGES = 256  # of the validation images, to leave units out on


def make_supernet(model: nn.Module, config: SearchConfig, steps_per_epoch: int) -> Supernet:
    """The supernet a config describes, over a dense model that it takes over.

    Raises:
        ValueError: the target is out of reach, or the model cannot be searched.
    """
    target, *later_targets = config.all_targets()
    timed = any("latency_ms" in amounts(each) for each in config.all_targets())
    return Supernet(
        model,
        target,
        later_targets=later_targets,
        space=config.search_space(),
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=_warmup_epochs(config),
        residual_mask=config.residual_mask,
        lam_start=config.lam_start,
        lam_end=config.lam_end,
        mask_ratio_start=config.mask_ratio_start,
        mask_ratio_end=config.mask_ratio_end,
        score_init=config.score_init,
        score_mean=config.score_mean,
        architecture_init=config.architecture_init,
        criterion=config.criterion(),
        one_hot_weight=config.one_hot_weight,
        one_hot_delay=config.one_hot_delay,
        macs_weight=config.macs_weight,
        pace=config.pace,
        settling=config.settling,
        prunes_per_epoch=config.prunes_per_epoch,
        prune_threshold=config.prune_threshold,
        latency_table=on_main(_latency_table, model, config) if timed else None,
        backend=config.backend,
    )


def search(
    supernet: Supernet,
    train_loader: Loader,
    val_loader: Loader,
    config: SearchConfig | None = None,
    *,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """Search and fine-tune; the result is a plain timm model with the weights of its best epoch.

    The search ends when every size is final, at the latest after `config.epochs`. With `config.output` checkpoints are
    written there, and `config.resume` continues from the last one: a resumed run equals an uninterrupted one. A search
    that diverges goes back to it, with half the learning rate.

    Args:
        supernet: made for as many epochs and steps as are run here.
        train_loader: batches of images (B, C, H, W) and class indices (B,), with a length.
        val_loader: the same, to choose the best epoch of the fine-tuning.
        config: the recipe; its data and model options are not read here.
        teacher: to distil from, as `config.distillation` says; the dense network itself finds better ones.

    Raises:
        ValueError: the supernet was made for another number of steps or targets, or the run cannot be resumed.
        FloatingPointError: losses or gradients are not finite, and no lower learning rate helped.
        KeyboardInterrupt: SIGINT or SIGTERM came; where there is a run folder, a checkpoint was written first.
    """
    config = config or SearchConfig()
    if config.targets is not None:
        raise ValueError(f"targets: expected None, got {config.targets}; ofb.search_targets searches several")
    return search_targets(supernet, train_loader, val_loader, config, teacher=teacher)[config.target]


def search_targets(
    supernet: Supernet,
    train_loader: Loader,
    val_loader: Loader,
    config: SearchConfig,
    *,
    teacher: nn.Module | None = None,
) -> dict[str, nn.Module]:
    """`search` for several targets at once: the networks that one search finds on its way, each fine-tuned.

    The epochs are shared out evenly. At the end of its share a target's network is extracted from a copy of the
    supernet, which goes on to the next.

    Returns:
        The network of each of `config.all_targets()`.
    """
    config = with_precision(config)
    steps, targets = config.epochs * len(train_loader), config.all_targets()
    if supernet.total_steps != steps:
        raise ValueError(
            f"supernet: expected one for {config.epochs} epochs of {len(train_loader)} steps, got one for "
            f"{supernet.total_steps} steps in all; make it with ofb.Supernet(..., epochs=, steps_per_epoch=)"
        )
    if len(supernet.targets) != len(targets):
        raise ValueError(
            f"supernet: expected one for the targets {', '.join(targets)}, got one for {len(supernet.targets)}; "
            "make it with ofb.Supernet(..., target=, later_targets=)"
        )
    with locked(config.output), determinism(config):
        return _search_and_finetune(supernet, train_loader, val_loader, config, teacher)


def _search_and_finetune(
    supernet: Supernet, train_loader: Loader, val_loader: Loader, config: SearchConfig, teacher: nn.Module | None
) -> dict[str, nn.Module]:
    targets = config.all_targets()
    found = _search_sizes(supernet, train_loader, val_loader, config, teacher)
    print(describe_choices(supernet), flush=True)
    for limits, model in zip(supernet.targets, found, strict=True):
        print(describe_costs(supernet, model, limits), flush=True)
    on_main(_report_importance, supernet, val_loader, config)
    if config.output is not None:
        write_text(Path(config.output) / FOUND_FILE, json.dumps(_found(supernet, targets, found), indent=1) + "\n")
    networks, later = {}, config.finetune_epochs * len(targets)
    for target, model in zip(targets, found, strict=True):
        later -= config.finetune_epochs
        if config.finetune_epochs:
            stage = "finetune" if config.targets is None else f"finetune-{target}"
            options = {"teacher": teacher, "stage": stage, "later_epochs": later}
            model = train(model, train_loader, val_loader, config.finetune(), **options)
        networks[target] = model
    return networks


def describe_reach(supernet: Supernet) -> str:
    """What the search can reach and what it is asked for, a line for each budget."""
    return "\n".join(_reach(supernet, kind, limit) for kind, limit in supernet.target.items())


def describe_costs(supernet: Supernet, found: nn.Module, limits: Limits) -> str:
    """What a found network costs, in each unit its target limits, and how much of the limit that is."""
    sizes = sizes_of(found)
    costs = {kind: supernet.costs[kind].total(sizes) for kind in limits}
    shown = (
        f"{describe_amount(kind, cost)} ({cost / limits[kind]:.1%} of the target){_measured_on(supernet, kind)}"
        for kind, cost in costs.items()
    )
    return in_lines(items_in_lines("found: ", shown, "   "))


def describe_choices(supernet: Supernet) -> str:
    """The sizes found, and which of them the search left open until its end."""
    choices = {choice["submodule"]: choice for choice in supernet.choices}
    named = (f"{name} {_size(choices[name]['size'])}" for name in in_order(supernet) if name in choices)
    sizes = items_in_lines("sizes: ", named)
    chosen = [choice for choice in supernet.choices if choice["how"] == "chosen"]
    if not chosen:
        return f"{sizes}\nall of them were settled by pruning"
    least = min(choice["probability"] for choice in chosen)
    return (
        sizes
        + "\n"
        + in_lines(
            f"{len(chosen)} of {len(supernet.choices)} were still open at the end and chosen to meet the target (least "
            f"probability {least:.2f})"
        )
    )


def _found(supernet: Supernet, targets: list[str], networks: list[nn.Module]) -> dict:
    """The networks of a search, as `ofb report` reads them before they are fine-tuned."""
    found = {}
    for target, limits, network in zip(targets, supernet.targets, networks, strict=True):
        sizes = sizes_of(network)
        costs = {kind: cost.total(sizes) for kind, cost in supernet.costs.items()}
        found[target] = {"sizes": {name: list(size) for name, size in sizes.items()}, "costs": costs, "limits": limits}
    return {"networks": found, "choices": supernet.choices}


def _latency_table(model: nn.Module, config: SearchConfig) -> LatencyTable:
    """The table of the run to resume, or else the one the config names, or else one that is measured now."""
    path = Path(config.output) / LATENCY_FILE if config.resume else config.latency_table
    if path is None:
        return measure_latency(model, config.latency_batch_size, pick_device(config))
    try:
        saved = parse_json(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"latency_table: expected a latency.json that ofb wrote, got {path}: {error}") from error
    table = LatencyTable.from_dict(saved, model)
    if table.batch_size != config.latency_batch_size:
        raise ValueError(
            f"latency_batch_size: expected {table.batch_size}, with which {path} was measured, got "
            f"{config.latency_batch_size}; give the same, or no --latency-table"
        )
    return table


def _reach(supernet: Supernet, kind: str, limit: float) -> str:
    least, most = supernet.reachable(kind)
    dense = supernet.dense_costs[kind]
    figures = {"min": least, "target": limit, "max": most}
    shown = "   ".join(f"{n} {describe_amount(kind, cost)} ({cost / dense:.0%})" for n, cost in figures.items())
    satisfiable = "yes" if least <= limit <= most else "no"
    return f"{shown}{_measured_on(supernet, kind)}   satisfiable: {satisfiable}"


def _measured_on(supernet: Supernet, kind: str) -> str:
    """Where a latency is from: a table of another device or batch size than the report's own."""
    if kind != "latency_ms":
        return ""
    table = supernet.costs[kind]
    doubt = "" if table.stable else f"; unstable, {table.noise:.0%} noise: measure it on an idle machine"
    return f" by the table measured on {table.device}, batch size {table.batch_size}{doubt}"


def _search_sizes(
    supernet: Supernet, train_loader: Loader, val_loader: Loader, config: SearchConfig, teacher: nn.Module | None
) -> list[nn.Module]:
    """Train the supernet until its sizes are final; the network of each target."""
    whole = None if config.output is None else copy.deepcopy(supernet)  # a pruned one cannot go back to larger sizes

    def attempt(config: SearchConfig, setbacks: int) -> list[nn.Module]:
        if setbacks:
            vars(supernet).update(vars(copy.deepcopy(whole)))
        return _train_supernet(supernet, train_loader, val_loader, config, teacher, setbacks)

    return through_setbacks(attempt, config)


def _train_supernet(
    supernet: Supernet,
    train_loader: Loader,
    val_loader: Loader,
    config: SearchConfig,
    teacher: nn.Module | None,
    setbacks: int,
) -> list[nn.Module]:
    device = pick_device(config)
    start_alike(supernet.to(device))
    train_loader = shard(train_loader, config.grad_accum_steps)
    set_drop_path(supernet.model, config.drop_path)
    teach = teaching(teacher, config, device)
    groups = supernet.parameter_groups(config.weight_decay, config.architecture_lr, config.score_lr)

    def loss_of(images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        losses = vars(supernet.loss(images, targets, teach(images)))
        return {"loss": losses.pop("total")} | losses

    optimization = Optimization(
        make_optimizer(groups, config, SEARCH_LR_AT_256),
        loss_of,
        config,
        _warmup_epochs(config),
        len(train_loader),
        device,
        cosine_epochs=config.cosine_epochs or config.epochs + config.finetune_epochs,
        revision=lambda: supernet.revision,
    )
    found, history = Networks(like=supernet.model), History(supernet)
    parts = {"supernet": supernet, "history": history, "found": found}
    later_epochs = config.finetune_epochs * len(config.all_targets())
    stage = Stage(config, "search", len(train_loader), optimization, parts, setbacks, later_epochs)
    if not stage.resumed:
        _begin(supernet, train_loader, config, device)

    def stepped() -> None:
        if supernet.step(optimization.optimizer):
            check_alike(_decisive(supernet), f"after the pruning event of step {supernet.steps}")
        history.stepped()

    def an_epoch(epoch: int) -> None:
        supernet.train()
        losses = run_epoch(train_loader, stage, stepped, journal)
        journal.record(epoch, losses | _figures(supernet, val_loader, config))
        journal.record_history(epoch, history)
        if pictured is not None and not supernet.finished:
            record_reconstruction(journal, supernet, pictured, epoch, config)
        if len(supernet.targets) * (epoch + 1) >= config.epochs * (len(found) + 1) and not supernet.finished:
            found.append(supernet.extract())
            supernet.next_target()
            passed, following, *_ = config.all_targets()[len(found) - 1 :]
            print(f"{passed}: its network is taken after epoch {epoch + 1}; on to {following}", flush=True)

    with Journal(config, "search", stage.epoch, history.status, history.unshown) as journal:
        if not stage.resumed:
            journal.record_history(-1, history)
        pictured = images_to_rebuild(supernet, val_loader)
        stage.run(an_epoch, finished=lambda: supernet.finished)
        if stage.epoch < config.epochs:
            print(f"all sizes are final in epoch {stage.epoch} of {config.epochs}: the search is over", flush=True)
    return [*found, supernet.extract()]


class Networks(list[nn.Module]):
    """Networks that a search found on its way.

    Args:
        like: a network for the same images.
    """

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.pretrained_cfg = getattr(like, "pretrained_cfg", None)

    def state_dict(self) -> dict[str, Any]:
        return {"networks": [{"architecture": describe(each), "weights": each.state_dict()} for each in self]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self[:] = [self._built(saved) for saved in state["networks"]]

    def _built(self, saved: Mapping[str, Any]) -> nn.Module:
        model = build(saved["architecture"])
        model.pretrained_cfg = model.default_cfg = self.pretrained_cfg
        model.load_state_dict(saved["weights"])
        return model


def _begin(supernet: Supernet, train_loader: Loader, config: SearchConfig, device: torch.device) -> None:
    """What comes before the first step of a search."""
    if config.output is not None and "latency_ms" in supernet.costs:
        table = json.dumps(supernet.costs["latency_ms"].to_dict(), indent=1)
        write_text(Path(config.output) / LATENCY_FILE, table + "\n")
    if supernet.score_init == "taylor":
        _rank_scores(supernet, train_loader, config, device)


def _figures(supernet: Supernet, val_loader: Loader, config: SearchConfig) -> dict[str, Any]:
    """How a supernet stands after an epoch."""
    figures = {f"val_{name}": value for name, value in evaluate(supernet, val_loader, config).items()}
    figures |= {f"expected_{kind}": cost for kind, cost in supernet.expected_costs().items()}
    alive = supernet.alive_candidates()
    decided = {"decided": supernet.decided(), "alive": sum(alive.values())}
    return figures | decided | {"alive_candidates": alive}


def _rank_scores(supernet: Supernet, train_loader: Loader, config: SearchConfig, device: torch.device) -> None:
    """Rank the units by the loss on some training images, before the first epoch."""
    seed_everything(config.seed, "scores", 0, rank())
    batches = ((x.to(device), y.to(device)) for x, y in islice(train_loader, SCORE_BATCHES))
    with autocast(config, device):
        supernet.rank_scores(batches, average_gradients)
    check_alike(_decisive(supernet), "on the ranks of the units")


def _decisive(supernet: Supernet) -> dict[str, list[Tensor]]:
    """What decides which sizes and units stay, of each submodule."""
    return {name: list(bimask.state_dict().values()) for name, bimask in supernet.bimasks.items()}


def _report_importance(supernet: Supernet, val_loader: Loader, config: SearchConfig) -> None:
    """Print the rank correlation of importance and leave-one-out loss; the sample goes into the run folder."""
    seed_everything(config.seed, "importance", 0)
    device = pick_device(config)
    images, targets = next(iter(val_loader))
    sampled = leave_one_out(supernet, images[:IMPORTANCE_IMAGES].to(device), targets[:IMPORTANCE_IMAGES].to(device))
    correlations = {name: rank_correlation(*pair) for name, pair in sampled.items()}
    mean = sum(correlations.values()) / max(1, len(correlations))
    told = f"rank correlation {mean:.2f} (mean of {len(correlations)} submodules)"
    print(in_lines(f"importance against the loss without a unit: {told}"), flush=True)
    if config.output is not None:
        entries = {
            name: {"importance": importance, "loss_change": change, "rank_correlation": correlations[name]}
            for name, (importance, change) in sampled.items()
        }
        write_text(Path(config.output) / IMPORTANCE_FILE, json.dumps(entries, indent=1) + "\n")


def _warmup_epochs(config: SearchConfig) -> float:
    return config.shortened_warmup(SEARCH_WARMUP_SHARE * config.epochs)


def _size(size: int | list[int]) -> str:
    return "×".join(map(str, size)) if isinstance(size, list) else str(size)
