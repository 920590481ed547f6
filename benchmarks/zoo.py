"""Make the networks that come with the package, from the runs of `ducat demo`.

    ducat demo --out demo
    OMP_NUM_THREADS=1 python -m benchmarks.zoo demo/runs

attacks three of the four networks with the suite `standard`, AutoAttack included, on all 500 test images, where that
has not been done, writes them to src/ducat/zoo/, and prints the SHA-256 for the table in src/ducat/zoo/__init__.py.
"""

import argparse
import json
from pathlib import Path

from ducat import zoo
from ducat.evaluation.runs import evaluate_run
from ducat.runs import RunFolder

RUNS = {
    "digits-pgd-at": "digits-small-pgd-at-s0",
    "digits-published": "digits-small-pgd-at-published-s0",
    "digits-recovery-aware": "digits-small-pgd-at-recovery-aware-s0",
}
SUITE = "standard"
MADE_BY = [
    "ducat demo --out demo",
    "OMP_NUM_THREADS=1 ducat evaluate demo/runs/{run} --which last --suite standard",
    "python -m benchmarks.zoo demo/runs",
]


def make(runs: Path, out: Path) -> dict[str, str]:
    """Evaluate the runs and write the files; return their SHA-256 by name."""
    made = {}
    for name, run in RUNS.items():
        folder = RunFolder.open(runs / run)
        done = folder.evaluation_path.is_file() and json.loads(folder.evaluation_path.read_text(encoding="utf-8"))
        if not done or (done["suite"], done["checkpoint"]) != (SUITE, "last"):
            evaluate_run(folder, SUITE, which="last")
        commands = [command.format(run=run) for command in MADE_BY]
        made[name] = zoo.pack(folder.path, out / f"{name}.safetensors", commands)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs that `ducat demo` made")
    parser.add_argument("--out", type=Path, default=zoo.HERE, help="folder for the files")
    arguments = parser.parse_args()
    for name, sha256 in make(arguments.runs, arguments.out).items():
        print(f"{name} {sha256}")


if __name__ == "__main__":
    main()
