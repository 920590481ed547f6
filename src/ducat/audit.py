"""Signs that an evaluation overstates robustness: what to measure for them, and the warnings that name what was seen.

The signs are those of Athalye et al. 2018 (arXiv 1802.00420) and Carlini et al. 2019 (arXiv 1902.06705), and, for dummy
classes, the sink gap.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ducat.attacks import external
from ducat.attacks.adaptive import adaptive
from ducat.attacks.objectives import find
from ducat.attacks.pgd import pgd
from ducat.dummy import RecoveredClassifier, recover
from ducat.seeding import generator
from ducat.threat import ThreatModel

if TYPE_CHECKING:
    from ducat.evaluate import Evaluation

AUDITED = 100  # correctly classified ones that the measurements are made on
STEPS = (1, 10, 50)
QUERIES = 500
OBJECTIVES = ("recovered-cross-entropy", "weighted-pair")
VANISHED = 1e-12  # largest entry of an input gradient, in logits per unit of brightness
FAR = 0.5  # at this distance in L-inf every image can be made one flat grey

SINK_GAP = 0.01
SHORTFALL = 0.005  # of our ensemble against AutoAttack
NOISE = 0.02  # accuracies on `AUDITED` samples that differ by no more are taken as equal
FEW = 0.01  # of `AUDITED`


@dataclass(frozen=True)
class Audit:
    """Measurements on a few correctly classified samples; numbers are of samples.

    Attributes:
        samples: how many there were.
        vanishing: by objective, those whose gradient of the input is zero, all but zero, or not a number.
        standing_after_steps: by steps of plain PGD, whose last image counts, those that withstood it.
        standing: those that withstood PGD-20 at eps, as often as not with a wrong image on the way.
        standing_at_double_eps: those that withstood it at 2 eps.
        standing_far: those that withstood the ensemble in a ball in which every image can become one flat grey.
        only_black_box: those that Square broke with 500 queries, and no attack of the suite that uses gradients.
    """

    samples: int
    vanishing: dict[str, int]
    standing_after_steps: dict[int, int]
    standing: int
    standing_at_double_eps: int
    standing_far: int
    only_black_box: int

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as values for JSON, whose keys are strings."""
        steps = {str(steps): count for steps, count in self.standing_after_steps.items()}
        return {**asdict(self), "standing_after_steps": steps}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Audit":
        """Undo `to_dict`."""
        steps = {int(steps): count for steps, count in values["standing_after_steps"].items()}
        return cls(**{**values, "standing_after_steps": steps})


def measure_signs(
    network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, withstood_gradients: Tensor, seed: int
) -> Audit:
    """Measure the signs.

    Args:
        network: with 2C outputs, in evaluation mode and without parameter gradients.
        x: benign images that it classifies correctly, at least one.
        y: their labels.
        threat: the ball; its eps is above 0.
        withstood_gradients: which samples withstood every attack of the suite that uses gradients only.
        seed: of the random starts.
    """

    def standing(images: Tensor) -> Tensor:
        with torch.no_grad():
            return recover(network(images)).argmax(1) == y

    def noise(key: str) -> torch.Generator:
        return generator(seed, "audit", key)

    def iterate(steps: int) -> Tensor:
        ball = replace(threat, steps=steps, step_size=threat.radius if steps == 1 else threat.stride)
        goal = "recovered-cross-entropy"
        return pgd(network, x, y, ball, goal, generator=noise("steps"), keep="last")

    def at(eps: float) -> int:
        ball = ThreatModel(threat.norm, eps, steps=20)
        found = pgd(network, x, y, ball, "recovered-cross-entropy", generator=noise("eps"), keep="first")
        return int(standing(found).sum())

    limit = 1.0 if threat.norm == "linf" else float("inf")
    far = FAR if threat.norm == "linf" else FAR * x[0].numel() ** 0.5
    distant = adaptive(
        RecoveredClassifier(network),
        x,
        y,
        ThreatModel(threat.norm, max(far, threat.radius)),
        generator=noise("far"),
    )
    queried = external.square(RecoveredClassifier(network), x, y, threat, noise("square"), queries=QUERIES)
    start = threat.random_start(x, noise("gradients"))
    return Audit(
        samples=len(x),
        vanishing={name: _vanishing(network, start, y, name) for name in OBJECTIVES},
        standing_after_steps={steps: int(standing(iterate(steps)).sum()) for steps in STEPS},
        standing=at(threat.radius),
        standing_at_double_eps=at(min(2 * threat.radius, limit)),
        standing_far=int(standing(distant).sum()),
        only_black_box=int((withstood_gradients & ~standing(queried)).sum()),
    )


