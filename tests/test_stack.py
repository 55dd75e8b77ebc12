"""Stack: every submodule gets in a stack what it would get alone."""

import pytest
import torch

from ofb.supernet import adaptive_one_hot_loss
from ofb.supernet.bimask import BiMask
from ofb.supernet.search_space import Candidates
from ofb.supernet.stack import Padding, Stacks

LAM = torch.tensor(0.3)
PENALTIES = {"attention": 0.0, "others": 0.01}


def make_bimasks() -> dict[str, BiMask]:
    """Two open submodules of different sizes, one of them with dead candidates, and a final one."""
    sizes = {"a": Candidates((2, 4), (3, 5, 8)), "b": Candidates((1, 2, 3), (4, 6)), "c": Candidates((2,), (7,))}
    bimasks = {name: BiMask(candidates) for name, candidates in sizes.items()}
    bimasks["a"].alive[0, 1] = False
    bimasks["c"].scale.data.normal_()
    return bimasks


def test_masks_and_their_gradients():
    bimasks = make_bimasks()
    masks = Stacks(bimasks, PENALTIES).masks(LAM)
    cotangents = {name: torch.randn_like(mask) for name, mask in masks.items()}
    torch.autograd.backward(list(masks.values()), list(cotangents.values()))
    for name, bimask in bimasks.items():
        learned = [bimask.scale] if bimask.final else [bimask.score, bimask.alpha]
        expected = bimask.mask(LAM)
        torch.testing.assert_close(masks[name], expected)
        gradients = torch.autograd.grad(expected, learned, cotangents[name])
        for parameter, gradient in zip(learned, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_expected_sizes():
    bimasks = make_bimasks()
    with torch.no_grad():
        bimasks["a"].alpha.copy_(torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.3, 0.1]]).log())
        bimasks["b"].alpha.zero_()
    a = (0.1 * 6 + 0.2 * 16 + 0.3 * 12 + 0.3 * 20 + 0.1 * 32) / (0.1 + 0.2 + 0.3 + 0.3 + 0.1)
    b = sum(heads * channels for heads in (1, 2, 3) for channels in (4, 6)) / 6
    _, heads, units = Stacks(bimasks, PENALTIES).statistics()
    assert heads.tolist() == pytest.approx([(0.3 * 2 + 0.7 * 4), 2, 2])
    assert units.tolist() == pytest.approx([a, b, 14])


def test_one_hot_loss_is_that_of_the_open_submodules():
    bimasks = make_bimasks()
    penalized = [0.01 * bimasks[name].score.sigmoid().sum() for name in "ab"]
    losses = [adaptive_one_hot_loss(bimasks[name].alpha, bimasks[name].alive) for name in "ab"]
    torch.testing.assert_close(Stacks(bimasks, PENALTIES).statistics()[0], sum(penalized + losses))


def test_padding_there_and_back():
    flat = torch.arange(1.0, 16.0)  # the last one fills
    padding = Padding([[(2, 3), (1, 5)], [(1, 1), (1, 2)]], flat)
    grids = padding(flat)
    assert grids[0].tolist() == [[[1, 2, 3, 15, 15], [4, 5, 6, 15, 15]], [[7, 8, 9, 10, 11], [15, 15, 15, 15, 15]]]
    assert grids[1].tolist() == [[[12, 15]], [[13, 14]]]
    taken = padding.take(grids)
    assert [len(each) for each in taken] == [6, 5, 1, 2] and torch.equal(torch.cat(taken), flat[:-1])


def test_gradients_of_padding_there_and_back():
    padding = Padding([[(2, 3), (1, 5)], [(1, 1), (1, 2)]], torch.zeros((), dtype=torch.float64))
    entries, filling = torch.randn(14, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64)

    def there(entries):
        return tuple(padding(torch.cat([entries, filling])))

    def there_and_back(entries):
        return padding.take([grid.square() for grid in there(entries)])

    assert torch.autograd.gradcheck(there, entries) and torch.autograd.gradcheck(there_and_back, entries)


def test_attention_has_a_score_penalty_of_its_own():
    bimasks = {name: BiMask(Candidates((2, 4), (2, 4))) for name in ("attn0", "mlp0")}

    def one_hot_loss(penalties):
        return Stacks(bimasks, penalties).statistics()[0]

    plain = one_hot_loss({"attention": 0.0, "others": 0.0})
    importance = {name: bimask.score.sigmoid().sum() for name, bimask in bimasks.items()}
    for penalties in ({"attention": 2.0, "others": 0.0}, {"attention": 0.0, "others": 3.0}):
        expected = penalties["attention"] * importance["attn0"] + penalties["others"] * importance["mlp0"]
        torch.testing.assert_close(one_hot_loss(penalties) - plain, expected)


def test_masks_of_some_submodules():
    bimasks = {name: BiMask(Candidates((2, 4), (2, 4))) for name in ("mlp0", "attn0", "mlp1")}
    stacks = Stacks(bimasks, PENALTIES)
    assert stacks.names == ["attn0", "mlp0", "mlp1"]
    assert set(stacks.masks(LAM)) == set(bimasks)
    (found,) = stacks.masks(LAM, names={"mlp0"}).items()
    assert found[0] == "mlp0"
    torch.testing.assert_close(found[1], bimasks["mlp0"].mask(LAM))


def test_what_is_joined_once_gives_the_same_gradients():
    bimasks = make_bimasks() | {"attn0": BiMask(Candidates((2, 4), (2, 4)))}
    stacks = Stacks(bimasks, {"attention": 0.3, "others": 0.01})
    learned = [parameter for each in bimasks.values() for parameter in (each.score, each.alpha)]

    def gradients(joined):
        one_hot, heads, units = stacks.statistics(joined)
        squares = sum(mask.square().sum() for mask in stacks.masks(LAM, joined).values())
        return torch.autograd.grad(squares + one_hot + (heads * units).sum(), learned)

    for got, expected in zip(gradients(stacks.join()), gradients(None), strict=True):
        torch.testing.assert_close(got, expected)
