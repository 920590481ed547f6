"""The table of methods: four methods, each without dummy classes, with published and with recovery-aware ones.

    python -m benchmarks.methods_table --cifar10 cifar-10-python.tar.gz --work /tmp/methods

Every line is made by `ducat train` and `ducat evaluate`, with the settings below. A line whose run folder is in --work
already is not made again, so an interrupted table goes on where it stopped. The runs are short: the table shows that
every combination trains and what it costs, not what it can reach.
"""

import argparse
import json
import math
import shlex
import sys
from itertools import product
from pathlib import Path
from typing import Any

from ducat.checkpoint import write_text
from ducat.cli import main as ducat
from ducat.compare import Run, compare, to_markdown
from ducat.methods import METHODS
from ducat.runs import RunFolder

KINDS = ("off", "published", "recovery-aware")
ADVERSARIAL = ("pgd-at", "trades", "mart", "consistency")
SEED = 0
TRAINING = {
    "digits": {
        "train.epochs": 30,
        "train.learning_rate": 0.3,
        "train.schedule": "one-cycle",
        "train.validate_every": 10,
        "dummy.start_epoch": 0.5,
    },
    "cifar10": {
        "data.samples": 1000,
        "model.name": "resnet8",
        "model.width": 8,
        "train.epochs": 2,
        "train.learning_rate": 0.2,
        "train.schedule": "one-cycle",
        "train.validate_every": 2,
        "dummy.start_epoch": 0.5,
    },
}
SAMPLES = {"digits": 500, "cifar10": 200}
SUITES = {"digits": "light", "cifar10": "quick"}


def run(*arguments: str) -> str:
    """Run a command line of ducat and return it as text; exit if it fails."""
    line = shlex.join(["ducat", *arguments])
    print(line, flush=True)
    if code := ducat(arguments):
        sys.exit(f"exit code {code}: {line}")
    return line


def _folder(work: Path, data: str, method: str, kind: str) -> RunFolder:
    return RunFolder(work / "runs" / f"{data}-{method}-{kind}")


def make(data: str, method: str, kind: str, work: Path) -> dict[str, Any]:
    """Train and evaluate one line of the table, unless that has been done, and return what is known of it."""
    folder = _folder(work, data, method, kind)
    commands = folder.path / "commands.json"
    if not commands.is_file():
        options = {
            "name": folder.name,
            "runs": folder.path.parent,
            "data.name": data,
            "data.root": work / "data",
            "method.name": method,
            "dummy.kind": kind,
            "train.seed": SEED,
            **TRAINING[data],
        }
        given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        resumed = folder.path.is_dir()
        train = run("train", *(["--resume", str(folder.path)] if resumed else given))
        evaluate = run(
            "evaluate", str(folder.path), "--which", "last", "--suite", SUITES[data], "--samples", str(SAMPLES[data])
        )
        train = shlex.join(["ducat", "train", *given]) if resumed else train
        write_text(commands, json.dumps([train, evaluate]))
    manifest, metrics = folder.manifest, folder.metrics
    if not all(math.isfinite(row["loss"]) for row in metrics):
        sys.exit(f"{folder.path}: a loss is not finite")
    return {
        "data": data,
        "method": method,
        "dummy_classes": kind,
        "seed": SEED,
        "commands": json.loads(commands.read_text()),
        "training_images": manifest["data"]["train"],
        "data_title": manifest["data"]["title"],
        "fingerprint": manifest["data"]["fingerprint"],
        "losses": [row["loss"] for row in metrics],
        "images_per_s": metrics[-1]["images_per_s"],
        "environment": {
            name: manifest[name] for name in ("ducat", "python", "packages", "platform", "device", "threads", "git")
        },
        "precision": manifest["precision"],
        "evaluation": json.loads(folder.evaluation_path.read_text()),
    }


def markdown(lines: list[dict[str, Any]], command: str, work: Path) -> str:
    """Return the table as Markdown, with the conditions that it was measured under."""
    text = [
        "# Four methods, without and with dummy classes",
        "",
        f"Made by `{command}`; each line's commands, versions and commit are in `methods.json`. The runs are short "
        "and small: they show that every combination trains and is evaluated, not what it can reach. One seed.",
        "",
        "The column `blind` is the per-sample worst case over attacks that do not know recovery, `robust` over all "
        "attacks, those that know it included.",
    ]
    for data in dict.fromkeys(line["data"] for line in lines):
        chosen = [line for line in lines if line["data"] == data]
        first = chosen[0]
        attacks = ", ".join(
            f"{attack['name']} ({'knows' if attack['knows_recovery'] else 'blind to'} recovery)"
            for attack in first["evaluation"]["attacks"]
        )
        settings = ", ".join(f"{name} {value}" for name, value in TRAINING[data].items())
        names = {"off": "", "published": " + dummy classes, published", "recovery-aware": " + dummy classes, aware"}
        runs = [
            Run.read(_folder(work, data, line["method"], line["dummy_classes"]).path, title)
            for line in chosen
            for title in [METHODS[line["method"]].title + names[line["dummy_classes"]]]
        ]
        text += [
            "",
            f"## {first['data_title']}",
            "",
            f"{first['training_images']:,} training images; {settings}; trained in {first['precision']}.",
            f"Attacks: {attacks}.",
            "",
            to_markdown(compare(runs)).rstrip(),
        ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="archive of CIFAR-10 or of a part of it; without it, digits only")
    parser.add_argument("--work", type=Path, required=True, help="folder of the prepared data and the runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder that the table is written to")
    arguments = parser.parse_args()
    datasets = ["digits"]
    if arguments.cifar10 is not None:
        datasets.append("cifar10")
        if not (arguments.work / "data").is_dir():
            run("data", "prepare", "cifar10", "--from", str(arguments.cifar10), "--root", str(arguments.work / "data"))
    lines = [make(*combination, arguments.work) for combination in product(datasets, ADVERSARIAL, KINDS)]
    command = shlex.join(["python", "-m", "benchmarks.methods_table", *sys.argv[1:]])
    arguments.out.mkdir(exist_ok=True)
    write_text(arguments.out / "methods.json", json.dumps({"command": command, "lines": lines}, indent=1) + "\n")
    write_text(arguments.out / "methods.md", markdown(lines, command, arguments.work))
    print(f"written: {arguments.out / 'methods.md'}, {arguments.out / 'methods.json'}")


if __name__ == "__main__":
    main()
