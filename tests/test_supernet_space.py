"""Supernet with sizes of the user's own: on target, folded exactly, frozen parts untouched, saved and loaded."""

import pytest
import torch

from ofb.supernet import SearchSpace
from ofb.supernet.budget import TOLERANCE
from ofb.supernet.families import count_macs
from tests.common import tiny_vit
from tests.test_supernet import RESIDUAL_MASKS, make_batch, make_supernet, train

SPACES = {
    "frozen": SearchSpace(freeze=("embed", "attn1")),
    "all attention frozen": SearchSpace(freeze=("attn*",)),
    "all but one frozen": SearchSpace(freeze=("embed", "attn*", "mlp1"), candidates={"mlp0": range(1, 129)}),
    "not the full size": SearchSpace(bounds={"mlp*": (0.25, 0.75)}, candidates={"attn0": {"heads": [2]}}),
    "one smaller size": SearchSpace(candidates={"mlp0": [40], "attn1": {"heads": [2], "channels": [5]}}),
}


@pytest.mark.parametrize("residual_mask", RESIDUAL_MASKS)
@pytest.mark.parametrize("wishes", SPACES)
def test_wished_sizes_end_on_target_and_fold(wishes, residual_mask):
    space = SPACES[wishes]
    target = "85%" if wishes == "all but one frozen" else "60%"
    supernet = make_supernet(space=space, residual_mask=residual_mask, target=target)
    allowed = {name: bimask.candidates for name, bimask in supernet.bimasks.items()}
    frozen = {name for name, bimask in supernet.bimasks.items() if bimask.final}
    train(supernet, 24)
    assert supernet.finished
    assert {choice["submodule"] for choice in supernet.choices} == set(supernet.bimasks) - frozen
    extracted = supernet.extract().eval()
    assert (1 - TOLERANCE) * supernet.target_macs <= count_macs(extracted) <= supernet.target_macs
    own = space.narrow({name: s.candidates for name, s in supernet.family.submodules(tiny_vit()).items()})
    for name, submodule in supernet.family.submodules(extracted).items():
        assert submodule.candidates.full in own[name].sizes
        assert name not in frozen or submodule.candidates.full == allowed[name].full
    images, _ = make_batch()
    with torch.no_grad():
        expected, got = supernet.eval()(images), extracted(images)
    assert (got - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


def test_a_frozen_submodule_is_as_it_was_and_trains():
    supernet = make_supernet(space=SearchSpace(freeze=("embed", "attn0")))
    masks = supernet._masks()
    for name in ("embed", "attn0"):
        assert supernet.bimasks[name].final and (masks[name] == 1).all()
    assert "embed" not in supernet._norm_masks()
    losses = supernet.loss(*make_batch())
    losses.total.backward()
    assert losses.one_hot.isfinite() and losses.total.isfinite()
    assert supernet.model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert supernet.bimasks["attn0"].scale.grad.abs().max() > 0


def test_units_beyond_an_upper_bound_go_at_the_first_pruning_event():
    supernet = make_supernet(space=SearchSpace(bounds={"mlp0": (0.5, 0.5)}), pace=0.5)
    bimask = supernet.bimasks["mlp0"]
    assert not bimask.final and bimask.oversized and bimask.candidates.full == (1, 128)
    supernet.steps = 12
    supernet.prune()
    assert bimask.final and bimask.candidates.full == (1, 64)
    assert supernet.model.blocks[0].mlp.fc1.weight.shape[0] == 64


@pytest.mark.parametrize("steps", [3, 13, 24])
def test_wished_sizes_are_saved_and_loaded(steps):
    space = SearchSpace(freeze=("embed",), bounds={"mlp*": (0.25, 0.75)})
    supernet, again = make_supernet(space=space), make_supernet(space=space)
    train(supernet, steps)
    again.load_state_dict(supernet.state_dict())
    images, _ = make_batch()
    assert torch.equal(supernet.eval()(images), again.eval()(images))
    assert again.alive_candidates() == supernet.alive_candidates()
