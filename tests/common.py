"""Which backends and dtypes a test runs with on this machine."""

import pytest
import timm
import torch

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


def tiny_vit(name: str = "vit_tiny_patch16_224", **options) -> torch.nn.Module:
    """A small timm model of the named kind: 16 × 16 images, 16 patches."""
    sizes = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    return timm.create_model(name, **(sizes | options))


def tiny_swin(**options) -> torch.nn.Module:
    """A small Swin: 32 × 32 images, 8 × 8 patches, two stages with windows of 4 × 4, the second one shifted."""
    sizes = dict(img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5)
    return timm.create_model("swin_tiny_patch4_window7_224", **(sizes | options))
