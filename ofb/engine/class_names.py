"""Names of the classes: taken from the data into a network, and checked where the network meets data again."""

from torch import nn
from torch.utils.data import Dataset

from ofb.engine.data import pretrained_cfg
from ofb.engine.splits import class_indices, shown


def label_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a network's classes in the order of its logits; empty where they are not known."""
    names = pretrained_cfg(model).get("label_names") or ()
    return tuple(names) if len(names) == model.num_classes else ()


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """The names of a data set's classes in the order of their indices; empty where it does not tell."""
    names: dict[int, str] = {}
    for name, index in class_indices(dataset).items():
        names.setdefault(index, str(name))  # torchvision's ImageNet has several names for a class
    return tuple(names[index] for index in range(len(names))) if names.keys() == set(range(len(names))) else ()


def set_label_names(model: nn.Module, dataset: Dataset) -> str:
    """Give a network the names of the classes that it is about to learn.

    Args:
        model: a timm model.
        dataset: its training images.

    Returns:
        A note where the network had other names before, else "".
    """
    before, names = label_names(model), class_names(dataset)
    if len(names) != model.num_classes or names == before:
        return ""
    kept = {key: value for key, value in pretrained_cfg(model).items() if key != "label_descriptions"}
    model.pretrained_cfg = model.default_cfg = kept | {"label_names": names}
    if not before:
        return ""
    return f"the data's classes ({shown(names)}) take the place of those the network knew ({shown(before)})"


def check_label_names(model: nn.Module, dataset: Dataset) -> str:
    """Check that a data set's classes are those of a network.

    Returns:
        A note where all names are others, so that indices have to be believed, else "".

    Raises:
        ValueError: the two share names, but not all of them at the same index.
    """
    expected, found = label_names(model), class_names(dataset)
    if not expected or not found or found == expected:
        return ""
    if not set(expected) & set(found):
        return (
            f"the data names its classes ({shown(found)}) otherwise than the network ({shown(expected)}): class 0 is "
            "taken to be class 0, and so on"
        )
    pairs = enumerate(zip(expected, found, strict=False))
    others = (f": class {i} is {ours!r}, in the data {theirs!r}" for i, (ours, theirs) in pairs if ours != theirs)
    raise ValueError(
        f"data: expected the {len(expected)} classes of the network ({shown(expected)}), got {len(found)} "
        f"({shown(found)}){next(others, '')}; evaluate on data with the same classes"
    )
