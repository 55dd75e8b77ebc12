"""Cost model: multiply-accumulates of one image, exact for sizes, differentiable for expected sizes.

Counted are the products of convolutions, linear layers and attention. Biases, norms, activations and softmax are not,
as in the paper and in torch.utils.flop_counter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Macs:
    """MACs of a network whose submodules have u units each: Σ linear[i] · uᵢ + Σ products[i, j] · uᵢ · uⱼ.

    A submodule inside a block is multiplied with one residual width only, the one it reads and writes; a residual width
    may be multiplied with the one before it.

    Attributes:
        widths: the submodules that are residual widths, from the images to the classifier.
        linear: MACs for each unit of a submodule.
        products: MACs for each pair of units, (submodule, its width) or (width, the width before).
    """

    widths: tuple[str, ...]
    linear: Mapping[str, int]
    products: Mapping[tuple[str, str], int]

    def total(self, sizes: Mapping[str, int]) -> int:
        """MACs for sizes in units."""
        products = sum(macs * sizes[one] * sizes[other] for (one, other), macs in self.products.items())
        return products + sum(macs * sizes[name] for name, macs in self.linear.items())

    def stages(self) -> dict[str, list[str]]:
        """The submodules of each residual width."""
        return {
            width: [one for one, other in self.products if other == width and one not in self.widths]
            for width in self.widths
        }

    def part(self, name: str, units: int, width: int) -> int:
        """MACs that a submodule adds, given the size of the width it is multiplied with; 0 before the first width."""
        per_pair = sum(macs for (one, _), macs in self.products.items() if one == name)
        return units * (self.linear.get(name, 0) + per_pair * width)

    def form(self, names: Sequence[str], **like) -> tuple[Tensor, Tensor]:
        """`linear` as (S,) and `products` as (S, S) for `expected`, in the order of the names."""
        linear = torch.tensor([self.linear.get(name, 0) for name in names], **like)
        return linear, torch.tensor([[self.products.get((one, other), 0) for other in names] for one in names], **like)


def expected_macs(units: Tensor, linear: Tensor, products: Tensor) -> Tensor:
    """Expected MACs (0-d) for expected sizes (S,), differentiable; exact, as sizes are independent of each other."""
    # No matrix products: autocast would take them to 16 bits, which such figures overflow.
    return (units * (linear + (products * units).sum(1))).sum()


def readable(amount: float) -> str:
    """Three digits and a letter: 4.6 G, 86.6 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if amount >= size:
            return f"{amount / size:.3g} {letter}"
    return f"{amount:g}"
