"""The search for dummy classes that hold: fronts of clean and robust accuracy at the same training budget.

    python -m benchmarks.cure --work /tmp/cure --data cifar10-jpeg.zip [--seed 0] [--only NAME ...]

One network is trained with PGD-AT; every row then trains it on for the same number of epochs, with the same learning
rate, batches and steps of the inner attack, and differs in nothing else but what `ROWS` says of it. Robust accuracy is
the worst case over PGD-20 and our ensemble, both on the classifier that is deployed. A row that is in --work is not
made again, so that an interrupted search goes on where it stopped; `--table DIR` writes what there is.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ducat
from ducat import checkpoint, losses, methods
from ducat.attacks.adaptive import BUDGETS, Round
from ducat.attacks.suites import SUITES, Attack, Suite, _ensemble, _pgd
from ducat.averaging import WeightAverage
from ducat.cli import main as command
from ducat.config import Config
from ducat.data import load_test
from ducat.dummy import add_dummy_classes, recover
from ducat.models.architecture import Architecture
from ducat.runs import RunFolder
from ducat.train import Initial, train

DATA, SAMPLES, NETWORK = "cifar10-jpeg", 20_000, "resnet8"
TEST = 1000
BASE = {"train.epochs": 12, "train.schedule": "constant", "train.warmup_epochs": 1, "train.validate_every": 4}
BRANCH: dict[str, Any] = {"train.epochs": 3, "train.schedule": "cosine", "train.validate_every": 3}
COMMON = {"data.samples": SAMPLES, "model.name": NETWORK, "method.attack": "pgd-cosine", "train.learning_rate": 0.1}

# On all samples and without the late rounds of "standard", which costs five times as much.
BUDGETS["front"] = (
    Round("recovered-cross-entropy", 20),
    Round("weighted-pair", 20),
    *(Round(f"targeted-pair-{rank}", 20) for rank in range(1, 6)),
)
SUITES["front"] = Suite(
    (
        Attack("pgd-20", False, _pgd(20)),
        Attack("pgd-20", True, _pgd(20)),
        Attack("ensemble-front", True, _ensemble("front")),
    ),
    audit=False,
)
# Rows of the table of methods that only this search has: other inner objectives.
methods.METHODS["pgd-at-margin"] = replace(methods.METHODS["pgd-at"], title="PGD-AT on the margin", objective="margin")
methods.METHODS["pgd-at-kl"] = replace(
    methods.METHODS["pgd-at"], title="PGD-AT on KL", objective="kl", gaussian_start=True
)


class ManyDummies(nn.Module):
    """Several dummy classes a class, seen as one: 2C logits, of which the dummy half is a logsumexp over `count`."""

    def __init__(self, base: Any, count: int) -> None:
        super().__init__()
        head = base.network.linear
        self.count, self.num_classes = count, head.out_features
        base.network.linear = nn.Linear(head.in_features, (1 + count) * head.out_features)
        with torch.no_grad():
            rows = [head.weight]
            noise = torch.Generator().manual_seed(0)
            for _ in range(count):
                shake = torch.randn(head.weight.shape, generator=noise) * 0.1 * head.weight.std()
                rows.append(head.weight + shake)
            base.network.linear.weight.copy_(torch.cat(rows))
            base.network.linear.bias.copy_(torch.cat([head.bias] + [head.bias - math.log(count)] * count))
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        real, *dummies = self.base(x).split(self.num_classes, dim=1)
        return torch.cat([real, torch.stack(dummies).logsumexp(0)], dim=1)


class SplitLate(nn.Module):
    """A trunk with two last stages: the real half of the 2C logits from one, the dummy half from a copy of it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        layers = dict(base.network.named_children())
        late = {name: layers.pop(name) for name in ("layer3", "pool", "flatten", "linear")}
        self.trunk = nn.Sequential(base.normalize, *layers.values())
        self.real = nn.Sequential(*late.values())
        self.dummy = deepcopy(self.real)

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return torch.cat([self.real(features), self.dummy(features)], dim=1)


