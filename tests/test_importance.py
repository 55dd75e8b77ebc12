"""Importance beside leave-one-out: what it returns, that nothing changes, and rank correlation against known values."""

import pytest
import torch
import torch.nn.functional as F

import ofb
from ofb.supernet.importance import leave_one_out, rank_correlation
from tests.common import tiny_vit


@pytest.fixture
def finished() -> ofb.Supernet:
    supernet = ofb.Supernet(tiny_vit(), "60%", epochs=1, steps_per_epoch=1)
    supernet.finalize()
    return supernet


def test_leaving_out_is_a_zero_scale(finished):
    """In the supernet a unit is out when its learned scale is zero; the folded network must agree."""
    images, targets = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    units = max(bimask.candidates.units for bimask in finished.bimasks.values())
    torch.manual_seed(0)
    found = leave_one_out(finished, images, targets, units)
    torch.manual_seed(0)
    finished.eval()
    with torch.no_grad():
        whole = F.cross_entropy(finished(images), targets)
        for name, bimask in finished.bimasks.items():
            drawn = torch.randperm(bimask.candidates.units)
            importance, changes = found[name]
            torch.testing.assert_close(torch.tensor(importance), bimask.score.sigmoid()[drawn])
            if name == "embed":
                continue  # LayerNorm's statistics count a scaled channel, a pruned one not
            unit = int(drawn[0])
            kept = bimask.scale[unit].clone()
            bimask.scale[unit] = 0
            change = float(F.cross_entropy(finished(images), targets) - whole)
            bimask.scale[unit] = kept
            assert changes[0] == pytest.approx(change, abs=1e-5)


def test_nothing_changes(finished):
    before = {
        name: tensor.clone() for name, tensor in finished.state_dict().items() if isinstance(tensor, torch.Tensor)
    }
    leave_one_out(finished, torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), units=4)
    after = finished.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 21]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [5, 4, -1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)  # 1 − 6·4 / (4·15)
    assert rank_correlation([1, 1, 2], [1, 1, 2]) == pytest.approx(1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
