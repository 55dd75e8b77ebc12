"""Candidate sizes against the table of the method."""

import pytest

from ofb.supernet.search_space import attention_candidates, embed_candidates, mlp_candidates


@pytest.mark.parametrize(("width", "step", "count"), [(192, 6, 17), (384, 12, 17), (768, 12, 33), (96, 3, 17)])
def test_residual_width(width, step, count):
    channels = embed_candidates(width).channels
    assert channels == tuple(range(width // 2, width + 1, step))
    assert len(channels) == count


@pytest.mark.parametrize(
    ("heads", "expected"),
    [(6, (2, 4, 6)), (12, (2, 4, 6, 8, 10, 12)), (3, (2, 3)), (1, (1,)), (2, (2,)), (5, (2, 4, 5))],
)
def test_heads(heads, expected):
    assert attention_candidates(heads, 64).heads == expected


def test_channels_of_a_head():
    assert attention_candidates(6, 64).channels == (16, 24, 32, 40, 48, 56, 64)


@pytest.mark.parametrize("hidden", [768, 1536, 3072])
def test_hidden(hidden):
    assert mlp_candidates(hidden).channels == tuple(range(hidden // 4, hidden + 1, hidden // 8))


@pytest.mark.parametrize("size", [1, 5, 17, 50, 100])
def test_odd_sizes_ascend_and_end_full(size):
    for candidates in (embed_candidates(size), mlp_candidates(size), attention_candidates(size, size)):
        for sizes in (candidates.heads, candidates.channels):
            assert list(sizes) == sorted(set(sizes))
            assert sizes[0] >= 1
        assert candidates.channels[-1] == size
