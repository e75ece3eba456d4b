"""Endless, seeded, sharded batches of a data set that can be resumed exactly."""

import itertools
import multiprocessing.util
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from ..argument_checks import LARGEST_SIZE, check_integer, check_size

# Of a scheduler or a user who stops a run.
STOP_SIGNALS = [
    signal.Signals[name]
    for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
    if name in signal.Signals.__members__  # not all are on Windows
]


class TrainingStream:
    """
    Endless batches of one rank's share of a data set, reshuffled from a seed every epoch.

    Its position is (epoch, batches taken in it). A stream with the same arguments that loads the position of another
    continues exactly where that one stood.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset`.
        collate: list of examples -> batch, a dictionary with `counts` (see [`ImageCollator`]).
        batch_size: examples per batch; the last batch of an epoch may be smaller.
        seed: of the shuffle; the same on all ranks.
        rank, world_size: this process and the number of processes.
        shuffle_buffer_size: examples in the shuffle buffer of an `IterableDataset`; a `Dataset` is shuffled whole.
        num_workers: processes that collate; 0 collates in this process.
        max_skipped: images in a row that cannot be decoded before iteration gives up.

    Batches without images are passed over, and their counts added to those of the next batch. Iteration raises
    `ValueError` after `max_skipped` images in a row that cannot be decoded, and when this rank's share is empty.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        collate: Callable[[list[dict]], dict],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer_size: int = 10_000,
        num_workers: int = 0,
        max_skipped: int = 10_000,
    ):
        check_size("batch_size", batch_size)
        check_integer("seed", seed, 0, 2**32 - 1)
        check_size("world_size", world_size)
        check_integer("rank", rank, 0, world_size - 1)
        check_size("shuffle_buffer_size", shuffle_buffer_size)
        check_integer("num_workers", num_workers, 0, LARGEST_SIZE)
        check_size("max_skipped", max_skipped)
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size
        self.seed = int(seed)
        self.rank = rank
        self.world_size = world_size
        self.shuffle_buffer_size = shuffle_buffer_size
        self.num_workers = num_workers
        self.max_skipped = max_skipped
        self.epoch = 0
        self.batches_in_epoch = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches_in_epoch": self.batches_in_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batches_in_epoch = state["epoch"], state["batches_in_epoch"]

    def __iter__(self) -> Iterator[dict]:
        counts = Counter()  # of the batches since the last one with images
        while True:
            skip = self.batches_in_epoch
            batches = self._epoch_batches(skip)
            # A worker takes the signal with which an exiting process stops it for that of a scheduler. The priority is
            # above that of the queues, through which it is told to stop.
            close = multiprocessing.util.Finalize(None, batches.close, exitpriority=100)
            try:
                for batch in batches:
                    self.batches_in_epoch += 1
                    counts.update(batch["counts"])
                    if counts["images"]:
                        yield batch | {"counts": dict(counts)}
                        counts.clear()
                    elif counts["skipped_images"] >= self.max_skipped:
                        raise ValueError(f"none of {counts['skipped_images']} images in a row can be decoded")
            finally:
                close()
            if skip == 0 and self.batches_in_epoch == 0:
                raise ValueError(f"the data set has no examples for rank {self.rank} of {self.world_size}")
            self.epoch, self.batches_in_epoch = self.epoch + 1, 0

    def _epoch_batches(self, skip: int) -> Iterator[dict]:
        """The batches of this rank in the current epoch, without the first `skip`."""
        seed = self.seed + self.epoch
        # Examples are skipped before they are decoded. With workers, whole batches are produced and discarded, because
        # each worker has its own share and random state.
        skip_examples, skip_batches = (0, skip) if self.num_workers else (skip * self.batch_size, 0)
        if isinstance(self.dataset, datasets.IterableDataset):
            dataset = self.dataset.shuffle(seed=seed, buffer_size=self.shuffle_buffer_size)
            dataset = split_dataset_by_node(dataset, self.rank, self.world_size)
            dataset, sampler = (SkipFirst(dataset, skip_examples) if skip_examples else dataset), None
        else:
            dataset, order = self.dataset, np.random.default_rng(seed).permutation(len(self.dataset))
            sampler = order[self.rank :: self.world_size][skip_examples:].tolist()
        loader = DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            worker_init_fn=outlive_stop_signals,
            # Without its own generator a loader would advance the global random state, and break an exact resume.
            generator=torch.Generator().manual_seed(seed),
        )
        with stop_signals_blocked():  # workers unblock them when they can outlive them
            batches = iter(loader)
        yield from itertools.islice(batches, skip_batches, None)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Delays the stop signals of this process, and of those that it starts until they unblock them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_stop_signals(worker: int) -> None:
    """They reach all processes of a run, but the main process needs its workers until it has finished its step. The
    second SIGTERM ends a worker: it is that of the main process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class SkipFirst(torch.utils.data.IterableDataset):
    """A stream without its first `count` examples."""

    def __init__(self, stream: datasets.IterableDataset, count: int):
        self.stream = stream
        self.count = count

    def __iter__(self) -> Iterator[dict]:
        return itertools.islice(self.stream, self.count, None)
