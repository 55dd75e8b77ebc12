"""Cost model: what one image costs, exact for sizes, differentiable for expected sizes.

Multiply-accumulates are counted for the products of convolutions, linear layers and attention. Biases, norms,
activations and softmax are not, as in the paper and in torch.utils.flop_counter. Parameters (`ofb.supernet.params`) are
of the same form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ofb.supernet.search_space import Size
from ofb_kernels.autocast import without_autocast

Sizes = Mapping[str, Size]  # (heads, channels) of each submodule


@dataclass(frozen=True)
class Cost:
    """Cost of submodules with u = heads · channels units each.

        constant + Σ heads[i] · headsᵢ + Σ linear[i] · uᵢ + Σ products[i, j] · uᵢ · uⱼ

    A submodule inside a block is multiplied with one residual width only, the one it reads and writes; a residual width
    may be multiplied with the one before it.

    Attributes:
        widths: the submodules that are residual widths, from the images to the classifier.
        linear: cost of each unit of a submodule.
        products: cost of each pair of units, (submodule, its width) or (width, the width before).
        heads: cost of each head of a submodule, besides its units.
        constant: what the sizes do not change.
    """

    widths: tuple[str, ...]
    linear: Mapping[str, int]
    products: Mapping[tuple[str, str], int]
    heads: Mapping[str, int] = field(default_factory=dict)
    constant: int = 0

    def total(self, sizes: Sizes) -> int:
        """Cost of a network of these sizes."""
        return total(self, sizes)

    def stages(self) -> dict[str, list[str]]:
        """The submodules of each residual width."""
        return {
            width: [one for one, other in self.products if other == width and one not in self.widths]
            for width in self.widths
        }

    def part(self, name: str, size: Size, width: int) -> int:
        """What a submodule adds, given the size of the width it is multiplied with; 0 before the first width."""
        heads, channels = size
        per_pair = sum(cost for (one, _), cost in self.products.items() if one == name)
        return heads * self.heads.get(name, 0) + heads * channels * (self.linear.get(name, 0) + per_pair * width)

    def expectation(self, names: Sequence[str], **like) -> nn.Module:
        """Expected cost as a module, for submodules in the order of the names."""
        return ExpectedCost(self, names, **like)


def total(cost: Cost, sizes: Sizes) -> float:
    """Cost of a network of these sizes, the sum of its parts."""
    amount, before = cost.constant, 0
    for width, members in cost.stages().items():
        units = sizes[width][0] * sizes[width][1]
        amount += cost.part(width, sizes[width], before)
        amount += sum(cost.part(name, sizes[name], units) for name in members)
        before = units
    return amount


class ExpectedCost(nn.Module):
    """Expected cost (0-d) of expected heads (S,) and units (S,), differentiable; exact, as submodules are independent.

    Args:
        cost: the cost model.
        names: the submodules in their order.
        like: device and dtype.
    """

    def __init__(self, cost: Cost, names: Sequence[str], **like) -> None:
        super().__init__()
        forms = {
            "heads": [cost.heads.get(name, 0) for name in names],
            "linear": [cost.linear.get(name, 0) for name in names],
            "products": [[cost.products.get((one, other), 0) for other in names] for one in names],
        }
        for name, values in forms.items():
            self.register_buffer(name, torch.tensor(values, **like), persistent=False)
        self.constant, self.counts_heads = float(cost.constant), any(forms["heads"])

    def forward(self, heads: Tensor, units: Tensor) -> Tensor:
        with without_autocast(units):  # it would take products to 16 bits, which such figures overflow
            costs = units * torch.addmv(self.linear, self.products, units)
            return (costs + heads * self.heads if self.counts_heads else costs).sum() + self.constant


def readable(amount: float) -> str:
    """Three digits and a letter: 4.6 G, 86.6 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if amount >= size:
            return f"{amount / size:.3g} {letter}"
    return f"{amount:g}"
