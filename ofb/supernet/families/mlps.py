"""timm's MLPs as searchable submodules: Mlp, and the gated GluMlp (SwiGLUPacked) and SwiGLU.

A unit is a hidden channel; in a gated MLP it is a value and its gate. The mask meets the value (in a plain Mlp the
only one there is, before the activation): fc2(act(gate) ⊙ value ⊙ m).
"""

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from ofb.supernet.families.layers import (
    ACTIVATION_LAYERS,
    activation,
    linear_without_bias,
    masked_norm,
    present,
    resized,
    scale_rows,
)
from ofb.supernet.pruning import Coupling
from ofb_kernels import masked_linear, masked_mlp

KINDS = {Mlp: "mlp", GluMlp: "glu", SwiGLU: "swiglu"}
FUSED_ACTIVATIONS = ACTIVATION_LAYERS.keys() - {"quick_gelu"}  # those that ofb_kernels has


def obstacle(mlp: nn.Module) -> str | None:
    """What stands in the way of a search, None where nothing does."""
    if type(mlp) not in KINDS:
        return f"expected timm's Mlp, GluMlp or SwiGLU, got {type(mlp).__name__}"
    if mlp.drop1.p > 0 or mlp.drop2.p > 0:
        return "expected no dropout"
    return None if activation(mlp.act) else f"activation {type(mlp.act).__name__} is not supported"


def hidden_units(mlp: nn.Module) -> int:
    """Hidden channels."""
    return mlp.fc2.in_features


def matrices(mlp: nn.Module) -> int:
    """How many weights of width × hidden channels it has."""
    return 2 if type(mlp) is Mlp else 3


def couplings(mlp: nn.Module, name: str) -> list[Coupling]:
    """All dimensions that hold hidden channels."""
    rows = {"fc1": 2 if type(mlp) is GluMlp else 1, "fc1_g": 1, "fc1_x": 1, "norm": 1}
    held = {f"{layer}.{kind}": repeats for layer, repeats in rows.items() for kind in ("weight", "bias")}
    found = [Coupling(f"{name}.{key}", 0, held[key]) for key, _ in mlp.named_parameters() if key in held]
    return [*found, Coupling(f"{name}.fc2.weight", 1)]


def masked_forward(
    mlp: nn.Module, x: Tensor, mask: Tensor, norm_mask: Tensor | None, without_bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The MLP with mask (hidden,), and V (hidden,) for the norm inside if it has one; beside it the bias that it lacks,
    fc2's if that is left to who adds the branch to the stream."""
    fc2 = mlp.fc2
    if type(mlp) is Mlp and not present(mlp.norm) and activation(mlp.act) in FUSED_ACTIVATIONS:
        fc1 = mlp.fc1
        bias, late_bias = (None, fc2.bias) if without_bias else (fc2.bias, None)
        return masked_mlp(x, fc1.weight, fc1.bias, mask, fc2.weight, bias, activation(mlp.act)), late_bias
    if type(mlp) is SwiGLU:
        hidden = mlp.act(mlp.fc1_g(x)) * masked_linear(x, mlp.fc1_x.weight, mlp.fc1_x.bias, mask)
    elif type(mlp) is GluMlp:
        first, second = masked_linear(x, mlp.fc1.weight, mlp.fc1.bias, _rows(mlp, mask)).chunk(2, -1)
        hidden = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        hidden = mlp.act(masked_linear(x, mlp.fc1.weight, mlp.fc1.bias, mask))
    return linear_without_bias(fc2, masked_norm(mlp.norm, hidden, norm_mask), without_bias)


def fold(mlp: nn.Module, mask: Tensor) -> None:
    """Multiply the final mask into the weights."""
    scale_rows(mlp.fc1_x if type(mlp) is SwiGLU else mlp.fc1, _rows(mlp, mask))


def resize(mlp: nn.Module, width: int, hidden: int) -> None:
    """Fresh layers of these sizes."""
    for name in ("fc1", "fc1_g", "fc1_x"):
        if hasattr(mlp, name):
            setattr(mlp, name, resized(getattr(mlp, name), width, hidden * (2 if type(mlp) is GluMlp else 1)))
    mlp.norm, mlp.fc2 = resized(mlp.norm, hidden), resized(mlp.fc2, hidden, width)


def _rows(mlp: nn.Module, mask: Tensor) -> Tensor:
    """The mask for each row of the layer that holds the values; where it holds the gates too, they stay."""
    if type(mlp) is not GluMlp:
        return mask
    ones = torch.ones_like(mask)
    return torch.cat([mask, ones] if mlp.gate_last else [ones, mask])
