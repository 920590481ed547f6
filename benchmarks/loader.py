"""How fast training images are made ready: ducat's batches beside a plain per-image pipeline, and beside kornia.

    python -m benchmarks.loader [--images 50000] [--size 32] [--batch 128] [--seconds 5]

Random images, because the content does not matter to the speed. kornia is measured where it is installed.
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


def rate(batches: Callable[[], Iterator[Any]], device: str, seconds: float) -> float:
    """Return images a second over about `seconds`, after a warm-up of three batches."""
    iterator, count = batches(), 0
    for _ in range(3):
        next(iterator)
    _synchronise(device)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = next(iterator, None)
        if batch is None:
            iterator = batches()
            continue
        count += len(batch[1])
    _synchronise(device)
    return count / (time.perf_counter() - start)


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
    for workers in (0, torch.get_num_threads()):
        loader = DataLoader(PlainPipeline(images), arguments.batch, shuffle=True, num_workers=workers)
        measured = rate(partial(iter, loader), "cpu", arguments.seconds)
        rows.append((f"one image at a time, {workers or 'no'} workers", "crop, flip", measured))
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if kornia := kornia_batches(images, arguments.batch, device):
            rows.append((f"kornia on resident images, {device}", "crop, flip", rate(kornia, device, arguments.seconds)))
        for title, augment in (("crop, flip", BASE), ("crop, flip, AutoAugment, cutout", strong)):
            for place, limit in (("resident", images.images.nbytes), ("streamed", 0)):
                ducat_batches.RESIDENT_BYTES = limit
                batches = Batches(images, arguments.batch, seed=0, augment=augment, device=device)
                measured = rate(partial(batches.epoch, 0), device, arguments.seconds)
                rows.append((f"ducat, {place}, {device}", title, measured))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} CPU threads{gpu}")
    print(f"{arguments.images:,} images of {arguments.size} x {arguments.size}, batches of {arguments.batch}\n")
    print("| loader | augmentation | images/s |\n| --- | --- | ---: |")
    for name, augmentation, measured in rows:
        print(f"| {name} | {augmentation} | {measured:,.0f} |")


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
