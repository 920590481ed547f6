"""The paper's table at the size of a CPU: four methods, each without dummy classes, with published and aware ones.

    python -m benchmarks.reproduction --work /tmp/reproduction --only digits
    python -m benchmarks.reproduction --work /tmp/reproduction --only cifar10 --archive cifar-10-python.tar.gz
    python -m benchmarks.reproduction --work /tmp/reproduction --table results
    python -m benchmarks.reproduction --draw results    # the plots alone, from reproduction.json

Every row is made by `ducat train` and `ducat evaluate`, with the settings below, and AutoAttack once more, blind, on
the first of the samples. A row that is in --work is not made again, so an interrupted table goes on where it stopped.
"""

import argparse
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import ducat
from ducat.attacks.suites import SUITES, Suite
from ducat.checkpoint import write_text
from ducat.cli import main as command
from ducat.data import load_test
from ducat.evaluation.studies import always_failed
from ducat.methods import METHODS
from ducat.reporting import plots
from ducat.reporting.compare import Run, compare, setting, to_markdown
from ducat.runs import RunFolder

AUTOATTACK_BLIND = Suite(
    tuple(row for row in SUITES["standard"].attacks if row.name == "autoattack"), audit=False, name="autoattack-blind"
)

KINDS = ("off", "published", "recovery-aware")
FOUR = ("pgd-at", "trades", "mart", "consistency")
TITLES = {"off": "", "published": " + dummy classes, published", "recovery-aware": " + dummy classes, aware"}


@dataclass(frozen=True)
class Table:
    """The rows of one data set.

    Attributes:
        options: of `ducat train`.
        samples: test images of the suite `light`.
        autoattack: of them, how many AutoAttack attacks too, blind.
        every: it takes every so many, from the first on: more than 1 where test images are ordered by class.
        rows: method and seed.
    """

    options: Mapping[str, Any]
    samples: int
    autoattack: int
    every: int = 1
    rows: Sequence[tuple[str, int]] = (("pgd-at", 0), ("pgd-at", 1), *((name, 0) for name in FOUR[1:]))


_CIFAR = {
    "model.name": "resnet8",
    "model.width": 8,
    "method.attack": "pgd-cosine",
    "train.epochs": 15,
    "train.learning_rate": 0.2,
    "train.schedule": "one-cycle",
    "train.validate_every": 15,
    "dummy.start_epoch": 0.6,
}
TABLES = {
    "digits": Table(
        {
            "train.epochs": 30,
            "train.learning_rate": 0.3,
            "train.schedule": "one-cycle",
            "train.validate_every": 30,
            "dummy.start_epoch": 0.6,
        },
        samples=500,
        autoattack=200,
    ),
    "fashion-mnist": Table(
        {
            "data.samples": 5000,
            "method.attack": "pgd-cosine",
            "train.epochs": 8,
            "train.learning_rate": 0.2,
            "train.schedule": "one-cycle",
            "train.validate_every": 8,
            "dummy.start_epoch": 0.6,
        },
        samples=500,
        autoattack=100,
        rows=[("pgd-at", 0)],
    ),
    "cifar10": Table(_CIFAR, samples=500, autoattack=100),
    "cifar10-jpeg": Table(
        {**_CIFAR, "data.samples": 10_000, "train.epochs": 12, "train.validate_every": 12},
        samples=1000,
        autoattack=100,
        every=10,
    ),
}


def run(*arguments: str) -> str:
    """Run a command line of ducat and return it as text; exit if it fails."""
    line = shlex.join(["ducat", *arguments])
    print(line, flush=True)
    if code := command(arguments):
        sys.exit(f"exit code {code}: {line}")
    return line


def folder_of(work: Path, data: str, method: str, kind: str, seed: int) -> RunFolder:
    """Return the run folder of a row."""
    return RunFolder(work / "runs" / f"{data}-{method}-{kind}-s{seed}")


