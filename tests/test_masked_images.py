"""Masked image modelling: how many patches are hidden, which, and that only their pixels count."""

import pytest
import torch

import ofb
from ofb.supernet.masked_images import MaskedImages, TokenArea, draw_areas, replace_patches
from ofb_kernels import local_norm
from tests.common import tiny_swin, tiny_vit


def test_masked_patches_keep_their_share():
    embeddings, mask_token = torch.randn(6, 16, 32), torch.randn(1, 1, 32)
    area = TokenArea(pixels=(4, 4), rows=4, columns=4)
    for ratio, expected in [(0.01, 1), (0.15, 3), (0.25, 4)]:
        patches, masked = draw_areas(6, 16, torch.tensor(ratio), most=0.25)
        assert patches.shape == (6, 4)
        assert all(len(set(row)) == 4 for row in patches.tolist())
        assert masked.sum() == expected
        result = replace_patches(embeddings, area, patches, masked, mask_token)
        replaced = (result == mask_token).all(2)
        assert replaced.sum(1).tolist() == [expected] * 6
        assert all(replaced[i, patches[i, masked]].all() for i in range(6))
        assert torch.equal(result[~replaced], embeddings[~replaced])


def test_drawn_are_as_many_as_are_ever_masked():
    for most, ratio, count in [(0.3, 0.3, 5), (0.01, 0.0, 1), (0.0, 0.0, 1)]:
        areas, masked = draw_areas(50, 16, torch.tensor(ratio), most)
        assert areas.shape == (50, count) and masked.all()
        assert len(set(areas[:, 0].tolist())) > 1  # each image has areas of its own


def test_the_mask_token_starts_small_and_takes_the_embeddings_dtype():
    module = MaskedImages(TokenArea(pixels=(2, 2), rows=2, columns=2), 3, first=4096, last=6, most=0.5)
    assert module.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
    for dtype in (torch.bfloat16, torch.float64):
        hidden, _, _ = module.hide(torch.zeros(2, 4, 4096, dtype=dtype), torch.tensor(0.5), None)
        assert hidden.dtype == dtype and hidden.any()


def test_pictures_of_half_precision_images_are_float32():
    module = MaskedImages(TokenArea(pixels=(2, 2), rows=2, columns=2), 3, first=5, last=6, most=0.5)
    images = torch.randn(2, 3, 4, 4).bfloat16()
    pictures = module.pictures(torch.randn(2, 4, 6), images, *draw_areas(2, 4, torch.tensor(0.5), 0.5), None)
    assert torch.equal(pictures[0], local_norm(images.float())) and pictures[2].dtype == torch.float32


def test_areas_of_several_patches_are_masked_as_a_whole():
    area = TokenArea(pixels=(8, 8), rows=2, columns=3, patches=2)  # 4 × 6 patches
    areas, masked = torch.tensor([[4, 0], [2, 1]]), torch.tensor([True, False])
    embeddings, mask_token = torch.randn(2, 24, 5), torch.randn(1, 1, 5)
    replaced = (replace_patches(embeddings, area, areas, masked, mask_token) == mask_token).all(2).view(2, 4, 6)
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[0, 2:4, 2:4] = expected[1, 0:2, 4:6] = True
    assert torch.equal(replaced, expected)


@pytest.mark.parametrize("positions", [None, torch.tensor([1, 2, 5, 7, 8, 10])])
def test_pictures_show_what_the_loss_is_of(positions):
    images = torch.randn(2, 3, 9, 14)  # the last row and the last columns belong to no area
    module = MaskedImages(TokenArea(pixels=(2, 4), rows=4, columns=3), 3, first=5, last=6, most=0.5)
    count = 12 if positions is None else len(positions)
    tokens, ratio = torch.randn(2, count, 6), torch.tensor(0.25)
    _, drawn, masked = module.hide(torch.randn(2, 12, 5), ratio, positions)
    target, hidden, rebuilt = module.pictures(tokens, images, drawn, masked, positions)
    assert torch.equal(target, local_norm(images))
    is_hidden = hidden != target
    assert not hidden[is_hidden].any() and torch.equal(rebuilt[~is_hidden], target[~is_hidden])
    assert is_hidden.sum() == len(images) * masked.sum() * 3 * 2 * 4
    error = (rebuilt - target)[is_hidden].abs().mean()
    torch.testing.assert_close(error, module.loss(tokens, images, drawn, masked, positions))


@pytest.mark.parametrize(
    ("model", "space"),
    [(tiny_vit, {}), (tiny_vit, {"tokens": True}), (tiny_swin, {})],
    ids=["vit", "vit with a searched number of patches", "swin"],
)
def test_a_supernet_shows_what_it_rebuilds(model, space):
    supernet = ofb.Supernet(
        model(), "60%", space=ofb.SearchSpace(**space), epochs=2, steps_per_epoch=4, mask_ratio_end=0.25
    )
    images = torch.randn(3, 3, *supernet.model.patch_embed.img_size)
    target, hidden, rebuilt = supernet.reconstruct(images)
    assert torch.equal(target, local_norm(images)) and not rebuilt.requires_grad
    assert 0 < (hidden == 0).float().mean() < 0.3 and not torch.equal(rebuilt, target)


def test_without_masked_image_modelling_there_is_nothing_to_show():
    with pytest.raises(ValueError, match="reconstruct: expected a supernet with masked image modelling"):
        ofb.Supernet(tiny_vit(), epochs=1, steps_per_epoch=4).reconstruct(torch.randn(1, 3, 16, 16))
