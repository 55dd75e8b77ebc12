"""Model families: what the units of each submodule are, in parameters, sizes and MACs."""

from dataclasses import dataclass
from types import ModuleType

from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ofb.supernet.families import eva, module_checks, swin, vit, vit_checks

KINDS = (VisionTransformer, Eva, SwinTransformer)
EXAMPLES = ("deit_small_patch16_224", "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224")
FAMILIES = {vit.NAME: vit, eva.NAME: eva, swin.NAME: swin}


@dataclass(frozen=True)
class Support:
    """Whether a model can be searched; true or false as it stands in an `if`.

    Attributes:
        supported: whether it can.
        reason: what stands in the way, empty where nothing does.
    """

    supported: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.supported


def supports(model: nn.Module) -> Support:
    """Whether a model can be searched, and if not, why."""
    try:
        check_searchable(model)
    except ValueError as error:
        return Support(False, str(error).removeprefix("model: "))
    return Support(True)


def check_searchable(model: nn.Module) -> None:
    """Raise ValueError, saying why, where a model cannot be searched."""
    if isinstance(model, KINDS):
        vit_checks.raise_first(module_checks.obstacles(model))
    family_of(model)


def family_of(model: nn.Module) -> ModuleType:
    """The family module that knows the anatomy of this model.

    Raises:
        ValueError: no family does; the message says why.
    """
    family = swin if isinstance(model, SwinTransformer) else eva if isinstance(model, Eva) else vit
    family.check(model)
    return family


def describe(model: nn.Module) -> dict:
    """What `build` needs to make the same architecture again: plain numbers and strings, fit for JSON."""
    family = family_of(model)
    return {"family": family.NAME, **family.describe(model)}


def build(description: dict) -> nn.Module:
    """A plain timm model of a described architecture, with fresh weights.

    Raises:
        ValueError: the description is of no known family or lacks an entry.
    """
    name = description.get("family")
    if name not in FAMILIES:
        raise ValueError(f"description: expected family as one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name].build(description)


def sizes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(heads, channels) of every submodule of a plain timm model."""
    return {name: submodule.candidates.full for name, submodule in family_of(model).submodules(model).items()}


def count_macs(model: nn.Module) -> int:
    """Exact multiply-accumulates of one image through a plain timm model, whatever the sizes of its blocks.

    Raises:
        ValueError: no family knows the model.
    """
    return family_of(model).macs(model).total(sizes_of(model))