def make(data: str, method: str, kind: str, seed: int, work: Path) -> None:
    """Train and evaluate a row, unless that has been done, and note its commands and what was measured."""
    folder, table = folder_of(work, data, method, kind, seed), TABLES[data]
    noted = folder.path / "row.json"
    if noted.is_file():
        return
    options = {
        "name": folder.name,
        "runs": folder.path.parent,
        "data.name": data,
        "data.root": work / "data",
        "method.name": method,
        "dummy.kind": kind,
        "train.seed": seed,
        "train.batch_norm": "joint",  # as the tables were measured, before there was a choice
        **table.options,
    }
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run("train", *(["--resume", str(folder.path)] if folder.path.is_dir() else given))
    measured = run("evaluate", str(folder.path), "--which", "last", "--suite", "light", "--samples", str(table.samples))
    manifest, metrics = folder.manifest, folder.metrics
    if not all(math.isfinite(row["loss"]) for row in metrics):
        sys.exit(f"{folder.path}: a loss is not finite")
    blind = autoattack(folder, data, work)
    row = {
        "data": data,
        "data_title": manifest["data"]["title"],
        "method": method,
        "dummy_classes": kind,
        "seed": seed,
        "commands": [shlex.join(["ducat", "train", *given]), measured],
        "training_images": manifest["data"]["train"],
        "fingerprint": manifest["data"]["fingerprint"],
        "losses": [row["loss"] for row in metrics],
        "images_per_s": metrics[-1]["images_per_s"],
        "environment": {
            name: manifest[name] for name in ("ducat", "python", "packages", "platform", "device", "threads", "git")
        },
        "precision": manifest["precision"],
        "autoattack_blind": blind.to_dict()["attacks"][0],
        "autoattack_samples": len(blind.labels),
        "evaluation": json.loads(folder.evaluation_path.read_text()),
    }
    write_text(noted, json.dumps(row) + "\n")


def autoattack(folder: RunFolder, data: str, work: Path) -> ducat.Evaluation:
    """Run AutoAttack on the raw outputs of a row, on some of the samples."""
    table = TABLES[data]
    x, y = load_test(data, table.samples, work / "data")
    chosen = slice(0, table.every * table.autoattack, table.every)
    model, threat = ducat.load(folder.path, "last"), folder.config.threat.build(None)
    return ducat.evaluate(model, x[chosen].contiguous(), y[chosen], threat, AUTOATTACK_BLIND, num_classes=10)


def markdown(data: str, rows: Sequence[Mapping[str, Any]], work: Path) -> str:
    """Return one data set's table as Markdown, with the conditions that it was measured under."""
    first, table = rows[0], TABLES[data]
    knows = {False: "blind", True: "knows recovery"}
    attacks = ", ".join(f"{row['name']} ({knows[row['knows_recovery']]})" for row in first["evaluation"]["attacks"])
    settings = ", ".join(f"{name} {value}" for name, value in table.options.items())
    runs = [
        Run.read(folder_of(work, data, row["method"], row["dummy_classes"], row["seed"]).path, title)
        for title, row in titled(rows)
    ]
    comparison = compare(runs)
    text = [
        f"## {first['data_title']}",
        "",
        f"{first['training_images']:,} training images; {settings}; trained in {first['precision']}.",
        f"Attacks: {attacks}.",
        "",
        to_markdown(comparison).rstrip(),
        "",
        f"![Clean accuracy against accuracy under attack, hollow blind, filled robust](reproduction-{data}.svg)",
        "",
        *apart(data, rows),
    ]
    plain = [
        folder_of(work, data, row["method"], "off", 0).path
        for row in rows
        if (row["dummy_classes"], row["seed"]) == ("off", 0)
    ]
    if len(plain) > 1:
        study = always_failed(plain)
        failed, every = study.failed.any(0), study.failed.all(0)
        text += [
            "",
            f"Samples that fail on every one of the {len(plain)} methods without dummy classes (seed 0), each under its"
            f" own attack: {int(every.sum())} of {len(every)}, {100 * float(every.float().mean()):.1f} % of the test "
            f"images and {100 * int(every.sum()) / int(failed.sum()):.1f} % of those that fail on some.",
        ]
    return "\n".join(text) + "\n"


