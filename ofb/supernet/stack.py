"""Stacks: what the bi-masks of all submodules compute in a step, together in a constant number of operator calls."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ofb.supernet.bimask import BiMask
from ofb_kernels import bimask, candidate_statistics
from ofb_kernels.autocast import without_autocast


class Joined(NamedTuple):
    """The parameters of several submodules, flat and one after the other, and behind them what fills up a stack.

    Attributes:
        score: scores of all units, then −inf: no unit.
        alpha: logits of all candidates, then 0, of a candidate that is dead.
    """

    score: Tensor
    alpha: Tensor


class Stack(nn.Module):
    """Submodules whose masks are computed at once, filled up to the largest one's size.

    Args:
        bimasks: the submodules, by name.
        alive: (S, A, B) bool, their candidates filled up with dead ones.
    """

    def __init__(self, bimasks: Mapping[str, BiMask], alive: Tensor) -> None:
        super().__init__()
        self.names = tuple(bimasks)
        self.bimasks = tuple(bimasks.values())  # in a tuple: they are the supernet's children
        head_counts = nn.utils.rnn.pad_sequence([each.head_counts for each in self.bimasks], batch_first=True)
        channel_counts = nn.utils.rnn.pad_sequence([each.channel_counts for each in self.bimasks], batch_first=True)
        self.register_buffer("alive", alive, persistent=False)
        self.register_buffer("head_counts", head_counts, persistent=False)  # (S, A)
        self.register_buffer("channel_counts", channel_counts, persistent=False)  # (S, B)

    def forward(self, score: Tensor, alpha: Tensor, lam: Tensor) -> Tensor:
        """m (S, H, d) from scores (S, H, d) and logits (S, A, B)."""
        return bimask(score, alpha, (self.head_counts, self.channel_counts), lam, self.alive)


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
        kinds = {kind: members for kind, members in kinds.items() if members}
        self.bimasks = tuple(each for members in kinds.values() for each in members.values())
        stacked = [list(members.values()) for members in kinds.values()]
        like = self.bimasks[0].score
        self.units = Padding([[each.candidates.full for each in members] for members in stacked], like)
        self.candidates = Padding([[tuple(each.alpha.shape) for each in members] for members in stacked], like)
        self.rows = Padding([[(1, each.alpha.numel()) for each in self.bimasks]], like)
        self.register_buffer("no_unit", like.new_full((1,), -torch.inf), persistent=False)
        self.register_buffer("no_candidate", like.new_zeros(1), persistent=False)
        alive = _flat((each.alive for each in self.bimasks), torch.zeros_like(self.no_candidate, dtype=torch.bool))
        self.stacks = nn.ModuleList(map(Stack, kinds.values(), self.candidates(alive)))
        heads = (each.head_counts[:, None].expand_as(each.alpha) for each in self.bimasks)
        units = (each.head_counts[:, None] * each.channel_counts for each in self.bimasks)
        penalties = (
            torch.full_like(each.score, score_penalties[kind]) * (each.alive.sum() > 1)
            for kind, members in kinds.items()
            for each in members.values()
        )
        none = torch.zeros_like(self.no_candidate, dtype=torch.int64)
        self.register_buffer("alive", self._rows(alive), persistent=False)  # (S, K)
        self.register_buffer("heads", self._rows(_flat(heads, none)), persistent=False)  # (S, K)
        self.register_buffer("sizes", self._rows(_flat(units, none)), persistent=False)  # (S, K)
        # of the S of each unit, in the order of the joined scores
        self.register_buffer("penalties", _flat(penalties, self.no_candidate), persistent=False)

    @property
    def names(self) -> list[str]:
        """The submodules in the order of the expected sizes."""
        return [name for stack in self.stacks for name in stack.names]

    def join(self) -> Joined:
        """All parameters as they are now, for several of the methods below: the gradients from all of them then meet
        in a few tensors, and not in each of the many parameters."""
        score = _flat((each.score for each in self.bimasks), self.no_unit)
        return Joined(score, _flat((each.alpha for each in self.bimasks), self.no_candidate))

    def masks(
        self, lam: Tensor, joined: Joined | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """m (H, d) of every submodule, or of those named; a final one's is its learned scale."""
        joined, names = joined or self.join(), names or self.names
        parameters = zip(self.stacks, self.units(joined.score), self.candidates(joined.alpha), strict=True)
        masks = [
            stack(score, alpha, lam) if any(name in names for name in stack.names) else score  # no part is looked at
            for stack, score, alpha in parameters
        ]
        parts = zip(self.names, self.bimasks, self.units.take(masks), strict=True)
        return {
            name: each.mask(lam) if each.final else part.view(each.candidates.full)
            for name, each, part in parts
            if name in names
        }

    def statistics(self, joined: Joined | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the losses ask of the submodules.

        Returns:
            One-hot loss: Σ over the open submodules of the adaptive one-hot loss plus score penalty · Σ S, 0-d.
            Expected sizes: Σ p · size in heads (S,) and in units (S,) of every submodule.
        """
        joined = joined or self.join()
        one_hot, heads, units = candidate_statistics(self._rows(joined.alpha), self.alive, self.heads, self.sizes)
        importance = joined.score.sigmoid()
        with without_autocast(importance):
            one_hot = torch.addmv(one_hot.sum(0, keepdim=True), self.penalties[None], importance).squeeze(0)
        return one_hot, heads, units

    def _rows(self, candidates: Tensor) -> Tensor:
        """(S, K) of what the candidates of all submodules have, flat as `Joined` has it."""
        (rows,) = self.rows(candidates)
        return rows.squeeze(1)


class Padding(nn.Module):
    """Lays matrices, flat and one after the other, into grids (S, rows, columns), and takes them out.

    Args:
        shapes: (rows, columns) of each matrix, grid by grid.
        like: of the matrices' dtype and device.
    """

    def __init__(self, shapes: Sequence[Sequence[tuple[int, int]]], like: Tensor) -> None:
        super().__init__()
        inside = list(map(_inside, shapes))
        self.grids = [tuple(grid.shape) for grid in inside]
        self.lengths = [rows * columns for grid in shapes for rows, columns in grid]
        inside = torch.cat([grid.flatten() for grid in inside])
        index = torch.full(inside.shape, sum(self.lengths))
        index[inside] = torch.arange(sum(self.lengths))
        places = inside.nonzero().flatten().to(like.device)
        self.register_buffer("index", index.to(like.device), persistent=False)  # of each place, in the flat entries
        self.register_buffer("places", places, persistent=False)  # of each entry but the filling
        # of the filling too, which has no gradient that anyone asks for
        self.register_buffer("places_and_filling", torch.cat([places, places[:1]]), persistent=False)
        self.register_buffer("zero", like.detach().new_zeros(1), persistent=False)

    def forward(self, flat: Tensor) -> list[Tensor]:
        """The grids. The last of the flat entries, behind all matrices, fills the places that no matrix has."""
        padded = _Laid.apply(flat, self.index, self.places_and_filling)
        parts = padded.split(list(map(math.prod, self.grids))) if len(self.grids) > 1 else [padded]
        return [part.view(grid) for part, grid in zip(parts, self.grids, strict=True)]

    def take(self, grids: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The entries of each matrix, flat."""
        padded = torch.cat([grid.flatten() for grid in grids])
        return _Taken.apply(padded, self.index, self.places, self.zero, self.lengths)


class _Laid(torch.autograd.Function):
    """Padding's way there: each entry stands in one place, so that its gradient is found there and not summed."""

    @staticmethod
    def forward(ctx, flat: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return flat.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Taken(torch.autograd.Function):
    """Padding's way back."""

    @staticmethod
    def forward(
        ctx, padded: Tensor, index: Tensor, places: Tensor, zero: Tensor, lengths: list[int]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index, zero)
        ctx.set_materialize_grads(False)
        ctx.lengths = lengths
        return padded.index_select(0, places).split(lengths)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        index, zero = ctx.saved_tensors
        grads = (zero.expand(n) if grad is None else grad for n, grad in zip(ctx.lengths, grads, strict=True))
        return _flat(grads, zero).index_select(0, index), None, None, None, None


def _inside(shapes: Sequence[tuple[int, int]]) -> Tensor:
    """(S, rows, columns) bool, large enough for matrices of these shapes: whether they have an entry there."""
    inside = torch.zeros(len(shapes), max(rows for rows, _ in shapes), max(columns for _, columns in shapes))
    for matrix, (rows, columns) in zip(inside, shapes, strict=True):
        matrix[:rows, :columns] = 1
    return inside.bool()


def _flat(matrices: Iterable[Tensor], filling: Tensor) -> Tensor:
    """The entries of all matrices, one after the other, and the filling (1,) behind them."""
    return torch.cat([each.flatten() for each in chain(matrices, [filling])])
