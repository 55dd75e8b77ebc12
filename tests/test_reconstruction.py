"""Pictures of masked image modelling: one row of images for each step, values in 0 to 1."""

import pytest
import torch

from ofb.engine.reconstruction import DEVIATIONS, in_rows


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_rows_of_images_of_any_channels(channels):
    rows = tuple(torch.randn(2, channels, 64, 64) for _ in range(3))
    picture = in_rows(rows)
    assert picture.shape == (3, 3 * 68 + 4, 2 * 68 + 4) and 0 <= picture.min() and picture.max() <= 1
    expected = (rows[1][1] / (2 * DEVIATIONS) + 0.5).clamp(0, 1)
    if channels not in (1, 3):
        expected = expected.mean(0, keepdim=True)
    torch.testing.assert_close(picture[:, 72:136, 72:136], expected.expand(3, 64, 64))


def test_small_images_are_enlarged():
    assert in_rows((torch.zeros(2, 1, 8, 8),)).shape == (3, 72, 140)
