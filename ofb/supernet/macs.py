"""Cost model: multiply-accumulates of one image, exact for sizes, differentiable for expected sizes.

Counted are the products of convolutions, linear layers and attention. Biases, norms, activations and softmax are not,
as in the paper and in torch.utils.flop_counter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Macs:
    """MACs of a network with one residual width: width · fixed + Σ units · (width · per_width + constant).

    Attributes:
        fixed: MACs per channel of the residual width in patch embedding and classifier.
        per_unit: for each searchable submodule but the width, (per_width, constant) of one of its units.
    """

    fixed: int
    per_unit: Mapping[str, tuple[int, int]]

    def total(self, sizes: Mapping[str, int]) -> int:
        """MACs for sizes in units, "embed" being the width."""
        width = sizes["embed"]
        return width * self.fixed + sum(
            sizes[name] * (width * per_width + constant) for name, (per_width, constant) in self.per_unit.items()
        )

    def rates(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """(per_width, constant) of each submodule, 0 for the width itself."""
        return [self.per_unit.get(name, (0, 0)) for name in names]

    def expected(self, width: Tensor, units: Tensor, rates: Tensor) -> Tensor:
        """Expected MACs for the expected width (0-d) and units (S,), differentiable; rates (S, 2).

        Exact where sizes are independent: the total is linear in each of them.
        """
        per_width, constant = (units @ rates).unbind()
        return width * (self.fixed + per_width) + constant


def readable(amount: float) -> str:
    """Three digits and a letter: 4.6 G, 86.6 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if amount >= size:
            return f"{amount / size:.3g} {letter}"
    return f"{amount:g}"