def apart(data: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table in Markdown of what two blind attacks leave, beside the worst case over all attacks."""
    table = TABLES[data]
    chosen = f"the first {table.autoattack}" if table.every == 1 else f"each {table.every}th of the"
    lines = [
        "Two blind attacks apart, in %, beside the worst case over all attacks; AutoAttack on the raw outputs of "
        f"{chosen} samples, the others on all:",
        "",
        "| run | seed | PGD-20, blind | AutoAttack, blind | robust |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        measured = row["evaluation"]
        by_name = {attack["name"]: attack["accuracy"] for attack in measured["attacks"]}
        left = (by_name["pgd-20"], row["autoattack_blind"]["accuracy"], measured["robust"])
        title = METHODS[row["method"]].title + TITLES[row["dummy_classes"]]
        *blind, worst = (f"{100 * each:.1f}" for each in left)
        bound = "at most " if measured.get("at_most") else ""
        lines.append(f"| {title} | {row['seed']} | {' | '.join(blind)} | {bound}{worst} |")
    return lines


def titled(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return rows with the names that tables show; those of several seeds end as `compare` knows seeds."""
    seeds = Counter((row["method"], row["dummy_classes"]) for row in rows)
    names = []
    for row in rows:
        name = METHODS[row["method"]].title + TITLES[row["dummy_classes"]]
        names.append((f"{name}-s{row['seed']}" if seeds[row["method"], row["dummy_classes"]] > 1 else name, row))
    return names


def draw(out: Path) -> None:
    """Draw a plot for each data set from the evaluations in reproduction.json."""
    rows = json.loads((out / "reproduction.json").read_text())
    for data in dict.fromkeys(row["data"] for row in rows):
        points: dict[str, list[Any]] = {}
        for name, row in titled([row for row in rows if row["data"] == data]):
            points.setdefault(name.removesuffix(f"-s{row['seed']}"), []).append(row["evaluation"])
        title = setting(next(iter(points.values()))[0])
        plots.save(plots.trade_off(points, title), out / f"reproduction-{data}.svg")


def write(work: Path, out: Path) -> None:
    """Write reproduction.md, reproduction.json and a plot for each data set from the rows that there are."""
    out.mkdir(exist_ok=True)
    rows = []
    for data, table in TABLES.items():
        for (method, seed), kind in product(table.rows, KINDS):
            noted = folder_of(work, data, method, kind, seed).path / "row.json"
            if noted.is_file():
                rows.append(json.loads(noted.read_text()))
    parts = [
        "# The paper's table at the size of a CPU\n\n"
        "Made by `python -m benchmarks.reproduction`; each row's commands, versions and commit are in "
        "`reproduction.json`. The column `blind` is the per-sample worst case over attacks that do not know recovery, "
        "`robust` over all, those that know it included. Training seeds are named; attacks have seed 0. "
        "TRADES and MART forward benign and adversarial images as one batch (`--train.batch_norm joint`), which is "
        "not their papers' way: [batch-norm.md](batch-norm.md).\n"
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        parts.append(markdown(data, [row for row in rows if row["data"] == data], work))
    write_text(out / "reproduction.json", json.dumps(rows, indent=1) + "\n")
    write_text(out / "reproduction.md", "\n".join(parts))
    draw(out)
    print(f"written: {out / 'reproduction.md'}, {out / 'reproduction.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the prepared data and the runs")
    parser.add_argument("--only", choices=TABLES, default="digits", help="the data set whose rows are made")
    parser.add_argument("--archive", type=Path, help="its archive, where it has to be prepared first")
    parser.add_argument("--table", type=Path, metavar="DIR", help="write what there is; make no rows")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="draw the plots of a reproduction.json; make no rows")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        draw(arguments.draw)
        return
    if arguments.work is None:
        parser.error("--work is missing: the folder of the prepared data and the runs")
    if arguments.table is not None:
        write(arguments.work, arguments.table)
        return
    torch.set_num_threads(1)
    if arguments.archive is not None:
        run("data", "prepare", arguments.only, "--from", str(arguments.archive), "--root", str(arguments.work / "data"))
    for (method, seed), kind in product(TABLES[arguments.only].rows, KINDS):
        make(arguments.only, method, kind, seed, arguments.work)


if __name__ == "__main__":
    main()
