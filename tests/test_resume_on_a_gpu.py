"""A search on a GPU goes on where it was interrupted: to the bit with `deterministic`, else within rounding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ofb
from ofb.engine import stage
from ofb.engine.config import SearchConfig
from tests.common import assert_same_training
from tests.test_search import OPTIONS, fresh_supernet
from tests.test_train import assert_same_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_within_rounding(tmp_path, cuda_graph):
    """Two epochs of search: long enough to be interrupted, too short for a candidate's fate to turn on rounding."""
    straight, resumed = straight_and_resumed(tmp_path, epochs=2, finetune_epochs=0, amp=False, cuda_graph=cuda_graph)
    assert_same_training(resumed, straight)


def test_to_the_bit(tmp_path):
    """In a process of its own: cuBLAS has to know before its first product."""
    command = f"from tests.{Path(__file__).stem} import to_the_bit; to_the_bit({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def to_the_bit(folder: str) -> None:
    assert_same_weights(*straight_and_resumed(Path(folder), deterministic=True, amp=True))


def straight_and_resumed(folder: Path, **options) -> tuple[nn.Module, nn.Module]:
    """The networks of one search that ran through, and of one that was interrupted in its second epoch."""
    options = OPTIONS | {"device": "cuda"} | options

    def config(run: str, **more) -> SearchConfig:
        return SearchConfig(**options | more, output=str(folder / run))

    def stop_there(self, losses):
        stepped(self, losses)
        if (self.epoch, self.batches) == (1, 2):
            raise KeyboardInterrupt

    straight, stepped = searched(config("straight")), stage.Stage.stepped
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stage.Stage, "stepped", stop_there)
        searched(config("resumed"))
    return straight, searched(config("resumed", resume=True))


def searched(config: SearchConfig) -> nn.Module:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 3, 16, 16), torch.arange(64) % 5)
    train, val = DataLoader(data, 16, shuffle=True, drop_last=True), DataLoader(data, 32)
    return ofb.search(fresh_supernet(config), train, val, config)
