"""Stack: the bi-masks of all submodules of a kind, evaluated together in a constant number of operator calls."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ofb.supernet.bimask import BiMask
from ofb.supernet.losses import one_hot_losses
from ofb_kernels import bimask
from ofb_kernels.reference import candidate_probabilities


class Stack(nn.Module):
    """What S submodules compute in every step, filled up to the largest one's size.

    A unit that is none has a score of −inf, a candidate that is none is dead. Parameters stay with their bi-masks; the
    stack knows where they go, and has to be built anew when a size or a candidate is gone.

    Args:
        bimasks: the submodules, by name.
    """

    def __init__(self, bimasks: Mapping[str, BiMask]) -> None:
        super().__init__()
        self.names = tuple(bimasks)
        self.bimasks = tuple(bimasks.values())  # in a tuple: they are the supernet's children
        sizes = [each.candidates.full for each in self.bimasks]
        grids = [tuple(each.alpha.shape) for each in self.bimasks]
        self.units, self.candidates = Padding(sizes), Padding(grids)
        self.to(self.bimasks[0].score.device)
        self.register_buffer("alive", self.candidates(self._all("alive"), False), persistent=False)
        head_counts = nn.utils.rnn.pad_sequence([each.head_counts for each in self.bimasks], batch_first=True)
        channel_counts = nn.utils.rnn.pad_sequence([each.channel_counts for each in self.bimasks], batch_first=True)
        self.register_buffer("head_counts", head_counts, persistent=False)  # (S, A)
        self.register_buffer("channel_counts", channel_counts, persistent=False)  # (S, B)

    def masks(self, lam: Tensor) -> dict[str, Tensor]:
        """m (H, d) of every submodule; a final one's is its learned scale."""
        score = self.units(self._all("score"), -torch.inf)
        mask = bimask(score, self._alpha(), (self.head_counts, self.channel_counts), lam, self.alive)
        parts = self.units.take(mask).split([each.candidates.units for each in self.bimasks])
        return {
            name: each.mask(lam) if each.final else part.view(each.candidates.full)
            for name, each, part in zip(self.names, self.bimasks, parts, strict=True)
        }

    def expected_sizes(self) -> tuple[Tensor, Tensor]:
        """Σ p · size in heads (S,) and in units (S,) of every submodule, differentiable in alpha."""
        p = candidate_probabilities(self._alpha(), self.alive)
        by_heads = p * self.head_counts[:, :, None]
        return by_heads.sum((1, 2)), (by_heads * self.channel_counts[:, None]).sum((1, 2))

    def one_hot_loss(self, score_penalty: float) -> Tensor:
        """Σ over the open submodules of the adaptive one-hot loss plus score_penalty · Σ S."""
        importance = self.units(self._all("score"), -torch.inf).sigmoid().sum((1, 2))
        candidates_left = self.alive.sum((1, 2))
        one_hot = one_hot_losses(self._alpha().flatten(1), self.alive.flatten(1))
        return (one_hot + score_penalty * importance * (candidates_left > 1)).sum()

    def _all(self, attribute: str) -> Tensor:
        return torch.cat([getattr(each, attribute).flatten() for each in self.bimasks])

    def _alpha(self) -> Tensor:
        return self.candidates(self._all("alpha"), 0.0)


class Stacks(nn.ModuleDict):
    """The bi-masks of a supernet in two stacks: attention has heads, the rest has none, and would be mostly filling.

    Args:
        bimasks: the submodules, by name.
    """

    def __init__(self, bimasks: Mapping[str, BiMask]) -> None:
        kinds = {"attention": {}, "others": {}}
        for name, each in bimasks.items():
            kinds["attention" if name.startswith("attn") else "others"][name] = each
        super().__init__({kind: Stack(members) for kind, members in kinds.items()})

    @property
    def names(self) -> list[str]:
        """The submodules in the order of the expected sizes."""
        return [name for stack in self.values() for name in stack.names]

    def masks(self, lam: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """m (H, d) of every submodule, or at least of those named."""
        wanted = [stack for stack in self.values() if names is None or any(name in names for name in stack.names)]
        return {name: mask for stack in wanted for name, mask in stack.masks(lam).items()}

    def expected_sizes(self) -> tuple[Tensor, Tensor]:
        """Expected heads (S,) and units (S,) of all submodules."""
        heads, units = zip(*(stack.expected_sizes() for stack in self.values()), strict=True)
        return torch.cat(heads), torch.cat(units)

    def one_hot_loss(self, score_penalties: Mapping[str, float]) -> Tensor:
        """Σ over all open submodules; Σ S is weighed by the penalty of the stack, "attention" or "others"."""
        return sum(stack.one_hot_loss(score_penalties[kind]) for kind, stack in self.items())


class Padding(nn.Module):
    """Lays matrices of several shapes, flat and one after the other, into one (S, rows, columns), and takes them out.

    Args:
        shapes: (rows, columns) of each matrix.
    """

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.shape = (len(shapes), max(rows for rows, _ in shapes), max(columns for _, columns in shapes))
        inside = torch.zeros(self.shape, dtype=torch.bool)
        for matrix, (rows, columns) in zip(inside, shapes, strict=True):
            matrix[:rows, :columns] = True
        self.register_buffer("places", inside.flatten().nonzero().flatten(), persistent=False)

    def forward(self, flat: Tensor, fill: float | bool) -> Tensor:
        """(S, rows, columns), with `fill` where a matrix has no entry."""
        padded = flat.new_full(self.shape, fill).flatten()
        return padded.index_copy(0, self.places, flat).view(self.shape)

    def take(self, padded: Tensor) -> Tensor:
        """The entries of all matrices, flat and one after the other."""
        return padded.flatten().index_select(0, self.places)
