"""What tests share: backends and dtypes of this machine, tiny networks, what two trainings may be compared by."""

from collections.abc import Mapping

import pytest
import timm
import torch
from torch import Tensor, nn

BACKENDS = ("reference", "eager", "triton")


def dtypes_of(*backends: str) -> list:
    """(backend, dtype) pairs; Triton takes no float64 on a GPU, and its interpreter computes garbage in bfloat16."""
    has_gpu = torch.cuda.is_available()
    triton_dtypes = [torch.float32, torch.float16, torch.bfloat16 if has_gpu else torch.float64]
    plain_dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    return [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in backends
        for dtype in (triton_dtypes if backend == "triton" else plain_dtypes)
    ]


def tiny_vit(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    """A small timm model of the named kind: 16 × 16 images, 16 patches."""
    sizes = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    return timm.create_model(name, **(sizes | options))


def tiny_swin(**options) -> nn.Module:
    """A small Swin: 32 × 32 images, 8 × 8 patches, two stages with windows of 4 × 4, the second one shifted."""
    sizes = dict(img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5)
    return timm.create_model("swin_tiny_patch4_window7_224", **(sizes | options))


def determined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What training determines of a network's weights, by name: all but the bias of k in a packed qkv.

    That bias adds the same to all scores of a query, which softmax does not see. Its gradient is rounding alone, and
    Adam's steps turn whatever sign it has into ± the learning rate.
    """
    kept = dict(weights)
    for name in (name for name in weights if name.endswith("qkv.bias")):
        q, _, v = kept[name].chunk(3)
        kept[name] = torch.cat([q, v])
    return kept


def assert_same_training(first: nn.Module, second: nn.Module) -> None:
    """Two networks that were trained alike have the same weights, as far as training determines them."""
    expected = determined(second.state_dict())
    for name, weight in determined(first.state_dict()).items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4, msg=message)
