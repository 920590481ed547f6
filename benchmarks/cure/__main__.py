"""The search for dummy classes that hold: fronts of clean and robust accuracy at the same training budget.

    python -m benchmarks.cure --work /tmp/cure --setting digits [--seed 0] [--only NAME ...]
    python -m benchmarks.cure --work /tmp/cure --archive cifar10-jpeg.zip
    python -m benchmarks.cure --work /tmp/cure --table results

In each setting one network is trained with PGD-AT; every row then trains it on for the same number of epochs, with
the same learning rate, batches and steps of the inner attack, and differs in nothing else but what `ROWS` says of it.
Robust accuracy is the worst case over PGD-20 and our ensemble, both on the classifier that is deployed, and for
mixtures also over attacks through smoother mixtures. A row that is in --work is not made again, so that an interrupted
search goes on where it stopped; `--table DIR` writes what there is.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ducat
from benchmarks.cure import objectives
from benchmarks.cure.fronts import write
from benchmarks.cure.networks import Gated, Held, Joined, through_stand_ins
from benchmarks.cure.rows import ROWS, Row
from benchmarks.cure.settings import SETTINGS, Setting
from ducat import checkpoint
from ducat.architecture import Architecture
from ducat.attacks.adaptive import TARGETED, Round
from ducat.attacks.suites import SUITES, Attack, Suite, ensemble
from ducat.cli import main as command
from ducat.config import Config
from ducat.data import load, load_test
from ducat.dummy import add_dummy_classes
from ducat.runs import RunFolder
from ducat.training import Initial, train

# On all samples, without the long rounds of "standard".
SHORT = (
    Round("recovered-cross-entropy", 20),
    Round("weighted-pair", 20),
    Round(TARGETED, 20, targets=5),
)
STANDARD = (
    *(row for row in SUITES["light"].attacks if row.strategy == "pgd-20"),
    Attack("ensemble-front", True, ensemble(SHORT)),
)
FRONT = Suite(STANDARD, audit=False, name="front")
FRONT_OF_MIXTURES = Suite(
    (*STANDARD, Attack("stand-ins", True, through_stand_ins)), audit=False, name="front-of-mixtures"
)


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """Return the config with options by their names on the command line, for example "train.epochs"."""
    for name, value in options.items():
        group, option = name.split(".")
        config = replace(config, **{group: replace(getattr(config, group), **{option: value})})
    return config


class Search:
    """The rows of one setting and seed, in a folder of the setting's name."""

    def __init__(self, work: Path, setting: str, seed: int) -> None:
        self.setting: Setting = SETTINGS[setting]
        self.seed, self.data = seed, work / "data"
        self.runs, self.rows = work / setting / "runs", work / setting / "rows"
        self.rows.mkdir(parents=True, exist_ok=True)

    def trained(self, name: str, method: str) -> nn.Module:
        """Return a network of the first phase, which is trained if there is none."""
        folder = RunFolder(self.runs / f"{name}-s{self.seed}")
        if not (folder.path.is_dir() and folder.manifest["status"] == "finished"):
            options = {
                "name": folder.name,
                "runs": self.runs,
                "data.root": self.data,
                **self.setting.common,
                **self.setting.base,
                "method.name": method,
                "train.seed": self.seed,
            }
            given = [word for option, value in options.items() for word in (f"--{option}", str(value))]
            print(shlex.join(["ducat", "train", *given]), flush=True)
            if code := command(["train", "--resume", str(folder.path)] if folder.path.is_dir() else ["train", *given]):
                sys.exit(code)
        return ducat.load(folder.path, "last").requires_grad_(True)

    def network(self, row: Row) -> nn.Module:
        """Return the network that a row begins with."""
        base = self.trained("base", "pgd-at")
        if row.network is not None:
            return row.network(base)
        return base if row.settings.get("dummy.kind", "off") == "off" else add_dummy_classes(base)

    def run(self, name: str) -> dict[str, Any]:
        """Train and evaluate a row, unless that has been done, and return what was measured."""
        file, row = self.rows / f"{name}-s{self.seed}.json", ROWS[name]
        if file.is_file():
            content: dict[str, Any] = json.loads(file.read_text())
            return content
        began = time.perf_counter()
        network, folder = self.joined() if row.of == "joined" else self._trained_on(row.of or name)
        seconds = time.perf_counter() - began
        manifest, threat = folder.manifest, folder.config.threat.build(None)
        held_out = load(self.setting.data, samples=folder.config.data.samples, root=self.data).validation
        deployed = row.deployed(network.eval(), Held(held_out.floats(), held_out.labels, threat))
        x, y = load_test(self.setting.data, self.setting.test, self.data)
        title = manifest["data"]["title"]
        suite = FRONT_OF_MIXTURES if isinstance(deployed, Gated) else FRONT
        measured = ducat.evaluate(deployed, x, y, threat, suite, num_classes=10, seed=self.seed, data=title)
        content = {
            "name": name,
            "front": row.front,
            "seed": self.seed,
            "settings": dict(row.settings),
            "teachers": row.teach,
            "of": row.of,
            "images_per_s": folder.metrics[-1]["images_per_s"],
            "seconds": round(seconds),
            "evaluation": measured.to_dict(),
            "environment": {
                key: manifest[key] for key in ("ducat", "python", "packages", "platform", "device", "threads", "git")
            },
            "precision": manifest["precision"],
            "fingerprint": manifest["data"]["fingerprint"],
        }
        checkpoint.write_text(file, json.dumps(content, indent=1) + "\n")
        shown = content["evaluation"]
        print(
            f"{name} s{self.seed}: clean {shown['clean']['accuracy']:.3f} robust {shown['robust']:.3f} "
            f"pgd-20 blind {shown['attacks'][0]['accuracy']:.3f} ({seconds:.0f} s)",
            flush=True,
        )
        return content

    def _trained_on(self, name: str) -> tuple[nn.Module, RunFolder]:
        row, folder = ROWS[name], RunFolder(self.runs / f"{name}-s{self.seed}")
        network = self.network(row)
        finished = folder.path.is_dir() and folder.manifest["status"] == "finished"
        if not finished:
            # A few epochs that were stopped are begun again: networks and teachers of a row's own cannot be resumed.
            shutil.rmtree(folder.path, ignore_errors=True)
            change = row.change
            if row.teach:
                natural = self.trained("natural", "natural").eval() if row.teach == "both" else None
                change = objectives.taught(natural)
            config = with_options(
                Config(name=folder.name),
                {
                    "data.root": self.data,
                    "dummy.start_epoch": 0,
                    "train.seed": self.seed,
                    "train.batch_norm": "joint",  # as the tables were measured, before there was a choice
                    **self.setting.common,
                    **self.setting.branch,
                    **row.settings,
                },
            )
            objective = None if change is None else objectives.changed(config, change)

            def build(architecture: Architecture) -> tuple[Architecture, nn.Module]:
                return architecture, network

            base = f"base-s{self.seed}"
            train(
                config,
                self.runs,
                model=Initial(build, {"file": str(self.runs / base), "row": name}),
                objective=objective,
            )
        tensors, _ = checkpoint.read(folder.checkpoint_path("last"))
        network.load_state_dict(checkpoint.part("model", tensors))
        return network, folder

    def joined(self) -> tuple[nn.Module, RunFolder]:
        robust, folder = self._trained_on("pgd-at")
        return Joined(self.trained("natural", "natural"), robust), folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the prepared data, the runs and the rows")
    parser.add_argument("--setting", choices=SETTINGS, default="cifar10-jpeg", help="data, network and budget")
    parser.add_argument("--archive", type=Path, help="the data set's archive, where it has to be prepared first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, metavar="DIR", help="write what there is, tables and plots; make no rows")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ROWS, help="rows to make; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table is not None:
        write(arguments.work, arguments.table)
        return
    search = Search(arguments.work, arguments.setting, arguments.seed)
    if arguments.archive is not None:
        source = ["--from", str(arguments.archive), "--root", str(search.data)]
        if code := command(["data", "prepare", search.setting.data, *source]):
            sys.exit(code)
    possible = [name for name in ROWS if search.setting.splits or not name.startswith("split-")]
    for name in arguments.only or possible:
        if name not in possible:
            parser.error(f"--only {name}: the network of --setting {arguments.setting} cannot be split")
        search.run(name)


if __name__ == "__main__":
    main()
