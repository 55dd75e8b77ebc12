"""Candidate sizes of each kind of submodule (OFB, CVPR 2024, section 4.1 and its released search space)."""

from dataclasses import dataclass

Size = tuple[int, int]  # heads, channels of each


@dataclass(frozen=True)
class Candidates:
    """The grid of sizes a submodule may end with: each head count with each channel count of a head.

    A submodule without heads has one head. Both tuples ascend, and their last entries are the full size.
    """

    heads: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def full(self) -> Size:
        return self.heads[-1], self.channels[-1]

    @property
    def units(self) -> int:
        return self.heads[-1] * self.channels[-1]


def embed_candidates(embed_dim: int) -> Candidates:
    """Residual widths D/2 … D in steps of min(D/32, 12), counted down from D."""
    step = max(1, min(embed_dim // 32, 12))
    return Candidates((1,), tuple(sorted(range(embed_dim, (embed_dim + 1) // 2 - 1, -step))))


def attention_candidates(heads: int, head_dim: int) -> Candidates:
    """Heads 2 … H in steps of 2, H itself always among them, times channels d/4 … d in steps of d/8."""
    return Candidates(tuple(sorted({*range(2, heads + 1, 2), heads})), _eighths(head_dim))


def mlp_candidates(hidden: int) -> Candidates:
    """Hidden channels h/4 … h in steps of h/8."""
    return Candidates((1,), _eighths(hidden))


def _eighths(size: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(size * eighths / 8)) for eighths in range(2, 9)}))
