"""Evaluation: every suite runs blind and recovery-aware attacks side by side, and the worst case per sample counts."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ducat import checkpoint
from ducat.attacks.adaptive import SilentDummies, adaptive
from ducat.attacks.pgd import attackable, pgd
from ducat.data import load_test
from ducat.dummy import RecoveredClassifier, recover
from ducat.runs import RunFolder, Which
from ducat.seeding import generator as seeded
from ducat.threat import ThreatModel

Images = Float[Tensor, "samples channels height width"]
Labels = Int[Tensor, " samples"]
Flags = Bool[Tensor, " samples"]

SCHEMA = 1
SINK_GAP = 0.01  # above this gap the blind number is called what it is


@dataclass(frozen=True)
class Attack:
    """A row of a suite.

    Every attack is a function of a classifier with 2C logits. What the attacker knows is only a matter of which one it
    is given: an attacker that knows recovery gets the network itself, a blind one a view of it as a plain classifier
    with 2C classes. So a blind and a recovery-aware row of one strategy differ in nothing else, and on a network
    without dummy classes they are one attack.

    Attributes:
        strategy: what is run; with the knowledge of recovery it makes the name in the report.
        knows_recovery: whether the attacker knows that predictions are recovered.
        run: `(model, x, y, threat, generator)` to images in the ball.
    """

    strategy: str
    knows_recovery: bool
    run: Callable[[nn.Module, Tensor, Tensor, ThreatModel, torch.Generator], Tensor]

    @property
    def name(self) -> str:
        return f"{self.strategy}-recovered" if self.knows_recovery else self.strategy


def _fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    single = replace(threat, steps=1, step_size=threat.radius)
    return pgd(model, x, y, single, "recovered-cross-entropy", start=x, keep="last")


def _pgd(steps: int) -> Callable[..., Tensor]:
    def run(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        return pgd(model, x, y, replace(threat, steps=steps), "recovered-cross-entropy", generator=generator)

    return run


def _ensemble(budget: str) -> Callable[..., Tensor]:
    def run(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        return adaptive(RecoveredClassifier(model), x, y, threat, budget, generator)

    return run


QUICK = (
    Attack("pgd-10", False, _pgd(10)),
    Attack("ensemble-quick", False, _ensemble("quick")),
    Attack("ensemble-quick", True, _ensemble("quick")),
)
SUITES: dict[str, tuple[Attack, ...]] = {
    "quick": QUICK,
    # What shows catastrophic overfitting during training: FGSM and PGD on the deployed classifier.
    "single-step": (*QUICK, Attack("fgsm", True, _fgsm), Attack("pgd-10", True, _pgd(10))),
    "light": (
        Attack("fgsm", False, _fgsm),
        Attack("pgd-20", False, _pgd(20)),
        Attack("ensemble", False, _ensemble("standard")),
        Attack("pgd-20", True, _pgd(20)),
        Attack("ensemble", True, _ensemble("standard")),
    ),
    "standard": (
        Attack("fgsm", False, _fgsm),
        Attack("pgd-10", False, _pgd(10)),
        Attack("pgd-20", False, _pgd(20)),
        Attack("ensemble", False, _ensemble("standard")),
        Attack("pgd-20", True, _pgd(20)),
        Attack("ensemble", True, _ensemble("standard")),
    ),
}


def wilson(successes: int, samples: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Wilson 1927)."""
    z = 1.959963984540054
    share, denominator = successes / samples, 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class AttackResult:
    """What one attack left standing: `correct` is true where the recovered prediction still was right."""

    name: str
    knows_recovery: bool
    correct: Flags
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, per sample.

    Attributes:
        data: name of the data.
        threat: the ball.
        seed: seed of the attacks.
        suite: name of the suite.
        clean: whether the benign image is classified correctly, shape (samples,).
        attacks: a result per attack.
        adversarial: for each sample the image that broke it, or the last attack's, shape (samples, channels, H, W).
        warnings: what a reader must know before quoting a number.
    """

    data: str
    threat: ThreatModel
    seed: int
    suite: str
    clean: Flags
    attacks: Sequence[AttackResult]
    adversarial: Images = field(repr=False)
    warnings: Sequence[str] = ()

    @property
    def blind(self) -> Flags:
        """Whether a sample survives every attack that does not know recovery."""
        return self._worst([attack for attack in self.attacks if not attack.knows_recovery])

    @property
    def robust(self) -> Flags:
        """Whether a sample survives every attack."""
        return self._worst(self.attacks)

    def _worst(self, attacks: Sequence[AttackResult]) -> Flags:
        return torch.stack([self.clean, *(attack.correct for attack in attacks)]).all(0)

    @property
    def sink_gap(self) -> float:
        """Blind accuracy - robust accuracy."""
        return float(self.blind.float().mean() - self.robust.float().mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the content of evaluation.json."""
        return {
            "schema": SCHEMA,
            "data": self.data,
            "samples": len(self.clean),
            "seed": self.seed,
            "suite": self.suite,
            "threat": {"norm": self.threat.norm, "eps": self.threat.radius},
            "clean": _share(self.clean),
            "attacks": [
                {
                    "name": attack.name,
                    "knows_recovery": attack.knows_recovery,
                    **_share(attack.correct),
                    "seconds": round(attack.seconds, 2),
                }
                for attack in self.attacks
            ],
            "blind": _share(self.blind)["accuracy"],
            "blind_ci95": _share(self.blind)["ci95"],
            "robust": _share(self.robust)["accuracy"],
            "robust_ci95": _share(self.robust)["ci95"],
            "sink_gap": round(self.sink_gap, 6),
            "warnings": list(self.warnings),
        }


