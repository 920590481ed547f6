"""The recovery-aware ensemble: every attack aims at the classifier that is deployed, the worst case counts."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat import losses
from ducat.attacks.pgd import attackable, pgd
from ducat.dummy import RecoveredClassifier, dummy_head, recover
from ducat.threat import ThreatModel

Images = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]


@dataclass(frozen=True)
class Round:
    """One attack of the ensemble.

    Attributes:
        objective: a name in `objectives.OBJECTIVES` that knows recovery.
        steps: its steps.
        restarts: independent random starts.
        share: of the samples that withstood the rounds before, the share that came closest to being fooled, in
            (0, 1]; the round attacks only those. Late rounds seldom break a sample that stayed far from it.
    """

    objective: str
    steps: int
    restarts: int = 1
    share: float = 1.0


def _targets(ranks: int, steps: int, restarts: int = 1, share: float = 1.0) -> tuple[Round, ...]:
    return tuple(Round(f"targeted-pair-{rank}", steps, restarts, share) for rank in range(1, ranks + 1))


# Short attacks on all samples, then ever longer ones on ever fewer: most of the time goes where a sample may yet fall.
# Measured against AutoAttack in docs/evaluation.md.
BUDGETS: dict[str, tuple[Round, ...]] = {
    "quick": (Round("recovered-cross-entropy", 10), Round("weighted-pair", 20)),
    "standard": (
        Round("recovered-cross-entropy", 20),
        Round("weighted-pair", 20),
        *_targets(5, steps=20),
        *_targets(9, steps=50, share=0.3),
        Round("recovered-margin", 100, share=0.1),
        *_targets(5, steps=100, restarts=4, share=0.1),
    ),
    "full": (
        Round("recovered-cross-entropy", 100, restarts=2),
        Round("recovered-max-cross-entropy", 100, restarts=2),
        Round("weighted-pair", 100, restarts=2),
        Round("recovered-margin", 100, restarts=2),
        *_targets(9, steps=100),
        Round("recovered-cross-entropy", 200, restarts=5, share=0.3),
        *_targets(9, steps=200, restarts=5, share=0.3),
    ),
}


class SilentDummies(nn.Module):
    """A classifier without dummy classes, seen as one whose dummy classes never fire: C logits to 2C."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        # Half of the lowest number: its exponential is 0, and differences with it stay finite.
        return torch.cat([logits, torch.full_like(logits, torch.finfo(logits.dtype).min / 2)], dim=1)


def with_dummy_classes(model: nn.Module) -> nn.Module:
    """Return a view of any classifier that has 2C logits.

    A `RecoveredClassifier` is opened, a network made by `add_dummy_classes` is returned as it is, and any other
    classifier counts as one without dummy classes.
    """
    if isinstance(model, RecoveredClassifier):
        return model.model
    return model if dummy_head(model) is not None else SilentDummies(model)


def adaptive(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    budget: str = "standard",
    generator: torch.Generator | None = None,
) -> Images:
    """Attack the recovered classifier with an ensemble that keeps, per sample, the first success.

    The objectives are those that work on both members of each pair of real and dummy class: recovered cross-entropy,
    recovered margin, weighted pair, and targeted pair for the strongest wrong classes. Each runs with momentum and step
    halving in the manner of Auto-PGD, on samples that survived the ones before it. `threat.steps` and
    `threat.step_size` are not used: the budget sets the steps.

    Args:
        model: a `RecoveredClassifier`, a network with dummy classes made by `add_dummy_classes`, or a classifier
            without them. A network whose 2C outputs come from elsewhere must be wrapped in `RecoveredClassifier`.
        x: benign images in [0, 1], shape (B, channels, H, W).
        y: labels in [0, C), shape (B,).
        threat: the ball.
        budget: a row of `BUDGETS`: "quick", "standard" or "full".
        generator: source of the random starts; PyTorch's global one by default.

    Returns:
        Images in the ball, shape of x: for a sample that was broken, one whose recovered prediction is wrong (the
        benign image itself if that is wrong already); for the others, the image that came closest to it.

    Raises:
        ValueError: if the budget is unknown.
    """
    if budget not in BUDGETS:
        raise ValueError(f"budget {budget!r} is unknown: choose from {', '.join(BUDGETS)}")
    network = with_dummy_classes(model)
    adversarial, margin = x.clone(), _margin(network, x, y)
    for attack in BUDGETS[budget]:
        standing = (margin <= 0).nonzero().squeeze(1)
        if not len(standing):
            break
        closest = margin[standing].argsort(descending=True, stable=True)[: math.ceil(attack.share * len(standing))]
        rows = standing[closest]
        ball = replace(threat, steps=attack.steps)
        found = pgd(
            network,
            x[rows],
            y[rows],
            ball,
            attack.objective,
            attack.restarts,
            generator,
            keep="first",
            adaptive_steps=True,
        )
        reached = _margin(network, found, y[rows])
        closer = reached > margin[rows]
        adversarial[rows[closer]], margin[rows[closer]] = found[closer], reached[closer]
    return adversarial


def _margin(network: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, " batch"]:
    with attackable(network), torch.no_grad():
        return losses.margin(recover(network(x)).to(x.dtype), y)
