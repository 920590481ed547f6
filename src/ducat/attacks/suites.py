"""The suites: tables of attacks, blind and recovery-aware side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import get_args

import torch
from torch import Tensor, nn

from ducat.attacks import external
from ducat.attacks.adaptive import Round, adaptive
from ducat.attacks.guides import narrowed
from ducat.attacks.pgd import pgd
from ducat.dummy import RecoveredClassifier
from ducat.threat import Norm, ThreatModel

NORMS: tuple[str, ...] = get_args(Norm)
RunAttack = Callable[[nn.Module, Tensor, Tensor, ThreatModel, torch.Generator], Tensor]


@dataclass(frozen=True)
class Attack:
    """A row of a suite.

    Every attack is a function of a classifier with 2C logits. What the attacker knows is only a matter of which one it
    is given: an attacker that knows recovery gets the network itself, a blind one a view of it as a plain classifier
    with 2C classes. So a blind and a recovery-aware row of one strategy differ in nothing else, and on a network
    without dummy classes they are one attack, if they have one `run`.

    Attributes:
        strategy: what is run; with the knowledge of recovery it makes the name in the report.
        knows_recovery: whether the attacker knows that predictions are recovered.
        run: `(model, x, y, threat, generator)` to images in the ball.
        norms: the threat models that it is for.
        black_box: whether it also, or only, searches without gradients.
    """

    strategy: str
    knows_recovery: bool
    run: RunAttack
    norms: tuple[str, ...] = NORMS
    black_box: bool = False

    @property
    def name(self) -> str:
        return attack_name(self.strategy, self.knows_recovery)


def attack_name(strategy: str, knows_recovery: bool) -> str:
    """Return what the report calls a row."""
    return f"{strategy}-recovered" if knows_recovery else strategy


@dataclass(frozen=True)
class Suite:
    """Attacks that are run together.

    Attributes:
        attacks: the rows.
        audit: whether the evaluation also looks for signs that it was fooled (`ducat.evaluation.audit`), attacks again
            where there are any, and ends with a second opinion.
        name: what the report calls it.
    """

    attacks: tuple[Attack, ...]
    audit: bool = True
    name: str = "own"


def find_suite(suite: str | Suite) -> Suite:
    """Return the suite of that name, or the suite itself.

    Raises:
        ValueError: if there is none of that name.
    """
    if isinstance(suite, Suite):
        return suite
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown: choose from {', '.join(SUITES)}")
    return replace(SUITES[suite], name=suite)


def through(guide: nn.Module, steps: int = 50) -> RunAttack:
    """Return an attack along the gradients of another network of C or 2C logits, judged by the model at every step."""

    def run(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        deployed = RecoveredClassifier(model)
        found, standing = x.clone(), torch.arange(len(x), device=x.device)
        with torch.no_grad():
            outputs = deployed(x[:1]).shape[1] if len(x) else 0
        leading, ball = narrowed(guide, outputs), replace(threat, steps=steps)
        for objective in ("cross-entropy", "margin"):
            if not len(standing):
                break
            images = pgd(
                leading,
                x[standing],
                y[standing],
                ball,
                objective,
                generator=generator,
                keep="first",
                adaptive_steps=True,
                judge=deployed,
            )
            with torch.no_grad():
                fooled = deployed(images).argmax(1) != y[standing]
            found[standing] = images
            standing = standing[~fooled]
        return found

    return run


def fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """The fast gradient sign method: one step of length eps from the benign image (Goodfellow et al. 2015)."""
    single = replace(threat, steps=1, step_size=threat.eps)
    return pgd(model, x, y, single, "recovered-cross-entropy", start=x, keep="last")


@cache
def _pgd(steps: int, objective: str = "recovered-cross-entropy", restarts: int = 1) -> RunAttack:
    def run(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        return pgd(model, x, y, replace(threat, steps=steps), objective, restarts, generator)

    return run


@cache
def _targeted(steps: int) -> RunAttack:
    """Return PGD towards a wrong class that is drawn for each sample."""

    def run(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1] // 2
        shift = torch.randint(1, classes, y.shape, generator=generator, device=generator.device).to(y)
        ball, goal = replace(threat, steps=steps), "recovered-targeted-cross-entropy"
        return pgd(model, x, (y + shift) % classes, ball, goal, generator=generator)

    return run


def ensemble(budget: str | Sequence[Round]) -> RunAttack:
    """Return the recovery-aware ensemble with a budget, for a row of a suite."""
    return _ensemble(budget if isinstance(budget, str) else tuple(budget))


@cache
def _ensemble(budget: str | tuple[Round, ...]) -> RunAttack:
    def run(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        return adaptive(RecoveredClassifier(model), x, y, threat, budget, generator)

    return run


@cache
def _external(attack: Callable[..., Tensor], **settings: int) -> RunAttack:
    def run(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
        return attack(RecoveredClassifier(model), x, y, threat, generator, **settings)

    return run


_QUICK = (
    Attack("pgd-10", False, _pgd(10)),
    Attack("ensemble-quick", False, ensemble("quick")),
    Attack("ensemble-quick", True, ensemble("quick")),
)
# In L-inf "C&W" is PGD on the loss of Carlini & Wagner, as in the literature of adversarial training.
_CW_LINF = partial(Attack, "cw-30", run=_pgd(30, "recovered-margin"), norms=("linf",))
_CW_L2 = partial(Attack, "cw", run=_external(external.carlini_wagner), norms=("l2",))
_AUTOATTACK = partial(Attack, "autoattack", run=_external(external.autoattack), black_box=True)
_STANDARD = (
    Attack("fgsm", False, fgsm),
    Attack("pgd-10", False, _pgd(10)),
    Attack("pgd-20", False, _pgd(20)),
    Attack("pgd-20-targeted", False, _targeted(20)),
    _CW_LINF(False),
    _CW_L2(False),
    Attack("ensemble", False, ensemble("standard")),
    _AUTOATTACK(False),
    Attack("pgd-20", True, _pgd(20)),
    Attack("pgd-20-targeted", True, _targeted(20)),
    _CW_L2(True),
    Attack("ensemble", True, ensemble("standard")),
    _AUTOATTACK(True),
)


def _light(name: str, budget: str) -> tuple[Attack, ...]:
    """Return the rows of a suite without AutoAttack; the ensemble has the name and the budget."""
    return (
        Attack("fgsm", False, fgsm),
        Attack("pgd-20", False, _pgd(20)),
        Attack(name, False, ensemble(budget)),
        Attack("pgd-20", True, _pgd(20)),
        Attack(name, True, ensemble(budget)),
    )


SUITES: dict[str, Suite] = {
    "quick": Suite(_QUICK, audit=False),
    # What shows catastrophic overfitting during training: FGSM and PGD on the deployed classifier.
    "single-step": Suite((*_QUICK, Attack("fgsm", True, fgsm), Attack("pgd-10", True, _pgd(10))), audit=False),
    "light": Suite(_light("ensemble", "standard")),
    "demo": Suite(_light("ensemble-light", "light")),
    "standard": Suite(_STANDARD),
    "full": Suite(
        (
            *_STANDARD,
            *(
                Attack(strategy, knows_recovery, run, norms)
                for knows_recovery in (False, True)
                for strategy, run, norms in (
                    ("pgd-100", _pgd(100), NORMS),
                    ("pgd-100x5", _pgd(100, restarts=5), NORMS),
                    ("ddn", _external(external.ddn, steps=200), ("l2",)),
                    ("ensemble-full", ensemble("full"), NORMS),
                )
            ),
            Attack("square-5000", True, _external(external.square, queries=5000), black_box=True),
        )
    ),
}
