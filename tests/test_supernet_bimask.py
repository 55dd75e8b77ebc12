"""BiMask: candidates die, units go, one candidate left makes a scale."""

import pytest
import torch

from ofb.supernet.bimask import BiMask
from ofb.supernet.pruning import Coupling, keep_units
from ofb.supernet.search_space import Candidates

LAM = torch.tensor(0.3)


def cut(bimask: BiMask, alive: torch.Tensor, optimizer=None) -> torch.Tensor:
    """What the supernet does: remove the units beyond, then let the candidates die."""
    index, _ = bimask.units_kept_by(alive)
    keep_units(bimask, [Coupling("score", 0), Coupling("scale", 0)], index, bimask.candidates.full, optimizer)
    bimask.keep_candidates(alive, LAM, optimizer)
    return index


def test_scores_start_around_their_mean():
    bimask = BiMask(Candidates((1,), (512, 1024)), score_mean=3.0)
    assert bimask.score.mean().item() == pytest.approx(3.0, abs=0.05)
    assert bimask.score.std().item() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("grid", [((1,), (16, 32, 48, 64)), ((2, 4), (8, 16))])
def test_how_likely_candidates_start(grid):
    candidates = Candidates(*grid)
    full, equal, random = (BiMask(candidates, architecture_init=how) for how in ("full", "equal", "random"))
    sizes = sorted((p, heads * channels) for (heads, channels), p in full.sizes(full.alive).items())
    assert [size for _, size in sizes] == sorted(size for _, size in sizes)  # the larger the likelier
    assert full.mask(0.0).mean() > 0.9 > equal.mask(0.0).mean()
    assert set(equal.sizes(equal.alive).values()) == {1 / equal.alpha.numel()}
    assert 0 <= random.alpha.min() and random.alpha.max() <= 1 and random.alpha.std() > 0


def test_survivors_follow_the_threshold_and_spare_the_likeliest():
    bimask = BiMask(Candidates((1,), (2, 4, 6, 8)))
    with torch.no_grad():
        bimask.alpha.copy_(torch.tensor([[0.04, 0.06, 0.3, 0.6]]).log())
    assert bimask.survivors(0.2).tolist() == [[False, True, True, True]]  # 0.2 / 4 = 0.05
    assert bimask.survivors(100.0).tolist() == [[False, False, False, True]]


def test_survivors_are_more_than_the_threshold_among_the_living():
    bimask = BiMask(Candidates((1,), (2, 4, 6, 8)), architecture_init="equal")
    assert bimask.survivors(1.0).tolist() == [[True, False, False, False]]  # p = 1 / 4 is not more than 1 / 4
    bimask.alive[0, :2] = False
    with torch.no_grad():
        bimask.alpha.copy_(torch.tensor([[0.9, 0.9, 0.08, 0.92]]).log())
    assert bimask.survivors(0.2).tolist() == [[False, False, False, True]]  # 0.2 / 2 = 0.1


def test_likeliest_candidates_of_the_living_and_the_chosen_one():
    bimask = BiMask(Candidates((1,), (2, 4, 6, 8)))
    with torch.no_grad():
        bimask.alpha.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log())
    alive = torch.tensor([[True, True, True, False]])
    assert bimask.likeliest(alive, 1, (1, 2)).tolist() == [[True, False, False, False]]
    assert bimask.likeliest(alive, 2, (1, 2)).tolist() == [[True, False, True, False]]
    assert torch.equal(bimask.likeliest(alive, 4, (1, 2)), alive)


def test_probabilities_of_sizes_are_over_those_alone():
    bimask = BiMask(Candidates((1,), (2, 4, 6)))
    with torch.no_grad():
        bimask.alpha.copy_(torch.tensor([[0.1, 0.3, 0.6]]).log())
    assert bimask.sizes(torch.tensor([[True, True, False]])) == pytest.approx({(1, 2): 0.25, (1, 4): 0.75})


def test_scores_are_handed_out_by_importance():
    bimask = BiMask(Candidates((1,), (2, 4)))
    scores = bimask.score.detach().sort(descending=True).values
    bimask.rank_scores_by(torch.tensor([1.0, 4.0, 2.0, 3.0]))
    assert torch.equal(bimask.score, scores[[3, 0, 2, 1]])


def test_one_living_candidate_is_not_final_before_the_units_beyond_are_gone():
    bimask = BiMask(Candidates((1,), (2, 4), excluded=frozenset({(1, 4)})))
    bimask.refresh()
    assert bimask.oversized and not bimask.final
    cut(bimask, bimask.alive)
    assert not bimask.oversized and bimask.final


def test_units_beyond_the_largest_living_candidate_go():
    bimask = BiMask(Candidates((2, 4), (2, 3, 4)))
    alive = torch.tensor([[True, True, False], [False, False, False]])
    scores = bimask.score.detach().clone().view(4, 4)
    index = cut(bimask, alive)
    heads = scores.sigmoid().sum(1).argsort(descending=True)[:2].sort().values
    kept = [(h * 4 + c).item() for h in heads for c in scores[h].argsort(descending=True)[:3].sort().values]
    assert index.tolist() == kept
    assert bimask.candidates == Candidates((2,), (2, 3))
    assert torch.equal(bimask.score, scores.flatten()[index])
    assert bimask.alpha.shape == bimask.alive.shape == (1, 2)
    assert not bimask.final
    assert bimask.sparsity().max() == 1


def test_a_smaller_candidate_dies_without_removal():
    bimask = BiMask(Candidates((1,), (2, 4, 6)))
    optimizer = torch.optim.Adam(bimask.parameters())
    bimask.mask(LAM).sum().backward()
    optimizer.step()
    score, state = bimask.score, optimizer.state[bimask.alpha]
    cut(bimask, torch.tensor([[True, False, True]]), optimizer)
    assert bimask.score is score and score.shape == (6,)
    assert optimizer.state[bimask.alpha] is state
    assert bimask.sizes(bimask.alive).keys() == {(1, 2), (1, 6)}


def test_moments_of_alpha_are_reset_when_the_largest_dies():
    bimask = BiMask(Candidates((1,), (2, 4, 6)))
    optimizer = torch.optim.Adam(bimask.parameters())
    bimask.mask(LAM).sum().backward()
    optimizer.step()
    cut(bimask, torch.tensor([[True, True, False]]), optimizer)
    assert bimask.alpha not in optimizer.state
    assert optimizer.state[bimask.score]["exp_avg"].shape == (4,)


def test_final_mask_is_a_scale_with_the_value_it_had():
    bimask = BiMask(Candidates((1,), (2, 4, 6)))
    cut(bimask, torch.tensor([[False, True, False]]))
    assert bimask.final
    torch.testing.assert_close(bimask.mask(LAM).flatten(), LAM * bimask.score.sigmoid() + (1 - LAM))
    assert bimask.mask(LAM).requires_grad
    assert (bimask.sparsity() == 1).all()
    bimask.mask(LAM).sum().backward()
    assert bimask.scale.grad is not None and bimask.score.grad is None


def test_gradients_reach_score_through_importance_and_alpha_through_sparsity():
    bimask = BiMask(Candidates((2, 4), (2, 4)))
    bimask.mask(torch.tensor(1.0)).square().sum().backward()
    assert bimask.score.grad.abs().min() > 0
    assert bimask.alpha.grad.abs().max() == 0
    bimask.zero_grad()
    bimask.mask(torch.tensor(0.0)).square().sum().backward()
    assert bimask.score.grad.abs().max() == 0
    assert bimask.alpha.grad.abs().max() > 0
