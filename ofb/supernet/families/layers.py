"""timm's layers under masks that the families share: patch embedding, norms, residual branches, activations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.layers import RmsNorm
from timm.layers.activations import GELUTanh, QuickGELU
from torch import Tensor, nn

from ofb.supernet.pruning import Coupling
from ofb.supernet.search_space import Candidates
from ofb_kernels import masked_add_layer_norm, masked_layer_norm, masked_linear
from ofb_kernels.dispatch import choose_backend
from ofb_kernels.eager import add_branch, blocks_of
from ofb_kernels.ops.checks import compute_dtype

# A unit whose mask is 0 must add nothing: activations that are 0 at 0.
ACTIVATION_LAYERS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
NORM_LAYERS = {"layernorm": nn.LayerNorm, "rmsnorm": RmsNorm}


@dataclass(frozen=True)
class Submodule:
    """A searchable submodule.

    Attributes:
        candidates: its sizes.
        couplings: the parameter dimensions that hold its units.
        normed: whether a norm, a softmax or an average runs over its units inside the network, and has to weigh them
            while their number is open; residual widths aside.
    """

    candidates: Candidates
    couplings: tuple[Coupling, ...]
    normed: bool = False


def activation(layer: nn.Module) -> str | None:
    """Name of an activation in `ACTIVATION_LAYERS`, None where it is none of these."""
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_tanh"
    return {GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu", nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(layer))


def norm_kind(norm: nn.Module) -> str | None:
    """Name of a norm in `NORM_LAYERS`, None where it is none of these or has no weight."""
    for name, layer in NORM_LAYERS.items():
        if isinstance(norm, layer) and norm.weight is not None:
            return name
    return None


def present(*layers: nn.Module | None) -> bool:
    """Whether one of some optional layers is there: neither None nor an Identity."""
    return any(not isinstance(layer, nn.Identity | None) for layer in layers)


def patch_embeddings(model: nn.Module, images: Tensor) -> Tensor:
    """(B, patches, D), before the norm that may belong to them, mask tokens and position embedding.

    Raises:
        ValueError: the images are not of the model's size; a search is at one size, even with dynamic_img_size.
    """
    if tuple(images.shape[-2:]) != tuple(model.patch_embed.img_size):
        expected, got = " × ".join(map(str, model.patch_embed.img_size)), " × ".join(map(str, images.shape[-2:]))
        raise ValueError(f"images: expected {expected} pixels, got {got}; resize them, or make the model with img_size")
    proj = model.patch_embed.proj
    if images.is_cuda and _cuts_patches(proj):
        return project_patches(proj, images)
    return proj(images).flatten(2).mT


def project_patches(proj: nn.Conv2d, images: Tensor) -> Tensor:
    """(B, patches, D) of a convolution whose windows lie side by side, as a product of patches and weights.

    cuDNN has no fast weight gradient for such a convolution (benchmarks/NOTES.md); on a CPU the convolution is faster.
    """
    patches = blocks_of(images, proj.kernel_size).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, q)
    dtype = compute_dtype("patch_embeddings", images)
    patches = patches.to(dtype, memory_format=torch.contiguous_format)  # cast and laid out in one pass
    return masked_linear(patches.flatten(3).flatten(1, 2), proj.weight.flatten(1), proj.bias, None)


def masked_norm(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """A norm that weighs channels by the mask, its output ⊙ mask; a plain one without a mask."""
    if isinstance(norm, nn.LayerNorm):
        return masked_layer_norm(x, norm.weight, norm.bias, mask, norm.eps)
    return norm(x) if mask is None or isinstance(norm, nn.Identity) else _masked_rms_norm(norm, x, mask)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer without a mask of its own; one with another forward as it is."""
    return masked_linear(x, layer.weight, layer.bias, None) if type(layer) is nn.Linear else layer(x)


def drop_path_scales(drop_paths: Sequence[nn.Module], x: Tensor) -> list[Tensor | None]:
    """What each drop path multiplies the samples of x (B, ...) by: (B,), 0 or 1 / keep probability, or None for ones.

    All are drawn at once, in a handful of launches: floor(u + keep) is 1 with probability keep for u from U(0, 1).
    """
    drops = [(i, each) for i, each in enumerate(drop_paths) if each.training and getattr(each, "drop_prob", 0)]
    scales: list[Tensor | None] = [None] * len(drop_paths)
    if drops:
        keeps = [1 - each.drop_prob for _, each in drops]
        drawn = torch.rand(len(drops), len(x), device=x.device).unbind()
        kept = torch._foreach_floor(torch._foreach_add(drawn, keeps))
        for (i, _), scale in zip(drops, torch._foreach_div(kept, keeps), strict=True):
            scales[i] = scale
    return scales


