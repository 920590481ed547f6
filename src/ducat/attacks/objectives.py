"""What an attack maximises: a table of per-sample objectives, and whether each knows of runtime recovery.

A blind objective reads the logits as they are, and its attacker counts a sample as fooled once argmax leaves y, be it
for y's own dummy class. A recovery-aware one works on the classifier that is deployed, and its attacker counts a sample
as fooled once the recovered prediction is wrong. For a network without dummy classes only the blind ones apply.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ducat import losses
from ducat.dummy import recover

Logits = Float[Tensor, "batch outputs"]
Labels = Int[Tensor, " batch"]
PerSample = Float[Tensor, " batch"]


@dataclass(frozen=True)
class Goal:
    """What an attack raises, and when it believes to have won: a row of the table.

    Attributes:
        value: `(logits, y, reference)` to a value per sample, which the attack raises. `reference` is what
            `reference` below computed for the sample before the attack, or None.
        knows_recovery: whether the attacker knows that predictions are recovered.
        reference: `(clean_logits, y)` to a tensor with a row per sample that stays fixed during the attack, for
            objectives that compare with the benign image; None for the others.
        targeted: whether y holds the classes that the attacker wants, instead of the true labels.
        success: `(logits, y)` to whether the attacker has what he wants of each sample, where that is not simply a
            wrong prediction; None for that.
        recovered: the recovery-aware counterpart of a blind objective, if it has one.
    """

    value: Callable[[Tensor, Tensor, Any], Tensor]
    knows_recovery: bool = False
    reference: Callable[[Tensor, Tensor], Tensor] | None = None
    targeted: bool = False
    success: Callable[[Tensor, Tensor], Tensor] | None = None
    recovered: "Goal | None" = None

    def fooled(self, logits: Logits, y: Labels) -> Bool[Tensor, " batch"]:
        """Tell which samples this attacker believes to be misclassified; when `targeted`, classified as y.

        Logits that are NaN or plus infinity are no prediction; minus infinity is a class that never fires.
        """
        if self.success is not None:
            return self.success(logits, y)
        prediction = (recover(logits) if self.knows_recovery else logits).argmax(1)
        broken = (logits.isnan() | logits.isposinf()).any(1)
        return ~broken & (prediction == y) if self.targeted else broken | (prediction != y)


def dlr(logits: Logits, y: Labels) -> PerSample:
    """Difference of logits ratio, invariant to shift and scale of the logits (Croce & Hein 2020, arXiv 2003.01690).

    Raises:
        ValueError: if there are fewer than 3 outputs.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"dlr needs at least 3 outputs, recovered where they are, not {logits.shape[1]}: use 'margin'")
    ordered = logits.sort(dim=1, descending=True).values
    return losses.margin(logits, y) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def weighted_pair(logits: Logits, y: Labels) -> PerSample:
    """The recovered margin with both members of the pair of y pushed down.

    max_{k not in {y, y+C}} z_k - (a z_y + (1 - a) z_{y+C}), where a = softmax(z_y, z_{y+C})_1 follows whichever
    is larger and passes no gradient itself. The plain recovered margin sends gradient to one member only, and
    oscillates between the two.
    """
    real, dummy = logits.chunk(2, dim=1)
    pair = torch.stack([half.gather(1, y[:, None]).squeeze(1) for half in (real, dummy)])
    weight = pair.detach().softmax(dim=0)
    others = recover(logits).scatter(1, y[:, None], -torch.inf).amax(1)
    return others - torch.where(weight > 0, weight * pair, 0).sum(0)  # 0 times minus infinity is no number


def runner_up(rank: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a reference that picks each sample's `rank`-th strongest wrong recovered class, counted from 0."""

    def target(clean_logits: Tensor, y: Tensor) -> Tensor:
        wrong = recover(clean_logits).scatter(1, y[:, None], -torch.inf)
        return wrong.argsort(dim=1, descending=True)[:, min(rank, wrong.shape[1] - 2)]

    return target


def targeted_pair(logits: Logits, y: Labels, target: Labels) -> PerSample:
    """max(z_k, z_{k+C}) - max(z_y, z_{y+C}) for one wrong class k, given as `target`."""
    recovered = recover(logits)
    return (recovered.gather(1, target[:, None]) - recovered.gather(1, y[:, None])).squeeze(1)


def _clean(clean_logits: Tensor, y: Tensor) -> Tensor:
    return clean_logits


def _negative_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return -losses.cross_entropy(logits, y)


def _recovered(value: Callable[[Tensor, Tensor], Tensor], how: str, targeted: bool = False) -> Goal:
    return Goal(lambda logits, y, reference: value(recover(logits, how), y), knows_recovery=True, targeted=targeted)


def _blind(value: Callable[[Tensor, Tensor], Tensor], how: str, targeted: bool = False) -> Goal:
    """Return a blind objective, whose counterpart has the same value on logits recovered by `how`."""
    counterpart = _recovered(value, how, targeted)
    return Goal(lambda logits, y, reference: value(logits, y), targeted=targeted, recovered=counterpart)


_RECOVERED_KL = Goal(
    lambda logits, y, clean: losses.kl(recover(clean, "logsumexp"), recover(logits, "logsumexp")),
    knows_recovery=True,
    reference=_clean,
)
BLIND: dict[str, Goal] = {
    "cross-entropy": _blind(losses.cross_entropy, "logsumexp"),
    "margin": _blind(losses.margin, "max"),
    "dlr": _blind(dlr, "max"),
    "kl": Goal(lambda logits, y, clean: losses.kl(clean, logits), reference=_clean, recovered=_RECOVERED_KL),
    "targeted-cross-entropy": _blind(_negative_cross_entropy, "logsumexp", targeted=True),
}


OBJECTIVES: dict[str, Goal] = {
    **BLIND,
    **{f"recovered-{name}": row.recovered for name, row in BLIND.items() if row.recovered is not None},
    "recovered-max-cross-entropy": _recovered(losses.cross_entropy, "max"),
    "weighted-pair": Goal(lambda logits, y, reference: weighted_pair(logits, y), knows_recovery=True),
    **{f"targeted-pair-{rank + 1}": Goal(targeted_pair, True, runner_up(rank)) for rank in range(9)},
}


def find(objective: str | Goal) -> Goal:
    """Return the objective of that name, or the objective itself.

    Raises:
        ValueError: if there is none of that name.
    """
    if isinstance(objective, Goal):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown: choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]
