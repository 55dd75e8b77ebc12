"""ViT and DeiT of Hugging Face's transformers as timm networks, and back: the same weights under other names."""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ofb.engine.class_names import label_names
from ofb.supernet.families import vit
from ofb.supernet.families.vit_description import DEFAULTS

OLDEST_TRANSFORMERS = "5.9"  # older ones call the parameters of ViT and DeiT otherwise

# timm's classifiers and what each class of transformers calls them
CLASSIFIERS = {
    "ViTForImageClassification": {"head": "classifier"},
    "DeiTForImageClassification": {"head": "classifier", "head_dist": "classifier"},  # see _with_one_classifier
    "DeiTForImageClassificationWithTeacher": {"head": "cls_classifier", "head_dist": "distillation_classifier"},
    "ViTModel": {},
    "DeiTModel": {},
}
# (distilled, has a classifier) of a timm network
CLASSES = {
    (False, True): "ViTForImageClassification",
    (True, True): "DeiTForImageClassificationWithTeacher",
    (False, False): "ViTModel",
    (True, False): "DeiTModel",
}
# timm's part of a parameter's name and transformers'; the packed qkv is q_proj, k_proj and v_proj there
NAMES = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "blocks.": "layers.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.qkv.": "attention.qkv.",
    "attn.proj.": "attention.o_proj.",
    "norm.": "layernorm.",
}
# config.hidden_act and the search's name for it; the first of several is the one that is written
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@torch.no_grad()
def from_transformers(model: nn.Module, image_processor: Any = None) -> VisionTransformer:
    """The timm network that computes what a model of transformers computes, on its device, in its dtype and mode.

    A copy: the given model stays as it is. The logits are the same; without a classifier (ViTModel, DeiTModel) it is
    `forward_features` that gives the `last_hidden_state`, and a pooler is left behind, as are a mask token and dropout.
    timm's distilled network averages two classifiers: the only one of DeiTForImageClassification becomes twice as
    large, beside one of zeros for the distillation token.

    Args:
        model: ViTForImageClassification, DeiTForImageClassification, DeiTForImageClassificationWithTeacher, ViTModel
            or DeiTModel.
        image_processor: the model's image processor: its mean and std go into the network's `pretrained_cfg`, beside
            the input size and the labels. Without it timm's defaults hold wherever images are normalized.

    Raises:
        ModuleNotFoundError: the package's extra [transformers] is not installed.
        ImportError: the installed transformers is too old.
        ValueError: the model is of another class, or timm has no such network.
    """
    name = type(model).__name__
    if name not in CLASSIFIERS or type(model) is not getattr(_import_transformers(), name):
        raise ValueError(
            f"model: expected one of transformers' {', '.join(CLASSIFIERS)}, got {type(model).__module__}.{name}; "
            "a ViT or DeiT for another task has the network itself in its attribute `vit` or `deit`"
        )
    converted = vit.build(_description(model.config, name)).to(model.device, model.dtype)
    weights = _to_timm(model, converted.state_dict())
    if name == "DeiTForImageClassification":
        weights = _with_one_classifier(weights)
    converted.load_state_dict(weights)
    converted.pretrained_cfg = converted.default_cfg = _pretrained_cfg(converted, model.config, image_processor)
    return converted.train(model.training)


@torch.no_grad()
def to_transformers(model: VisionTransformer) -> nn.Module:
    """The model of transformers that computes what a timm network computes, on its device, in its dtype and mode.

    A copy: the given model stays as it is. ViT becomes ViTForImageClassification, distilled DeiT becomes
    DeiTForImageClassificationWithTeacher; without a classifier they become ViTModel and DeiTModel, with no pooler.
    Dropout is left behind.

    Args:
        model: a timm Vision Transformer whose blocks are all of one size.

    Raises:
        ModuleNotFoundError: the package's extra [transformers] is not installed.
        ImportError: the installed transformers is too old.
        ValueError: no config of transformers describes the network; one whose blocks differ in size, say.
    """
    transformers = _import_transformers()
    vit.check(model)
    description = vit.describe(model)
    _check_expressible(description)
    name = CLASSES[description["distilled"], description["num_classes"] > 0]
    cls = getattr(transformers, name)
    config = cls.config_class(**_config(description), **_labels(model))
    converted = cls(config) if CLASSIFIERS[name] else cls(config, add_pooling_layer=False)
    weight = model.patch_embed.proj.weight
    converted.to(weight.device, weight.dtype)
    converted.load_state_dict(_to_transformers(model.state_dict(), name, _prefix(converted)))
    return converted.train(model.training)


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: Hugging Face models need the extra [transformers]: pip install 'ofb-kernels[transformers]'",
            name=error.name,
        ) from error
    from packaging.version import Version  # transformers requires it

    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"transformers: expected version {OLDEST_TRANSFORMERS} or newer, got {transformers.__version__}: "
            "pip install --upgrade transformers"
        )
    return transformers


# ---- configs ----


