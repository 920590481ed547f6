"""The recovery-aware ensemble: every attack aims at the classifier that is deployed, the worst case counts."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ducat.attacks.pgd import attackable, pgd
from ducat.dummy import RecoveredClassifier, dummy_head, recover
from ducat.threat import ThreatModel

Images = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]

SILENT = -1e4  # logit of a dummy class that never fires: exp(SILENT) is 0 in float32, and SILENT * 0 is not NaN


@dataclass(frozen=True)
class Round:
    """One attack of the ensemble: an objective, its steps, and its restarts."""

    objective: str
    steps: int
    restarts: int = 1


def _targets(steps: int, ranks: int) -> tuple[Round, ...]:
    return tuple(Round(f"targeted-pair-{rank + 1}", steps) for rank in range(ranks))


BUDGETS: dict[str, tuple[Round, ...]] = {
    "quick": (Round("recovered-cross-entropy", 10), Round("weighted-pair", 20)),
    "standard": (
        Round("recovered-cross-entropy", 50),
        Round("weighted-pair", 50),
        Round("recovered-margin", 50),
        *_targets(50, ranks=9),
    ),
    "full": (
        Round("recovered-cross-entropy", 100, restarts=5),
        Round("recovered-max-cross-entropy", 100, restarts=2),
        Round("weighted-pair", 100, restarts=5),
        Round("recovered-margin", 100, restarts=2),
        *_targets(100, ranks=9),
    ),
}


class SilentDummies(nn.Module):
    """A classifier without dummy classes, seen as one whose dummy classes never fire: C logits to 2C."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return torch.cat([logits, torch.full_like(logits, SILENT)], dim=1)


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
    halving in the manner of Auto-PGD, on the samples that survived the ones before it. `threat.steps` and
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
        benign image itself if that is wrong already); for the others, the last attack's best iterate.

    Raises:
        ValueError: if the budget is unknown.
    """
    if budget not in BUDGETS:
        raise ValueError(f"budget {budget!r} is unknown: choose from {', '.join(BUDGETS)}")
    network = with_dummy_classes(model)
    adversarial = x.clone()
    alive = torch.arange(len(x), device=x.device)
    alive = alive[_correct(network, x, y)]
    for attack in BUDGETS[budget]:
        if not len(alive):
            break
        ball = replace(threat, steps=attack.steps)
        found = pgd(
            network,
            x[alive],
            y[alive],
            ball,
            attack.objective,
            attack.restarts,
            generator,
            keep="first",
            adaptive_steps=True,
        )
        adversarial[alive] = found
        alive = alive[_correct(network, found, y[alive])]
    return adversarial


def _correct(network: nn.Module, x: Tensor, y: Tensor) -> Bool[Tensor, " batch"]:
    with attackable(network), torch.no_grad():
        return recover(network(x)).argmax(1) == y
