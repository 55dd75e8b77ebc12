"""Candidate sizes against the table of the method, and what a user may wish of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofb.engine.config import SearchConfig
from ofb.engine.presets import preset
from ofb.supernet.search_space import (
    Candidates,
    SearchSpace,
    attention_candidates,
    embed_candidates,
    mlp_candidates,
)


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


# ---- a user's wishes ----

VIT = {
    "embed": embed_candidates(384),
    "attn0": attention_candidates(6, 64),
    "mlp0": mlp_candidates(1536),
    "attn1": attention_candidates(6, 64),
    "mlp1": mlp_candidates(1536),
}


def narrowed(own: Candidates, name: str = "mlp0", **wishes) -> Candidates:
    """A submodule's candidates beside a second one, which leaves something to search."""
    return SearchSpace(**wishes).narrow({name: own, "mlp9": mlp_candidates(128)})[name]


def test_without_rounding_everything_is_as_published():
    assert SearchSpace(round_to=1).narrow(VIT) == VIT


def test_presets_search_the_published_grids():
    space = SearchConfig(**preset("deit-small-imagenet") | {"data_dir": "/imagenet"}).search_space()
    found = space.narrow(VIT)
    assert found["embed"].channels == tuple(range(192, 385, 12))
    assert found["attn0"] == Candidates((2, 4, 6), (16, 24, 32, 40, 48, 56, 64))
    assert found["mlp1"].channels == tuple(range(384, 1537, 192))


@pytest.mark.parametrize(
    ("own", "round_to", "expected"),
    [
        (embed_candidates(64), 8, (32, 40, 48, 56, 64)),
        (embed_candidates(96), 16, (48, 64, 80, 96)),
        (mlp_candidates(100), 8, (24, 40, 48, 64, 72, 88, 100)),  # the full size stays; 12.5 → 25, 38, 50, …
        (mlp_candidates(128), 8, (32, 48, 64, 80, 96, 112, 128)),
        (embed_candidates(32), 8, tuple(range(16, 33))),  # only 16, 24, 32 would be left
        (mlp_candidates(8), 8, (2, 3, 4, 5, 6, 7, 8)),
        (mlp_candidates(1536), 256, (512, 768, 1024, 1280, 1536)),  # a half goes up
    ],
)
def test_rounding(own, round_to, expected):
    assert narrowed(own, round_to=round_to).channels == expected


@given(st.integers(1, 2000), st.integers(1, 64))
def test_rounded_sizes_are_multiples_or_full(size, round_to):
    for own in (embed_candidates(size), mlp_candidates(size)):
        found = narrowed(own, round_to=round_to).channels
        assert list(found) == sorted(set(found)) and found[-1] == size
        assert found == own.channels or (len(found) >= 4 and all(each % round_to == 0 for each in found[:-1]))


@pytest.mark.parametrize(
    ("head_dim", "round_to", "expected"),
    [
        (64, 32, (16, 24, 32, 40, 48, 56, 64)),  # never to more than 8
        (32, 8, (8, 16, 24, 32)),
        (32, 4, (8, 12, 16, 20, 24, 28, 32)),
        (16, 8, (4, 6, 8, 10, 12, 14, 16)),
        (8, 8, (2, 3, 4, 5, 6, 7, 8)),
    ],
)
def test_rounding_the_channels_of_a_head(head_dim, round_to, expected):
    found = narrowed(attention_candidates(6, head_dim), "attn0", round_to=round_to)
    assert (found.heads, found.channels) == ((2, 4, 6), expected)


def test_frozen_submodules_have_their_full_size_alone():
    found = SearchSpace(freeze=("embed", "attn*"), bounds={"attn0": (0, 0.5)}).narrow(VIT)
    assert found["embed"] == Candidates((1,), (384,))
    assert found["attn0"] == found["attn1"] == Candidates((6,), (64,))
    assert found["mlp0"] == VIT["mlp0"]


def test_listed_sizes_are_taken_as_they_are():
    lists = {"mlp*": [100, 1536], "mlp1": [500, 300, 300], "attn0": {"heads": [1, 6]}, "attn1": {"channels": [5]}}
    found = SearchSpace(candidates=lists).narrow(VIT)
    assert found["mlp0"].sizes == [(1, 100), (1, 1536)]
    assert found["mlp1"].sizes == [(1, 300), (1, 500)]
    assert {(1, 16), (6, 64)} <= set(found["attn0"].sizes) and len(found["attn0"].sizes) == 14
    assert found["attn1"].sizes == [(2, 5), (4, 5), (6, 5)]
    assert all(each.full == VIT[name].full for name, each in found.items())


