"""Every op in a few lines of plain PyTorch: the definition of "right".

Reading this file alone tells what the whole package computes. Nothing here is fast, everything is exact in float64,
and every other backend is tested against it. Arguments are those of the public ops and already checked.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}

# Head importances are summed in units of 2^-30: an integer sum does not depend on its order, so ties stay ties.
HEAD_IMPORTANCE_UNIT = 2**30
# σ stays this far from 0 and 1, where the tangent has its poles; in float32 it even has the wrong sign there.
SIGMA_MARGIN = 1e-4
# A probability below e^-80 contributes nothing to an entropy in float32; the bound keeps 0 · log 0 at 0.
LOG_PROBABILITY_FLOOR = -80.0


def ranks(importance: Tensor) -> Tensor:
    """Rank of each entry along the last dimension, the largest first, equal entries by index."""
    order = importance.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def unit_ranks(score: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (…, H) of the heads by Σ_channels S, and ranks (…, H, d) of the channels inside each head by s."""
    # In float64: on a CPU the last bit of a float32 sigmoid depends on where in memory its argument stands.
    head_importance = (score.double().sigmoid() * HEAD_IMPORTANCE_UNIT).long().sum(-1)
    return ranks(head_importance), ranks(score)


def candidate_probabilities(alpha: Tensor, alive: Tensor) -> Tensor:
    """Softmax of the architecture logits (…, A, B) over all alive candidates together, 0 for the others."""
    return alpha.masked_fill(~alive, -torch.inf).flatten(-2).softmax(-1).view(alpha.shape)


def bimask(
    score: Tensor, alpha: Tensor, head_counts: Tensor, channel_counts: Tensor, lam: Tensor, alive: Tensor
) -> Tensor:
    """m = λ·S + (1 − λ)·V of S submodules at once.

    score (S, H, d), alpha and alive (S, A, B), head_counts (S, A), channel_counts (S, B). A submodule without heads
    is the case H = 1, A = 1.
    """
    importance = score.sigmoid()
    head_rank, channel_rank = unit_ranks(score)
    keeps_head = head_rank[..., None] < head_counts[:, None]  # (S, H, A)
    keeps_channel = channel_rank[..., None] < channel_counts[:, None, None]  # (S, H, d, B)
    p = candidate_probabilities(alpha, alive)
    sparsity = torch.einsum("sha,sab,shdb->shd", keeps_head.to(p.dtype), p, keeps_channel.to(p.dtype))
    return lam * importance + (1 - lam) * sparsity


