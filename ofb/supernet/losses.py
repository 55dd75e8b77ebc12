"""The losses of a search step (OFB, CVPR 2024, sections 3.2 to 3.4)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ofb.checks import between, check_numbers
from ofb_kernels.reference import one_hot_losses

DISTILLATIONS = (None, "auto", "soft", "hard")


@dataclass
class Losses:
    """The losses of one step, 0-d tensors; `total` is what to differentiate, the others are detached parts of it.

    `macs` is the loss of all budgets, whatever costs they limit.
    """

    total: Tensor
    classification: Tensor
    one_hot: Tensor
    macs: Tensor
    reconstruction: Tensor


def adaptive_one_hot_loss(alpha: Tensor, alive: Tensor | None = None) -> Tensor:
    """Adaptive one-hot loss of a submodule's candidate probabilities p = softmax(alpha) over its n alive candidates.

        σ = Σ (p − mean p)² / (1 − 1/n)          1 if and only if p is one-hot, 0 if and only if it is uniform
        L = −Σ p log p + (1/n) · tan(π/2 − π σ)

    Finite with finite gradients for every finite alpha. One candidate alive gives 0.

    Args:
        alpha: architecture logits, any shape, floating point.
        alive: bool, of alpha's shape; None where all candidates are alive.

    Returns:
        0-d tensor of alpha's dtype (float32 for half-precision alpha).

    Raises:
        TypeError: alpha is no floating-point tensor or alive no bool tensor.
        ValueError: the shapes differ, or no candidate is given.
    """
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        got = alpha.dtype if isinstance(alpha, Tensor) else type(alpha).__name__
        raise TypeError(f"adaptive_one_hot_loss: expected alpha as a floating-point tensor, got {got}")
    if alpha.numel() == 0:
        raise ValueError("adaptive_one_hot_loss: expected alpha with at least one candidate, got none")
    if alive is None:
        alive = torch.ones_like(alpha, dtype=torch.bool)
    if alive.dtype != torch.bool:
        raise TypeError(f"adaptive_one_hot_loss: expected alive as a bool tensor, got {alive.dtype}")
    if alive.shape != alpha.shape:
        raise ValueError(
            f"adaptive_one_hot_loss: expected alive of alpha's shape {tuple(alpha.shape)}, got {tuple(alive.shape)}"
        )
    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    return one_hot_losses(alpha.flatten()[None], alive.flatten()[None])[0]


def budget_loss(expected: Tensor, goals: Tensor, dense: Tensor) -> Tensor:
    """How far expected costs F are from their goals, relative to the dense network's, 0-d; all arguments (budgets,).

        r = (F − F_goal) / F_dense        L = Σ max(r, 0)² + min(max r, 0)²

    For one budget that is r², the FLOPs loss of the paper.
    """
    # Each excess costs, for a network must keep within all budgets. Below its goal costs only the budget that comes
    # nearest to it: one-sided losses alone would let a network shrink away from everything it may spend, and two-sided
    # ones would draw it beyond the tighter budget towards the looser one.
    excess = (expected - goals) / dense
    if len(excess) == 1:
        return excess.square().squeeze(0)
    return excess.clamp(min=0).square().sum() + excess.max().clamp(max=0).square()


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of logits (B, classes), 0-d: what `F.cross_entropy` gives, in half as many launches.

    Args:
        logits: (B, classes).
        targets: class indices (B,), each of them a class; or probabilities (B, classes), which are used as they are.
        smoothing: label smoothing ε of class indices, L = (1 − ε) · mean −log p_target + ε · mean −log p.
    """
    if targets.is_floating_point():
        return F.cross_entropy(logits, targets)
    log_p = logits.log_softmax(1)
    loss = F.nll_loss(log_p, targets)
    return torch.sub((1 - smoothing) * loss, log_p.mean(), alpha=smoothing) if smoothing else loss


@dataclass(frozen=True)
class Criterion:
    """What a network is trained towards: cross entropy, and where there is a teacher, agreement with it.

        L_cls = (1 − alpha) · CE + alpha · L_teacher
        soft: L_teacher = tau² · KL(softmax(teacher / tau) ‖ softmax(logits / tau));   hard: CE with the teacher's class

    (DeiT, Touvron et al. 2021, section 4.)

    Attributes:
        smoothing: label smoothing of the cross entropy, for targets given as class indices; from 0 on, below 1.
        distillation: "soft" or "hard", which need a teacher; "auto", soft where there is one; None to ignore it.
        alpha: weight of the teacher.
        tau: temperature of soft distillation.
    """

    smoothing: float = 0.1
    distillation: str | None = None
    alpha: float = 0.5
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.distillation not in DISTILLATIONS:
            names = ", ".join(str(name) for name in DISTILLATIONS)
            raise ValueError(f"distillation: expected one of {names}, got {self.distillation!r}")
        check_numbers(self)
        between(self, 0, 1, "smoothing")
        if not 0 <= self.alpha <= 1 or not self.tau > 0:
            raise ValueError(f"distillation: expected alpha from 0 to 1, tau above 0, got {self.alpha}, {self.tau}")

    def __call__(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """0-d loss; targets are class indices (B,) or, after mixup, probabilities (B, classes) used as they are.

        Raises:
            ValueError: there is distillation and no teacher.
        """
        logits = logits.float()
        loss = cross_entropy(logits, targets, self.smoothing)
        if self.distillation is None or (self.distillation == "auto" and teacher_logits is None):
            return loss
        if teacher_logits is None:
            raise ValueError(f"teacher: expected a teacher for {self.distillation} distillation, got none")
        teacher_logits = teacher_logits.float()
        if self.distillation == "hard":
            return torch.lerp(loss, F.cross_entropy(logits, teacher_logits.argmax(1)), self.alpha)
        log_p, log_q = (logits / self.tau).log_softmax(1), (teacher_logits / self.tau).log_softmax(1)
        divergence = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return torch.lerp(loss, self.tau**2 * divergence, self.alpha)