class Gated(nn.Module):
    """Two experts of 2C logits mixed by a constant gate: [log(1 - g) + log a; log g + log b], recovered by their sum.

    Args:
        experts: maps images to 2C logits, the accurate expert's and the robust one's.
        gate: g, the robust expert's weight.
        sharpen: what the robust expert's logits are multiplied by.
    """

    def __init__(self, experts: nn.Module, gate: float, sharpen: float) -> None:
        super().__init__()
        self.experts, self.gate, self.sharpen = experts, gate, sharpen

    def forward(self, x: Tensor) -> Tensor:
        accurate, robust = self.experts(x).chunk(2, dim=1)
        accurate = F.log_softmax(accurate, dim=1) + math.log(1 - self.gate)
        robust = F.log_softmax(self.sharpen * robust, dim=1) + math.log(self.gate)
        return torch.logaddexp(accurate, robust)


class Joined(nn.Module):
    """Two networks as one of 2C logits."""

    def __init__(self, accurate: nn.Module, robust: nn.Module) -> None:
        super().__init__()
        self.accurate, self.robust = accurate, robust

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.accurate(x), self.robust(x)], dim=1)


class BySum(nn.Module):
    """A network with dummy classes, recovered by logsumexp: C logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return recover(self.model(x), "logsumexp")


@dataclass(frozen=True)
class Distilled(methods.Objective):
    """Soft targets from teachers in the place of labels, a share `taught` of them.

    Attributes:
        natural: an accurate network of C logits, the teacher of benign images; without it the average teaches them too.
        average: the average of the student's own weights, the teacher of adversarial images (and on recovered classes).
        taught: the teachers' share of the target; the label has the rest.
    """

    natural: nn.Module | None = None
    average: list[WeightAverage] = field(default_factory=list)
    taught: float = 0.5

    def loss(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        if not self.average:
            self.average.append(WeightAverage(model, 0.995))
        self.average[0].update(model)
        with torch.no_grad():
            own = self.average[0](torch.cat([x, adversarial])).float()
            taught = (recover(own, "logsumexp") if self.targets else own).softmax(1)
            calm, attacked = taught.chunk(2)
            if self.natural is not None:
                calm = self.natural(x).float().softmax(1)
            label = F.one_hot(y, calm.shape[1])
            calm, attacked = (self.taught * teacher + (1 - self.taught) * label for teacher in (calm, attacked))
        logits = model(torch.cat([x, adversarial])).float()
        if self.targets is None:
            values = losses.soft_cross_entropy(logits, torch.cat([calm, attacked])).view(2, -1).mean(1)
            return self.weight * values[0] + (1 - self.weight) * values[1]
        halves = [
            torch.cat([(1 - weight) * target, weight * target], dim=1)
            for weight, target in ((self.targets.benign, calm), (self.targets.adversarial, attacked))
        ]
        values = losses.soft_cross_entropy(logits, torch.cat(halves)).view(2, -1).mean(1)
        return self.targets.benign_share * values[0] + (1 - self.targets.benign_share) * values[1]


@dataclass(frozen=True)
class Row:
    """A use of dummy classes, or a baseline.

    Attributes:
        front: which line of the plot it is a point of.
        expected: the hypothesis, and what it predicts against the front of the baselines.
        settings: options that differ from the branch's.
        network: makes the network from the base; None doubles its head with copies where there are dummy classes.
        teach: the teachers, "both" (a natural network and the average) or "self" (the average alone); "" for none.
        deployed: what is evaluated, made from the trained network.
        of: another row whose network is evaluated, instead of training one.
    """

    front: str
    expected: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: Callable[[nn.Module], nn.Module] | None = None
    teach: str = ""
    deployed: Callable[[nn.Module], nn.Module] = lambda network: network
    of: str | None = None


def _aware(share: float, **others: Any) -> dict[str, Any]:
    return {"dummy.kind": "recovery-aware", "dummy.benign_share": share, **others}


def _dummy(**settings: Any) -> dict[str, Any]:
    return _aware(0.35, **{name.replace("__", "."): value for name, value in settings.items()})


ROWS: dict[str, Row] = {
    "pgd-at": Row("PGD-AT", "the base method trained on"),
    "mixed-0.2": Row(
        "mixed", "more benign weight: more clean, less robust", {"method.name": "mixed", "method.weight": 0.2}
    ),
    "mixed-0.35": Row("mixed", "", {"method.name": "mixed", "method.weight": 0.35}),
    "mixed-0.5": Row("mixed", "", {"method.name": "mixed", "method.weight": 0.5}),
    "trades-1": Row("TRADES", "smaller beta: more clean, less robust", {"method.name": "trades", "method.weight": 1}),
    "trades-3": Row("TRADES", "", {"method.name": "trades", "method.weight": 3}),
    "trades-6": Row("TRADES", "", {"method.name": "trades", "method.weight": 6}),
    "published": Row(
        "published",
        "robust far below the front: the attack in training is satisfied by the dummy class",
        {"dummy.kind": "published"},
    ),
    "aware-0.2": Row("recovery-aware", "on the front of `mixed`: the same loss on q, plus a detector", _aware(0.2)),
    "aware-0.35": Row("recovery-aware", "", _aware(0.35)),
    "aware-0.5": Row("recovery-aware", "", _aware(0.5)),
    "two-soft-0.35": Row(
        "two-soft targets",
        "two teachers in two halves do not collide: above one head with the same teachers",
        _aware(0.35),
        teach="both",
    ),
    "two-soft-0.5": Row("two-soft targets", "", _aware(0.5), teach="both"),
    "one-head-0.35": Row(
        "one head, two teachers",
        "soft targets move the front up without dummy classes too",
        {"method.name": "mixed", "method.weight": 0.35},
        teach="both",
    ),
    "one-head-0.5": Row("one head, two teachers", "", {"method.name": "mixed", "method.weight": 0.5}, teach="both"),
    "self-0.35": Row("variants", "self-distillation on q: smoother targets, more robust", _aware(0.35), teach="self"),
    "split-0.35": Row(
        "two experts, split late",
        "each half has its own last stage: less interference, above `aware`",
        _aware(0.35),
        network=SplitLate,
    ),
    "split-0.5": Row("two experts, split late", "", _aware(0.5), network=SplitLate),
    "pair-0": Row(
        "variants", "without the pair term: as `mixed`, the extra rows alone do little", _dummy(dummy__pair_weight=0)
    ),
    "pair-0.1": Row("variants", "a weak detector costs less capacity: more robust", _dummy(dummy__pair_weight=0.1)),
    "pair-3": Row("variants", "a strong detector costs robustness", _dummy(dummy__pair_weight=3)),
    "random-rows": Row(
        "variants",
        "random rows lose part of the short branch",
        _aware(0.35),
        network=lambda base: add_dummy_classes(base, "random", generator=torch.Generator().manual_seed(0)),
    ),
    "margin": Row(
        "variants", "recovered margin inside: stronger on the margin, more robust", _dummy(method__name="pgd-at-margin")
    ),
    "kl": Row("variants", "recovered KL inside: more clean, less robust", _dummy(method__name="pgd-at-kl")),
    "trades-3-aware": Row("variants", "on the front of TRADES", _dummy(method__name="trades", method__weight=3)),
    "benign-0": Row("variants", "w_b = 0: a crisper pair", _dummy(dummy__benign_weight=0)),
    "weights-0.5": Row(
        "variants",
        "w_b = w_a = 0.5: no signal in the pair, two equal rows: as `mixed`",
        _dummy(dummy__benign_weight=0.5, dummy__adversarial_weight=0.5),
    ),
    "adversarial-0.75": Row("variants", "w_a = 0.75: a softer pair", _dummy(dummy__adversarial_weight=0.75)),
    "three-dummies": Row(
        "variants",
        "three dummy classes a class: room for kinds of failure",
        _aware(0.35),
        network=lambda base: ManyDummies(base, 3),
    ),
    "ema": Row(
        "variants",
        "an average is worth a point of both, on any method",
        _dummy(train__averaging="ema", train__averaging_decay=0.995, train__averaging_start_epoch=0),
    ),
    "ema-mixed-0.35": Row(
        "averaged baselines",
        "",
        {
            "method.name": "mixed",
            "method.weight": 0.35,
            "train.averaging": "ema",
            "train.averaging_decay": 0.995,
            "train.averaging_start_epoch": 0,
        },
    ),
    "awp": Row("variants", "AWP costs clean accuracy in a network that underfits", _dummy(train__awp=0.005)),
    "smooth": Row(
        "variants", "label smoothing 0.1: softer targets, a little more robust", _dummy(method__label_smoothing=0.1)
    ),
    "smooth-mixed-0.35": Row(
        "averaged baselines", "", {"method.name": "mixed", "method.weight": 0.35, "method.label_smoothing": 0.1}
    ),
    "sum-0.35": Row(
        "variants", "recovery by logsumexp instead of max: the same within noise", of="aware-0.35", deployed=BySum
    ),
    **{
        f"split-gate-{gate}-{sharpen}": Row(
            "two experts, calibrated",
            "a constant gate and a sharper robust half: more robust for little clean",
            of="split-0.35",
            deployed=partial(Gated, gate=gate, sharpen=sharpen),
        )
        for gate, sharpen in ((0.7, 1), (0.7, 2), (0.85, 2))
    },
    **{
        f"joined-gate-{gate}-{sharpen}": Row(
            "two networks, joined",
            "natural and robust network mixed: clean for little robust, if sharpened",
            of="joined",
            deployed=partial(Gated, gate=gate, sharpen=sharpen),
        )
        for gate, sharpen in ((0.7, 2), (0.85, 2), (0.95, 2), (0.85, 4))
    },
}


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """Return the config with options by their names on the command line, for example "train.epochs"."""
    for name, value in options.items():
        group, option = name.split(".")
        config = replace(config, **{group: replace(getattr(config, group), **{option: value})})
    return config


@dataclass(frozen=True)
class _Taught(Config):
    """A config whose objective has teachers."""

    def objective(self, epoch: int) -> methods.Objective:
        plain = super().objective(epoch)
        values = {item.name: getattr(plain, item.name) for item in dataclasses.fields(plain)}
        assert self.name is not None
        return Distilled(**values, **TEACHERS[self.name])


TEACHERS: dict[str, dict[str, Any]] = {}


class Search:
    """The rows of one seed in a folder."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed, self.runs = work, seed, work / "runs"
        (work / "rows").mkdir(parents=True, exist_ok=True)
        self.data = work / "data"

    def trained(self, name: str, method: str) -> nn.Module:
        """Return a network of the first phase, which is trained if there is none."""
        folder = RunFolder(self.runs / f"{name}-s{self.seed}")
        if not (folder.path.is_dir() and folder.manifest["status"] == "finished"):
            options = {**COMMON, **BASE, "method.name": method, "train.seed": self.seed}
            given = [word for option, value in options.items() for word in (f"--{option}", str(value))]
            given = [
                "--name",
                folder.name,
                "--runs",
                str(self.runs),
                "--data.name",
                DATA,
                "--data.root",
                str(self.data),
                *given,
            ]
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
        file, row = self.work / "rows" / f"{name}-s{self.seed}.json", ROWS[name]
        if file.is_file():
            content: dict[str, Any] = json.loads(file.read_text())
            return content
        began = time.perf_counter()
        network, folder = self._joined() if row.of == "joined" else self._trained_on(row.of or name)
        seconds = time.perf_counter() - began
        x, y = load_test(DATA, TEST, self.data)
        threat = folder.config.threat.build(None)
        deployed = row.deployed(network.eval())
        measured = ducat.evaluate(
            deployed, x, y, threat, "front", num_classes=10, seed=self.seed, data="CIFAR-10 (JPEG)"
        )
        manifest = folder.manifest
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
        if not (folder.path.is_dir() and folder.manifest["status"] == "finished"):
            kind = _Taught if row.teach else Config
            config = with_options(
                kind(name=folder.name),
                {
                    "data.name": DATA,
                    "data.root": self.data,
                    "dummy.start_epoch": 0,
                    "train.seed": self.seed,
                    **COMMON,
                    **BRANCH,
                    **row.settings,
                },
            )
            if row.teach:
                natural = self.trained("natural", "natural").eval() if row.teach == "both" else None
                TEACHERS[folder.name] = {"natural": natural, "average": []}

            def build(architecture: Architecture) -> tuple[Architecture, nn.Module]:
                return architecture, network

            base = f"base-s{self.seed}"
            train(config, self.runs, initial=Initial(build, {"file": str(self.runs / base), "row": name}))
        tensors, _ = checkpoint.read(folder.checkpoint_path("last"))
        network.load_state_dict(checkpoint.part("model", tensors))
        return network, folder

    def _joined(self) -> tuple[nn.Module, RunFolder]:
        robust, folder = self._trained_on("pgd-at")
        return Joined(self.trained("natural", "natural"), robust), folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the prepared data, the runs and the rows")
    parser.add_argument("--data", type=Path, help="cifar10-jpeg.zip, needed the first time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(ROWS), help="rows to make; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    search = Search(arguments.work, arguments.seed)
    if not search.data.is_dir():
        if arguments.data is None:
            parser.error("--data is needed: there are no prepared data in --work yet")
        command(["data", "prepare", DATA, "--from", str(arguments.data), "--root", str(search.data)])
    for name in arguments.only:
        search.run(name)


if __name__ == "__main__":
    main()