def _vanishing(network: nn.Module, x: Tensor, y: Tensor, objective: str) -> int:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = find(objective).value(network(x), y, None).sum()
        # A network may pass no gradient at all, which autograd reports as an error or as None.
        gradient = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        return len(x)
    return int((~(gradient.flatten(1).abs().amax(1) > VANISHED)).sum())


def find_warnings(evaluation: "Evaluation") -> list[str]:
    """Return what a reader must know before quoting the evaluation, each in a sentence with the numbers seen."""
    found = [_sink_gap(evaluation), *_shortfalls(evaluation), _unrepeatable(evaluation)]
    if evaluation.audit is not None:
        found.extend(_signs(evaluation.audit, evaluation.threat))
    return [warning for warning in found if warning]


def _sink_gap(evaluation: "Evaluation") -> str | None:
    if evaluation.sink_gap <= SINK_GAP:
        return None
    blind, robust = (100 * float(flags.float().mean()) for flags in (evaluation.blind, evaluation.robust))
    return (
        f"sink gap of {blind - robust:.1f} points: {blind:.1f} % withstand attacks that do not know recovery, "
        f"{robust:.1f} % withstand those that do; only the second number is robustness"
    )


def _shortfalls(evaluation: "Evaluation") -> Sequence[str]:
    found = []
    for knows_recovery in (False, True):
        rows = [attack for attack in evaluation.attacks if attack.knows_recovery == knows_recovery]
        ours = [attack.correct for attack in rows if attack.strategy.startswith("ensemble")]
        theirs = [attack.correct for attack in rows if attack.strategy == "autoattack"]
        if not ours or not theirs:
            continue
        left, reached = (100 * float(torch.stack(flags).all(0).float().mean()) for flags in (ours, theirs))
        if left - reached > 100 * SHORTFALL:
            knowing = "recovery-aware" if knows_recovery else "blind"
            found.append(
                f"AutoAttack beats our {knowing} ensemble by {left - reached:.1f} points ({reached:.1f} % against "
                f"{left:.1f} %): the ensemble needs work, and without AutoAttack robustness would be overstated"
            )
    return found


def _unrepeatable(evaluation: "Evaluation") -> str | None:
    if not evaluation.unrepeatable:
        return None
    return (
        f"{evaluation.unrepeatable} saved adversarial images were classified otherwise when they were looked at again: "
        "the model is random or depends on the batch, and needs attacks that average over its randomness"
    )


def _signs(audit: Audit, threat: ThreatModel) -> Sequence[str]:
    found, of = [], f"of {audit.samples} samples"
    for objective, count in audit.vanishing.items():
        if count > FEW * audit.samples:
            found.append(
                f"gradients vanish: for {count} {of} the gradient of {objective} is zero or below {VANISHED:g}; "
                "attacks that follow gradients stand still there"
            )
    if audit.only_black_box > FEW * audit.samples:
        found.append(
            f"black-box beats white-box: {audit.only_black_box} {of} withstand every attack that follows gradients, "
            f"but not Square with {QUERIES} queries; the gradients mislead"
        )
    counts = list(audit.standing_after_steps.items())
    pairs = [(few, many) for index, few in enumerate(counts) for many in counts[index + 1 :]]
    worse = [(few, many) for few, many in pairs if many[1] - few[1] > NOISE * audit.samples]
    if worse:
        (few, before), (many, after) = max(worse, key=lambda pair: pair[1][1] - pair[0][1])
        found.append(
            f"more steps do not lower accuracy: {before} {of} withstand PGD with {few} step{'s'[: few > 1]}, "
            f"{after} withstand {many}; the loss surface misleads the attack"
        )
    if audit.standing > NOISE * audit.samples and audit.standing_at_double_eps >= audit.standing:
        found.append(
            f"a larger eps does not lower accuracy: {audit.standing} {of} withstand PGD at eps {threat.radius:.4g}, "
            f"{audit.standing_at_double_eps} at twice that; the attack is stuck, not the model robust"
        )
    if audit.standing_far:
        found.append(
            f"accuracy does not fall to 0: {audit.standing_far} {of} withstand an attack that may turn every image "
            "into flat grey; the attack fails, not the model resists"
        )
    return found