def _description(config: Any, class_name: str) -> dict:
    """What `vit.build` needs, from a config of transformers.

    Raises:
        ValueError: timm has no such network.
    """
    patch_size, image_size = _pair(config.patch_size), _pair(config.image_size)
    classifiers = CLASSIFIERS[class_name]
    if config.hidden_act not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ValueError(f"model: expected config.hidden_act as one of {expected}, got {config.hidden_act!r}")
    if patch_size[0] != patch_size[1]:
        raise ValueError(f"model: expected square patches, got config.patch_size {patch_size}")
    if class_name == "DeiTForImageClassification" and config.num_labels == 0:
        raise ValueError("model: expected config.num_labels of 1 or more, got 0; pass the network alone: model.deit")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", config.hidden_size // heads)
    return {
        "distilled": class_name.startswith("DeiT"),
        "img_size": image_size,
        "patch_size": patch_size[0],
        "in_chans": config.num_channels,
        "num_classes": config.num_labels if classifiers else 0,
        "embed_dim": config.hidden_size,
        "no_embed_class": False,
        "qkv_bias": config.qkv_bias,
        "proj_bias": True,
        "layer_scale": False,
        "norm_eps": config.layer_norm_eps,
        "activation": ACTIVATIONS[config.hidden_act],
        "blocks": [{"heads": heads, "head_dim": head_dim, "hidden": config.intermediate_size}]
        * config.num_hidden_layers,
    }


def _config(description: dict) -> dict:
    """Arguments for a config of transformers."""
    block, width = description["blocks"][0], description["embed_dim"]
    rows, columns = description["img_size"]
    config = {
        "hidden_size": width,
        "num_hidden_layers": len(description["blocks"]),
        "num_attention_heads": block["heads"],
        "intermediate_size": block["hidden"],
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == description["activation"]),
        "layer_norm_eps": description["norm_eps"],
        "image_size": rows if rows == columns else [rows, columns],
        "patch_size": description["patch_size"],
        "num_channels": description["in_chans"],
        "qkv_bias": description["qkv_bias"],
    }
    return config if block["head_dim"] == width // block["heads"] else config | {"head_dim": block["head_dim"]}


def _check_expressible(description: dict) -> None:
    sizes = {f"{b['heads']}×{b['head_dim']}, {b['hidden']}": None for b in description["blocks"]}
    obstacles = {
        f"expected blocks of one size, got several (heads × channels, hidden): {'; '.join(sizes)}": len(sizes) > 1,
        "expected no layer scale (init_values=None)": description["layer_scale"],
        "expected a position embedding for the class token too (no_embed_class=False)": description["no_embed_class"],
        "expected biases in the projections (proj_bias=True)": not description["proj_bias"],
    }
    obstacles |= {
        f"expected {name}={default!r}, got {description[name]!r}": description[name] != default
        for name, default in DEFAULTS.items()
    }
    for reason, wrong in obstacles.items():
        if wrong:
            raise ValueError(
                f"model: transformers' ViT and DeiT cannot express it: {reason}; "
                "keep the timm network (ofb.save) or write it as ONNX (ofb.export_onnx)"
            )


def _pretrained_cfg(model: VisionTransformer, config: Any, image_processor: Any) -> dict:
    """What is known of images and labels, in timm's words."""
    channels = model.patch_embed.proj.in_channels
    known = {"input_size": (channels, *model.patch_embed.img_size), "num_classes": model.num_classes}
    if model.num_classes:
        known["label_names"] = tuple(label for _, label in sorted(config.id2label.items()))
    if image_processor is None:
        return known
    if not image_processor.do_normalize:
        return known | {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return known | {"mean": tuple(image_processor.image_mean), "std": tuple(image_processor.image_std)}


def _labels(model: VisionTransformer) -> dict:
    """Arguments for a config of transformers: the labels' names if timm's network has them, else how many they are."""
    names = label_names(model)
    if not names:
        return {"num_labels": model.num_classes}
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _pair(size: int | Iterable[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


# ---- weights ----


def _names(name: str, class_name: str, prefix: str) -> list[str]:
    """What transformers calls a parameter of timm's: one name, or those of q, k and v."""
    module, _, kind = name.partition(".")
    if module in CLASSIFIERS[class_name]:
        return [f"{CLASSIFIERS[class_name][module]}.{kind}"]
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    if ".qkv." not in name:
        return [prefix + name]
    return [prefix + name.replace(".qkv.", f".{part}_proj.") for part in "qkv"]


def _prefix(model: nn.Module) -> str:
    """What stands before the names of the network proper, where the model has it as an attribute."""
    return f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""


def _to_timm(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a model of transformers under these names of timm's.

    Raises:
        ValueError: it lacks some.
    """
    source, class_name, prefix = model.state_dict(), type(model).__name__, _prefix(model)
    parts = {name: _names(name, class_name, prefix) for name in names}
    missing = sorted({part for group in parts.values() for part in group} - source.keys())
    if missing:
        raise ValueError(
            f"model: expected the parameters of a plain {class_name}, lacking {missing[0]} "
            f"and {len(missing) - 1} more; merge adapters into the weights first"
        )
    return {name: torch.cat([source[part] for part in group]) for name, group in parts.items()}


def _to_transformers(weights: Mapping[str, Tensor], class_name: str, prefix: str) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in weights.items():
        parts = _names(name, class_name, prefix)
        converted |= dict(zip(parts, tensor.chunk(len(parts)), strict=True))
    return converted


def _with_one_classifier(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two classifiers whose average is the class token's alone: twice itself, and zeros."""
    doubled = {name: 2 * weights[name] for name in ("head.weight", "head.bias")}
    zeros = {name: torch.zeros_like(weights[name]) for name in ("head_dist.weight", "head_dist.bias")}
    return {**weights, **doubled, **zeros}
