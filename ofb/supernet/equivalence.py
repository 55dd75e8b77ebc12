"""Whether a supernet whose masks are all one computes what its network does, and if not, which module differs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from ofb.supernet.families import attentions, mlps
from ofb.supernet.families.layers import linear, masked_norm, norm_kind
from ofb.supernet.search_space import Size
from ofb_kernels import use_backend

IMAGES = 2
TF32_EPS = 2.0**-10  # with which a GPU may multiply float32

Call = tuple[str, Callable[[], Tensor], Tensor]  # a module's name, the supernet's way to compute it, what it gave


@torch.no_grad()
def check_equivalence(model: nn.Module, family: ModuleType, sizes: Mapping[str, Size], normed: Collection[str]) -> None:
    """Compare the masked forward pass, all masks at one, with the model's own on a random batch.

    Args:
        model: the dense network; in training or not, it stays so, and nothing is drawn from torch's own generator.
        family: the module of `families` that knows it.
        sizes: (heads, channels) of every submodule.
        normed: the submodules that norms weigh.

    Raises:
        ValueError: features or logits differ by more than rounding; the message names the first module that does.
    """
    weight = next(model.parameters())
    if weight.is_meta:
        return
    shape = (IMAGES, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    # The eager backend compiles nothing for these few images; whether the kernels are right is not asked here.
    with _evaluating(model), torch.autocast(weight.device.type, enabled=False), use_backend("eager"):
        features = model.forward_features(images)
        dense = features, model.forward_head(features)
        if not all(each.isfinite().all() for each in dense):
            raise ValueError("model: expected a finite output for a random batch, got NaN or infinity; see its weights")
        masked = _unmasked(model, family, images, sizes, normed)
        differences = [_difference(*pair) for pair in zip(masked, dense, strict=True)]
        if not all(difference <= _rounding(weight) for difference in differences):
            raise ValueError(
                "model: cannot be searched: with all masks at one the supernet gives something else, which differs by "
                f"{max(differences):.1g} of the largest value; the first module to differ is "
                f"{_first_to_differ(model, family, images) or 'none of its blocks'}; verify=False goes on all the same"
            )


def _unmasked(
    model: nn.Module, family: ModuleType, images: Tensor, sizes: Mapping[str, Size], normed: Collection[str]
) -> tuple[Tensor, Tensor]:
    """Features and logits of the masked forward pass, all masks at one."""
    masks = {name: torch.ones(size).to(images) for name, size in sizes.items()}
    flat = {name: mask.flatten() for name, mask in masks.items()}
    residual_masks = {name: mask for name, mask in flat.items() if name.startswith("embed")}
    all_masks = masks, residual_masks, {name: mask for name, mask in flat.items() if name in normed}
    features = family.features(model, family.patch_embeddings(model, images), *all_masks)
    return features, family.logits(model, features, *all_masks)


def _first_to_differ(model: nn.Module, family: ModuleType, images: Tensor) -> str | None:
    with _traced(model, family) as calls:
        model(images)
    return next((name for name, own, output in calls if not _difference(own(), output) <= _rounding(output)), None)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float(
        (ours.reshape_as(theirs) - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)
    )


def _rounding(like: Tensor) -> float:
    """What rounding can make of a difference: half of the digits."""
    return (TF32_EPS if like.is_cuda and like.dtype == torch.float32 else torch.finfo(like.dtype).eps) ** 0.5


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Out of training for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _traced(model: nn.Module, family: ModuleType) -> Iterator[list[Call]]:
    """What the modules of a model that a supernet computes in its own way were given and gave, the inner ones first."""
    calls: list[Call] = []
    ways = {block: family.unmasked_block for block in family.blocks(model)}
    ways |= {module: way for module in model.modules() if (way := _own_way(module)) is not None}

    def remember(name: str, compute: Callable[..., Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            calls.append((name, lambda: compute(module, *args, **kwargs), output))

        return hook

    hooks = [
        module.register_forward_hook(remember(name, ways[module]), with_kwargs=True)
        for name, module in model.named_modules()
        if module in ways
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _own_way(module: nn.Module) -> Callable[..., Tensor] | None:
    """How a supernet computes a part of a block, all masks at one; None where it calls it, or its family does it."""
    if type(module) in attentions.KINDS:
        return _attention
    if type(module) in mlps.KINDS:
        return lambda mlp, x: mlps.masked_forward(mlp, x, x.new_ones(mlps.hidden_units(mlp)), None)[0]
    if isinstance(module, nn.Linear):
        return linear
    return (lambda norm, x: masked_norm(norm, x, None)) if norm_kind(module) else None


def _attention(attn: nn.Module, x: Tensor, rope: Tensor | None = None, **_: object) -> Tensor:
    mask = x.new_ones(attn.num_heads, attentions.head_dim(attn))
    return attentions.masked_forward(attn, x, mask, None, rope)[0]
