"""Stacks: what the bi-masks of all submodules compute in a step, together in a constant number of operator calls."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ofb.supernet.bimask import BiMask
from ofb_kernels import bimask, candidate_statistics


class Joined(NamedTuple):
    """The parameters of several submodules, flat and one after the other.

    Attributes:
        score: scores of all units.
        alpha: logits of all candidates.
    """

    score: Tensor
    alpha: Tensor


class Stack(nn.Module):
    """The masks of S submodules, filled up to the largest one's size.

    A unit that is none has a score of −inf, a candidate that is none is dead.

    Args:
        bimasks: the submodules, by name.
    """

    def __init__(self, bimasks: Mapping[str, BiMask]) -> None:
        super().__init__()
        self.names = tuple(bimasks)
        self.bimasks = tuple(bimasks.values())  # in a tuple: they are the supernet's children
        self.units = Padding([each.candidates.full for each in self.bimasks])
        self.candidates = Padding([tuple(each.alpha.shape) for each in self.bimasks])
        self.to(self.bimasks[0].score.device)
        alive = _flat(each.alive for each in self.bimasks)
        self.register_buffer("alive", self.candidates(alive, False), persistent=False)
        head_counts = nn.utils.rnn.pad_sequence([each.head_counts for each in self.bimasks], batch_first=True)
        channel_counts = nn.utils.rnn.pad_sequence([each.channel_counts for each in self.bimasks], batch_first=True)
        self.register_buffer("head_counts", head_counts, persistent=False)  # (S, A)
        self.register_buffer("channel_counts", channel_counts, persistent=False)  # (S, B)

    def masks(self, lam: Tensor, joined: Joined) -> dict[str, Tensor]:
        """m (H, d) of every submodule, from the parameters of all; a final one's is its learned scale."""
        score, alpha = self.units(joined.score, -torch.inf), self.candidates(joined.alpha, 0.0)
        mask = bimask(score, alpha, (self.head_counts, self.channel_counts), lam, self.alive)
        parts = self.units.take(mask).split([each.candidates.units for each in self.bimasks])
        return {
            name: each.mask(lam) if each.final else part.view(each.candidates.full)
            for name, each, part in zip(self.names, self.bimasks, parts, strict=True)
        }


class Stacks(nn.Module):
    """What the submodules of a supernet compute in every step.

    Masks come from two stacks: attention has heads, the rest has none, and would be mostly filling. For expected sizes
    and the one-hot loss every submodule is a row of candidates. Parameters stay with their bi-masks; the stacks know
    where they go, and have to be built anew when a size or a candidate is gone.

    Args:
        bimasks: the submodules, by name.
        score_penalties: weights of Σ S in the one-hot loss, of "attention" and "others".
    """

    def __init__(self, bimasks: Mapping[str, BiMask], score_penalties: Mapping[str, float]) -> None:
        super().__init__()
        kinds = {"attention": {}, "others": {}}
        for name, each in bimasks.items():
            kinds["attention" if name.startswith("attn") else "others"][name] = each
        self.stacks = nn.ModuleList(Stack(members) for members in kinds.values() if members)
        self.bimasks = tuple(each for members in kinds.values() for each in members.values())
        self.candidates = Padding([(1, each.alpha.numel()) for each in self.bimasks])
        self.to(self.bimasks[0].score.device)
        heads = (each.head_counts[:, None].expand_as(each.alpha) for each in self.bimasks)
        units = (each.head_counts[:, None] * each.channel_counts for each in self.bimasks)
        penalties = (
            torch.full_like(each.score, score_penalties[kind]) * (each.alive.sum() > 1)
            for kind, members in kinds.items()
            for each in members.values()
        )
        self.register_buffer("alive", self._rows(each.alive for each in self.bimasks), persistent=False)  # (S, K)
        self.register_buffer("heads", self._rows(heads), persistent=False)  # (S, K)
        self.register_buffer("units", self._rows(units), persistent=False)  # (S, K)
        self.register_buffer("penalties", _flat(penalties), persistent=False)  # of the S of each unit

    @property
    def names(self) -> list[str]:
        """The submodules in the order of the expected sizes."""
        return [name for stack in self.stacks for name in stack.names]

    def join(self) -> Joined:
        """All parameters as they are now, for several of the methods below: the gradients from all of them then meet
        in a few tensors, and not in each of the many parameters."""
        return Joined(_flat(each.score for each in self.bimasks), _flat(each.alpha for each in self.bimasks))

    def masks(
        self, lam: Tensor, joined: Joined | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """m (H, d) of every submodule, or at least of those named."""
        joined, masks = joined or self.join(), {}
        scores = joined.score.split([len(stack.units.places) for stack in self.stacks])
        alphas = joined.alpha.split([len(stack.candidates.places) for stack in self.stacks])
        for stack, score, alpha in zip(self.stacks, scores, alphas, strict=True):
            if names is None or any(name in names for name in stack.names):
                masks |= stack.masks(lam, Joined(score, alpha))
        return masks

    def statistics(self, joined: Joined | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the losses ask of the submodules.

        Returns:
            One-hot loss: Σ over the open submodules of the adaptive one-hot loss plus score penalty · Σ S, 0-d.
            Expected sizes: Σ p · size in heads (S,) and in units (S,) of every submodule.
        """
        joined = joined or self.join()
        alpha = self.candidates(joined.alpha, 0.0).squeeze(1)
        one_hot, heads, units = candidate_statistics(alpha, self.alive, self.heads, self.units)
        return one_hot.sum() + (self.penalties * joined.score.sigmoid()).sum(), heads, units

    def _rows(self, matrices: Iterable[Tensor]) -> Tensor:
        """(S, K) of a matrix (A, B) of each submodule, filled up with 0."""
        return self.candidates(_flat(matrices), 0).squeeze(1)


class Padding(nn.Module):
    """Lays matrices of several shapes, flat and one after the other, into one (S, rows, columns), and takes them out.

    Args:
        shapes: (rows, columns) of each matrix.
    """

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.shape = (len(shapes), max(rows for rows, _ in shapes), max(columns for _, columns in shapes))
        self.full = len(set(shapes)) == 1  # nothing to fill up, and nothing to copy
        inside = torch.zeros(self.shape, dtype=torch.bool)
        for matrix, (rows, columns) in zip(inside, shapes, strict=True):
            matrix[:rows, :columns] = True
        self.register_buffer("places", inside.flatten().nonzero().flatten(), persistent=False)

    def forward(self, flat: Tensor, fill: float | bool) -> Tensor:
        """(S, rows, columns), with `fill` where a matrix has no entry."""
        if self.full:
            return flat.view(self.shape)
        padded = flat.new_full((math.prod(self.shape),), fill)
        return padded.index_copy_(0, self.places, flat).view(self.shape)

    def take(self, padded: Tensor) -> Tensor:
        """The entries of all matrices, flat and one after the other."""
        return padded.flatten() if self.full else padded.flatten().index_select(0, self.places)


def _flat(matrices: Iterable[Tensor]) -> Tensor:
    """The entries of all matrices, one after the other."""
    return torch.cat([matrix.flatten() for matrix in matrices])
