"""Randomness depends on where a run stands, on all of it and on nothing else."""

import itertools
import random

import numpy as np
import torch

from ofb.engine.seeding import seed_everything


def drawn(*place) -> tuple[float, float, float]:
    seed_everything(*place)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_each_place_has_its_own():
    places = list(itertools.product((0, 1), ("search", "finetune"), (0, 1, 2), (0, 1), (0, 1, 2)))
    for generator in zip(*(drawn(*place) for place in places), strict=True):
        assert len(set(generator)) == len(places)


def test_and_the_same_each_time():
    first = drawn(3, "search", 4, 1, 5)
    drawn(0, "train", 0)
    assert drawn(3, "search", 4, 1, 5) == first
