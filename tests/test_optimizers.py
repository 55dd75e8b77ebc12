"""Every optimizer of timm and torch: searches to the end with its moments pruned in value, or is refused at once.

`python -m tests.test_optimizers` writes the table of docs/own-loop.md.
"""

import copy
import inspect
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import timm.optim
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import ofb
from ofb.engine.config import TrainConfig
from ofb.engine.optimization import make_optimizer
from ofb.supernet.pruning import reset_moments
from tests.common import tiny_vit

PAGE = Path(__file__).parents[1] / "docs/own-loop.md"
START, END = "<!-- optimizers: written by tests/test_optimizers.py -->\n", "<!-- end of optimizers -->\n"
FOREIGN = ("bnb", "fused")  # of bitsandbytes and APEX, which need CUDA
STEPS = 8
PRUNED, REFUSED, UNKNOWN = "pruned with the weights", "refused after the first step", "not known"


def names() -> list[str]:
    """timm's optimizers by their timm names, torch's by their classes."""
    own = [
        name
        for name, each in vars(torch.optim).items()
        if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
    ]
    return [*timm.optim.list_optimizers(), "lookahead_adamw", "lookahead_adagrad", *(f"torch.optim.{n}" for n in own)]


def make(name: str, groups: list[dict], lr: float = 1e-3) -> torch.optim.Optimizer:
    if name.startswith("torch."):
        return getattr(torch.optim, name.split(".")[-1])(groups, lr=lr)
    return timm.optim.create_optimizer_v2(groups, opt=name, lr=lr)


def kept_by(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict:
    return getattr(optimizer, "_base_optimizer", optimizer).state.get(parameter, {})


def is_moment(value) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def copied(kept: dict) -> dict:
    return {key: copy.copy(value) if not torch.is_tensor(value) else value.clone() for key, value in kept.items()}


def assert_pruned_alike(optimizer, before: dict) -> int:
    """Each moment has, entry by entry, what it had for the weights that are left; how many moments were cut."""
    cut = 0
    for parameter, (old, kept) in before.items():
        if parameter.shape == old.shape:
            continue
        values, order = old.flatten().sort()
        assert (values.diff() > 0).all(), "weights that are alike cannot be told apart"
        places = order[torch.searchsorted(values, parameter.detach().flatten())].view(parameter.shape)
        assert torch.equal(old.flatten()[places], parameter)
        now = kept_by(optimizer, parameter)
        assert now.keys() == kept.keys()
        for key, value in kept.items():
            if is_moment(value):
                assert torch.equal(now[key], value.flatten()[places]), key
                cut += 1
            else:
                assert now[key] == value, key
    return cut


@cache
def outcome(name: str) -> tuple[str, str]:
    """What an optimizer keeps of a parameter, and what becomes of a search with it."""
    if name.startswith(FOREIGN):
        return UNKNOWN, "needs CUDA and a library of its own: **not tried**"
    torch.manual_seed(0)
    model = tiny_vit(drop_path_rate=0.0).double()
    supernet = ofb.Supernet(model, "50%", epochs=1, steps_per_epoch=STEPS, prunes_per_epoch=STEPS)
    anew = {each for bimask in supernet.bimasks.values() for each in (bimask.alpha, bimask.scale)}
    kinds, cut = set(), 0
    try:
        optimizer = make(name, supernet.parameter_groups(architecture_lr=0.1))
        for step in range(STEPS):
            images = torch.randn(4, *(3, *model.patch_embed.img_size), dtype=torch.float64)
            with sdpa_kernel(SDPBackend.MATH):  # the one that has a gradient of its gradient
                loss = supernet.loss(images, torch.arange(4)).total
                loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
            with torch.compiler.set_stance("force_eager"):  # Kron compiles itself
                optimizer.step()
            optimizer.zero_grad()
            for parameter in supernet.parameters():  # no two weights are the same
                parameter.data.add_(torch.randn_like(parameter), alpha=1e-6)
            before = {p: (p.detach().clone(), copied(kept_by(optimizer, p))) for p in supernet.parameters()}
            before = {p: each for p, each in before.items() if p not in anew}
            kinds |= {key for _, kept in before.values() for key, value in kept.items() if is_moment(value)}
            try:
                supernet.step(optimizer)
            except ValueError as error:
                assert step == 0
                assert "take another, such as torch.optim.AdamW" in str(error)
                return str(error).split("which keeps ")[1].split("; take")[0].split(",")[0], REFUSED
            cut += assert_pruned_alike(optimizer, before)
    except (RuntimeError, ValueError) as error:
        return UNKNOWN, f"refused by torch: {str(error).splitlines()[0].split(' whereas')[0]}"
    assert supernet.finished
    assert cut > 0 or not kinds
    return ", ".join(sorted(kinds)) or "nothing", PRUNED


def table() -> str:
    """The table in Markdown."""
    rows = defaultdict(list)
    for name in names():
        rows[outcome(name)].append(name)
    lines = ["| optimizers | keep of a weight, besides numbers | in a search |", "|---|---|---|"]
    for (kept, fate), members in sorted(rows.items(), key=lambda row: (row[0][1] != PRUNED, *row[0][::-1])):
        lines.append(f"| {', '.join(members)} | {kept} | {fate} |")
    return "\n".join(lines) + "\n"


def page_parts() -> tuple[str, str, str]:
    before, rest = PAGE.read_text().split(START)
    inside, after = rest.split(END)
    return before, inside, after


def told() -> dict[str, tuple[str, str]]:
    """What the page says of each optimizer."""
    rows = [line.strip("| \n").split(" | ") for line in page_parts()[1].splitlines()[2:]]
    return {name: (kept, fate) for members, kept, fate in rows for name in members.split(", ")}


@pytest.mark.parametrize("name", names())
def test_searches_to_the_end_or_is_refused_at_once(name):
    if name not in told():
        pytest.skip("the page is of other versions of timm and torch")
    assert told()[name] == outcome(name), "`python -m tests.test_optimizers` brings docs/own-loop.md up to date"


@pytest.mark.parametrize("accumulated", [0.0, 0.3])
def test_adagrad_starts_logits_afresh(accumulated):
    """It makes what it keeps when it is made, and never again."""
    parameter, other = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    groups = [{"params": [other]}, {"params": [parameter], "lr": 0.3}]
    optimizer = torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=accumulated)
    for each in (parameter, other):
        each.grad = torch.randn(3)
    optimizer.step()
    expected = copied(kept_by(optimizer, other))
    parameter.data, parameter.grad = parameter.data[:2].clone(), torch.randn(2)
    reset_moments(parameter, optimizer)
    assert kept_by(optimizer, parameter)["step"] == 0
    assert torch.equal(kept_by(optimizer, parameter)["sum"], torch.full((2,), accumulated))
    optimizer.step()
    assert kept_by(optimizer, parameter)["step"] == 1
    assert torch.allclose(kept_by(optimizer, other)["sum"], expected["sum"] + other.grad**2)