def _share(flags: Tensor) -> dict[str, Any]:
    count = int(flags.sum())
    return {
        "accuracy": round(count / len(flags), 6),
        "ci95": [round(end, 6) for end in wilson(count, len(flags))],
    }


def evaluate(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    suite: str = "standard",
    *,
    num_classes: int,
    seed: int = 0,
    batch_size: int = 500,
    data: str = "",
    progress: Callable[[str], None] = lambda attack: None,
) -> Evaluation:
    """Attack a classifier with every attack of a suite, blind and recovery-aware.

    Predictions are always recovered ones. Every attack starts from all samples that the benign images leave standing,
    so that each attack's accuracy is its own; the adversarial images are looked at once more at the end, in float32.

    Args:
        model: maps images in [0, 1] to 2C logits (a network with dummy classes) or to C logits.
        x: benign images, shape (samples, channels, H, W).
        y: labels in [0, C).
        threat: ball and step size.
        suite: a row of `SUITES`.
        num_classes: C, the number of real classes.
        seed: of the attacks' random starts.
        batch_size: samples attacked at a time.
        data: name of the data, for the report.
        progress: called with the name of each attack and chunk as it starts.

    Raises:
        ValueError: if the suite is unknown, there are no samples, or the model's outputs fit neither C nor 2C.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown: choose from {', '.join(SUITES)}")
    if not len(x):
        raise ValueError("there are no samples to evaluate on")
    network = _with_dummy_classes(model, x, num_classes)
    chunks = [slice(first, first + batch_size) for first in range(0, len(x), batch_size)]
    with attackable(network):
        clean = torch.cat([_correct(network, x[chunk], y[chunk]) for chunk in chunks])
        adversarial, standing = x.clone(), clean.clone()
        results = []
        for attack in SUITES[suite]:
            correct, began = clean.clone(), time.perf_counter()
            for number, chunk in enumerate(chunks):
                progress(attack.name)
                rows = torch.arange(len(x), device=x.device)[chunk][clean[chunk]]
                if not len(rows):
                    continue
                view = network if attack.knows_recovery else SilentDummies(network)
                noise = seeded(seed, "evaluate", attack.strategy, number)
                found = attack.run(view, x[rows], y[rows], threat, noise)
                # An image outside the ball breaks nothing, whatever the model makes of it.
                correct[rows] = _correct(network, found, y[rows]) | ~threat.allows(found, x[rows])
                adversarial[rows[standing[rows]]] = found[standing[rows]]
                standing[rows] &= correct[rows]
            results.append(AttackResult(attack.name, attack.knows_recovery, correct, time.perf_counter() - began))
        confirmed = torch.cat([_correct(network, adversarial[chunk], y[chunk]) for chunk in chunks])
    if not torch.equal(confirmed | ~clean, standing | ~clean):
        raise RuntimeError("the saved adversarial images do not reproduce the attacks' results: is the model random?")
    evaluation = Evaluation(data, threat, seed, suite, clean, results, adversarial)
    return replace(evaluation, warnings=_warnings(evaluation))


def _with_dummy_classes(model: nn.Module, x: Tensor, num_classes: int) -> nn.Module:
    """Return a view of the model with 2C logits, after a look at how many outputs it has."""
    network = model.model if isinstance(model, RecoveredClassifier) else model
    with attackable(network), torch.no_grad():
        outputs = network(x[:1]).shape[1]
    if outputs == num_classes:
        return SilentDummies(network)
    if outputs == 2 * num_classes:
        return network
    raise ValueError(
        f"the model has {outputs} outputs: with num_classes={num_classes} it must have {num_classes}, "
        f"or {2 * num_classes} with dummy classes"
    )


def _correct(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return recover(network(x)).argmax(1) == y


def _warnings(evaluation: Evaluation) -> list[str]:
    warnings = []
    if evaluation.sink_gap > SINK_GAP:
        blind, robust = (100 * float(flags.float().mean()) for flags in (evaluation.blind, evaluation.robust))
        warnings.append(
            f"sink gap of {blind - robust:.1f} points: {blind:.1f} % withstand attacks that do not know recovery, "
            f"{robust:.1f} % withstand those that do; only the second number is robustness"
        )
    return warnings


def evaluate_run(
    folder: RunFolder,
    suite: str = "standard",
    *,
    samples: int | None = None,
    seed: int = 0,
    which: Which = "best",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a run on its test images, write evaluation.json, and return what was written."""
    config = folder.config
    x, y = load_test(config.data.name, samples, config.data.root)
    measured = evaluate(
        folder.load(which),
        x,
        y,
        config.threat.build(None),
        suite,
        num_classes=checkpoint.read(folder.checkpoint_path(which))[1]["model"]["num_classes"],
        seed=seed,
        data=config.data.name,
        progress=progress or (lambda attack: None),
    )
    content = measured.to_dict()
    checkpoint.write_text(folder.evaluation_path, json.dumps(content, indent=2) + "\n")
    return content
