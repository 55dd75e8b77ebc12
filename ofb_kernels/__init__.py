"""Masked layers and bi-masks for vision transformers: every op in reference, eager and Triton form, one public face."""

from ofb_kernels.dispatch import use_backend
from ofb_kernels.ops.bimask import bimask
from ofb_kernels.ops.candidate_statistics import candidate_statistics
from ofb_kernels.ops.local_norm import local_norm
from ofb_kernels.ops.masked_add_layer_norm import masked_add_layer_norm
from ofb_kernels.ops.masked_attention import masked_attention, masked_qkv_attention
from ofb_kernels.ops.masked_layer_norm import masked_layer_norm
from ofb_kernels.ops.masked_linear import masked_linear
from ofb_kernels.ops.masked_mlp import masked_mlp
from ofb_kernels.ops.masked_reconstruction_loss import masked_reconstruction_loss

__all__ = [
    "bimask",
    "candidate_statistics",
    "local_norm",
    "masked_add_layer_norm",
    "masked_attention",
    "masked_layer_norm",
    "masked_linear",
    "masked_mlp",
    "masked_qkv_attention",
    "masked_reconstruction_loss",
    "use_backend",
]
