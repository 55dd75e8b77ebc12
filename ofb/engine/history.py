"""What a search does to its supernet, epoch by epoch: what `ofb report` draws and TensorBoard shows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ofb.supernet import Supernet
from ofb.supernet.bimask import BiMask
from ofb.supernet.cost import readable
from ofb.supernet.search_space import Size

DECILES = torch.linspace(0, 1, 11, dtype=torch.float64)
DIGITS = 4


@dataclass(frozen=True)
class Look:
    """One submodule as it stands: copies on the host.

    Attributes:
        heads: A head counts of the candidate grid.
        channels: B channel counts of a head.
        alive: (A, B) bool.
        probabilities: (A, B), 0 for dead candidates.
        importance: S (H · d,).
        sparsity: V (H · d,).
    """

    heads: tuple[int, ...]
    channels: tuple[int, ...]
    alive: Tensor
    probabilities: Tensor
    importance: Tensor
    sparsity: Tensor

    def by_units(self) -> tuple[Tensor, Tensor]:
        """The sizes in units, ascending (K,), and how likely each of them is (K,)."""
        units = torch.tensor(self.heads)[:, None] * torch.tensor(self.channels)
        sizes, index = units.flatten().double().unique(return_inverse=True)
        return sizes, torch.zeros_like(sizes).index_add(0, index, self.probabilities.flatten())

    def summary(self) -> dict[str, Any]:
        """As plain numbers: the grid, None for the probability of a dead candidate, and deciles of S and V."""
        alive, p = self.alive.tolist(), self.probabilities.tolist()
        return {
            "heads": list(self.heads),
            "channels": list(self.channels),
            "probabilities": [
                [round(p[a][b], DIGITS) if alive[a][b] else None for b in range(len(self.channels))]
                for a in range(len(self.heads))
            ],
            "importance": _deciles(self.importance),
            "sparsity": _deciles(self.sparsity),
        }


class History:
    """Follows a supernet through its search.

    Args:
        supernet: the one to follow.
    """

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet
        self.pruned: list[dict[str, Any]] = []  # since the last entry
        self.latest: list[dict[str, Any]] = []  # at the last pruning event
        self._remember()

    def stepped(self) -> None:
        """Note what a pruning event did, after `supernet.step`. Where none was, the host reads nothing."""
        if self.supernet.revision == self.revision:
            return
        before, self.latest = self.left, []
        self._remember()
        for name, (size, alive) in self.left.items():
            if (size, alive) != before[name]:
                event = {"step": self.supernet.steps, "submodule": name, "from": list(before[name][0])}
                self.latest.append(event | {"to": list(size), "alive": alive})
        self.pruned += self.latest

    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self.pruned, "latest": self.latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on following a supernet whose own state has been loaded before."""
        self.pruned, self.latest = list(state["pruned"]), list(state["latest"])
        self._remember()

    def looks(self) -> dict[str, Look]:
        """Every submodule as it stands."""
        return {name: _look(bimask) for name, bimask in self.supernet.bimasks.items()}

    def entry(self, looks: dict[str, Look]) -> dict[str, Any]:
        """An epoch's entry: costs, submodules, and what was pruned since the last entry."""
        pruned, self.pruned = self.pruned, []
        expected = self.supernet.expected_costs()
        return {
            "costs": {
                kind: {"dense": dense, "target": self.supernet.target.get(kind), "expected": expected[kind]}
                for kind, dense in self.supernet.dense_costs.items()
            },
            "submodules": {name: look.summary() for name, look in looks.items()},
            "pruned": pruned,
        }

    def status(self) -> dict[str, str]:
        """What someone who watches wants to know beside the losses; read from the device."""
        expected = self.supernet.expected_costs()
        figures = {
            f"expected {kind}": f"{readable(expected[kind])}, target {readable(limit)}"
            for kind, limit in self.supernet.target.items()
        }
        figures["candidates alive"] = str(sum(alive for _, alive in self.left.values()))
        if self.latest:
            pruned = describe_pruned(self.latest, in_order(self.supernet))
            figures[f"pruned at step {self.latest[0]['step']}"] = ", ".join(pruned)
        return figures

    def unshown(self) -> set[str]:
        """The losses that say nothing to a reader: those that count nothing, and the one-hot loss and the sum of all,
        which its tangent carries away. How far the sizes are `decided` says what that loss achieves."""
        supernet = self.supernet
        weights = {
            "macs": supernet.macs_weight,
            "reconstruction": supernet.masked_images is not None,
        }
        return {"loss", "one_hot"} | {name for name, weight in weights.items() if not weight}

    def _remember(self) -> None:
        bimasks = self.supernet.bimasks
        alive = self.supernet.alive_candidates()
        self.left = {name: (bimask.candidates.full, alive[name]) for name, bimask in bimasks.items()}
        self.revision = self.supernet.revision


def in_order(supernet: Supernet) -> list[str]:
    """The submodules as images pass through them, each residual width before its blocks."""
    passed = [name for width, inside in supernet.macs.stages().items() for name in (width, *inside)]
    return [*passed, *(name for name in supernet.bimasks if name not in passed)]


def describe_pruned(events: Iterable[dict[str, Any]], order: Sequence[str]) -> list[str]:
    """Pruning events in words, those of a submodule as one: mlp0 384 → 288 (5 left), attn1 4×24 (2 left)."""
    merged: dict[str, dict[str, Any]] = {}
    for event in events:
        merged[event["submodule"]] = event | {"from": merged.get(event["submodule"], event)["from"]}
    return [_event(merged[name]) for name in order if name in merged]


def describe_size(name: str, size: Size | list[int]) -> str:
    """A submodule's size as it is spoken of: heads × channels for attention, units for the others."""
    return "×".join(map(str, size)) if name.startswith("attn") else str(size[-1])


def _event(event: dict[str, Any]) -> str:
    sizes = [describe_size(event["submodule"], event[end]) for end in ("from", "to")]
    change = sizes[1] if sizes[0] == sizes[1] else " → ".join(sizes)
    return f"{event['submodule']} {change} ({event['alive']} left)"


@torch.no_grad()
def _look(bimask: BiMask) -> Look:
    return Look(
        bimask.candidates.heads,
        bimask.candidates.channels,
        bimask.alive.cpu(),
        bimask.probabilities().double().cpu(),
        bimask.score.sigmoid().float().cpu(),
        bimask.sparsity().flatten().float().cpu(),
    )


def _deciles(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.double().quantile(DECILES).tolist()]
