"""Each process's share of the batches: together the processes see the batches that a single one would.

timm's and torch's samplers for distributed jobs draw an order of their own and fill it up with repeated images; sharing
out the batches of the ordinary loader keeps results independent of the number of processes, and evaluation exact.
"""

import copy
from collections.abc import Iterable, Iterator
from itertools import islice

from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ofb.engine.distributed import in_job, on_main, processes, rank

Loader = Iterable[tuple[Tensor, Tensor]]


def shard(loader: Loader, multiple: int | None = None) -> Loader:
    """This process's share of each batch of a loader; outside a job the loader itself.

    Of a DataLoader each process reads its own images only, in the order that the first process draws. Of any other
    iterable, which must yield the same in all processes, it takes its part of each batch. What is shared out already
    stays as it is: loaders with a sampler for distributed jobs, and data sets that are read as a stream, which timm's
    readers divide among the processes.

    Args:
        loader: batches of images (B, C, H, W) and targets (B, ...), with a length.
        multiple: for training, of what the size of each share must be a multiple; if None, batches may be shared out
            unevenly.
    """
    if not in_job() or isinstance(loader, Shares | Slices):
        return loader
    if isinstance(loader, PrefetchLoader):
        loader = copy.copy(loader)
        loader.loader = shard(loader.loader, multiple)
        return loader
    if not isinstance(loader, DataLoader):
        return Slices(loader, multiple)
    if isinstance(loader.dataset, IterableDataset) or hasattr(loader.sampler, "num_replicas"):
        return loader
    return Slices(loader, multiple) if loader.batch_sampler is None else Shares(loader, multiple)


def loader_batch_size(batch_size: int, dataset: Dataset) -> int:
    """Batch size to make a loader with that `shard` is given: a stream comes in shares from the start.

    Raises:
        ValueError: a stream's batches cannot be shared out evenly.
    """
    if not isinstance(dataset, IterableDataset):
        return batch_size
    _check_size(batch_size, multiple=1)
    return batch_size // processes()


class Shares:
    """A DataLoader's batches, of which each process loads its share."""

    def __init__(self, loader: DataLoader, multiple: int | None) -> None:
        self.loader, self.multiple = loader, multiple

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = on_main(self._batches)
        for batch in batches:
            _check_size(len(batch), self.multiple)
        shares = [batch[rank() :: processes()] for batch in batches]
        loader = self.loader
        yield from DataLoader(
            loader.dataset,
            batch_sampler=[share for share in shares if share],
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
        )

    def _batches(self) -> list[list[int]]:
        """The indices of an epoch's batches, drawn from the generators just as the loader itself does."""
        indices = DataLoader(
            _Indices(), batch_sampler=self.loader.batch_sampler, collate_fn=list, generator=self.loader.generator
        )
        return list(islice(indices, len(self.loader)))


class _Indices(Dataset):
    """A data set whose items are their own indices."""

    def __getitem__(self, index: int) -> int:
        return index


class Slices:
    """The batches of any iterable, of which each process keeps its part."""

    def __init__(self, loader: Loader, multiple: int | None) -> None:
        self.loader, self.multiple = loader, multiple

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in self.loader:
            _check_size(len(images), self.multiple)
            if len(images) > rank():
                yield images[rank() :: processes()], targets[rank() :: processes()]


def _check_size(images: int, multiple: int | None) -> None:
    if multiple is None or images % (processes() * multiple) == 0:
        return
    parts = "" if multiple == 1 else f" × {multiple} for mixup or --grad-accum-steps"
    raise ValueError(
        f"batch_size: expected a multiple of {processes() * multiple} ({processes()} processes{parts}), got a batch of "
        f"{images}; change --batch-size, or in a loader of your own its batch size and drop_last=True"
    )