def adds_bias(norm: nn.Module, x: Tensor) -> bool:
    """Whether `add_norm` is the place for the bias of the linear layer before: the fused op has its gradient for
    nothing. Everywhere else a product adds the bias for nothing."""
    return isinstance(norm, nn.LayerNorm) and choose_backend("masked_add_layer_norm", None, {"x": x}) == "triton"


def linear_without_bias(layer: nn.Linear, x: Tensor, without: bool) -> tuple[Tensor, Tensor | None]:
    """`linear`, or where that is wanted and can be, its product alone and the bias beside it."""
    if without and type(layer) is nn.Linear:
        return masked_linear(x, layer.weight, None, None), layer.bias
    return linear(layer, x), None


def add_norm(
    x: Tensor,
    branch: tuple[Tensor, Tensor | None],
    layer_scale: Callable[[Tensor], Tensor],
    sample_scale: Tensor | None,
    residual_mask: Tensor | None,
    norm: nn.Module,
    norm_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The new stream x + sample_scale · layer_scale(branch ⊙ mask), and its norm; a branch comes with the bias that it
    lacks.

    Mask, layer scale and sample scale all only scale: they are multiplied together before they meet the branch.
    """
    branch_mask = layer_scale(x.new_ones(x.shape[-1]) if residual_mask is None else residual_mask)
    branch, branch_bias = branch
    if not isinstance(norm, nn.LayerNorm):
        x = add_branch(x, branch, branch_mask, sample_scale, branch_bias)
        return x, masked_norm(norm, x, norm_mask)
    vectors = branch_mask, norm.weight, norm.bias, norm_mask
    return masked_add_layer_norm(x, branch, *vectors, norm.eps, sample_scale, branch_bias=branch_bias)


def copies(mask: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """A mask (D,) once for each of its users: their gradients are then summed at once and not added one by one."""
    return [None] * count if mask is None else mask.expand(count, -1).unbind()


def scale_rows(layer: nn.Module, scale: Tensor) -> None:
    """Multiply a layer's outputs, in its parameters: rows of a linear layer or convolution, entries of a norm."""
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    if getattr(layer, "bias", None) is not None:
        layer.bias.mul_(scale)


def resized(layer: nn.Module, *sizes: int) -> nn.Module:
    """A fresh layer of the same kind: (inputs, outputs) of a linear layer, channels of a norm; an Identity stays."""
    if isinstance(layer, nn.Identity):
        return layer
    if isinstance(layer, nn.Linear):
        return nn.Linear(*sizes, bias=layer.bias is not None)
    options = {"bias": False} if isinstance(layer, nn.LayerNorm) and layer.bias is None else {}
    return NORM_LAYERS[norm_kind(layer)](*sizes, eps=layer.eps, **options)


def materialize(model: nn.Module) -> None:
    """Give what is still on the meta device memory where tensors are made now, and fresh values, in place."""
    for module in model.modules():
        parameters, buffers = (dict(own(recurse=False)) for own in (module.named_parameters, module.named_buffers))
        if not any(each.is_meta for each in (*parameters.values(), *buffers.values())):
            continue
        module.to_empty(device=torch.get_default_device(), recurse=False)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
            continue
        for parameter in module.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)
        for buffer in module.buffers(recurse=False):
            buffer.zero_()


def sync_layers(model: nn.Module) -> None:
    """Bring the size attributes of linear layers and norms in line with their parameters."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.LayerNorm | RmsNorm):
            module.normalized_shape = tuple(module.weight.shape)


def _cuts_patches(proj: nn.Module) -> bool:
    """Whether a projection is a convolution whose windows lie side by side, from the image's first pixel on."""
    if type(proj) is not nn.Conv2d:
        return False
    return (proj.stride, proj.padding, proj.dilation, proj.groups) == (proj.kernel_size, (0, 0), (1, 1), 1)


def _masked_rms_norm(norm: RmsNorm, x: Tensor, mask: Tensor) -> Tensor:
    """√(Σ mᵢxᵢ² / Σ mᵢ) divides instead of the root of the plain mean."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = (wide.square() * mask).sum(-1, keepdim=True) / mask.sum()
    return (wide * (mean_square + norm.eps).rsqrt() * (norm.weight * mask)).to(x.dtype)
