"""BiMask: what a searchable submodule learns about its units and its sizes (OFB, CVPR 2024, section 3.2)."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ofb.supernet.pruning import replace_data, reset_moments
from ofb.supernet.search_space import Candidates
from ofb_kernels import bimask
from ofb_kernels.reference import candidate_probabilities, unit_ranks

SCORE_STD = 0.2
FULL_SLOPE = 10.0  # architecture_init="full": how much larger the logit of the full size is than that of no size at all
ARCHITECTURE_INITS = ("full", "equal", "random")


class BiMask(nn.Module):
    """Scores of a submodule's H × d units and architecture logits of its candidate sizes.

    A submodule without heads has H = 1. Once a single candidate is left the submodule is final: its mask is then a
    plain learnable scale of each unit.

    Args:
        candidates: the sizes to choose from.
        score_mean: where the scores start, give or take `SCORE_STD`; S starts at sigmoid(score_mean).
        architecture_init: how likely the candidates start: "full", the larger the likelier, so that the mask is near 1;
            "equal", all alike; "random", with logits from U(0, 1).

    Attributes:
        score: (H · d,), importance logits s.
        alpha: (A, B), architecture logits of A head counts × B channel counts.
        scale: (H · d,), the mask of a final submodule; it exists from the start so that any optimizer knows it.
        alive: (A, B) bool.
        candidates: the sizes behind alpha, on the host.
        final: whether one candidate is left, on the host.
    """

    def __init__(
        self,
        candidates: Candidates,
        score_mean: float = 0.0,
        architecture_init: str = "full",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.empty(candidates.units, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.score, score_mean, SCORE_STD, score_mean - 2 * SCORE_STD, score_mean + 2 * SCORE_STD)
        self.alpha = nn.Parameter(_initial_logits(candidates, architecture_init).to(device, dtype))
        self.scale = nn.Parameter(torch.ones_like(self.score))
        self.register_buffer("alive", _allowed(candidates).to(device))
        self.register_buffer("head_counts", torch.tensor(candidates.heads, device=device))
        self.register_buffer("channel_counts", torch.tensor(candidates.channels, device=device))
        self.candidates = candidates
        self.final = self.alpha.numel() == 1

    @torch.no_grad()
    def rank_scores_by(self, importance: Tensor) -> None:
        """Hand out the scores there are anew: the largest to the unit of largest importance (H · d,), and so on.

        Units of equal importance keep their order.
        """
        ranked, order = self.score.sort(descending=True)
        self.score[order[importance[order].argsort(descending=True, stable=True)]] = ranked

    def mask(self, lam: Tensor | float) -> Tensor:
        """m (H, d): λ·S + (1 − λ)·V while the size is open, the learned scale once it is final."""
        if self.final:
            return self.scale.view(self.candidates.full)
        score = self.score.view(self.candidates.full)
        return bimask(score, self.alpha, (self.head_counts, self.channel_counts), lam, self.alive)

    def sparsity(self) -> Tensor:
        """V (H, d), all ones once the size is final."""
        return torch.ones_like(self.score).view(self.candidates.full) if self.final else self.mask(0.0)

    def probabilities(self) -> Tensor:
        """p (A, B) of the candidates, 0 for dead ones."""
        return candidate_probabilities(self.alpha, self.alive)

    # What follows reads values back from the device: for pruning events only.

    @property
    def oversized(self) -> bool:
        """Whether it has units that no living candidate keeps: until the first pruning event, where the search space
        excludes the full size."""
        return not (bool(self.alive[-1].any()) and bool(self.alive[:, -1].any()))

    @torch.no_grad()
    def sizes(self, alive: Tensor) -> dict[tuple[int, int], float]:
        """Probability of each size (heads, channels) that lives in `alive` (A, B), over these alone."""
        p = candidate_probabilities(self.alpha.double(), alive.to(self.alpha.device)).tolist()
        return {
            (heads, channels): p[a][b]
            for a, heads in enumerate(self.candidates.heads)
            for b, channels in enumerate(self.candidates.channels)
            if alive[a, b]
        }

    @torch.no_grad()
    def survivors(self, threshold: float) -> Tensor:
        """(A, B) bool: alive candidates with p > threshold / n, n being alive; the likeliest one always survives."""
        p = self.probabilities()
        surviving = self.alive & (p > threshold / self.alive.sum())
        surviving.view(-1)[p.argmax()] = True
        return surviving

    @torch.no_grad()
    def likeliest(self, alive: Tensor, count: int, chosen: tuple[int, int]) -> Tensor:
        """(A, B) bool: of the candidates in `alive` the `count` likeliest, and first of all the `chosen` size."""
        p = candidate_probabilities(self.alpha, alive)
        p[self.holds(*chosen)] = 2
        surviving = torch.zeros_like(alive)
        surviving.view(-1)[p.flatten().argsort(descending=True, stable=True)[:count]] = True
        return surviving & alive

    def holds(self, heads: int, channels: int) -> Tensor:
        """(A, B) bool: the candidate of this size."""
        return (self.head_counts == heads)[:, None] & (self.channel_counts == channels)

    @torch.no_grad()
    def units_kept_by(self, alive: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Units that the largest size in `alive` keeps, as ascending indices into H · d, and that size (H', d')."""
        heads = self.candidates.heads[int(alive.any(1).nonzero().max())]
        channels = self.candidates.channels[int(alive.any(0).nonzero().max())]
        head_rank, channel_rank = unit_ranks(self.score.view(self.candidates.full))
        kept = (head_rank[:, None] < heads) & (channel_rank < channels)
        return kept.flatten().nonzero().flatten(), (heads, channels)

    @torch.no_grad()
    def keep_candidates(self, alive: Tensor, lam: Tensor, optimizer: Optimizer | None) -> None:
        """All candidates outside `alive` die; those larger than every living one vanish.

        The units beyond must already be gone from score and scale. One candidate left makes the submodule final.
        """
        rows, columns = int(alive.any(1).nonzero().max()) + 1, int(alive.any(0).nonzero().max()) + 1
        if (rows, columns) != tuple(self.alpha.shape):
            # contiguous also in a dimension of size 1, as DDP's buffers are
            replace_data(self.alpha, self.alpha.data[:rows, :columns].clone(memory_format=torch.contiguous_format))
            reset_moments(self.alpha, optimizer)
        self.alive = alive[:rows, :columns].to(self.alive.device)
        self.head_counts, self.channel_counts = self.head_counts[:rows], self.channel_counts[:columns]
        self.refresh()
        if self.final:
            self.scale.copy_(torch.lerp(torch.ones_like(self.score), self.score.sigmoid(), lam))

    def refresh(self) -> None:
        """Read back from the buffers what the host knows of them."""
        self.candidates = Candidates(tuple(self.head_counts.tolist()), tuple(self.channel_counts.tolist()))
        self.final = int(self.alive.sum()) == 1 and not self.oversized


def _allowed(candidates: Candidates) -> Tensor:
    """(A, B) bool."""
    sizes = [[(heads, channels) for channels in candidates.channels] for heads in candidates.heads]
    return torch.tensor([[size not in candidates.excluded for size in row] for row in sizes])


def _initial_logits(candidates: Candidates, architecture_init: str) -> Tensor:
    """(A, B)."""
    sizes = torch.tensor(candidates.heads)[:, None] * torch.tensor(candidates.channels)
    if architecture_init == "random":
        return torch.rand(sizes.shape)
    return (FULL_SLOPE if architecture_init == "full" else 0.0) * (sizes / candidates.units - 1)
