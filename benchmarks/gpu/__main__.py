"""What one GPU does in an hour: the training step, and three ResNet-18 on CIFAR-10 (JPEG), trained and attacked.

    PYTHONPATH=src python -m benchmarks.gpu --data cifar10-jpeg.zip --out DIR --stage 1    # 1 to 7, in this order
    PYTHONPATH=src python -m benchmarks.gpu --data cifar10-jpeg.zip --out DIR              # or all of them

    1  the training step in float32, TF32 and bf16, plain, compiled, as CUDA graphs, against research code's
    2  train PGD-AT                                      5  attack it: the suite `light`, AutoAttack on a subset
    3  train published dummy classes                     6  attack them, blind and recovery-aware
    4  train recovery-aware dummy classes                7  attack them likewise

A stage writes what it has as it goes, and results.json and results.md when it ends, be it by an error. After --minutes,
once the attack on a chunk of images or the compilation that is going on is over, the script saves, says how to go on,
and exits with code 3: the same command continues in the middle of a training or of an evaluation, and what is done is
not done again. So DIR has to stay; only results.json and results.md, which hold everything measured and are small, need
to leave the machine.

The package need not be installed, but what it imports has to be there. A machine with PyTorch, accelerate and
scikit-learn that reaches no network lacks five packages, none of them compiled: put them into a folder elsewhere, take
that along, and name it. AutoAttack's examples are 42 MB that nothing reads; cifar10-jpeg.zip is 60 MB.

    pip install --no-deps -t site platformdirs jsonargparse docstring-parser pyautoattack==0.2.0 foolbox==3.3.4
    rm -r site/pyautoattack/examples && tar czf site.tar.gz site    # 3 MB
    tar xzf site.tar.gz && export PYTHONPATH=src:site               # on that machine

The paper's table at full size is `benchmarks.size --setting resnet18`, and `--setting wrn`.

--toy does all of it in seconds on a CPU, with a tiny network and few images: the numbers mean nothing.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import training_step
from benchmarks.training_step import KINDS, Recipe
from ducat.attacks.suites import SUITES, Suite
from ducat.checkpoint import write_text
from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.data import cache, load_test
from ducat.data.prepare import prepare
from ducat.evaluation import evaluate
from ducat.evaluation.runs import evaluate_run
from ducat.runs import RunFolder, environment
from ducat.training import Interrupted, resume, train

# Blind and recovery-aware; `light` has the other attacks.
AUTOATTACK = Suite(
    tuple(row for row in SUITES["standard"].attacks if row.strategy == "autoattack"), audit=False, name="autoattack"
)
DATA = "cifar10-jpeg"
NAMES = {"off": "pgd-at", "published": "published", "recovery-aware": "recovery-aware"}
MEASURED = ("pgd-at", "trades", "mart", "consistency")
OUT_OF_TIME = 3

# The attack takes 5 shortening steps, so an image costs 13 forward passes an epoch, and 16 with dummy classes.
RECIPE = Config(
    data=DataConfig(DATA),
    model=ModelConfig("resnet18"),
    method=MethodConfig("pgd-at", attack="pgd-cosine"),
    threat=ThreatConfig("linf", "8/255", "2/255", 10),
    train=TrainConfig(
        epochs=30,
        batch_size=256,
        learning_rate=0.2,
        schedule="one-cycle",
        averaging="ema",
        validate_every=5,
        checkpoint_minutes=2,
        tracker="none",
    ),
)
START_EPOCH = 0.81
LIGHT_SAMPLES, AUTOATTACK_SAMPLES = 2000, 1000
STEP = {"model": "resnet18", "batch_size": 128, "rounds": 5}


class OutOfTimeError(Exception):
    """The stage is saved as far as it is."""


class Clock:
    """Stops what runs too long, at a point from which it can go on.

    Args:
        minutes: from now.
    """

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def is_up(self) -> bool:
        return time.monotonic() > self.end

    def attack(self, name: str) -> None:
        """Before each attack of an evaluation, whose finished chunks are kept."""
        if self.is_up:
            raise OutOfTimeError

    def step(self, done: int, total: int) -> None:
        """After each step of a training, which saves itself on this signal."""
        if self.is_up:
            signal.raise_signal(signal.SIGTERM)

    def epoch(self, row: dict[str, Any]) -> None:
        print(f"epoch {row['epoch'] + 1}: {row}", flush=True)

    def warning(self, text: str) -> None:
        print(f"warning: {text}", flush=True)


class Place:
    """The folder of results, and the sizes that everything is done at.

    Args:
        out: the folder.
        toy: whether everything is tiny.
    """

    def __init__(self, out: Path, toy: bool) -> None:
        self.out, self.toy = out, toy
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def config(self, kind: Any) -> Config:
        config = replace(
            RECIPE,
            name=NAMES[kind],
            data=replace(RECIPE.data, root=self.out / "data"),
            dummy=DummyConfig(kind, start_epoch=START_EPOCH),
        )
        if not self.toy:
            return config
        return replace(
            config,
            data=replace(config.data, samples=60),
            model=ModelConfig("resnet8", width=4),
            dummy=replace(config.dummy, start_epoch=1),
            threat=ThreatConfig("linf", 0.5),  # so large that no attack has to search
            train=replace(config.train, epochs=2, batch_size=30),
        )

    def run(self, kind: str) -> Path:
        return self.out / "runs" / NAMES[kind]

    def read(self, name: str) -> Any:
        """Return the content of a .json file of the folder, or None."""
        path = self.out / name
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, name: str, content: Any) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / name, json.dumps(content, indent=1) + "\n")


def measure_steps(place: Place, clock: Clock) -> None:
    """Stage 1: fill steps.json, a measurement at a time."""
    sizes: dict[str, Any] = {"model": "resnet8", "batch_size": 4, "rounds": 1} if place.toy else STEP
    rows = place.read("steps.json") or []
    tasks: list[tuple[str, str, bool, dict[str, Recipe]]] = []
    for tf32 in (False, True):
        precision = "TF32" if tf32 else "float32"
        formats = {precision: Recipe(bf16=False), "bf16": Recipe()}
        tasks.append(("pgd-at", "recovery-aware", tf32, formats))
        if not place.toy:
            for mode, title in ((None, "compiled"), ("reduce-overhead", "compiled, CUDA graphs")):
                compiled = {
                    f"{name}, {title}": replace(recipe, compiled=True, mode=mode) for name, recipe in formats.items()
                }
                tasks += [("pgd-at", "recovery-aware", tf32, {name: recipe}) for name, recipe in compiled.items()]
    methods = MEASURED[:1] if place.toy else MEASURED
    tasks += [(method, kind, True, training_step.DUCAT) for method in methods for kind in KINDS]
    for method, kind, tf32, recipes in tasks:
        # What is timed, under what the research code's step is timed under too.
        task = [method, kind, "TF32" if tf32 else "float32", *recipes]
        if any(row["task"] == task for row in rows):
            continue
        if clock.is_up:
            raise OutOfTimeError
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        try:
            measured = training_step.measure(method, kind, device=place.device, recipes=recipes, **sizes)
        except RuntimeError as error:
            if not any(recipe.compiled for recipe in recipes.values()):
                raise
            print(f"not measured: {', '.join(recipes)}: {error}", flush=True)  # the next call tries again
            continue
        rows += [{**row, "research_precision": task[2], "task": task} for row in measured]
        place.write("steps.json", rows)


def train_network(kind: str, place: Place, clock: Clock) -> None:
    """Stages 2 to 4: train a network, or go on with it."""
    path = place.run(kind)
    if path.is_dir():
        if RunFolder(path).manifest["status"] == "finished":
            return
        resume(path, clock)
    else:
        train(place.config(kind), path.parent, clock)


def attack_network(kind: str, place: Place, clock: Clock) -> None:
    """Stages 5 to 7: `light` leaves evaluation.json in the run folder, AutoAttack autoattack.json beside it."""
    folder, suite = RunFolder(place.run(kind)), "quick" if place.toy else "light"
    if not (folder.path / "manifest.json").is_file() or folder.manifest["status"] != "finished":
        sys.exit(f"{folder.path} is not trained yet: run the stage that trains it first")
    if not folder.evaluation_path.is_file():
        evaluate_run(folder, suite, samples=20 if place.toy else LIGHT_SAMPLES, which="last", progress=clock.attack)
    path = folder.path / "autoattack.json"
    if not path.is_file():
        config, network = folder.config, folder.load("last").to(place.device)
        x, y = load_test(DATA, 20 if place.toy else AUTOATTACK_SAMPLES, config.data.root)
        measured = evaluate(
            network,
            x,
            y,
            config.threat.build(None),
            AUTOATTACK,
            num_classes=10,
            batch_size=250,
            data=folder.manifest["data"]["title"],
            progress=clock.attack,
            parts=folder.path / "autoattack-parts",
        )
        measured.save(path)


def results(place: Place, command: str) -> dict[str, Any]:
    """Return everything measured so far, with what it depends on."""
    networks = []
    for kind, name in NAMES.items():
        folder = RunFolder(place.run(kind))
        if folder.config_path.is_file():
            evaluations = {which: place.read(f"runs/{name}/{which}.json") for which in ("evaluation", "autoattack")}
            network = {"manifest": folder.manifest, "config": folder.config_path.read_text()}
            networks.append({"name": name, **network, "metrics": folder.metrics, **evaluations})
    return {
        "command": command,
        "toy": place.toy,
        "environment": environment(),
        "steps": place.read("steps.json") or [],
        "networks": networks,
    }


def report(place: Place) -> None:
    """Write everything measured so far."""
    content = results(place, " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]))
    place.write("results.json", content)
    write_text(place.out / "results.md", markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """Return the results as a page."""
    found, toy = content["environment"], "**Toy sizes: the numbers mean nothing.**\n\n" if content["toy"] else ""
    text = f"# One GPU\n\n{toy}Made by `{content['command']}` on {found['gpu'] or found['processor']}, "
    text += f"PyTorch {found['packages']['torch']}, CUDA {found['cuda']}, commit {(found['git'] or {}).get('commit')}. "
    text += "results.json beside this page holds the manifests.\n"
    if content["steps"]:
        text += (
            "\n## The training step\n\nBenign images a second; the ratio is to research code's step, timed in turn.\n\n"
        )
        columns = ("method", "dummy", "attack", "research_precision", "research_images_per_s", "ducat_images_per_s")
        text += training_step.table(
            [{name: row[name] for name in (*columns, "ratio", "spread")} for row in content["steps"]]
        )
        text += "\n"
    if content["networks"]:
        title = content["networks"][0]["manifest"]["data"]["title"]
        text += f"\n## Networks on {title}\n\nAccuracies in percent, of the weights after the last epoch. "
        text += "blind: under attackers who do not know recovery; robust: under all.\n\n"
        text += training_step.table([_line(network) for network in content["networks"]]) + "\n"
    return text


def _line(network: dict[str, Any]) -> dict[str, Any]:
    """Return a network's line of the table."""
    manifest, line = network["manifest"], {"network": network["name"], "status": network["manifest"]["status"]}
    line["epochs"] = len(network["metrics"])
    line["minutes of training"] = f"{manifest['seconds'] / 60:.1f}" if "seconds" in manifest else ""
    for which, short in (("evaluation", "light"), ("autoattack", "AutoAttack")):
        measured = network[which]
        of = f", {short}" + (f", {measured['samples']} images" if measured else "")
        for name in ("clean", "blind", "robust"):
            value = measured and (measured["clean"]["accuracy"] if name == "clean" else measured[name])
            line[f"{name}{of}"] = "" if value is None else f"{100 * value:.1f}"
    return line


