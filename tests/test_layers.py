"""Layers under masks that the families share: patches as a product, linear layers as they are, drop path."""

import copy
from itertools import product

import pytest
import torch
from timm.layers import DropPath, RmsNorm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ofb.supernet import Supernet
from ofb.supernet.families import family_of
from ofb.supernet.families.layers import (
    add_norm,
    adds_bias,
    drop_path_scales,
    linear,
    linear_without_bias,
    patch_embeddings,
    project_patches,
    scale_rows,
)
from ofb_kernels import use_backend
from tests.common import tiny_swin, tiny_vit

CONVOLUTION, PRODUCT = torch.ops.aten.convolution, torch.ops.aten.addmm


def convolved(proj, images):
    return proj(images).flatten(2).mT


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "pixels", "size"), [(2, (16, 16), 4), (3, (15, 22), (3, 7)), (1, (17, 18), (4, 8)), (0, (8, 8), 4)]
)
def test_agrees_with_the_convolution(batch, pixels, size, bias, memory_format, device):
    proj = nn.Conv2d(3, 5, size, size, bias=bias).to(device, torch.float64, memory_format=memory_format)
    images = torch.randn(batch, 3, *pixels, dtype=torch.float64, device=device).to(memory_format=memory_format)
    images.requires_grad_()
    expected, got = convolved(proj, images), project_patches(proj, images)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    cotangent = torch.randn_like(expected)
    inputs = [images, *proj.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad(each, inputs, cotangent) for each in (got, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_errs_no_more_than_rounding_in_float32(device):
    proj, images = nn.Conv2d(3, 384, 16, 16).to(device), torch.randn(2, 3, 224, 224, device=device)
    exact = convolved(proj.double(), images.double())
    error = project_patches(proj.float(), images) - exact
    assert error.norm() < 1e-6 * exact.norm()


def test_a_view_of_images(device):
    proj, images = nn.Conv2d(3, 5, 4, 4).to(device), torch.randn(3, 2, 24, 24, device=device).transpose(0, 1)
    images = images[..., 3:19, ::2]
    torch.testing.assert_close(project_patches(proj, images), convolved(proj, images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    proj, images = nn.Conv2d(3, 8, 4, 4).to(device), torch.randn(2, 3, 16, 16, device=device)
    exact = convolved(proj, images)
    with torch.autocast(device, dtype):
        got = project_patches(proj, images)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)
    got.sum().backward()
    assert proj.weight.grad.dtype == torch.float32


def test_compiled(device):
    torch._dynamo.reset()
    proj, images = nn.Conv2d(3, 8, 4, 4).to(device), torch.randn(2, 3, 16, 16, device=device)
    compiled = torch.compile(project_patches, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(compiled(proj, images), project_patches(proj, images))


def operators(model: nn.Module, device: str) -> set:
    """What embeds images: operators of which operations are counted."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
        images = torch.empty(2, 3, *model.patch_embed.img_size, device=device)
        with use_backend("eager"):  # the package's choice asks the GPU for its capability, and there may be none
            patch_embeddings(model.to(device), images)
    return set(counter.get_flop_counts()["Global"])


@pytest.mark.parametrize("make_model", [tiny_vit, tiny_swin])
def test_on_a_gpu_alone(make_model):
    assert operators(make_model(), "cpu") == {CONVOLUTION}
    assert operators(make_model(), "cuda") == {PRODUCT}


@pytest.mark.parametrize(
    "proj",
    [
        nn.Conv2d(3, 32, 4, 2),
        nn.Conv2d(3, 32, 4, 4, padding=1),
        nn.Conv2d(3, 32, 4, 4, dilation=2),
        nn.Conv2d(3, 33, 4, 4, groups=3),
        nn.Sequential(nn.Conv2d(3, 32, 4, 4)),
    ],
    ids=lambda proj: str(proj),
)
def test_other_projections_stay_as_they_are(proj):
    model = tiny_vit()
    model.patch_embed.proj = proj
    assert operators(model, "cuda") == {CONVOLUTION}


def test_a_linear_layer_with_its_own_forward_keeps_it():
    """Such as a low-rank adapter's: what it adds must not be lost in the search."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, doubled, x = nn.Linear(6, 5), Doubled(6, 5), torch.randn(3, 6)
    torch.testing.assert_close(linear(plain, x), plain(x))
    torch.testing.assert_close(linear(doubled, x), doubled(x))


def test_drop_path_keeps_samples_with_its_probability():
    """One draw for all modules; those that keep everything, or are not training, have no scale."""
    drops = [nn.Identity(), DropPath(0.1), DropPath(0.0), DropPath(0.6), DropPath(0.3).eval()]
    first, few, zero, many, evaluated = drop_path_scales(drops, torch.zeros(20_000, 1))
    assert first is None and zero is None and evaluated is None
    for scale, keep in ((few, 0.9), (many, 0.4)):
        assert torch.equal(scale.unique(), torch.tensor([0.0, 1 / keep]))
        assert abs(scale.mean() - 1) < 5 * ((1 - keep) / keep / 20_000) ** 0.5  # five standard errors


KEEPS = (0.3, 0.5, 0.6, 0.8)  # of each branch: attention and MLP of two blocks


def by_kept_branches(network: nn.Module, branches_of, image: torch.Tensor) -> torch.Tensor:
    """(2, 2, 2, 2, classes): the logits of an image without (0) or with (1) each branch, scaled by 1 / keep."""
    logits = []
    for kept in product((0, 1), repeat=len(KEEPS)):
        scaled = copy.deepcopy(network).eval()
        with torch.no_grad():
            for branch, is_kept, keep in zip(branches_of(scaled), kept, KEEPS, strict=True):
                scale_rows(branch, torch.full((len(branch.weight),), is_kept / keep, dtype=torch.float64))
            logits.append(scaled(image)[0])
    return torch.stack(logits).view(*[2] * len(KEEPS), -1)


@pytest.mark.parametrize("residual_mask", ["stream", "input"])
@pytest.mark.parametrize(
    ("make_model", "options"),
    [
        (tiny_vit, {}),
        (tiny_vit, {"norm_layer": "rmsnorm", "init_values": 0.5}),
        (tiny_vit, {"name": "eva02_tiny_patch14_224"}),
        (tiny_swin, {"depths": (1, 1)}),
    ],
    ids=["vit", "vit, RMSNorm", "eva", "swin"],
)
def test_a_supernet_drops_what_the_dense_network_drops(make_model, options, residual_mask):
    """In training every sample is one of those that some branches are left out of, as often as the dense network's."""
    model = make_model(**options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    blocks = list(family_of(model).blocks(model))
    for block, keep in zip(blocks, (KEEPS[:2], KEEPS[2:]), strict=True):
        block.drop_path1, block.drop_path2 = (DropPath(1 - each) for each in keep)
    supernet = Supernet(model, "50%", epochs=4, steps_per_epoch=6, residual_mask=residual_mask)
    image = torch.randn(1, 3, *model.patch_embed.img_size, dtype=torch.float64)

    def branches_of(network):
        network = getattr(network, "model", network)
        return [layer for block in family_of(network).blocks(network) for layer in (block.attn.proj, block.mlp.fc2)]

    samples = 600
    for network in (supernet, copy.deepcopy(model)):
        possible = by_kept_branches(network, branches_of, image)
        with torch.no_grad():
            logits = network.train()(image.expand(samples, -1, -1, -1))
        distances = (logits[:, None] - possible.flatten(0, -2)).abs().amax(-1)
        assert distances.amin(1).max() < 1e-6  # the scales are drawn in float32
        assert torch.pdist(possible.flatten(0, -2)).min() > 1e-3
        kept = torch.stack(torch.unravel_index(distances.argmin(1), possible.shape[:-1])).double()
        for share, keep in zip(kept.mean(1), KEEPS, strict=True):
            assert abs(share - keep) < 5 * (keep * (1 - keep) / samples) ** 0.5  # five standard errors
        assert kept.corrcoef().fill_diagonal_(0).abs().max() < 5 / samples**0.5  # each branch by itself


def test_add_norm_drops_the_branches_of_samples():
    x, branch, scale = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.tensor([0.0, 2.0, 1.0])
    mask, expected = torch.rand(8), x.clone()
    expected += scale[:, None, None] * branch * mask
    for norm in (nn.LayerNorm(8), RmsNorm(8)):
        stream, normalized = add_norm(x, (branch, None), nn.Identity(), scale, mask, norm, None)
        torch.testing.assert_close(stream, expected)
        torch.testing.assert_close(normalized, norm(expected))


def test_the_bias_of_a_branch_is_added_where_its_gradient_costs_nothing(device):
    x = torch.randn(2, 3, 8, device=device)
    for backend, fused in (("triton", True), ("eager", False)):
        with use_backend(backend):
            assert adds_bias(nn.LayerNorm(8), x) == fused
            assert not adds_bias(RmsNorm(8), x)


def test_a_layer_is_taken_apart_only_where_its_forward_is_known(device):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, layer, doubled = torch.randn(2, 3, 8, device=device), nn.Linear(8, 8).to(device), Doubled(8, 8).to(device)
    product, bias = linear_without_bias(layer, x, True)
    assert bias is layer.bias
    torch.testing.assert_close(product + bias, layer(x))
    for each, without in ((layer, False), (doubled, True)):
        whole, bias = linear_without_bias(each, x, without)
        assert bias is None
        torch.testing.assert_close(whole, each(x))
