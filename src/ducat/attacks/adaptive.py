"""The recovery-aware ensemble: every attack aims at the classifier that is deployed, the worst case counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat.attacks.objectives import Objective, find, targeted_pair
from ducat.attacks.pgd import attackable, pgd
from ducat.dummy import RecoveredClassifier, dummy_head, recover
from ducat.threat import ThreatModel

Images = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]


TARGETED = "targeted-pair"


@dataclass(frozen=True)
class Round:
    """One attack of the ensemble.

    Its candidates are the samples that withstood the rounds before or, with `targets`, the pairs of such a sample and
    one of the wrong classes nearest to it. It attacks the share of them that came closest to success so far.

    Attributes:
        objective: a name in `objectives.OBJECTIVES` that knows recovery; with `targets`, `TARGETED`.
        steps: its steps.
        restarts: independent random starts.
        share: of the candidates that are attacked, in (0, 1]. Late rounds seldom break one that stayed far.
        targets: how many wrong classes of each sample are tried; 0 for an objective that names none.
    """

    objective: str
    steps: int
    restarts: int = 1
    share: float = 1.0
    targets: int = 0

    def __post_init__(self) -> None:
        if (self.targets > 0) != (self.objective == TARGETED):
            raise ValueError(
                f"objective={self.objective!r} with targets={self.targets}: {TARGETED!r} alone takes targets"
            )


# A tournament: short attacks on all samples, then on all targets, then ever more on ever fewer pairs of sample and
# target: most of the time goes where a sample may yet fall. Measured against AutoAttack in docs/evaluation.md.
BUDGETS: dict[str, tuple[Round, ...]] = {
    "quick": (Round("recovered-cross-entropy", 10), Round("weighted-pair", 20)),
    "standard": (
        Round("recovered-cross-entropy", 20),
        Round("weighted-pair", 20),
        Round(TARGETED, 20, targets=9),
        Round(TARGETED, 50, restarts=4, share=0.05, targets=9),
        Round(TARGETED, 100, restarts=8, share=0.02, targets=9),
    ),
    "full": (
        Round("recovered-cross-entropy", 100, restarts=2),
        Round("recovered-max-cross-entropy", 100, restarts=2),
        Round("weighted-pair", 100, restarts=2),
        Round("recovered-margin", 100, restarts=2),
        Round(TARGETED, 100, targets=9),
        Round("recovered-cross-entropy", 200, restarts=5, share=0.3),
        Round(TARGETED, 200, restarts=5, share=0.3, targets=9),
        Round(TARGETED, 200, restarts=20, share=0.03, targets=9),
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


def is_recovered(model: nn.Module) -> bool:
    """Tell whether a model is runtime recovery and nothing else: a class derived from it may compute anything."""
    forward = getattr(model.forward, "__func__", None)
    return isinstance(model, RecoveredClassifier) and forward is RecoveredClassifier.forward


def with_dummy_classes(model: nn.Module, x: Images) -> nn.Module:
    """Return a view of any classifier that has 2C logits.

    What `recover` makes of them by max is the decision of the classifier. A `RecoveredClassifier` by max is opened, a
    network made by `add_dummy_classes` is returned as it is, and any other classifier, one recovered by logsumexp
    included, counts as one without dummy classes. `x` are images to look at the outputs with.
    """
    if isinstance(model, RecoveredClassifier) and is_recovered(model):
        return model.model if model.how == "max" else SilentDummies(model)
    head = dummy_head(model)
    if head is None:
        return SilentDummies(model)
    with attackable(model), torch.no_grad():
        outputs = model(x[:1]).shape[1]
    return model if outputs == 2 * head.num_classes else SilentDummies(model)


def adaptive(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    budget: str | Sequence[Round] = "standard",
    generator: torch.Generator | None = None,
) -> Images:
    """Attack the recovered classifier with an ensemble that keeps, per sample, the first success.

    The objectives are those that work on both members of each pair of real and dummy class: recovered cross-entropy,
    recovered margin, weighted pair, and targeted pair for the nearest wrong classes. Each runs with momentum and step
    halving in the manner of Auto-PGD, on samples that survived the ones before it. Starts and targets run side by side,
    at most as many rows at a time as x has. `threat.steps` and `threat.step_size` are not used: the budget sets the
    steps.

    Args:
        model: a `RecoveredClassifier`, a network with dummy classes made by `add_dummy_classes`, or a classifier
            without them. A network whose 2C outputs come from elsewhere must be wrapped in `RecoveredClassifier`.
        x: benign images in [0, 1], shape (B, channels, H, W).
        y: labels in [0, C), shape (B,).
        threat: the ball.
        budget: a row of `BUDGETS` ("quick", "standard" or "full"), or rounds.
        generator: source of the random starts; PyTorch's global one by default.

    Returns:
        Images in the ball, shape of x: for a sample that was broken, one whose recovered prediction is wrong (the
        benign image itself if that is wrong already); for the others, the image that came closest to it.

    Raises:
        ValueError: if the budget is unknown.
    """
    if isinstance(budget, str) and budget not in BUDGETS:
        raise ValueError(f"budget {budget!r} is unknown: choose from {', '.join(BUDGETS)}")
    if not len(x):
        return x.clone()
    network = with_dummy_classes(model, x)
    search = _Search(network, x, y)
    for attack in BUDGETS[budget] if isinstance(budget, str) else budget:
        rows, targets = search.candidates(attack)
        while len(rows):
            now, target = rows[: len(x)], targets[: len(x)]
            goal = find(attack.objective) if not attack.targets else _towards(target)
            ball = replace(threat, steps=attack.steps)
            found = pgd(network, x[now], y[now], ball, goal, 1, generator, keep="first", adaptive_steps=True)
            search.take(now, found)
            rows, targets = rows[len(x) :], targets[len(x) :]
            standing = search.margin[rows] <= 0
            rows, targets = rows[standing], targets[standing]
    return search.adversarial


def _towards(target: Labels) -> Objective:
    return Objective(targeted_pair, knows_recovery=True, reference=lambda clean_logits, y: target)


class _Search:
    """What is known of each sample: how near it came to each wrong class, and the image that came nearest to any."""

    def __init__(self, network: nn.Module, x: Images, y: Labels) -> None:
        self.network = network
        self.y = y
        self.adversarial = x.clone()
        self.reached = self._lead(x, y)  # per sample and class, the best so far

    @property
    def margin(self) -> Float[Tensor, " batch"]:
        """Above 0 for the samples that were broken."""
        return self.reached.amax(1)

    def candidates(self, attack: Round) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Return the samples that a round attacks, a row for each start, and their targets; the closest come first."""
        rows = (self.margin <= 0).nonzero()
        lead, target = self.reached[rows.squeeze(1)].topk(min(max(1, attack.targets), self.reached.shape[1] - 1))
        order = lead.flatten().argsort(descending=True, stable=True)
        order = order[: math.ceil(attack.share * len(order))].repeat(attack.restarts)
        return rows.expand_as(target).flatten()[order], target.flatten()[order]

    def take(self, rows: Int[Tensor, " rows"], found: Float[Tensor, "rows channels height width"]) -> None:
        """Learn from images that were found for these samples, of which one may occur more than once."""
        lead = self._lead(found, self.y[rows])
        order = lead.amax(1).argsort(stable=True)
        ranks = torch.arange(len(rows), device=rows.device)
        place = torch.full_like(self.y, -1).scatter_reduce(0, rows[order], ranks, "amax")
        best = order[place.clamp_min(0)]  # the nearest of each sample's images, where it has any
        closer = (place >= 0) & (lead[best].amax(1) > self.margin)
        self.adversarial[closer] = found[best[closer]]
        self.reached = self.reached.scatter_reduce(0, rows[:, None].expand_as(lead), lead, "amax")

    def _lead(self, x: Tensor, y: Tensor) -> Float[Tensor, "rows classes"]:
        """Return by how much each class is ahead of the label's, recovered; minus infinity for the label's own."""
        with attackable(self.network), torch.no_grad():
            recovered = recover(self.network(x)).to(x.dtype)
        own = y[:, None]
        return (recovered - recovered.gather(1, own)).scatter(1, own, -torch.inf)
