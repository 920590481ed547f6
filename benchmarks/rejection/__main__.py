"""Does any signal of dummy classes beat the confidence of a plain robust network, at equal clean refusals?

    python -m benchmarks.rejection --work /tmp/rejection --setting digits [--seed 0] [--only NAME ...]
    python -m benchmarks.rejection --work /tmp/rejection --setting cifar10-jpeg --archive cifar10-jpeg.zip
    python -m benchmarks.rejection --work /tmp/rejection --second NAME ...
    python -m benchmarks.rejection --work /tmp/rejection --table results

In each setting one network is trained with PGD-AT; every row trains it on for the same number of epochs with the same
batches and the same number of steps inside, and differs in what `ROWS` says of it. Each is then attacked as a
classifier that may refuse (`ducat.evaluation.rejection`), with the signals that its row names, at thresholds that
refuse 2 and 5 % of the correctly classified benign test images: equal refusals for all rows, on the images where they
are compared. A row that is in --work is not made again, so that an interrupted run goes on where it stopped. `--second`
attacks rows again, with an attack that shares no code with the product's, and with the product's budget "standard".
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ducat
from benchmarks.cure import objectives
from benchmarks.cure.__main__ import with_options
from benchmarks.rejection.networks import SMALL_BALL, SmallBall
from benchmarks.rejection.rows import ROWS, Row
from benchmarks.rejection.second import second
from benchmarks.rejection.settings import SETTINGS, Setting
from benchmarks.rejection.tables import write
from ducat import checkpoint, seeding
from ducat.architecture import Architecture
from ducat.attacks.adaptive import Round, with_dummy_classes
from ducat.cli import main as command
from ducat.config import Config
from ducat.data import load_test
from ducat.dummy import RecoveredClassifier, add_dummy_classes
from ducat.evaluation import rejection
from ducat.models.folded import fold_batch_norm
from ducat.runs import RunFolder, environment
from ducat.training.loop import Initial, train

SHARES = (0.02, 0.05)


def register() -> None:
    """Add the budget of this benchmark to the product's.

    Against *wrong and accepted* it takes at most 98 passes a sample and threshold, "quick" 110, "standard" 780; denial
    takes 6 steps, "quick" 20.
    """
    rejection.WRONG_BUDGETS["rows"] = (
        Round("smooth", 20),
        Round("targeted-exact", 20, targets=3),
        Round("targeted-smooth", 20, share=0.1, targets=9),
    )
    rejection.DENIAL_STEPS["rows"] = (6, 1)


class Question:
    """The rows of one setting and seed, in a folder of the setting's name."""

    def __init__(self, work: Path, setting: str, seed: int) -> None:
        self.setting: Setting = SETTINGS[setting]
        self.seed, self.data = seed, work / "data"
        self.runs, self.rows = work / setting / "runs", work / setting / "rows"
        self.rows.mkdir(parents=True, exist_ok=True)

    def base(self) -> nn.Module:
        """Return the network of the first phase, which is trained if there is none."""
        folder = RunFolder(self.runs / f"base-s{self.seed}")
        if not (folder.path.is_dir() and folder.manifest["status"] == "finished"):
            options = {
                "name": folder.name,
                "runs": self.runs,
                "data.root": self.data,
                **self.setting.common,
                **self.setting.base,
                "train.seed": self.seed,
            }
            given = [word for option, value in options.items() for word in (f"--{option}", str(value))]
            print(shlex.join(["ducat", "train", *given]), flush=True)
            if code := command(["train", "--resume", str(folder.path)] if folder.path.is_dir() else ["train", *given]):
                sys.exit(code)
        return ducat.load(folder.path, "last").requires_grad_(True)

    def network(self, row: Row) -> nn.Module:
        """Return the network that a row begins with."""
        base = self.base()
        if row.network is not None:
            return row.network(base)
        return base if row.settings.get("dummy.kind", "off") == "off" else add_dummy_classes(base)

    def trained(self, name: str) -> tuple[nn.Module, RunFolder]:
        """Return the network that a row trained, which is trained if there is none."""
        row, folder = ROWS[name], RunFolder(self.runs / f"{name}-s{self.seed}")
        network = self.network(row)
        if not (folder.path.is_dir() and folder.manifest["status"] == "finished"):
            # A few epochs that were stopped are begun again: networks of a row's own cannot be resumed.
            shutil.rmtree(folder.path, ignore_errors=True)
            config = with_options(
                Config(name=folder.name),
                {
                    "data.root": self.data,
                    "dummy.start_epoch": 0,
                    "train.seed": self.seed,
                    **self.setting.common,
                    **self.setting.branch,
                    **row.settings,
                },
            )
            objective = None if row.change is None else objectives.changed(config, row.change)

            def build(architecture: Architecture) -> tuple[Architecture, nn.Module]:
                return architecture, network

            base = f"base-s{self.seed}"
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                train(
                    config,
                    self.runs,
                    model=Initial(build, {"file": str(self.runs / base), "row": name}),
                    objective=objective,
                )
        tensors, _ = checkpoint.read(folder.checkpoint_path("last"))
        network.load_state_dict(checkpoint.part("model", tensors))
        return network.eval(), folder

    def deployed(self, name: str) -> tuple[RecoveredClassifier, dict[str, rejection.Signal], RunFolder]:
        """Return the classifier of a row with 2C outputs, its signals, and the run it is from."""
        row = ROWS[name]
        network, folder = self.trained(row.of or name)
        paired = ROWS[row.of or name].settings.get("dummy.kind", "off") != "off"
        network = fold_batch_norm(network, load_test(self.setting.data, 2, self.data)[0]) or network
        # A network of a row's own has 2C outputs without being known for it.
        view = network if paired else with_dummy_classes(network)
        if row.of is not None:
            radius = folder.config.threat.build(None).eps / 4
            return RecoveredClassifier(SmallBall(view, radius)), dict(SMALL_BALL), folder
        view = RecoveredClassifier(view)
        return view, {signal: rejection.SIGNALS[signal] for signal in row.signals}, folder

    def run(self, name: str) -> None:
        """Train and evaluate a row, unless that has been done."""
        file = self.rows / f"{name}-s{self.seed}.json"
        if file.is_file():
            return
        began = time.perf_counter()
        model, signals, folder = self.deployed(name)
        trained = time.perf_counter()
        threat = folder.config.threat.build(None)
        x, y = load_test(self.setting.data, self.setting.test, self.data)
        measured = rejection.measure(
            model, x, y, threat, SHARES, signals=signals, budget="rows", seed=self.seed, batch_size=200
        )
        content = {
            "name": name,
            "seed": self.seed,
            "samples": len(y),
            "settings": dict(ROWS[name].settings),
            "of": ROWS[name].of,
            "seconds": [round(trained - began), round(time.perf_counter() - trained)],
            "rejection": measured.to_dict(),
            "environment": {
                key: folder.manifest[key]
                for key in ("ducat", "python", "packages", "platform", "device", "threads", "git")
            },
            "measured_by": environment()["git"],
            "precision": folder.manifest["precision"],
            "fingerprint": folder.manifest["data"]["fingerprint"],
        }
        checkpoint.write_text(file, json.dumps(content, indent=1) + "\n")
        shown = [
            f"{each['signal']} " + "/".join(f"{100 * row['robust']['share']:.1f}" for row in each["rows"])
            for each in content["rejection"]["signals"]
        ]
        print(f"{name} s{self.seed}: {', '.join(shown)} {content['seconds']} s", flush=True)

    def attack_again(self, name: str) -> None:
        """Attack a row's network at 5 % refused with the second attack, and with the product's larger budget."""
        row_file, file = self.rows / f"{name}-s{self.seed}.json", self.rows / f"second-{name}-s{self.seed}.json"
        if file.is_file() or not row_file.is_file():
            return
        content: dict[str, Any] = json.loads(row_file.read_text())
        model, signals, folder = self.deployed(name)
        threat = folder.config.threat.build(None)
        x, y = load_test(self.setting.data, self.setting.test, self.data)
        found = []
        for each in content["rejection"]["signals"]:
            row = next(row for row in each["rows"] if row["reject"] == 0.05)
            began = time.perf_counter()
            signal, threshold = signals[each["signal"]], row["threshold"]
            fallen = second(model, signal, threshold, x, y, threat.eps, self.seed)
            noise = seeding.generator(self.seed, "again")
            images = rejection.wrong_and_accepted(model, x, y, threat, signal, threshold, "standard", noise)
            again = rejection.Seen(model.model, x, y, threat, {each["signal"]: signal})
            again.look(images)
            found.append(
                {
                    "signal": each["signal"],
                    "product": row["robust"]["share"],
                    "standard": round(float((again.wrong[each["signal"]] < threshold).float().mean()), 6),
                    "second": round(1 - float(fallen.float().mean()), 6),
                    "seconds": round(time.perf_counter() - began),
                }
            )
            print(name, found[-1], flush=True)
        checkpoint.write_text(file, json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the prepared data, the runs and the rows")
    parser.add_argument("--setting", choices=SETTINGS, default="digits", help="data, network and budget")
    parser.add_argument("--archive", type=Path, help="the data set's archive, where it has to be prepared first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--table", type=Path, metavar="DIR", help="write what there is, tables and curves; make no rows"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ROWS, help="rows to make; all by default")
    parser.add_argument("--second", nargs="+", metavar="NAME", choices=ROWS, help="attack these rows once more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    register()
    if arguments.table is not None:
        write(arguments.work, arguments.table)
        return
    question = Question(arguments.work, arguments.setting, arguments.seed)
    if arguments.archive is not None:
        source = ["--from", str(arguments.archive), "--root", str(question.data)]
        if code := command(["data", "prepare", question.setting.data, *source]):
            sys.exit(code)
    if arguments.second:
        for name in arguments.second:
            question.attack_again(name)
        return
    for name in arguments.only or question.setting.rows or ROWS:
        question.run(name)


if __name__ == "__main__":
    main()