def candidate_statistics(alpha: Tensor, alive: Tensor, heads: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adaptive one-hot losses, Σ p · heads and Σ p · units of S submodules, (S,) each; all arguments (S, K)."""
    p = candidate_probabilities(alpha[:, None], alive[:, None]).squeeze(1)
    return one_hot_losses(alpha, alive), (p * heads).sum(1), (p * units).sum(1)


def one_hot_losses(alpha: Tensor, alive: Tensor) -> Tensor:
    """−Σ p log p + (1/n) · tan(π/2 − π σ) of S submodules, (S,), 0 for one alive candidate; alpha and alive (S, K)."""
    log_p = alpha.masked_fill(~alive, -torch.inf).log_softmax(1).clamp(min=LOG_PROBABILITY_FLOOR)
    p = log_p.exp() * alive
    n = alive.sum(1, dtype=p.dtype)
    entropy = -(p * log_p).sum(1)
    sigma = one_hotness(p, alive).clamp(SIGMA_MARGIN, 1 - SIGMA_MARGIN)
    # tan(π/2 − πσ) = 1 / tan(πσ) = 1 / tan(π(σ − 1)): the angle from the nearer pole keeps its digits beside it.
    from_pole = sigma - sigma.detach().round()
    losses = entropy + 1 / (n * torch.tan(math.pi * from_pole))
    return torch.where(n > 1, losses, torch.zeros_like(losses))


def one_hotness(p: Tensor, alive: Tensor) -> Tensor:
    """σ (S,) of the adaptive one-hot loss: 1 if and only if p is one-hot, 0 if and only if it is uniform over several
    candidates; p and alive (S, K)."""
    share = 1 / alive.sum(1, dtype=p.dtype)
    return ((p - share[:, None]).square() * alive).sum(1) / (1 - share).clamp(min=SIGMA_MARGIN)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str | None
) -> Tensor:
    """act((x Wᵀ + b) ⊙ mask)."""
    out = F.linear(x, weight, bias)
    return ACTIVATIONS[activation](out if mask is None else out * mask.to(x.dtype))


def masked_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    mask: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """fc2(act(fc1(x) ⊙ mask))."""
    return F.linear(masked_linear(x, fc1_weight, fc1_bias, mask, activation), fc2_weight, fc2_bias)


def masked_attention(qkv: Tensor, mask: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ · scale + bias) v with q, k and v each ⊙ mask; qkv (B, N, 3, H, d) → (B, N, H·d).

    bias (W, H, N, N) or None: sequence b has that of window b mod W.
    """
    q, k, v = (qkv * mask.to(qkv.dtype)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
    scores = q @ k.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype).repeat(len(scores) // len(bias), 1, 1, 1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def masked_qkv_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, scale: float, attention_bias: Tensor | None
) -> Tensor:
    """masked_attention of the projection x Wᵀ + b, which holds q, k and v one after the other."""
    return masked_attention(F.linear(x, weight, bias).unflatten(-1, (3, *mask.shape)), mask, scale, attention_bias)


def masked_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float) -> Tensor:
    """LayerNorm in which channel i counts with weight mask_i, its output ⊙ mask."""
    if mask is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    total = mask.sum()
    mean = (x * mask).sum(-1, keepdim=True) / total
    variance = ((x - mean).square() * mask).sum(-1, keepdim=True) / total
    normalized = (x - mean) * (variance + eps).rsqrt() * weight
    return (normalized if bias is None else normalized + bias) * mask


def add_branch(
    x: Tensor, branch: Tensor, branch_mask: Tensor, sample_scale: Tensor | None, branch_bias: Tensor | None = None
) -> Tensor:
    """x + (branch + branch_bias) ⊙ branch_mask, the branch of each sample times its own scale."""
    scaled = (branch if branch_bias is None else branch + branch_bias) * branch_mask
    if sample_scale is not None:
        scaled = scaled * sample_scale.view(-1, *[1] * (x.dim() - 1))
    return (x + scaled).to(torch.promote_types(x.dtype, branch.dtype))


def local_norm(images: Tensor, window: int, eps: float) -> Tensor:
    """(x − μ) / √(σ² + eps), μ and unbiased σ² over the window around each pixel, as far as it lies in the image."""
    half = window // 2

    def window_mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, window, stride=1, padding=half, count_include_pad=False)

    pixels = F.avg_pool2d(torch.ones_like(images), window, stride=1, padding=half, divisor_override=1)
    mean = window_mean(images)
    variance = (window_mean(images.square()) - mean.square()) * pixels / (pixels - 1).clamp(min=1)
    return (images - mean) / (variance.clamp(min=0) + eps).sqrt()


def masked_reconstruction_loss(
    decoded: Tensor, images: Tensor, areas: Tensor, masked: Tensor, pixels: tuple[int, int], window: int, eps: float
) -> Tensor:
    """Mean |decoded − target| over the masked areas, the target being these areas of local_norm(images)."""
    target = F.unfold(local_norm(images, window, eps), pixels, stride=pixels).mT  # (B, areas of an image, C·p·q)
    error = (decoded - target.take_along_dim(areas[..., None], 1)).where(masked[:, None], 0)  # (B, K, C·p·q)
    return error.abs().mean(2).sum() / (masked.sum() * len(images)).clamp(min=1)
