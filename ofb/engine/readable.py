"""Images that cannot be read: an error that names the file, or counted and left out."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset


class PassesTransform:
    """A data set on another one, whose transform is that one's: timm's loader sets it on the outer one."""

    dataset: Dataset

    @property
    def transform(self) -> Callable | None:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable | None) -> None:
        self.dataset.transform = transform


class ReadableImages(PassesTransform, Dataset):
    """timm's data set of image files, without its silence about those that cannot be read.

    Args:
        dataset: the images.
        skip: leave such images out, each time taking the next one that can be read, instead of raising.

    Raises:
        ValueError: on reading an image, if it cannot be read and is not to be skipped, or if none can.
    """

    def __init__(self, dataset: ImageDataset, skip: bool) -> None:
        dataset._max_retries = 1  # timm would go on to the next images, with a warning
        self.dataset, self.skip = dataset, skip
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # workers are processes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for later in range(len(self)):
            candidate = (index + later) % len(self)
            if self.unreadable[candidate]:
                continue
            try:
                return self.dataset[candidate]
            except (OSError, RuntimeError) as error:
                if not self.skip:
                    name, reason = self.dataset.filename(candidate, absolute=True), self._reason(candidate) or error
                    raise ValueError(
                        f"data: expected an image in {name}, got a file that cannot be read ({reason}); "
                        "replace it, or leave such images out with --skip-broken"
                    ) from error
                self.unreadable[candidate] = True
        raise ValueError(f"data: expected images, got {len(self)} files of which none can be read")

    def skipped(self) -> list[str]:
        """Files that turned out not to be readable, so far."""
        return [self.dataset.filename(index, absolute=True) for index in self.unreadable.nonzero().flatten().tolist()]

    @property
    def reader(self) -> Any:
        return self.dataset.reader

    def _reason(self, index: int) -> str:
        """What stands in the way of reading an image, which timm does not tell."""
        try:
            Image.open(self.dataset.reader[index][0]).load()
        except OSError as error:
            return str(error)
        return ""