Stage = Callable[[Place, Clock], None]
STAGES: list[tuple[str, Stage]] = [
    ("the training step", measure_steps),
    *((f"train {name}", partial(train_network, kind)) for kind, name in NAMES.items()),
    *((f"attack {name}", partial(attack_network, kind)) for kind, name in NAMES.items()),
]


def main() -> int:
    """Run the stages that are asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10-jpeg.zip")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; keep it between stages")
    parser.add_argument("--stage", type=int, choices=range(1, len(STAGES) + 1), help="all by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which to save and stop")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    clock, place = Clock(arguments.minutes), Place(arguments.out, arguments.toy)
    if (before := place.read("results.json")) and before["toy"] != place.toy:
        parser.error(f"--out {place.out} holds results {'with' if before['toy'] else 'without'} --toy: choose another")
    chosen = STAGES if arguments.stage is None else [STAGES[arguments.stage - 1]]
    code = 0
    try:
        if not cache.entry(DATA, place.out / "data").is_file():
            prepare(DATA, arguments.data, root=place.out / "data")
        for title, stage in chosen:
            print(f"== {title}", flush=True)
            try:
                stage(place, clock)
            finally:
                report(place)
    except (OutOfTimeError, Interrupted) as stop:
        if not clock.is_up:
            raise
        print(f"time is up in stage {title!r}; the same command goes on. {stop}", flush=True)
        code = OUT_OF_TIME
    print(f"written: {place.out / 'results.md'}, {place.out / 'results.json'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
