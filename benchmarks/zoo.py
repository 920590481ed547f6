"""Make the networks that come with the package, from the runs of `ducat demo` and of `benchmarks.size`.

    ducat demo --out demo
    OMP_NUM_THREADS=1 python -m benchmarks.zoo demo/runs
    python -m benchmarks.size --work size --archive cifar10-jpeg.zip
    python -m benchmarks.zoo size/cpu/runs

attacks the networks with the suite `standard`, AutoAttack included, where that has not been done: those of digits on
all 500 test images, those of photographs on as many as `benchmarks.size`. Writes them to src/ducat/zoo/, and prints the
SHA-256 for the table in src/ducat/zoo/__init__.py.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.size.settings import SETTINGS
from ducat import zoo
from ducat.evaluation.runs import evaluate_run
from ducat.runs import RunFolder

SUITE = "standard"


@dataclass(frozen=True)
class Origin:
    """Where networks come from.

    Attributes:
        runs: their run folders, by the name in the zoo.
        made_by: the commands; {run} stands for the name of the run folder.
        samples: how many test images they are attacked on; None for all.
    """

    runs: Mapping[str, str]
    made_by: tuple[str, ...]
    samples: int | None = None


ORIGINS = (
    Origin(
        {
            "digits-pgd-at": "digits-small-pgd-at-s0",
            "digits-published": "digits-small-pgd-at-published-s0",
            "digits-recovery-aware": "digits-small-pgd-at-recovery-aware-s0",
        },
        (
            "ducat demo --out demo",
            "OMP_NUM_THREADS=1 ducat evaluate demo/runs/{run} --which last --suite standard",
            "python -m benchmarks.zoo demo/runs",
        ),
    ),
    Origin(
        {
            "cifar10-jpeg-pgd-at": "pgd-at-s0",
            "cifar10-jpeg-published": "published-s0",
            "cifar10-jpeg-recovery-aware": "recovery-aware-s0",
        },
        (
            "python -m benchmarks.size --work size --archive cifar10-jpeg.zip",
            "python -m benchmarks.zoo size/cpu/runs",
        ),
        SETTINGS["cpu"].standard,
    ),
)


def make(runs: Path, out: Path) -> dict[str, str]:
    """Evaluate the runs and write the files; return their SHA-256 by name.

    Raises:
        FileNotFoundError: if they are not those of one of `ORIGINS`.
    """
    made = {}
    origin = next((each for each in ORIGINS if (runs / next(iter(each.runs.values()))).is_dir()), None)
    if origin is None:
        raise FileNotFoundError(f"{runs} has not the runs of `ducat demo` or of `benchmarks.size`")
    for name, run in origin.runs.items():
        folder = RunFolder.open(runs / run)
        measured = evaluate_run(folder, SUITE, samples=origin.samples, which="last")  # or what is kept of it
        commands = [command.format(run=run) for command in origin.made_by]
        made[name] = zoo.pack(folder.path, out / f"{name}.safetensors", commands, measured=measured)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=zoo.HERE, help="folder for the files")
    arguments = parser.parse_args()
    for name, sha256 in make(arguments.runs, arguments.out).items():
        print(f"{name} {sha256}")


if __name__ == "__main__":
    main()
