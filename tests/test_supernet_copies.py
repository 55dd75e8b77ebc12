"""Copies of a supernet in a loop of one's own: averages that follow it, deep copies, saved states."""

import copy
from functools import reduce

import pytest
import safetensors.torch
import torch
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ofb
from tests.common import tiny_swin, tiny_vit

EPOCHS, STEPS = 3, 6


def make_supernet(model=None, **options) -> ofb.Supernet:
    torch.manual_seed(0)
    return ofb.Supernet(model or tiny_vit(), epochs=EPOCHS, steps_per_epoch=STEPS, **options)


def make_optimizer(supernet: ofb.Supernet) -> torch.optim.Optimizer:
    return torch.optim.AdamW(supernet.parameter_groups(architecture_lr=0.5), lr=1e-2)


def train(supernet, optimizer, steps, copies=(), after=lambda: None) -> None:
    """Some steps of a search; what a step is given depends on its number alone."""
    for step in steps:
        torch.manual_seed(step)
        images = torch.randn(4, 3, *supernet.model.patch_embed.img_size)
        supernet.loss(images, torch.arange(4)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        supernet.step(optimizer, copies)
        after()


def assert_alike(first: torch.nn.Module, second: torch.nn.Module, **tolerances) -> None:
    expected = second.state_dict()
    assert first.state_dict().keys() == expected.keys()
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **tolerances)


