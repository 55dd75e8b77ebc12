"""Masked image modelling: how many patches are hidden, which, and that only their pixels count."""

import torch
import torch.nn.functional as F

from ofb.supernet.masked_images import TokenArea, draw_areas, reconstruction_loss, replace_patches
from ofb_kernels import local_norm


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


def test_areas_of_several_patches_are_masked_as_a_whole():
    area = TokenArea(pixels=(8, 8), rows=2, columns=3, patches=2)  # 4 × 6 patches
    areas, masked = torch.tensor([[4, 0], [2, 1]]), torch.tensor([True, False])
    embeddings, mask_token = torch.randn(2, 24, 5), torch.randn(1, 1, 5)
    replaced = (replace_patches(embeddings, area, areas, masked, mask_token) == mask_token).all(2).view(2, 4, 6)
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[0, 2:4, 2:4] = expected[1, 0:2, 4:6] = True
    assert torch.equal(replaced, expected)


def test_reconstruction_counts_masked_pixels_only():
    images = torch.randn(2, 3, 8, 12)  # 4 × 6 patches
    reconstruction = torch.randn_like(images)
    error = (reconstruction - local_norm(images)).abs()
    expected = torch.cat([error[0, :, 2:4, 4:6].flatten(), error[1, :, 6:8, 0:2].flatten()]).mean()
    decoded = F.pixel_unshuffle(reconstruction, 2).flatten(2).mT  # what the decoder gives before its pixel shuffle
    patches = torch.tensor([[8, 3], [18, 0]])
    drawn = decoded.take_along_dim(patches[..., None], 1)
    loss = reconstruction_loss(drawn, images, patches, torch.tensor([True, False]), pixels=(2, 2))
    torch.testing.assert_close(loss, expected)
