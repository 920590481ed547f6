"""The paper's table at a size that shows its pattern, and what an attacker who knows of recovery makes of it.

    python -m benchmarks.size --work /tmp/size --archive cifar10-jpeg.zip    # all of it, hours
    python -m benchmarks.size --work /tmp/size --only base                   # or a row at a time
    python -m benchmarks.size --work /tmp/size --setting wide                # a larger network, less attacked
    python -m benchmarks.size --work /tmp/size --seed 1 --light 8000         # another seed, more images attacked
    python -m benchmarks.size --work /tmp/size --table results               # with --base-seed 1: of that base

One network is trained with PGD-AT; every row trains it on, for the same number of epochs with the same learning rate
and the same steps of the inner attack, and differs in nothing but what `ROWS` says of it. Weights are then rounded to
half precision, so that the networks that are measured are those that ship (`benchmarks.zoo`), and evaluated by the
suites of the product. What is in --work is not made again: a training that was stopped is resumed in the middle of an
epoch, an evaluation after the last chunk of images that was finished.
"""

import argparse
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import ducat
from benchmarks.reproduction import run
from benchmarks.size.settings import SETTINGS, Setting
from benchmarks.size.tables import BY_SUM, Measured, write
from ducat import checkpoint
from ducat.data import load_test
from ducat.dummy import RecoveredClassifier
from ducat.evaluation.runs import evaluate_run
from ducat.runs import RunFolder
from ducat.threat import ThreatModel

CHUNK = 100  # images of an evaluation, after which it can go on
PARTS = ("light", "l2", BY_SUM, "standard")  # of an evaluation; they differ in what they cost
L2 = ThreatModel("l2", 128 / 255)


@dataclass(frozen=True)
class Row:
    """A way to train the base on.

    Attributes:
        title: what tables call it.
        settings: options that differ from the branch's.
    """

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


BASE, LONGER = "base", "longer"
ROWS: dict[str, Row] = {
    BASE: Row("the base: PGD-AT"),
    LONGER: Row("the base, trained longer"),
    "pgd-at": Row("PGD-AT, trained on"),
    "mixed": Row("mixed, half benign", {"method.name": "mixed", "method.weight": 0.5}),
    "published": Row("dummy classes, published", {"dummy.kind": "published"}),
    "recovery-aware": Row("dummy classes, recovery-aware", {"dummy.kind": "recovery-aware"}),
}


class Table:
    """The rows of one setting, in a folder of the setting's name.

    Args:
        work: folder of the data and of all settings.
        setting: a row of `SETTINGS`.
        seed: of the rows' training.
        base_seed: of the base's; that of the rows by default.
        light: test images of the suite `light`; the setting's number by default.

    Attributes:
        bases: options of the phases that the base is trained in, one after the other; rows begin at the last.
        names: the rows that the setting has.
    """

    def __init__(
        self, work: Path, setting: str, seed: int = 0, base_seed: int | None = None, light: int | None = None
    ) -> None:
        self.setting: Setting = SETTINGS[setting]
        if light is not None:
            self.setting = replace(self.setting, light=light)
        self.seed, self.work = seed, work
        self.base_seed = seed if base_seed is None else base_seed
        self.runs = work / setting / "runs"
        self.bases = {BASE: self.setting.base} | ({LONGER: self.setting.longer} if self.setting.longer else {})
        self.names = [name for name in ROWS if name != LONGER or name in self.bases]

    def folder(self, name: str) -> RunFolder:
        other = name not in self.bases and self.seed != self.base_seed
        return RunFolder(self.runs / f"{name}-s{self.base_seed}{f'-{self.seed}' if other else ''}")

    def train(self, name: str) -> RunFolder:
        """Train a row, or go on with it, unless it is finished."""
        folder, row = self.folder(name), ROWS[name]
        if folder.path.is_dir():
            if folder.manifest["status"] != "finished":
                run("train", "--resume", str(folder.path))
            _round(folder)
            return folder
        options = {
            "name": folder.name,
            "runs": self.runs,
            "data.root": self.work / "data",
            **self.setting.common,
            **self.bases.get(name, self.setting.branch),
            **row.settings,
            "train.seed": self.base_seed if name in self.bases else self.seed,
        }
        words = ["train"]
        if name != BASE:
            before = BASE if name == LONGER else list(self.bases)[-1]
            file = str(self.train(before).checkpoint_path("last"))
            if row.settings.get("dummy.kind", "off") == "off":
                options["model.weights"] = file
            else:
                words = ["adapt", file]
        run(*words, *(word for option, value in options.items() for word in (f"--{option}", str(value))))
        _round(folder)
        return folder

    def evaluate(self, name: str, parts: Collection[str] = PARTS) -> None:
        """Attack a row in some of the ways of `PARTS`, unless that has been done."""
        folder, setting = self.train(name), self.setting
        progress = _Said(name)

        def attack(suite: str, samples: int, **options: Any) -> None:
            evaluate_run(folder, suite, samples=samples, which="last", batch_size=CHUNK, progress=progress, **options)

        if "light" in parts:
            attack("light", setting.light)
        if "l2" in parts:
            attack("light", setting.l2, threat=L2)
        if BY_SUM in parts and ROWS[name].settings.get("dummy.kind") == "recovery-aware":
            self.evaluate_by_sum(folder, progress)
        if "standard" in parts:
            attack("standard", setting.standard)

    def evaluate_by_sum(self, folder: RunFolder, progress: "_Said") -> None:
        """Attack the classifier that recovers by logsumexp, which is what training works on, instead of by max."""
        file = folder.path / f"{BY_SUM}.json"
        if file.is_file():
            return
        x, y = load_test(self.setting.data, self.setting.light, self.work / "data")
        measured = ducat.evaluate(
            RecoveredClassifier(folder.load("last"), "logsumexp"),
            x,
            y,
            folder.config.threat.build(None),
            "light",
            num_classes=folder.read("last")[1]["model"]["num_classes"],
            batch_size=CHUNK,
            data=folder.manifest["data"]["title"],
            progress=progress,
            parts=folder.path / "by-sum-parts",
        )
        measured.save(file)

    def measured(self) -> list[Measured]:
        """Return what there is of every row from the base of this seed, with whatever seed of its own."""
        found = []
        for name, row in ROWS.items():
            begun = f"{name}-s{self.base_seed}"
            for path in sorted([*self.runs.glob(begun), *self.runs.glob(f"{begun}-*")]):
                folder = RunFolder(path)
                files = [*sorted(folder.evaluations_path.glob("*.json")), folder.path / f"{BY_SUM}.json"]
                contents = {file.stem: json.loads(file.read_text()) for file in files if file.is_file()}
                if contents:
                    found.append(Measured(row.title, path.name.removeprefix(f"{name}-s"), folder, contents))
        return found