def test_architecture_betas():
    """0.5 and 0.999 around whatever betas the optimizer has in between; a user's own stay."""
    supernet = ofb.Supernet(tiny_vit(), epochs=1, steps_per_epoch=2)
    *_, architecture = timm.optim.Adan(supernet.parameter_groups(), betas=(0.9, 0.8, 0.7)).param_groups
    assert architecture["betas"] == (0.5, 0.8, 0.999)
    *_, architecture = torch.optim.AdamW(supernet.parameter_groups(), betas=(0.9, 0.95)).param_groups
    assert architecture["betas"] == (0.5, 0.999)
    for kind, betas in ((torch.optim.AdamW, (0.8, 0.99)), (timm.optim.Adan, (0.8, 0.7, 0.99))):
        *weights, architecture = supernet.parameter_groups()
        architecture["betas"] = betas
        assert kind([*weights, architecture]).param_groups[-1]["betas"] == betas


def test_nothing_is_pruned_where_moments_cannot_follow():
    """Also where they came after the first step: the supernet stays whole."""
    supernet = ofb.Supernet(tiny_vit(), epochs=1, steps_per_epoch=4, prunes_per_epoch=4)
    optimizer = torch.optim.AdamW(supernet.parameter_groups(), lr=1e-3)
    supernet.step(optimizer)
    optimizer.state[supernet.model.blocks[1].mlp.fc2.weight]["rows"] = torch.zeros(32, 1)
    shapes = [parameter.shape for parameter in supernet.parameters()]
    for change in (supernet.prune, supernet.finalize):
        with pytest.raises(ValueError, match=r"optimizer: expected .* AdamW, which keeps rows, of shape \(32, 1\)"):
            change(optimizer)
    assert [parameter.shape for parameter in supernet.parameters()] == shapes
    assert supernet.choices == []


@pytest.mark.parametrize(("name", "message"), [("adahessian", "of first order"), ("bnbadam", "that runs here")])
def test_commands_refuse_what_does_not_run(name, message):
    with pytest.raises(ValueError, match=f"opt: expected .*{message}, got {name}.*take adamw"):
        make_optimizer(tiny_vit(), TrainConfig(opt=name, device="cpu"), 1e-3)


if __name__ == "__main__":
    before, _, after = page_parts()
    PAGE.write_text(before + START + table() + END + after)
