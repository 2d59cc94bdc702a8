"""The order of the data: seeded, the same for any number of processes, and resumable at any step.

Epoch e visits the examples in a permutation drawn from (seed, e). The epochs follow each other without a gap, and
optimizer step s uses the examples [s * batch_size, (s + 1) * batch_size) of this endless sequence. No example is
dropped, and none is seen twice in an epoch. A batch may span two epochs. The position is a single number. Each process
uses its own contiguous part of a batch, so one process, several processes and accumulation compute the same step.

If the lengths of the examples are given, a batch contains examples of similar length. Each pool of 50 batches is
sorted by length and cut into batches, and the batches are put in random order.

Random operations on the data (augmentation, collation) use generators that are seeded by (seed, step, piece, process).
They repeat exactly after a resume, with any number of workers.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

POOL = 50  # number of batches that are sorted by length together


@dataclass(frozen=True)
class Share:
    """The part of each batch that this process computes.

    Args:
        batch_size: Examples per optimizer step over all processes.
        accumulation: Number of pieces that a process computes one after the other.
        num_processes: Number of processes that share a batch.
        process_index: Index of this process, from 0.
    """

    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    process_index: int = 0

    def __post_init__(self):
        pieces = self.accumulation * self.num_processes
        if self.batch_size % pieces:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation x processes = {self.accumulation} x "
                f"{self.num_processes}, so that all pieces have the same size."
            )

    @property
    def pieces(self) -> list[slice]:
        """The slices of a batch, one per accumulation piece of this process."""
        size = self.batch_size // (self.accumulation * self.num_processes)
        first = self.process_index * self.accumulation
        return [slice((first + i) * size, (first + i + 1) * size) for i in range(self.accumulation)]


def mix_seed(*parts: int | str) -> int:
    """Hash integers and words to a 63-bit seed.

    Example:
        >>> mix_seed(0, 1) != mix_seed(1, 0)
        True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, NumPy, torch on the CPU and, if given, on one device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed also queues a call for CUDA before it is initialized, which takes milliseconds.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class _MapBatches(Dataset):
    """Batches of a map-style dataset, addressed by (step, position of the first example)."""

    def __init__(self, data: Any, share: Share, seed: int, collate: Callable, lengths: Sequence[Any] | None):
        self.data, self.share, self.seed, self.collate, self.lengths = data, share, seed, collate, lengths
        self._epoch, self._order = -1, []

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[tuple[int, int], Any]:
        step, start, piece = key
        part = self.share.pieces[piece]
        indices = [self._index(start + offset) for offset in range(part.start, part.stop)]
        seed_everything(mix_seed(self.seed, "data", step, piece, self.share.process_index))
        fetch = getattr(self.data, "__getitems__", None)
        examples = fetch(indices) if fetch else [self.data[index] for index in indices]
        return divmod(start + self.share.batch_size, len(self.data)), self.collate(examples)

    def _index(self, place: int) -> int:
        epoch, place = divmod(place, len(self.data))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.data), generator=generator).tolist()
            if self.lengths is not None:
                # The first examples complete the last batch of the previous epoch.
                begun = -epoch * len(self.data) % self.share.batch_size
                self._order = self._order[:begun] + self._bucket(self._order[begun:], generator)
        return self._order[place]

    def _bucket(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Reorder examples so that each batch has similar lengths; examples that do not fill a batch come last."""
        size, groups, rest = self.share.batch_size, [], []
        for first in range(0, len(order), POOL * size):
            pool = sorted(order[first : first + POOL * size], key=self.lengths.__getitem__)
            for start in range(0, len(pool), size):
                group = pool[start : start + size]
                # Shuffled, so that processes and pieces get similar lengths.
                mixed = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
                groups.append(mixed) if len(group) == size else rest.extend(mixed)
        turns = torch.randperm(len(groups), generator=generator).tolist()
        return [example for turn in turns for example in groups[turn]] + rest


class _Steps(Sampler):
    def __init__(self, step: int, start: int, max_steps: int, share: Share):
        self.step, self.start, self.max_steps, self.share = step, start, max_steps, share

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for step in range(self.step, self.max_steps):
            start = self.start + (step - self.step) * self.share.batch_size
            for piece in range(self.share.accumulation):
                yield step, start, piece


class _StreamBatches(IterableDataset):
    """Batches of a stream. Every process reads the whole stream and keeps its part of each batch."""

    def __init__(self, data: Any, share: Share, seed: int, collate: Callable, *, step: int, position: tuple[int, int]):
        self.data, self.share, self.seed, self.collate = data, share, seed, collate
        self.step, self.position = step, position

    def __iter__(self) -> Iterator[tuple[tuple[int, int], Any]]:
        step, (epoch, offset) = self.step, self.position
        waiting = []
        while True:
            empty = offset == 0
            for example in self._read(epoch, offset):
                offset, empty = offset + 1, False
                waiting.append(example)
                if len(waiting) < self.share.batch_size:
                    continue
                for piece, part in enumerate(self.share.pieces):
                    seed_everything(mix_seed(self.seed, "data", step, piece, self.share.process_index))
                    yield (epoch, offset), self.collate(waiting[part])
                step, waiting = step + 1, []
            if empty:
                raise ValueError(f"train_data ({type(self.data).__name__}) yielded no example in epoch {epoch}.")
            epoch, offset = epoch + 1, 0

    def _read(self, epoch: int, offset: int) -> Iterator[Any]:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        examples = iter(self.data)
        for _ in range(offset):  # `skip()` of datasets would disable the shuffling of shards
            next(examples, None)
        return examples


def _as_is(batch: Any) -> Any:
    return batch


def dataset_length(data: Any, needed_by: str, *, instead: str) -> int:
    """Return the number of examples of a dataset.

    Args:
        data: The dataset.
        needed_by: The flag that needs the length, with its value, for the error message.
        instead: The flag to use for a stream.

    Raises:
        ValueError: If the dataset is a stream, which has no length.
    """
    if not hasattr(data, "__len__"):
        raise ValueError(
            f"{needed_by} needs a dataset with a length, but train_data is a stream. Set {instead} instead."
        )
    return len(data)


def batches(
    data: Any,
    share: Share,
    *,
    seed: int,
    collate: Callable[[list], Any],
    lengths: Sequence[Any] | None = None,
    step: int = 0,
    position: tuple[int, int] = (0, 0),
    max_steps: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Make the loader of the pieces that one process computes, starting at a step.

    Args:
        data: A map-style dataset (`__len__` and `__getitem__`, optionally `__getitems__`) or an iterable one. An
            iterable one is iterated again for every epoch, after `set_epoch(epoch)` if it has this method.
        share: The part of each batch that this process computes.
        seed: Seed of order and augmentation.
        collate: Makes a batch from a list of examples.
        lengths: Length of each example; any sortable values. If given, each batch has similar lengths.
        step: First optimizer step, from 0.
        position: (epoch, number of its examples that are already used) at this step.
        max_steps: The step at which the loader of a map-style dataset ends; the loader of a stream never ends.
        num_workers: Number of loading processes; at most one for a stream, because it is read in order.
        pin_memory: Whether to copy batches to page-locked memory, for faster transfer to a GPU.

    Returns:
        A loader of (position after this step, batch), with `accumulation` batches per step.

    Raises:
        ValueError: If the dataset is empty, or `lengths` does not have one entry per example.
    """
    options = {
        "batch_size": None,
        "collate_fn": _as_is,
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        # The loader draws a base seed for its workers. From the global generator, this would change dropout.
        "generator": torch.Generator().manual_seed(mix_seed(seed, "workers")),
    }
    if lengths is not None and len(lengths) != (len(data) if hasattr(data, "__len__") else -1):
        count = f"{len(data)} examples" if hasattr(data, "__len__") else "a stream"
        raise ValueError(f"lengths has {len(lengths)} entries for {count}. Expected one entry per example.")
    if not hasattr(data, "__len__"):
        options["num_workers"] = min(num_workers, 1)
        return DataLoader(_StreamBatches(data, share, seed, collate, step=step, position=position), **options)
    if not len(data):
        raise ValueError("train_data has no examples. A run needs at least one.")
    start = position[0] * len(data) + position[1]
    return DataLoader(
        _MapBatches(data, share, seed, collate, lengths), sampler=_Steps(step, start, max_steps, share), **options
    )
