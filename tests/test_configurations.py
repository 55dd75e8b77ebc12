"""Configurations: which ones a call's kernels have, and the call with one of them."""

import torch

from benchmarks.configurations import Choice, defaults_and_others, with_defaults
from ofb_kernels.kernels import tuning

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
LARGE = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}
SIZES = (1000, 64)


def call(launched: list) -> None:
    """Two kernels with two configurations each, and one with no choice."""
    for kernel, candidates in {"first": (SMALL, LARGE), "second": (LARGE, SMALL), "third": (SMALL,)}.items():
        launch = lambda configuration, kernel=kernel: launched.append((kernel, configuration))  # noqa: E731
        tuning.run_configured(kernel, candidates, SIZES, torch.empty(1), launch)


def test_defaults_and_others():
    defaults, others = defaults_and_others(lambda: call([]))
    assert defaults == [Choice("first", SIZES, SMALL), Choice("second", SIZES, LARGE)]
    assert others == [Choice("first", SIZES, LARGE), Choice("second", SIZES, SMALL)]


def test_a_call_with_another_configuration_of_one_kernel(monkeypatch):
    """Of that kernel alone, whatever would be chosen otherwise."""
    monkeypatch.setattr(tuning, "choose", lambda *_: None)
    launched = []
    with_defaults(lambda: call(launched), Choice("second", SIZES, SMALL))()
    assert launched == [("first", SMALL), ("second", SMALL), ("third", SMALL)]
    launched.clear()
    with_defaults(lambda: call(launched))()
    assert launched == [("first", SMALL), ("second", LARGE), ("third", SMALL)]


def test_in_words():
    choice = Choice("masked_attention.backward_query 2 bytes, 64 wide", SIZES, LARGE)
    assert str(choice) == "backward_query 128×32 w8 s3"
