"""Images that cannot be read: an error that names the file, or counted and left out."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset


class ReadableImages(Dataset):
    """timm's data set of image files, without its silence about those that cannot be read.

    Args:
        dataset: the images.
        skip: leave such images out, each time taking the next one that can be read, instead of raising.

    Raises:
        ValueError: on reading an image, if it cannot be read and is not to be skipped, or if none can.
        RuntimeError: on reading an image, if what is done to it afterwards fails.
    """

    def __init__(self, dataset: ImageDataset, skip: bool) -> None:
        self.dataset, self.skip = dataset, skip
        self.transform: Callable | None = None
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # workers are processes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for later in range(len(self)):
            candidate = (index + later) % len(self)
            if self.unreadable[candidate]:
                continue
            try:
                image, target = self._read(candidate)
            except MemoryError:
                raise
            except Exception as error:  # Pillow raises almost anything on a damaged file
                if not self.skip:
                    reason = str(error) or type(error).__name__
                    raise ValueError(
                        f"data: expected an image in {self._name(candidate)}, got a file that cannot be read "
                        f"({reason}); replace it, or leave such images out with --skip-broken"
                    ) from error
                self.unreadable[candidate] = True
            else:
                return self._transformed(image, candidate), target
        raise ValueError(f"data: expected images, got {len(self)} files of which none can be read")

    def skipped(self) -> list[str]:
        """Files that turned out not to be readable, so far."""
        return [self._name(index) for index in self.unreadable.nonzero().flatten().tolist()]

    @property
    def reader(self) -> Any:
        return self.dataset.reader

    def _read(self, index: int) -> tuple[Image.Image, int]:
        """As timm's data set reads an image, which goes on to the next one, with a warning, where it cannot."""
        file, target = self.reader[index]
        with file, Image.open(file) as image:
            return image.convert(self.dataset.input_img_mode), -1 if target is None else target

    def _transformed(self, image: Image.Image, index: int) -> Any:
        if self.transform is None:
            return image
        try:
            return self.transform(image)
        except MemoryError:
            raise
        except Exception as error:
            raise RuntimeError(f"data: {self._name(index)}: {str(error) or type(error).__name__}") from error

    def _name(self, index: int) -> str:
        return self.dataset.filename(index, absolute=True) or f"image {index}"