def test_bounds_are_shares_of_the_units():
    found = SearchSpace(bounds={"*": (0.5, 1), "mlp*": (0.5, 0.75)}).narrow(VIT)
    assert found["mlp0"].sizes == [(1, 768), (1, 960), (1, 1152)] and found["mlp0"].full == (1, 1536)
    assert {h * c >= 192 for h, c in found["attn0"].sizes} == {True}
    assert (4, 48) in found["attn0"].sizes and (4, 40) not in found["attn0"].sizes


def test_text_means_the_same():
    parsed = SearchSpace.parse(4, ["embed"], ["mlp0=64,96", "attn*=2,4x16", "attn1=2x", "attn2=x8,16"], ["mlp*=0.5:1"])
    attention = {"attn*": {"heads": [2, 4], "channels": [16]}, "attn1": {"heads": [2]}, "attn2": {"channels": [8, 16]}}
    assert parsed == SearchSpace(4, ("embed",), {"mlp0": [64, 96]} | attention, {"mlp*": (0.5, 1.0)})


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"freeze": ["head"]}, "freeze: expected a pattern of embed, attn0, mlp0, attn1, mlp1, got 'head'"),
        ({"candidates": {"mlp7": [4]}}, "candidates: expected a pattern of embed, .* got 'mlp7'"),
        ({"bounds": {"Mlp0": (0, 1)}}, "bounds: expected a pattern of embed, .* got 'Mlp0'"),
        ({"candidates": {"mlp0": [64, 1537]}}, r"from 1 to 1536 as the sizes of mlp0, got \[1537\]"),
        ({"candidates": {"mlp0": [0]}}, r"from 1 to 1536 as the sizes of mlp0, got \[0\]"),
        ({"candidates": {"attn0": {"heads": [7]}}}, r"from 1 to 6 as the heads of attn0, got \[7\]"),
        ({"candidates": {"attn0": {"channels": [2.5]}}}, r"from 1 to 64 as the channels of attn0, got \[2.5\]"),
        ({"candidates": {"mlp0": []}}, "expected at least one of the sizes of mlp0, got an empty list"),
        ({"candidates": {"attn0": [64]}}, "HEADSxCHANNELS on the command line.* for attn0"),
        ({"candidates": {"attn0": {}}}, "HEADSxCHANNELS on the command line.* for attn0"),
        ({"candidates": {"mlp0": {"heads": [1]}}}, "expected a list of sizes for mlp0, which has no heads"),
        ({"freeze": ["*"]}, "expected a submodule left to search.*freeze fewer of embed, attn0"),
        ({"bounds": {"*": (1, 1)}}, "expected a submodule left to search.*widen bounds"),
        ({"bounds": {"mlp0": (0.9, 0.95)}}, "expected some candidate of mlp0 within, got 0.9 to 0.95 .*widen them"),
    ],
)
def test_wishes_that_a_model_cannot_grant(wishes, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(**wishes).narrow(VIT)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"round_to": 0}, "round_to: expected at least 1, got 0"),
        ({"freeze": "embed"}, "freeze: expected a list of patterns, got 'embed'"),
        ({"bounds": {"mlp0": (0.9, 0.5)}}, "expected 0 <= low <= high <= 1 for 'mlp0', got 0.9 and 0.5"),
        ({"bounds": {"mlp0": (0.5, 2)}}, "expected 0 <= low <= high <= 1 for 'mlp0', got 0.5 and 2"),
    ],
)
def test_wishes_that_no_model_could_grant(wishes, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(**wishes)


@pytest.mark.parametrize(
    "wishes",
    [{"candidates": ["mlp0"]}, {"candidates": ["=4"]}, {"candidates": ["mlp0=a"]}, {"bounds": ["mlp0=1"]}],
)
def test_text_that_cannot_be_read(wishes):
    (option, (text,)) = next(iter(wishes.items()))
    with pytest.raises(ValueError, match=f"{option}: expected PATTERN=.*, got '{text}'"):
        SearchSpace.parse(**wishes)


def test_sizes_that_a_family_keeps_cannot_be_listed():
    whole_heads = Candidates((2, 4), (64,))
    assert narrowed(whole_heads, "attn0", candidates={"attn0": {"heads": [3]}}).sizes == [(3, 64)]
    with pytest.raises(ValueError, match="expected 64 alone as the channels of attn0, which stay"):
        narrowed(whole_heads, "attn0", candidates={"attn0": {"channels": [32]}})
