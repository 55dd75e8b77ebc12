"""Small image sets in memory: many short trainings on few cores spend their time on the networks, not on reading."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_dataset
from torch import Tensor

from ofb.engine.data import Loaders

PADDING = 2  # training images move by up to this many pixels


class Batches:
    """A loader of images that lie in memory, (B, C, H, W) and class indices (B,).

    Training batches are shuffled, shifted and mirrored, all from torch's global generator.
    """

    def __init__(self, images: Tensor, targets: Tensor, batch_size: int, *, train: bool) -> None:
        self.images, self.targets, self.batch_size, self.train = images, targets, batch_size, train

    def __len__(self) -> int:
        return len(self.images) // self.batch_size if self.train else -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images)) if self.train else torch.arange(len(self.images))
        for indices in order.split(self.batch_size)[: len(self)]:
            images = self.images[indices]
            yield _shifted_and_mirrored(images) if self.train else images, self.targets[indices]


def small_images(data: str, data_dir: str, batch_size: int, train_images: int, val_images: int) -> Loaders:
    """Loaders of a data set that timm names torch/…: training and validation images from its training split, disjoint.

    Args:
        data: such as torch/fashion_mnist.
        data_dir: its folder.
        batch_size: images in a batch.
        train_images: how many to train on, always the same ones.
        val_images: how many choose the best epoch, always the same ones.
    """
    images, targets = _tensors(data, data_dir, "train")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    train, val = order[:train_images], order[len(order) - val_images :]
    mean, std = (statistic(images[train], (0, 2, 3), keepdim=True) for statistic in (torch.mean, torch.std))
    images = (images - mean) / std
    test_images, test_targets = _tensors(data, data_dir, "validation")
    return Loaders(
        train=Batches(images[train], targets[train], batch_size, train=True),
        val=Batches(images[val], targets[val], 500, train=False),
        test=Batches((test_images - mean) / std, test_targets, 500, train=False),
    )


def _tensors(data: str, data_dir: str, split: str) -> tuple[Tensor, Tensor]:
    """All images (N, C, H, W), 0 to 1, and class indices of a split."""
    try:
        dataset = create_dataset(data, root=data_dir, split=split)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"data_dir: expected {data} in {data_dir} as torchvision lays it out (python -m "
            f"benchmarks.quality.fashion_mnist does so with Fashion-MNIST), got: {error}"
        ) from error
    arrays = [np.asarray(image, dtype=np.float32) / 255 for image, _ in dataset]
    images = torch.from_numpy(np.stack(arrays))
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([int(target) for _, target in dataset])


def _shifted_and_mirrored(images: Tensor) -> Tensor:
    """Each image moved by up to PADDING pixels each way and mirrored every other time, edges repeated."""
    count, _, height, width = images.shape
    padded = F.pad(images, [PADDING] * 4, mode="replicate")
    rows = torch.randint(2 * PADDING + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * PADDING + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
