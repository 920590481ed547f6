"""Peak memory of preparing and training, on a data set and on a tenth of it: it should not depend on their size.

    python -m benchmarks.stream_memory --images 20000 --size 224 [--steps 50] [--batch 32] [--workers 1]

The images are JPEG files in shards, few different ones over and over: how many there are matters, not what they show.
The network is tiny and the training natural, so that the data weigh most. Both are trained on for as many steps, of an
order that is drawn over the whole set. Peaks are of the largest process, as `/usr/bin/time -v` tells them.
"""

import argparse
import io
import multiprocessing
import os
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ducat.config import Config, DataConfig, MethodConfig, ModelConfig, TrainConfig
from ducat.data import prepare
from ducat.training import train

DIFFERENT, SHARD = 50, 1000
TENTH = 10


def write_shards(folder: Path, count: int, size: int) -> None:
    """Write shards of `count` training images, and a few for the test, of 10 classes."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(DIFFERENT):
        content = io.BytesIO()
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((size, size)).save(content, "JPEG")
        files.append(content.getvalue())
    folder.mkdir()
    for part, total in (("train", count), ("test", SHARD // 10)):
        for first in range(0, total, SHARD):
            with tarfile.open(folder / f"{part}-{first:06d}.tar", "w") as archive:
                for number in range(first, min(total, first + SHARD)):
                    for kind, body in (("jpg", files[number % DIFFERENT]), ("cls", str(number % 10).encode())):
                        info = tarfile.TarInfo(f"{number:06d}.{kind}")
                        info.size = len(body)
                        archive.addfile(info, io.BytesIO(body))


class Stopper:
    """A listener that ends a training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, done: int, total: int) -> None:
        if done == self.steps:
            raise KeyboardInterrupt

    def epoch(self, row: dict[str, Any]) -> None: ...

    def warning(self, text: str) -> None: ...


def train_some(root: Path, given: argparse.Namespace) -> None:
    """Train for some steps, by what `ducat train` does."""
    config = Config(
        "run",
        DataConfig("set", root=root, workers=given.workers),
        ModelConfig("small", 4),
        MethodConfig("natural"),
        train=TrainConfig(batch_size=given.batch, device="cpu", tracker="none", precision="float32"),
    )
    with suppress(KeyboardInterrupt):
        train(config, root, Stopper(given.steps))


def peak(work: Callable[..., object], *arguments: object) -> float:
    """Do some work in a process of its own, and return the largest resident set of that and its processes in MB."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    _, status, used = os.wait4(process.pid or 0, 0)
    if status:
        raise SystemExit(f"{work} ended with {os.waitstatus_to_exitcode(status)}")
    return used.ru_maxrss / 1024  # which counts the processes that this one has waited for, too


def measure(root: Path, count: int, given: argparse.Namespace) -> tuple[float, float]:
    """Return the peaks of preparing a stream of so many images, and of training from it."""
    root.mkdir()
    write_shards(root / "shards", count, given.size)
    prepared = peak(partial(prepare, "set", f"wds:{root / 'shards'}", root=root))
    return prepared, peak(train_some, root, given)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="of the whole set")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50, help="of training, at most an epoch of the tenth")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = given.images // TENTH, given.images
        peaks = [measure(Path(folder) / str(count), count, given) for count in counts]
    side = f"{given.size} x {given.size}"
    print(f"| peak in MB | {given.images // TENTH:,} images | {given.images:,} | difference |")
    print("| --- | ---: | ---: | ---: |")
    for what, tenth, whole in zip(("indexing shards", "training from them"), *peaks, strict=True):
        print(f"| {what}, {side} | {tenth:.1f} | {whole:.1f} | {whole / tenth - 1:+.1%} |")


if __name__ == "__main__":
    main()
