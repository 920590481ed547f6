"""Peak memory of an evaluation, by the number of images.

    python -m benchmarks.memory [--samples 500 5000] [--size 224] [--batch 50] [--json FILE]

A tiny network and the cheapest suite that there is (one step, blind and recovery-aware), since only memory is measured:
what an attack needs besides depends on the network and on the batch, not on the number of images. Each row is
`evaluate_run` in a process of its own, of a run on a prepared set of random images; its peak is that of the resident
set (VmHWM), mapped files included. The evaluation's own files are then read again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training_step import peak_mb, table
from ducat.attacks.suites import Attack, Suite, fgsm
from ducat.config import Config, DataConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.data import cache
from ducat.data.images import Lazy, fingerprint, named_tensors
from ducat.data.specs import DataSpec
from ducat.evaluation.runs import evaluate_run
from ducat.models import allow_code
from ducat.runs import RunFolder
from ducat.seeding import generator
from ducat.training import train

NAME = "random-images"
CLASSES = 2  # so that half of the images are attacked
ONE_STEP = Suite((Attack("fgsm", False, fgsm), Attack("fgsm", True, fgsm)), audit=False, name="one-step")


def tiny(num_outputs: int) -> nn.Module:
    """Return the network: it looks at every pixel once."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_outputs)
    )


class Noise:
    """Pixels that are functions of the row."""

    decodes = False

    def __init__(self, size: int) -> None:
        self.shape = (3, size, size)

    def read(self, rows: Tensor) -> Tensor:
        draws = [torch.randint(256, self.shape, generator=generator("noise", row)) for row in rows.tolist()]
        return torch.stack(draws).to(torch.uint8)


def prepare(root: Path, samples: int, size: int) -> None:
    """Write a data set with so many test images."""
    parts = {
        part: Lazy(Noise(size), torch.arange(count) % CLASSES, torch.arange(count))
        for part, count in (("train", 8), ("validation", 4), ("test", samples))
    }
    tensors, unknown = named_tensors(**parts), (0.5,) * 3
    spec = DataSpec(NAME, "Random images", "folder", (3, size, size), unknown, unknown, crop_padding=0)
    header = cache.Header(spec, tuple(map(str, range(CLASSES))), fingerprint(tensors), "noise", "")
    cache.write(cache.entry(NAME, root), tensors, header)


def train_briefly(root: Path) -> Path:
    """Train for a step."""
    config = Config(
        "memory",
        DataConfig(NAME, root=root),
        ModelConfig("benchmarks.memory:tiny"),
        threat=ThreatConfig(eps=0.01, steps=1),
        train=TrainConfig(epochs=1, batch_size=8),
    )
    return train(config, root).path


def evaluate(run: Path, batch: int) -> dict[str, Any]:
    """Evaluate in this process, and return its peak."""
    began = time.perf_counter()
    allow_code("benchmarks.memory:tiny")
    evaluate_run(RunFolder.open(run), ONE_STEP, which="last", batch_size=batch, device="cpu")
    return {"peak_mb": int(peak_mb()), "seconds": round(time.perf_counter() - began)}


def measure(samples: int, size: int, batch: int) -> dict[str, Any]:
    """Return a row: make the data, the run, and evaluate it in a process of its own."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".memory-") as temporary:
        prepare(Path(temporary), samples, size)
        run = train_briefly(Path(temporary))
        command = [sys.executable, "-m", "benchmarks.memory", "--run", str(run), "--batch", str(batch)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        gigabytes = round(samples * 3 * size**2 * 4 / 1e9, 2)
        return {"images": samples, "float32_gb": gigabytes, "batch": batch, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[500, 5000], help="numbers of test images")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, default=50, help="images attacked at a time")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file for all rows")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(evaluate(arguments.run, arguments.batch)))
        return
    rows = []
    for samples in arguments.samples:
        rows.append(measure(samples, arguments.size, arguments.batch))
        print(rows[-1], file=sys.stderr)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
