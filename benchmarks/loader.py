"""How fast training images are made ready: ducat's batches beside a plain per-image pipeline, and beside kornia.

    python -m benchmarks.loader [--images 50000] [--size 32] [--batch 128] [--seconds 5]

Random images, because the content does not matter to the speed. On the CPU, rates are images for each second that a
core worked, which other work on the machine does not change. kornia is measured where it is installed.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ducat.data import Augmentation, Batches
from ducat.data import batches as ducat_batches
from ducat.data.images import Images, floats

PADDING = 4
BASE = Augmentation(PADDING, flip=True)


class PlainPipeline(Dataset[tuple[Tensor, int]]):
    """One image at a time through Pillow: pad, crop, flip, to a tensor; as torchvision's transforms do it."""

    def __init__(self, images: Images) -> None:
        self.arrays = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.arrays[index]), PADDING)
        left, top = torch.randint(2 * PADDING + 1, (2,)).tolist()
        image = image.crop((left, top, left + image.width - 2 * PADDING, top + image.height - 2 * PADDING))
        if torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, self.labels[index]


def rate(batches: Callable[[], Iterator[Any]], seconds: float, clock: Callable[[], float]) -> float:
    """Return images a second by `clock` over about `seconds`, after a warm-up of three batches."""
    iterator, count = batches(), 0
    for _ in range(3):
        next(iterator)
    start = clock()
    while clock() - start < seconds:
        # Many batches for a look at the clock, which waits for the GPU.
        for _ in range(20):
            batch = next(iterator, None)
            if batch is None:
                iterator = batches()
            else:
                count += len(batch[1])
    return count / (clock() - start)


def wall() -> float:
    """Return the time by the clock on the wall, once the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def kornia_batches(images: Images, batch_size: int, device: str) -> Callable[[], Iterator[Any]] | None:
    """Return the same crop and flip by kornia on resident images, or None where it is not installed."""
    try:
        from kornia.augmentation import AugmentationSequential, RandomCrop, RandomHorizontalFlip
    except ImportError:
        return None
    augment = AugmentationSequential(RandomCrop(images.images.shape[2:], padding=PADDING), RandomHorizontalFlip())
    there = images.to(device)

    def batches() -> Iterator[Any]:
        for rows in torch.randperm(len(there)).split(batch_size):
            batch = there.select(rows.to(device))
            yield augment(floats(batch.images)), batch.labels

    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    arguments = parser.parse_args()

    random = torch.Generator().manual_seed(0)
    shape = (arguments.images, 3, arguments.size, arguments.size)
    labels = torch.arange(arguments.images) % 10
    images = Images(torch.randint(256, shape, generator=random, dtype=torch.uint8), labels, torch.arange(len(labels)))
    strong = Augmentation(PADDING, flip=True, autoaugment=True, cutout=arguments.size // 2)

    rows: list[tuple[str, str, float]] = []

    def measure(name: str, augmentation: str, batches: Callable[[], Iterator[Any]], per_core: bool) -> None:
        clock = time.process_time if per_core else wall
        rows.append(
            (f"{name}{' (per core)' if per_core else ''}", augmentation, rate(batches, arguments.seconds, clock))
        )

    plain = PlainPipeline(images)
    measure("one image at a time", "crop, flip", partial(iter, DataLoader(plain, arguments.batch, shuffle=True)), True)
    if torch.cuda.is_available():
        loader = DataLoader(plain, arguments.batch, shuffle=True, num_workers=torch.get_num_threads())
        measure(f"one image at a time, {loader.num_workers} workers", "crop, flip", partial(iter, loader), False)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if kornia := kornia_batches(images, arguments.batch, device):
            measure(f"kornia on resident images, {device}", "crop, flip", kornia, device == "cpu")
        for title, augment in (("crop, flip", BASE), ("crop, flip, AutoAugment, cutout", strong)):
            for place, limit in (("resident", images.images.nbytes), ("streamed", 0)):
                ducat_batches.RESIDENT_BYTES = limit
                batches = Batches(images, arguments.batch, seed=0, augment=augment, device=device)
                measure(f"ducat, {place}, {device}", title, partial(batches.epoch, 0), device == "cpu")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"torch {torch.__version__}, {platform.machine()}{gpu}")
    print(f"{arguments.images:,} images of {arguments.size} x {arguments.size}, batches of {arguments.batch}\n")
    print("| loader | augmentation | images/s |\n| --- | --- | ---: |")
    for name, augmentation, measured in rows:
        print(f"| {name} | {augmentation} | {measured:,.0f} |")


if __name__ == "__main__":
    main()
