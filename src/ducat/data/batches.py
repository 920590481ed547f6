"""Batches for training: a function of the seed, the epoch and the step, whatever the device and number of processes."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ducat.data.augment import Augmentation
from ducat.data.images import Images, floats
from ducat.seeding import generator

RESIDENT_BYTES = 4 * 2**30
"""Larger sets of images stay where they are, mapped from their file, and are fetched batch by batch."""

WORKERS = 2
"""Threads that fetch the next batches of such a set: enough to hide a disk, since a GPU does the augmentation."""


class Batches:
    """Shuffled, augmented batches of images that live on the device, or are streamed to it if they are large.

    Every draw depends on the seed, the epoch and the step alone, and is made for the global batch. So an epoch can be
    entered at any step, and any number of processes sees the same batches: each takes its rows of them.

    Args:
        images: the training images; up to `RESIDENT_BYTES` of them are moved to `device` once, as uint8.
        batch_size: rows of the global batch, over all processes.
        seed: the run's seed.
        augment: what each view goes through; None leaves the images as they are.
        device: where the batches are made.
        views: how many independent augmentations of each image; more than 1 puts a dimension in front.
        drop_last: leave out an epoch's last batch when it would be short.
        rank: this process's number, in [0, world_size).
        world_size: how many processes share the global batch.

    Raises:
        ValueError: the batch size does not fit the number of images or of processes.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int,
        augment: Augmentation | None,
        device: torch.device | str = "cpu",
        views: int = 1,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
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
        self.streams = images.images.nbytes > RESIDENT_BYTES
        self.images = images if self.streams else images.to(device)
        self.device = device
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.views = views
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size

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
        """
        order = torch.randperm(len(self.images), generator=generator(self.seed, "order", epoch))
        batches = order.split(self.batch_size)[start_step : len(self)]
        for step, (rows, batch) in enumerate(zip(batches, self._fetch(batches), strict=True), start_step):
            views = [self._view(batch.images, epoch, step, view, len(rows)) for view in range(self.views)]
            yield floats(torch.stack(views) if self.views > 1 else views[0]), batch.labels

    def _mine(self, total: int) -> tuple[int, int]:
        start, stop = (total * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return start, stop

    def _fetch(self, batches: Sequence[Tensor]) -> Iterator[Images]:
        mine = (rows[slice(*self._mine(len(rows)))] for rows in batches)
        if not self.streams:
            yield from (self.images.select(rows.to(self.images.labels.device)) for rows in mine)
            return
        with ThreadPoolExecutor(WORKERS) as pool:
            waiting: deque[Future[Images]] = deque()
            for rows in mine:
                waiting.append(pool.submit(self.images.select, rows))
                if len(waiting) > 2 * WORKERS:
                    yield waiting.popleft().result().to(self.device)
            while waiting:
                yield waiting.popleft().result().to(self.device)

    def _view(self, images: Tensor, epoch: int, step: int, view: int, total: int) -> Tensor:
        if self.augment is None:
            return images
        return self.augment(
            images, generator(self.seed, "augmentation", epoch, step, view), self._mine(total)[0], total
        )
