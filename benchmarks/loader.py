"""How fast training images are made ready: ducat's batches beside a plain per-image pipeline, and beside kornia.

    python -m benchmarks.loader [--images 50000] [--size 32] [--batch 128] [--seconds 5]
    python -m benchmarks.loader --stream [--images 2000] [--size 224] [--batch 128] [--rounds 3]

Random images, because the content does not matter to the speed. On the CPU, rates are images for each second that a
core worked, which other work on the machine does not change. kornia is measured where it is installed.

--stream measures JPEG files of 500 x 375 pixels that are decoded as they come, with random resized crops and flips:
from shards, beside a plain DataLoader of one image at a time, and beside nothing but decoding, cropping and resizing;
on one core with one worker, and on two with two. A processor second is of all processes of a loader together.
"""

import argparse
import io
import multiprocessing
import os
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ducat.data import Augmentation, Batches, load, prepare
from ducat.data import batches as ducat_batches
from ducat.data.augment import window
from ducat.data.images import Images, floats

PADDING = 4
BASE = Augmentation(PADDING, flip=True)
FORKED = multiprocessing.get_context("fork")


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


class PlainFiles(Dataset[tuple[Tensor, int]]):
    """JPEG files through Pillow one at a time: random resized crop, flip, to a tensor; as torchvision's transforms."""

    def __init__(self, files: list[bytes], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def cropped(self, index: int) -> Image.Image:
        """Decode an image, cut a random part out and resize it: the least that any loader must do."""
        with Image.open(io.BytesIO(self.files[index])) as image:
            picture = image.convert("RGB")
        box = window(torch.rand(10, 4), (picture.height, picture.width), 0.08)
        return picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)

    def decode(self, rows: Iterable[int]) -> None:
        """Decode images and throw them away."""
        for row in rows:
            self.cropped(row)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.cropped(index)
        if torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, index % 10


def spent(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds by the clock, and of processors in this process and in those that it began and that ended."""

    def processors() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    start, before = time.perf_counter(), processors()
    work()
    return time.perf_counter() - start, processors() - before


def consume(batches: Iterator[Any]) -> None:
    """Take all batches."""
    for _ in batches:
        pass


def stream(count: int, size: int, batch: int, rounds: int) -> None:
    """Print the table of loaders that decode, in rounds that take turns, so that other load falls on all alike."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(count):
        pixels = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        content = io.BytesIO()
        pixels.save(content, "JPEG", quality=90)
        files.append(content.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        for part, members in (("train", files), ("test", files[:10])):
            with tarfile.open(f"{folder}/{part}-0.tar", "w") as archive:
                for number, file in enumerate(members):
                    for kind, body in (("jpg", file), ("cls", str(number % 10).encode())):
                        info = tarfile.TarInfo(f"{number:06d}.{kind}")
                        info.size = len(body)
                        archive.addfile(info, io.BytesIO(body))
        prepare(f"wds:{folder}", size=size, root=folder)
        source = load(f"wds:{folder}", root=Path(folder)).train
        plain = PlainFiles(files[: len(source)], size)
        augment = Augmentation(flip=True, resized_crop=0.08)

        def bare(cores: int) -> None:
            shares = [range(first, len(plain), cores) for first in range(cores)]
            begun = [FORKED.Process(target=plain.decode, args=(share,)) for share in shares]
            for process in begun:
                process.start()
            for process in begun:
                process.join()

        def one_by_one(cores: int) -> None:
            consume(iter(DataLoader(plain, batch, shuffle=True, num_workers=cores)))

        def ours(cores: int) -> None:
            consume(Batches(source, batch, seed=0, augment=augment, workers=cores, drop_last=False).epoch(0))

        loaders = {
            "nothing but decode, crop, resize": bare,
            "one image at a time, `DataLoader`": one_by_one,
            "ducat, shards": ours,
        }
        measured: dict[tuple[str, int], list[tuple[float, float]]] = {}
        everything = sorted(os.sched_getaffinity(0))
        for _ in range(rounds):
            for cores in range(1, min(2, len(everything)) + 1):
                os.sched_setaffinity(0, everything[:cores])
                for name, loader in loaders.items():
                    measured.setdefault((name, cores), []).append(spent(partial(loader, cores)))
        print(f"{len(plain):,} JPEG images of 500 x 375 to {size} x {size}, batches of {batch}, {rounds} rounds\n")
        print("| loader | cores and workers | images/s | images per processor second | of bare |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for (name, cores), times in measured.items():
            clock, processors = (median(values) for values in zip(*times, strict=True))
            least = median(processors for _, processors in measured["nothing but decode, crop, resize", cores])
            print(
                f"| {name} | {cores} | {len(plain) / clock:,.0f} | {len(plain) / processors:,.0f} "
                f"| {least / processors:.0%} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stream", action="store_true", help="measure images that are decoded as they come")
    parser.add_argument("--images", type=int, help="default: 50,000, of a stream 2,000")
    parser.add_argument("--size", type=int, help="height and width in pixels; default: 32, of a stream 224")
    parser.add_argument("--rounds", type=int, default=3, help="of a stream")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.stream:
        stream(arguments.images or 2000, arguments.size or 224, arguments.batch, arguments.rounds)
        return
    arguments.images, arguments.size = arguments.images or 50_000, arguments.size or 32

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
