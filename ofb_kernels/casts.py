"""Casting the weights of a network in one launch, where every op would cast its own."""

from collections.abc import Sequence
from contextvars import ContextVar, Token

import torch
from torch import Tensor, nn


class Casts:
    """Around a pass of a network under autocast: weights that the pass before cast one by one are now cast at once.

        casts = Casts()
        for images in loader:
            with casts:
                loss = network(images)

    The Triton backend's ops look for it. No weight may change inside the `with` block.
    """

    def __init__(self) -> None:
        self._asked: dict[int, Tensor] = {}  # by id, in the present pass or else in the last one
        self._expected: list[Tensor] = []
        self._copies: dict[int, Tensor] | None = None
        self._outer: Token | None = None

    def __enter__(self) -> None:
        self._expected, self._asked = list(self._asked.values()), {}
        self._outer = _ACTIVE.set(self)

    def __exit__(self, *_) -> None:
        _ACTIVE.reset(self._outer)
        self._expected, self._copies, self._outer = [], None, None

    def copy_of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype` if the pass before asked for it, else itself."""
        self._asked[id(weight)] = weight
        if self._copies is None:
            self._copies = dict(zip(map(id, self._expected), _cast(self._expected, dtype), strict=True))
        copy = self._copies.get(id(weight), weight)
        return copy if copy.dtype == dtype else weight


_ACTIVE: ContextVar[Casts | None] = ContextVar("_ACTIVE", default=None)


def cast_at_once(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The weight in `dtype` where `Casts` around the call have it, else itself.

    They have a network's parameters only: what is made of them anew in every pass is another tensor each time.
    """
    casts = _ACTIVE.get()
    if casts is None or not isinstance(weight, nn.Parameter) or weight.dtype == dtype:
        return weight
    return casts.copy_of(weight, dtype)


@torch.no_grad()
def _cast(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each in `dtype`, of the same strides."""
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    if copies:
        torch._foreach_copy_(copies, weights)
    return copies
