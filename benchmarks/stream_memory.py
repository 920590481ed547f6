"""Peak memory of preparing and training, on a data set and on a tenth of it: it should not depend on their size.

    python -m benchmarks.stream_memory --images 20000 --size 224 [--epochs 1] [--batch 64] [--workers 1]

The images are JPEG files in shards, few different ones over and over: how many there are matters, not what they show.
The network is tiny and the training natural, so that the data weigh most. A tenth is trained on for as many steps as
the whole. Peaks are the largest resident set of any process, as `/usr/bin/time -v` tells it.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

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


def peak(*arguments: str) -> float:
    """Run `ducat` and return the largest resident set of its processes in MB."""
    command = [sys.executable, "-m", "ducat", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return used.ru_maxrss / 1024  # which counts the processes that this one has waited for, too


def measure(root: Path, count: int, given: argparse.Namespace, epochs: int) -> tuple[float, float]:
    """Return the peaks of preparing a stream of so many images, and of training from it."""
    write_shards(root / "shards", count, given.size)
    prepared = peak("data", "prepare", "set", "--from", f"wds:{root / 'shards'}", "--root", str(root))
    trained = peak(
        *("train", "--name", "run", "--runs", str(root), "--data.name", "set", "--data.root", str(root)),
        *("--data.workers", str(given.workers), "--threat.steps", "1", "--model.name", "small"),
        *("--model.width", "4", "--method.name", "natural", "--train.device", "cpu", "--train.tracker", "none"),
        *("--train.batch_size", str(given.batch), "--train.epochs", str(epochs)),
        *("--train.validate_every", str(epochs)),
    )
    return prepared, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="of the whole set")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--epochs", type=int, default=1, help="of training on the whole set")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peaks = []
        for name, count, epochs in (("tenth", given.images // TENTH, TENTH), ("whole", given.images, 1)):
            (Path(folder) / name).mkdir()
            peaks.append(measure(Path(folder) / name, count, given, epochs * given.epochs))
    side = f"{given.size} x {given.size}"
    print(f"| peak in MB | {given.images // TENTH:,} images | {given.images:,} | difference |")
    print("| --- | ---: | ---: | ---: |")
    for what, tenth, whole in zip(("indexing shards", "training from them"), *peaks, strict=True):
        print(f"| {what}, {side} | {tenth:.1f} | {whole:.1f} | {whole / tenth - 1:+.1%} |")


if __name__ == "__main__":
    main()
