"""Which samples make a batch, and a loader that resumes where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_rec.data.batch import Batch
from lightning_rec.data.collate import BatchIndex


class LengthSampler(DistributedSampler[Any]):
    """Batches of similar length, so that short histories do not pay for the padding of long ones.

    In training, samples are shuffled, sorted by length within pools of some batches, cut into batches, and the batches
    are shuffled. Every sample comes once an epoch: when ``n`` ranks share the work, the number of batches is rounded up
    to a multiple of ``n`` by making batches smaller, never by repeating or dropping samples. In evaluation, samples are
    sorted by length and dealt to the ranks, so that each user is evaluated once; where there are as many samples as
    ranks, each rank has at least one batch, since Lightning refuses loaders that are empty on one rank only.

    It is a ``DistributedSampler`` so that Lightning leaves it as it is and calls ``set_epoch``.

    Args:
        lengths: ``(s,)`` length of each sample, or any other number in which the samples of a batch should be alike.
        batch_size: samples a batch, on each rank. Where it is 1 in training and the samples do not divide by the number
            of ranks, some batches have two.
        shuffle: True in training.
        seed: seed of the order and of what batches draw.
        rank: this process.
        world_size: number of processes.
        pool: number of batches that are sorted together; a larger one pads less and shuffles less.

    Raises:
        ValueError: when there are fewer training samples than processes.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pool: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
        if shuffle and 0 < len(lengths) < world_size:
            raise ValueError(f"{world_size} processes cannot share {len(lengths)} training samples: use fewer devices.")
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.num_replicas = world_size
        self.pool = pool
        self.epoch = 0

    def __len__(self) -> int:
        if self.shuffle:
            steps = -(-self._batches() // self.num_replicas)
            return min(steps, len(self.lengths) // self.num_replicas)
        return len(range(self.rank, self._batches(), self.num_replicas))

    def _batches(self) -> int:
        """Batches of all ranks that hold all samples."""
        return max(-(-len(self.lengths) // self.batch_size), min(self.num_replicas, len(self.lengths)))

    def __iter__(self) -> Iterator[BatchIndex]:
        batches = self._training() if self.shuffle else self._evaluation()
        for number, samples in enumerate(batches):
            yield BatchIndex(samples, (self.seed, self.epoch, number, self.rank))

    def _evaluation(self) -> list[NDArray[np.int64]]:
        # longest first: if memory does not suffice, that shows at once
        order = np.argsort(-self.lengths, kind="stable")
        if len(order) <= self.batch_size * self.num_replicas:
            return np.array_split(order, max(self._batches(), 1))[self.rank : self._batches() : self.num_replicas]
        starts = range(self.rank * self.batch_size, len(order), self.batch_size * self.num_replicas)
        return [order[start : start + self.batch_size] for start in starts]

    def _training(self) -> list[NDArray[np.int64]]:
        steps = len(self)
        if steps == 0:
            return []
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        # array_split gives sizes that differ by one at most, and none above batch_size
        bounds = np.cumsum([0] + [len(part) for part in np.array_split(order, steps * self.num_replicas)])
        for first in range(0, steps * self.num_replicas, self.pool * self.num_replicas):
            last = min(first + self.pool * self.num_replicas, steps * self.num_replicas)
            pool = order[bounds[first] : bounds[last]]
            order[bounds[first] : bounds[last]] = pool[np.argsort(self.lengths[pool], kind="stable")]
        # neighbours in length form one step, so that ranks have equal work
        numbers = rng.permutation(steps) * self.num_replicas + self.rank
        return [order[bounds[number] : bounds[number + 1]] for number in numbers]


class ResumableLoader(DataLoader[Batch]):
    """A loader whose state says how many batches of which epoch have been given out.

    Lightning stores the state in checkpoints and gives it back on resume, so that a run that stopped in the middle of
    an epoch goes on with the batches that it has not seen.
    """

    _epoch: int = 0
    _consumed: int = 0
    _skip: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, not torch's private iterator class
        sampler = self.sampler
        assert isinstance(sampler, LengthSampler)
        skip = 0
        if self._skip is not None:
            epoch, consumed = self._skip
            self._skip = None
            if epoch == sampler.epoch and consumed < len(sampler):
                skip = consumed
        self._epoch, self._consumed = sampler.epoch, skip
        if skip == 0:
            for batch in super().__iter__():
                self._consumed += 1
                yield batch
            return
        remaining = _Rest(sampler, skip)
        rest = DataLoader(
            self.dataset,
            sampler=remaining,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            generator=self.generator,
        )
        for batch in rest:
            self._consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches given out in it."""
        epoch, batches = (self._epoch, self._consumed) if self._skip is None else self._skip
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration of the stored epoch starts after the stored number of batches."""
        self._skip = (state["epoch"], state["batches"])


class _Rest(DistributedSampler[Any]):
    """What is left of a sampler after some batches."""

    def __init__(self, sampler: LengthSampler, skip: int) -> None:
        self.sampler = sampler
        self.skip = skip

    def __len__(self) -> int:
        return len(self.sampler) - self.skip

    def __iter__(self) -> Iterator[BatchIndex]:
        for number, index in enumerate(self.sampler):
            if number >= self.skip:
                yield index


def _same(batch: Any) -> Any:
    return batch


def make_loader(dataset: Dataset[Batch], sampler: LengthSampler, num_workers: int = 0) -> ResumableLoader:
    """The loader of the batches that ``sampler`` asks ``dataset`` for."""
    return ResumableLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=_same,
        # its own, so that making an iterator does not move the random numbers of training
        generator=torch.Generator().manual_seed(sampler.seed),
        pin_memory=torch.cuda.is_available(),
    )
