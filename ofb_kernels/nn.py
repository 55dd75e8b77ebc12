"""The masked layers as modules: parameters under the names timm gives them, the mask an argument of `forward`.

A mask belongs to a search, not to a layer, so no module keeps one; weights of a timm model load as they are.
"""

import torch
from torch import Tensor, nn

from ofb_kernels.ops.masked_attention import masked_qkv_attention
from ofb_kernels.ops.masked_layer_norm import masked_layer_norm
from ofb_kernels.ops.masked_linear import masked_linear
from ofb_kernels.ops.masked_mlp import masked_mlp


class MaskedLinear(nn.Linear):
    """act((x Wᵀ + b) ⊙ mask), see `masked_linear`.

    Args:
        in_features: K.
        out_features: N, the number of masked units.
        bias: whether to add one.
        activation: None, "gelu", "gelu_tanh", "relu" or "silu".
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (..., in_features), mask (out_features,) → (..., out_features)."""
        return masked_linear(x, self.weight, self.bias, mask, self.activation)


class MaskedMlp(nn.Module):
    """fc2(act(fc1(x) ⊙ mask)), see `masked_mlp`; state-dict keys of timm's Mlp.

    Args:
        in_features: K.
        hidden_features: number of masked units; in_features where None.
        out_features: in_features where None.
        activation: "gelu", "gelu_tanh", "relu", "silu" or None.
        bias: whether fc1 and fc2 have one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str | None = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden_features = in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (..., in_features), mask (hidden_features,) → (..., out_features)."""
        return masked_mlp(x, self.fc1.weight, self.fc1.bias, mask, self.fc2.weight, self.fc2.bias, self.activation)


class MaskedAttention(nn.Module):
    """Self-attention with q, k and v masked, see `masked_qkv_attention`; state-dict keys of timm's Attention.

    Args:
        dim: width of the residual stream.
        num_heads: H.
        head_dim: d, channels of a head; dim // num_heads where None.
        qkv_bias: whether the qkv projection has a bias.
        scale: of the scores; head_dim^−½ where None.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: dim is no multiple of num_heads and head_dim is None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if head_dim is None and dim % num_heads != 0:
            raise ValueError(
                f"MaskedAttention: expected dim as a multiple of num_heads={num_heads}, got {dim}; or give head_dim"
            )
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.scale = scale
        width = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * width, qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(width, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, dim), mask (num_heads, head_dim) → (B, N, dim)."""
        return self.proj(masked_qkv_attention(x, self.qkv.weight, self.qkv.bias, mask, self.scale))


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm in which channel i counts with weight mask_i, its output ⊙ mask, see `masked_layer_norm`.

    Args:
        num_channels: D.
        eps: added to the variance.
        bias: whether to add one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_channels, eps=eps, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (..., num_channels), mask (num_channels,) → the same shape."""
        return masked_layer_norm(x, self.weight, self.bias, mask, self.eps)
