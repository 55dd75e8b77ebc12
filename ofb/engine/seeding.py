"""Randomness that depends on where a run stands and on nothing before it: no checkpoint needs a generator's state."""

import random

import numpy as np
import torch


def seed_everything(seed: int, stage: str, epoch: int, rank: int = 0, batch: int = 0) -> None:
    """Seed Python's, NumPy's and torch's global generators, those of all GPUs included.

    Args:
        seed: of the run.
        stage: what is being done.
        epoch: of the stage.
        rank: of the process; each has its own randomness.
        batch: of the epoch.
    """
    entropy = [seed, epoch, *stage.encode(), *([rank] if rank or batch else []), *([batch] if batch else [])]
    state = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)
