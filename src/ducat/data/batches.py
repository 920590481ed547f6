"""Batches for training: a function of the seed, the epoch and the step, whatever the device and number of processes."""

import math
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ducat.data.augment import TRIES, Augmentation
from ducat.data.encoded import Encoded
from ducat.data.images import Images, Lazy, Memory, Source, floats
from ducat.data.own import Items
from ducat.seeding import generator

RESIDENT_BYTES = 4 * 2**30
"""Images in more bytes are not moved to an accelerator, but fetched batch by batch."""

HOST_BYTES = 2**26
"""Images in more bytes than this are not read into the host's memory: the system keeps their file at hand anyhow."""

THREADS = 2
"""Threads that read the next batches from a file: enough to hide a disk."""

MOST_WORKERS = 8
"""Processes that decode images, unless told otherwise, at most."""

AHEAD = 2
"""Batches that each of them is ahead of what is asked for."""


class Batches:
    """Shuffled, augmented batches of images that live on the device, or are streamed to it if they are large.

    Every draw depends on the seed, the epoch and the step alone, and is made for the global batch. So an epoch can be
    entered at any step, and any number of processes sees the same batches: each takes its rows of them.

    Args:
        images: the training images. On a GPU, up to `RESIDENT_BYTES` of prepared ones are moved to it once, as uint8;
            others are fetched as they are needed, and those that are still encoded are decoded by worker processes.
        batch_size: rows of the global batch, over all processes.
        seed: the run's seed.
        augment: what each view goes through; None leaves the images as they are.
        device: where the batches are made.
        views: how many independent augmentations of each image; more than 1 puts a dimension in front.
        drop_last: leave out an epoch's last batch when it would be short.
        rank: this process's number, in [0, world_size).
        world_size: how many processes share the global batch.
        workers: processes that decode images; 0 decodes in this one, None takes the cores there are, `MOST_WORKERS` at
            most. The batches do not depend on it.

    Raises:
        ValueError: the batch size does not fit the number of images or of processes, or the augmentation the images.
    """

    def __init__(
        self,
        images: Source,
        batch_size: int,
        *,
        seed: int,
        augment: Augmentation | None,
        device: torch.device | str = "cpu",
        views: int = 1,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size} is not a positive multiple of {world_size}, the processes there are"
            )
        if drop_last and batch_size > len(images):
            raise ValueError(
                f"batch_size={batch_size} is more than the {len(images)} training images: no batch is full"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is outside [0, {world_size - 1}]")
        if views < 1:
            raise ValueError(f"views={views} is less than 1")
        pixels = images.pixels if isinstance(images, Lazy) else None
        self.decodes = pixels is not None and pixels.decodes
        if augment is not None and augment.resized_crop and not isinstance(pixels, Encoded):
            raise ValueError("resized_crop needs images that are decoded as they come: prepare them from folder:PATH")
        held = isinstance(images, Images) or torch.device(device).type != "cpu"
        # What worker processes decode for a CPU they also augment there, so that training has less to do.
        self.early = self.decodes and torch.device(device).type == "cpu"
        self.streams = self.decodes or images.nbytes > (RESIDENT_BYTES if held else HOST_BYTES)
        self.images = images if self.streams else images.to(device)
        self.device = device
        self._memory = Memory()
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.views = views
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = max(1, min(MOST_WORKERS, cores // world_size)) if workers is None else workers

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return len(self.images) // self.batch_size if self.drop_last else -(-len(self.images) // self.batch_size)

    def epoch(
        self, epoch: int, start_step: int = 0
    ) -> Iterator[tuple[Float[Tensor, "*views batch channels height width"], Int64[Tensor, "batch"]]]:
        """Yield this process's rows of each batch of an epoch: images in [0, 1], and labels.

        Args:
            epoch: which epoch; each has an order and augmentations of its own.
            start_step: the first step to yield; the batches are those that a whole epoch would have yielded.

        Raises:
            ValueError: an image cannot be decoded; the message names it.
            OSError: a process that decodes images has died, or the file cannot be read.
        """
        order = torch.randperm(len(self.images), generator=generator(self.seed, "order", epoch))
        batches = order.split(self.batch_size)[start_step : len(self)]
        fetched = self._decode(batches, epoch, start_step) if self.decodes else self._fetch(batches)
        for step, (rows, (pixels, labels)) in enumerate(zip(batches, fetched, strict=True), start_step):
            views = pixels if self.early else self._augmented(pixels, epoch, step, len(rows))
            yield floats(views if self.views > 1 else views[0], self._memory), labels

    def _mine(self, total: int) -> tuple[int, int]:
        start, stop = (total * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return start, stop

    def _fetch(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels, with a dimension in front, and labels of this process's rows."""
        mine = (rows[slice(*self._mine(len(rows)))] for rows in batches)
        if not self.streams:
            for rows in mine:
                chosen = self.images.select(rows.to(self.images.labels.device))
                yield chosen.images[None], chosen.labels
            return
        with ThreadPoolExecutor(THREADS) as pool:
            waiting: deque[Future[Images]] = deque()

            def first() -> tuple[Tensor, Tensor]:
                chosen = waiting.popleft().result().to(self.device)
                return chosen.images[None], chosen.labels

            for rows in mine:
                waiting.append(pool.submit(self.images.select, rows))
                if len(waiting) > 2 * THREADS:
                    yield first()
            while waiting:
                yield first()

    def _decode(self, batches: Sequence[Tensor], epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same of images that worker processes decode, with as many views in front as differ so far."""
        steps = _Steps(self, batches, epoch, start_step)
        loader = DataLoader(
            steps,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            worker_init_fn=_leave_signals,
            # Else it takes a number from the caller's global generator.
            generator=generator(self.seed, "workers", epoch),
        )
        decoded = iter(loader)
        try:
            for index in count():
                try:
                    shape, labels, error = next(decoded)
                except StopIteration:
                    return
                except RuntimeError as death:
                    if "DataLoader worker" not in str(death):
                        raise
                    reason = " ".join(str(death).split())
                    raise OSError(f"a process that decodes images has died ({reason}): try --data.workers 1") from death
                if error:
                    raise ValueError(error)
                yield steps.place(index, shape).to(self.device), labels.to(self.device)
        finally:
            del decoded  # ends the workers

    def _augmented(self, pixels: Tensor, epoch: int, step: int, total: int, out: Tensor | None = None) -> Tensor:
        """Augment each view of this process's rows; `pixels` has one for all where they do not differ yet.

        The result is in `out` where that is given, which may be the memory of `pixels`.
        """
        shared = [pixels[min(view, len(pixels) - 1)] for view in range(self.views)]
        places = [None] * self.views if out is None else list(out)
        if self.augment is not None:
            draws = [generator(self.seed, "augmentation", epoch, step, view) for view in range(self.views)]
            start = self._mine(total)[0]
            shared = [
                self.augment(images, draw, start, total, place)
                for images, draw, place in zip(shared, draws, places, strict=True)
            ]
        if out is None:
            return torch.stack(shared) if self.views > 1 else shared[0][None]
        for images, place in zip(shared, out, strict=True):
            if images.data_ptr() != place.data_ptr():
                place.copy_(images)
        return out


class _Steps(Dataset[tuple[tuple[int, ...], Tensor, str]]):
    """The steps of an epoch: shape of the pixels, labels of one process's rows, and what was wrong with them, if so.

    The pixels are in `place`: memory that all processes share, one part after the other. New shared memory for each
    step takes as long as a tenth of the decoding.
    """

    def __init__(self, batches: Batches, steps: Sequence[Tensor], epoch: int, start: int) -> None:
        assert isinstance(batches.images, Lazy)
        self.batches, self.images, self.steps, self.epoch, self.start = batches, batches.images, steps, epoch, start
        views = batches.views if self._differ or batches.early else 1
        largest = views * max((self._mine(rows).numel() for rows in steps), default=0) * math.prod(batches.images.shape)
        # The loader hands a step out before the next but `AHEAD` of each worker is begun.
        slots = max(1, min(len(steps), batches.workers * AHEAD + 1))
        self.places = torch.empty((slots, largest), dtype=torch.uint8)
        if batches.workers:
            try:
                self.places.share_memory_()
            except RuntimeError as error:
                raise OSError(
                    f"there is no room for {self.places.nbytes:,} bytes in shared memory: try --data.workers 0, or "
                    "give /dev/shm more (docker: --shm-size)"
                ) from error

    def __len__(self) -> int:
        return len(self.steps)

    def place(self, index: int, shape: Sequence[int]) -> Tensor:
        """Return where a step's pixels are: until the step after it is asked for, they stay."""
        return self.places[index % len(self.places), : math.prod(shape)].view(shape)

    def __getitem__(self, index: int) -> tuple[tuple[int, ...], Tensor, str]:
        mine = self._mine(self.steps[index])
        total = len(self.steps[index])
        try:
            pixels = self._pixels(index, mine)
        except (ValueError, OSError) as error:
            # An error that crosses processes as such comes out with a traceback for a message.
            return (), torch.empty(0), str(error)
        views = self.batches.views if self.batches.early else len(pixels)
        place = self.place(index, (views, *pixels.shape[1:]))
        if self.batches.early:
            self.batches._augmented(pixels, self.epoch, self.start + index, total, place)
        elif pixels.data_ptr() != place.data_ptr():
            place.copy_(pixels)
        return tuple(place.shape), self.images.labels[mine], ""

    @property
    def _differ(self) -> bool:
        """Whether views differ before they are augmented as batches."""
        augment = self.batches.augment
        return isinstance(self.images.pixels, Items) or (augment is not None and augment.resized_crop > 0)

    def _mine(self, rows: Tensor) -> Tensor:
        return rows[slice(*self.batches._mine(len(rows)))]

    def _pixels(self, index: int, mine: Tensor) -> Tensor:
        augment, views, seed = self.batches.augment, range(self.batches.views), self.batches.seed
        rows = self.images.rows[mine]
        if isinstance(self.images.pixels, Items):
            return torch.stack([self.images.pixels.draw(rows, seed, self.epoch, view) for view in views])
        if not self._differ:
            return self.images.pixels.read(rows)[None]
        assert augment is not None
        total = len(self.steps[index])
        draws = [
            torch.rand(total, TRIES, 4, generator=generator(seed, "crop", self.epoch, self.start + index, view))
            for view in views
        ]
        encoded: Any = self.images.pixels
        share = slice(*self.batches._mine(total))
        place = self.place(index, (len(views), len(rows), *self.images.shape))
        pixels: Tensor = encoded.crops(rows, torch.stack(draws)[:, share], augment.resized_crop, place)
        return pixels


def _leave_signals(worker: int) -> None:
    """Let the training process decide when to stop: whoever interrupts it interrupts its workers, too."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
