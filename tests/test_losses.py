"""The losses of a search step."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ofb.supernet import adaptive_one_hot_loss
from ofb.supernet.losses import Criterion, budget_loss, cross_entropy


def by_definition(alpha: torch.Tensor) -> torch.Tensor:
    p = alpha.double().flatten().softmax(0)
    n = p.numel()
    sigma = (p - p.mean()).square().sum() / (1 - 1 / n)
    return -(p * p.log()).sum() + torch.tan(math.pi / 2 - math.pi * sigma) / n


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2,)])
def test_one_hot_loss_by_definition(shape):
    alpha = torch.randn(shape)
    torch.testing.assert_close(adaptive_one_hot_loss(alpha).double(), by_definition(alpha), rtol=1e-4, atol=1e-5)


def test_dead_candidates_do_not_count():
    alpha = torch.randn(7)
    alive = torch.tensor([True, False, True, True, False, True, True])
    torch.testing.assert_close(adaptive_one_hot_loss(alpha, alive), adaptive_one_hot_loss(alpha[alive]))


def test_one_candidate_costs_nothing():
    alpha = torch.randn(5, requires_grad=True)
    loss = adaptive_one_hot_loss(alpha, torch.tensor([False, True, False, False, False]))
    loss.backward()
    assert loss == 0
    assert (alpha.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "alpha",
    [[0.0] * 7, [1e30, 0, 0], [-1e30, 1e30], [3e38, -3e38, 0], [100.0, 0, 0, 0], [1.0, 1.0 + 1e-7], [5.0], [1e-30, 0]],
)
def test_finite_for_every_finite_alpha(alpha, dtype):
    alpha = torch.tensor(alpha, dtype=torch.float64).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    alpha.requires_grad_()
    loss = adaptive_one_hot_loss(alpha)
    loss.backward()
    assert loss.isfinite()
    assert alpha.grad.isfinite().all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12))
def test_finite_everywhere(values):
    alpha = torch.tensor(values, requires_grad=True)
    loss = adaptive_one_hot_loss(alpha)
    loss.backward()
    assert loss.isfinite() and alpha.grad.isfinite().all()


def test_pushes_towards_one_hot():
    alpha = torch.rand(7, requires_grad=True)
    first = alpha.argmax()
    for _ in range(200):
        (gradient,) = torch.autograd.grad(adaptive_one_hot_loss(alpha), alpha)
        alpha = (alpha - 0.05 * gradient.sign()).detach().requires_grad_()
    assert alpha.softmax(0)[first] > 0.95


@pytest.mark.parametrize(
    ("alpha", "alive", "error", "message"),
    [
        ([1.0], None, TypeError, "expected alpha as a floating-point tensor, got list"),
        (torch.ones(3).long(), None, TypeError, "got torch.int64"),
        (torch.ones(3), torch.ones(2).bool(), ValueError, r"shape \(3,\), got \(2,\)"),
        (torch.ones(3), torch.ones(3), TypeError, "expected alive as a bool tensor, got torch.float32"),
        (torch.ones(0), None, ValueError, "at least one candidate"),
    ],
)
def test_one_hot_loss_bad_input(alpha, alive, error, message):
    with pytest.raises(error, match=message):
        adaptive_one_hot_loss(alpha, alive)


@pytest.mark.parametrize(
    ("excess", "expected"),
    [
        ([0.25], 1 / 16),
        ([-0.25], 1 / 16),  # one budget is to be used up
        ([0.25, 0.5], 1 / 16 + 1 / 4),
        ([0.25, -0.5], 1 / 16),  # the looser of two is not
        ([-0.25, -0.5], 1 / 16),
    ],
)
def test_budget_loss(excess, expected):
    dense, goals = torch.tensor([4e9, 8e6][: len(excess)]), torch.tensor([2e9, 5e6][: len(excess)])
    costs = goals + dense * torch.tensor(excess)
    assert budget_loss(costs, goals, dense) == pytest.approx(expected)


def test_classification_takes_indices_and_probabilities():
    logits, indices = torch.randn(4, 5), torch.tensor([0, 2, 4, 4])
    expected = F.cross_entropy(logits, indices, label_smoothing=0.1)
    torch.testing.assert_close(Criterion(smoothing=0.1)(logits, indices), expected)
    one_hot = F.one_hot(indices, 5).float()
    torch.testing.assert_close(Criterion(smoothing=0.1)(logits, one_hot), F.cross_entropy(logits, indices))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_that_of_torch(smoothing):
    logits, targets = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (7,))
    losses = cross_entropy(logits, targets, smoothing), F.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(*losses, atol=1e-14, rtol=1e-14)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*gradients, atol=1e-15, rtol=1e-14)


def test_soft_distillation_is_the_scaled_divergence():
    logits, teacher, targets = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 2, 4, 4])
    p, q = (teacher / 3).softmax(1), (logits / 3).softmax(1)
    expected = 0.6 * F.cross_entropy(logits, targets) + 0.4 * 9 * (p * (p / q).log()).sum(1).mean()
    criterion = Criterion(smoothing=0.0, distillation="soft", alpha=0.4, tau=3.0)
    torch.testing.assert_close(criterion(logits, targets, teacher), expected)
    no_labels = Criterion(distillation="soft", alpha=1.0)
    torch.testing.assert_close(no_labels(teacher, targets, teacher), torch.zeros(()))


@pytest.mark.parametrize("distillation", [None, "soft", "hard"])
def test_logits_of_half_precision_are_taken_to_float32(distillation):
    logits, teacher, targets = torch.randn(4, 5).half(), torch.randn(4, 5).half(), torch.tensor([0, 2, 4, 4])
    criterion = Criterion(distillation=distillation, tau=3.0)
    loss = criterion(logits, targets, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, criterion(logits.float(), targets, teacher.float()), rtol=1e-6, atol=0)


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_classes():
    logits, teacher, targets = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 2, 4, 4])
    expected = 0.7 * F.cross_entropy(logits, targets) + 0.3 * F.cross_entropy(logits, teacher.argmax(1))
    torch.testing.assert_close(Criterion(0.0, "hard", 0.3)(logits, targets, teacher), expected)


def test_auto_is_soft_where_there_is_a_teacher():
    logits, targets, teacher_logits = torch.randn(6, 4), torch.randint(4, (6,)), torch.randn(6, 4)
    auto, soft, none = (Criterion(distillation=kind) for kind in ("auto", "soft", None))
    assert auto(logits, targets, teacher_logits) == soft(logits, targets, teacher_logits)
    assert auto(logits, targets) == none(logits, targets)


def test_without_distillation_a_teacher_changes_nothing():
    logits, teacher, targets = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 2, 4, 4])
    assert torch.equal(Criterion()(logits, targets, teacher), Criterion()(logits, targets))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distillation": "warm"}, "distillation: expected"),
        ({"alpha": 2.0}, "distillation: expected"),
        ({"tau": 0.0}, "distillation: expected"),
        ({"tau": float("inf")}, "tau: expected a finite number, got inf"),
        ({"smoothing": float("nan")}, "smoothing: expected a finite number, got nan"),
        ({"smoothing": 1.0}, "smoothing: expected at least 0 and less than 1, got 1.0"),
    ],
)
def test_criterion_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        Criterion(**wrong)


def test_distillation_without_a_teacher():
    with pytest.raises(ValueError, match="teacher: expected a teacher for soft distillation"):
        Criterion(distillation="soft")(torch.randn(2, 3), torch.tensor([0, 1]))