AVERAGES = {
    "torch, mean": lambda s: (average := AveragedModel(s), average.update_parameters),
    "torch, EMA": lambda s: (
        average := AveragedModel(s, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        average.update_parameters,
    ),
    "timm": lambda s: (average := ModelEmaV3(s, decay=0.5), average.update),
    "timm, one by one": lambda s: (average := ModelEmaV3(s, decay=0.5, foreach=False), average.update),
    "timm, buffers left out": lambda s: (average := ModelEmaV3(s, decay=0.5, exclude_buffers=True), average.update),
}


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("model", [tiny_vit, tiny_swin])
def test_averages_follow_to_the_end(kind, model):
    """An average has the sizes of the supernet it averages, and averages through every pruning event."""
    supernet = make_supernet(model(), mask_ratio_end=0.25)
    optimizer = make_optimizer(supernet)
    average, update = AVERAGES[kind](supernet)
    bias, its_mean = (list(each.model.parameters())[-1] for each in (supernet, average.module))  # the classifier's
    seen = [bias.detach().clone()] if kind.startswith("timm") else []

    def after() -> None:
        update(supernet)
        seen.append(bias.detach().clone())

    train(supernet, optimizer, range(EPOCHS * STEPS), [average.module], after)
    assert supernet.finished
    assert average.module.finished
    assert average.module.choices == supernet.choices
    assert average.module.steps == supernet.steps
    expected = reduce(lambda mean, bias: (mean + bias) / 2, seen) if "mean" not in kind else sum(seen) / len(seen)
    torch.testing.assert_close(its_mean.detach(), expected)
    images = torch.randn(2, 3, *supernet.model.patch_embed.img_size)
    found = average.module.extract().eval()
    torch.testing.assert_close(found(images), average.eval()(images), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found(images), supernet.extract().eval()(images))


def test_copies_lose_the_same_units():
    """Not those that their own scores rank last."""
    supernet = make_supernet()
    follower = copy.deepcopy(supernet)
    for bimask in follower.bimasks.values():
        bimask.score.data.neg_()  # ranks the other way round
    follower.model.load_state_dict(supernet.model.state_dict())
    optimizer = make_optimizer(supernet)
    for group in optimizer.param_groups[:3]:
        group["lr"] = 0.0  # the weights of both stay
    train(supernet, optimizer, range(EPOCHS * STEPS), [follower])
    assert supernet.bimasks["mlp0"].candidates.units < 128
    for (name, weight), other in zip(supernet.model.named_parameters(), follower.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_schedules_of_copies():
    supernet = make_supernet(mask_ratio_end=0.25)
    follower = copy.deepcopy(supernet)
    train(supernet, make_optimizer(supernet), range(4), [follower])
    for name in ("lam", "mask_ratio", "one_hot_factor"):
        assert torch.equal(getattr(follower, name), getattr(supernet, name))
    assert follower.steps == 4


def test_no_copies():
    supernet = make_supernet()
    with pytest.raises(ValueError, match="copies: expected supernets, such as the `module` of .*, got AveragedModel"):
        supernet.step(None, [AveragedModel(supernet)])
    late = copy.deepcopy(supernet)
    optimizer = make_optimizer(supernet)
    train(supernet, optimizer, range(EPOCHS * STEPS - 1))
    steps = supernet.steps
    for change in (supernet.step, supernet.prune, supernet.finalize):
        with pytest.raises(ValueError, match="copies: expected supernets with the sizes of this one"):
            change(optimizer, late)
    assert (supernet.steps, late.steps) == (steps, 0)


def test_a_deep_copy_in_the_middle_goes_its_own_way():
    """It ends where the first one ends, and neither touches the other."""
    supernet = make_supernet()
    optimizer = make_optimizer(supernet)
    train(supernet, optimizer, range(10))
    copied, its_optimizer = copy.deepcopy((supernet, optimizer))
    before = copy.deepcopy(supernet.state_dict())
    assert supernet.bimasks["mlp0"].candidates.units < 128
    assert not supernet.finished
    train(copied, its_optimizer, range(10, EPOCHS * STEPS))
    assert_alike_states(supernet.state_dict(), before)
    train(supernet, optimizer, range(10, EPOCHS * STEPS))
    assert_alike_states(copied.state_dict(), supernet.state_dict())


def assert_alike_states(first, second) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_state_is_tensors_alone(tmp_path, suffix):
    """Half pruned it is saved without pickled objects, and loaded into a supernet made as the first one was."""
    supernet = make_supernet(mask_ratio_end=0.25)
    optimizer = make_optimizer(supernet)
    train(supernet, optimizer, range(16))
    assert supernet.choices
    assert not supernet.finished
    path = tmp_path / f"state.{suffix}"
    if suffix == "pt":
        torch.save(supernet.state_dict(), path)
        state = torch.load(path, weights_only=True)
    else:
        safetensors.torch.save_file(supernet.state_dict(), path)
        state = safetensors.torch.load_file(path)
    resumed = make_supernet(mask_ratio_end=0.25)
    resumed.load_state_dict(state)
    assert_alike_states(resumed.state_dict(), supernet.state_dict())
    assert resumed.choices == supernet.choices
    assert resumed.steps == supernet.steps
    its_optimizer = make_optimizer(resumed)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((supernet, optimizer), (resumed, its_optimizer)):
        train(each, its, range(16, EPOCHS * STEPS))
    assert_alike_states(resumed.state_dict(), supernet.state_dict())


def test_states_of_something_else_change_nothing():
    supernet = make_supernet()
    train(supernet, make_optimizer(supernet), range(16))
    other = make_supernet(tiny_vit(depth=1))
    earlier = supernet.state_dict() | {"_extra_state": {"steps": 9}}
    wider = make_supernet(tiny_vit(embed_dim=64))
    for state in (other.state_dict(), wider.state_dict(), supernet.model.state_dict(), earlier):
        fresh = make_supernet()
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError, match="state_dict: expected the state_dict.* of a supernet.*, got another"):
            fresh.load_state_dict(state)
        assert_alike_states(fresh.state_dict(), before)


def test_choices_fit_into_the_state():
    """The longest name, size and probability: room for as many choices as there are submodules."""
    supernet = make_supernet()
    length = len(supernet.get_extra_state())
    choice = {"submodule": "attn999", "size": [128, 1024], "how": "chosen", "probability": 1.2345678901234567e-100}
    supernet.choices = [choice | {"step": 10**9} for _ in supernet.bimasks]
    assert len(supernet.get_extra_state()) == length
