"""Which of a supernet's parameters an optimizer treats alike."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

# Adam carries a parameter about as far as learning rate × steps: how far, in a whole search.
TRAVEL = {"architecture": 25.0, "score": 0.5}


class ArchitectureGroup(dict):
    """A parameter group with its own first and last beta, whether its optimizer has two of them or more."""

    def setdefault(self, name: str, default: Any = None) -> Any:
        """What an optimizer fills up its groups' options with; of its own betas those in between are taken."""
        if name == "betas" and len(default) > len(self["betas"]):
            self["betas"] = (self["betas"][0], *default[1:-1], self["betas"][-1])
        return super().setdefault(name, default)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    rates: Mapping[str, float | None],
    total_steps: int,
) -> list[dict]:
    """Groups for a torch optimizer: decayed weights, the rest, scores, and the architecture logits.

    Args:
        named_parameters: of the supernet.
        weight_decay: on matrices.
        rates: learning rate of the groups in `TRAVEL`; None for one that carries them so far.
        total_steps: length of the search.
    """
    names = ("decay", "no_decay", "score", "architecture")
    parameters = {name: [] for name in names}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            parameters[_group_of(name, parameter)].append(parameter)
    groups = {name: {"params": parameters[name], "weight_decay": 0.0} for name in names}
    groups["decay"]["weight_decay"] = weight_decay
    groups["architecture"] = ArchitectureGroup(groups["architecture"], betas=(0.5, 0.999))
    for name, travel in TRAVEL.items():
        groups[name]["lr"] = travel / total_steps if rates[name] is None else rates[name]
    return list(groups.values())


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if name.endswith(".alpha"):
        return "architecture"
    if name.endswith(".score"):
        return "score"
    is_token = name.endswith(("token", "pos_embed", "latent"))
    return "no_decay" if parameter.dim() < 2 or is_token else "decay"
