"""How strong our ensemble is for its time, against AutoAttack: both on the recovered classifier and the same samples.

    python -m benchmarks.strength RUN... --samples 500 --seeds 0 1

Seconds are of processor time on one thread, so that other work on the machine does not count.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ducat
from ducat.attacks.external import autoattack
from ducat.data import load_test
from ducat.runs import RunFolder

HEADERS = ("run", "samples", "attack", "seed", "left standing", "seconds", "of AutoAttack's time")


def measure(run: Path, samples: int | None, seeds: list[int], which: str) -> None:
    """Print the lines of one run."""
    config = RunFolder.open(run).config
    threat = config.threat.build(None)
    model = ducat.load(run, which)
    x, y = load_test(config.data.name, samples, config.data.root)

    def line(name: str, seed: int, attack: Callable[[], Tensor], reference: float | None) -> float:
        began = time.process_time()
        found = attack()
        seconds = time.process_time() - began
        with torch.no_grad():
            standing = int(((model(found).argmax(1) == y) | ~threat.allows(found, x)).sum())
        share = f"{seconds / (reference or seconds):.2f}"
        print(f"| {run.name} | {len(y)} | {name} | {seed} | {standing} | {seconds:.1f} | {share} |", flush=True)
        return seconds

    def noise(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    reference = line("AutoAttack", 0, partial(autoattack, model, x, y, threat, noise(0)), None)
    for seed in seeds:
        line(
            "ensemble",
            seed,
            partial(ducat.attacks.adaptive, model, x, y, threat, generator=noise(seed)),
            reference,
        )


def main() -> None:
    """Measure the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--which", default="last")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for cells in (HEADERS, ("---",) * len(HEADERS)):
        print(f"| {' | '.join(cells)} |")
    for run in arguments.runs:
        measure(run, arguments.samples, arguments.seeds, arguments.which)


if __name__ == "__main__":
    main()