def _round(folder: RunFolder) -> None:
    """Round the weights of a finished run to what half precision holds, unless they are."""
    tensors, state = checkpoint.read(folder.checkpoint_path("last"))
    weights = checkpoint.named("model", checkpoint.part("model", tensors))
    rounded = {name: each.half().to(each.dtype) if each.is_floating_point() else each for name, each in weights.items()}
    if not all(torch.equal(weights[name], each) for name, each in rounded.items()):
        checkpoint.save(folder.checkpoint_path("last"), {**tensors, **rounded}, state)


class _Said:
    """Prints which attack is being made on which row."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, attack: str) -> None:
        print(f"{self.name}: {attack}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the prepared data and the runs")
    parser.add_argument("--setting", choices=SETTINGS, default="cpu", help="data, network and budget")
    parser.add_argument("--archive", type=Path, help="the data set's archive, where it has to be prepared first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-seed", type=int, help="of the base, where rows of another seed begin at it")
    parser.add_argument("--light", type=int, help="test images of the suite light, instead of the setting's number")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ROWS, help="rows to make; all by default")
    parser.add_argument("--train", action="store_true", help="train the rows and do not attack them yet")
    parser.add_argument("--parts", nargs="+", metavar="PART", choices=PARTS, default=PARTS, help="ways to attack them")
    parser.add_argument("--table", type=Path, metavar="DIR", help="write what there is of a base's seed; make no rows")
    arguments = parser.parse_args()
    if arguments.table is not None:
        seed = arguments.base_seed or 0
        made = {name: rows for name in SETTINGS if (rows := Table(arguments.work, name, seed).measured())}
        if not made:
            parser.error(f"--table: {arguments.work} has no evaluated row from a base of seed {seed}: see --base-seed")
        write(made, arguments.table, seed)
        return
    table = Table(arguments.work, arguments.setting, arguments.seed, arguments.base_seed, arguments.light)
    if missing := [name for name in arguments.only or () if name not in table.names]:
        parser.error(
            f"--only: setting {arguments.setting} has no row {missing[0]}: choose from {', '.join(table.names)}"
        )
    if arguments.archive is not None:
        source = ["--from", str(arguments.archive), "--root", str(arguments.work / "data")]
        run("data", "prepare", table.setting.data, *source)
    for name in arguments.only or table.names:
        table.train(name) if arguments.train else table.evaluate(name, arguments.parts)


if __name__ == "__main__":
    main()
