"""The recovery-aware ensemble: every attack aims at the classifier that is deployed, the worst case counts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat.attacks.objectives import Goal, find, targeted_pair
from ducat.attacks.pgd import attackable, check_kinds, check_ranges, pgd
from ducat.dummy import RecoveredClassifier, dummy_head, recover
from ducat.models.heads import forward, images_for, returns_tensor
from ducat.models.outputs import as_classifier, logits_of
from ducat.threat import ThreatModel

Batch = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]


TARGETED = "targeted-pair"


# Radius in units of eps, and share of the steps (Croce & Hein 2021, arXiv 2103.01208): a thin ball is hard to cross.
SHRINKING = {"l1": ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))}


@dataclass(frozen=True)
class Round:
    """One attack of a tournament.

    Its candidates are the samples that withstood the rounds before or, with `targets`, the pairs of such a sample and
    one of the wrong classes nearest to it. It attacks the share of them that came closest to success so far.

    Attributes:
        objective: a name that the tournament's `aim` knows; it begins with "targeted" where there are `targets`. Those
            of `adaptive` are names in `objectives.OBJECTIVES` that know recovery and, with `targets`, `TARGETED`.
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
        if (self.targets > 0) != self.objective.startswith("targeted"):
            raise ValueError(
                f"objective={self.objective!r} with targets={self.targets}: 'targeted' ones alone take targets"
            )


# A tournament: short attacks on all samples, then on all targets, then ever more on ever fewer pairs of sample and
# target: most of the time goes where a sample may yet fall. Measured against AutoAttack in results/strength.md.
BUDGETS: dict[str, tuple[Round, ...]] = {
    "quick": (Round("recovered-cross-entropy", 10), Round("weighted-pair", 20)),
    # Shorter than the next, for the demo; what that saves, and costs in strength, is in results/demo.md.
    "light": (
        Round("recovered-cross-entropy", 20),
        Round("weighted-pair", 20),
        Round(TARGETED, 20, share=0.3, targets=9),
        Round(TARGETED, 50, restarts=4, share=0.03, targets=9),
        Round(TARGETED, 100, restarts=4, share=0.01, targets=9),
    ),
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
        return with_silent_dummies(logits_of(self.model(x)))


def with_silent_dummies(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch outputs"]:
    """Return C logits with those of C dummy classes that never fire."""
    # Half of the lowest number: its exponential is 0, and differences with it stay finite, in float32 too.
    lowest = max(torch.finfo(logits.dtype).min, torch.finfo(torch.float32).min) / 2
    return torch.cat([logits, torch.full_like(logits, lowest)], dim=1)


def is_recovered(model: nn.Module) -> bool:
    """Tell whether a model is runtime recovery and nothing else: a class derived from it may compute anything."""
    forward = getattr(model.forward, "__func__", None)
    # Hooks on it may change images and logits as well.
    plain = isinstance(model, RecoveredClassifier) and forward is RecoveredClassifier.forward
    return plain and not (model._forward_hooks or model._forward_pre_hooks)


def with_dummy_classes(model: nn.Module, x: Tensor | None = None) -> nn.Module:
    """Return a view of any classifier that has 2C logits.

    What `recover` makes of them by max is the decision of the classifier. A `RecoveredClassifier` by max is opened, a
    network made by `add_dummy_classes` is returned as it is, and any other classifier, one recovered by logsumexp
    included, counts as one without dummy classes. So does one that has a recovered network inside: how many outputs
    there are is looked at with the first image of `x`, or with random images.
    """
    if isinstance(model, RecoveredClassifier) and is_recovered(model):
        if model.how != "max":
            return SilentDummies(model)
        return _returning_tensors(model.model, x)
    if isinstance(model, SilentDummies):
        return model
    head = dummy_head(model)
    if head is None:
        return SilentDummies(model)
    x = images_for(model) if x is None else x
    outputs = forward(model, x[:1].to(head.weight.device)).shape[1]
    return _returning_tensors(model, x) if outputs == 2 * head.num_classes else SilentDummies(model)


def _returning_tensors(model: nn.Module, x: Tensor | None) -> nn.Module:
    """Return a model whose output is a tensor: itself if images show that it is."""
    if isinstance(model, SilentDummies):
        return model
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return model if x is not None and returns_tensor(model, x[:1].to(device)) else as_classifier(model)


def adaptive(
    model: nn.Module,
    x: Batch,
    y: Labels,
    threat: ThreatModel,
    budget: str | Sequence[Round] = "standard",
    generator: torch.Generator | None = None,
) -> Batch:
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
        budget: a row of `BUDGETS` ("quick", "light", "standard" or "full"), or rounds.
        generator: source of the random starts; PyTorch's global one by default.

    Returns:
        Images in the ball, shape of x: for a sample that was broken, one whose recovered prediction is wrong (the
        benign image itself if that is wrong already); for the others, the image that came closest to it.

    Raises:
        ValueError: if the budget is unknown, or images or labels are of another kind than this says.
    """
    if isinstance(budget, str) and budget not in BUDGETS:
        raise ValueError(f"budget {budget!r} is unknown: choose from {', '.join(BUDGETS)}")
    check_kinds(x, y)
    check_ranges(x, y)
    if not len(x):
        return x.clone()
    rounds = BUDGETS[budget] if isinstance(budget, str) else budget
    return tournament(with_dummy_classes(model, x), x, y, threat, rounds, _lead, _aim, generator)


def _lead(logits: Tensor, y: Tensor) -> Tensor:
    """Return by how much each class is ahead of the label's, recovered."""
    recovered = recover(logits)
    lead = (recovered - recovered.gather(1, y[:, None])).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    # Such outputs are no prediction.
    return torch.where((logits.isnan() | logits.isposinf()).any(1, keepdim=True), torch.inf, lead)


def _aim(objective: str, target: Labels | None) -> Goal:
    if target is None:
        return find(objective)
    return Goal(targeted_pair, knows_recovery=True, reference=lambda clean_logits, y: target)


def tournament(
    network: nn.Module,
    x: Batch,
    y: Labels,
    threat: ThreatModel,
    rounds: Sequence[Round],
    score: Callable[[Tensor, Tensor], Tensor],
    aim: Callable[[str, Labels | None], Goal],
    generator: torch.Generator | None = None,
    starts: Sequence[Batch] = (),
    judge: nn.Module | None = None,
) -> Batch:
    """Attack in rounds, each on the samples that are left or on the wrong classes that came closest.

    Args:
        network: maps images in [0, 1] to 2C logits.
        x: benign images, shape (B, channels, H, W).
        y: labels in [0, C), shape (B,).
        threat: the ball; its steps and step size are not used.
        rounds: the attacks, in their order.
        score: `(logits, y)` to how near each sample came to falling to each class, shape (B, C); above 0 it fell. The
            label's own column does not count.
        aim: makes a round's objective of its name and, where it has targets, of the class to reach for each row.
        generator: source of the random starts; PyTorch's global one by default.
        starts: images in the ball, each of x's shape, that count as found, and that the first round begins at as well.
        judge: the network that decides what fell and how near it came, where `network` only leads; `network` itself by
            default. It has as many outputs.

    Returns:
        For each sample the image that came nearest to any wrong class; of those that fell, the first that was found.
    """
    search = _Nearest(network if judge is None else judge, x, y, score)
    for images in starts:
        search.take(torch.arange(len(x), device=x.device), threat.project(images, x))
    for number, attack in enumerate(rounds):
        for images in starts if not number else ():
            rows = (search.margin <= 0).nonzero().squeeze(1)
            if len(rows):
                ball, begin = replace(threat, steps=attack.steps), threat.project(images, x)[rows]
                goal = aim(attack.objective, None)
                found = pgd(
                    network, x[rows], y[rows], ball, goal, start=begin, keep="first", adaptive_steps=True, judge=judge
                )
                search.take(rows, found)
        rows, targets = search.candidates(attack)
        while len(rows):
            now, target = rows[: len(x)], targets[: len(x)]
            goal = aim(attack.objective, target if attack.targets else None)
            ball = replace(threat, steps=attack.steps)
            search.take(now, ascended(network, x[now], y[now], ball, goal, generator, judge))
            rows, targets = rows[len(x) :], targets[len(x) :]
            standing = search.margin[rows] <= 0
            rows, targets = rows[standing], targets[standing]
    return search.adversarial


def ascended(
    network: nn.Module,
    x: Batch,
    y: Labels,
    threat: ThreatModel,
    goal: Goal,
    generator: torch.Generator | None,
    judge: nn.Module | None = None,
) -> Batch:
    """Return what one random start finds; in l1 it comes from outside, through larger balls that shrink to the ball."""
    found = None
    for radius, share in SHRINKING.get(threat.norm, ((1.0, 1.0),)):
        steps = max(1, round(share * threat.steps))
        ball = ThreatModel(threat.norm, radius * threat.eps, steps=steps)
        start = None if found is None else ball.project(found, x)
        keep = "first" if radius == 1 else "best"
        found = pgd(network, x, y, ball, goal, 1, generator, start=start, keep=keep, adaptive_steps=True, judge=judge)
    assert found is not None
    return found


class _Nearest:
    """What is known of each sample: how near it came to each wrong class, and the image that came nearest to any."""

    def __init__(self, network: nn.Module, x: Batch, y: Labels, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.network = network
        self.y = y
        self.score = score
        self.adversarial = x.clone()
        self.reached = self._score(x, y)  # per sample and class, the best so far

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
        lead = self._score(found, self.y[rows])
        order = lead.amax(1).argsort(stable=True)
        ranks = torch.arange(len(rows), device=rows.device)
        place = torch.full_like(self.y, -1).scatter_reduce(0, rows[order], ranks, "amax")
        best = order[place.clamp_min(0)]  # the nearest of each sample's images, where it has any
        closer = (place >= 0) & (lead[best].amax(1) > self.margin)
        self.adversarial[closer] = found[best[closer]]
        self.reached = self.reached.scatter_reduce(0, rows[:, None].expand_as(lead), lead, "amax")

    def _score(self, x: Tensor, y: Tensor) -> Float[Tensor, "rows classes"]:
        """Return the score of each class; minus infinity for the label's own."""
        with attackable(self.network), torch.no_grad():
            logits = self.network(x).to(x.dtype)
            classes = logits.shape[1] // 2
            if len(y) and int(y.max()) >= classes:
                raise ValueError(f"the labels run up to {int(y.max())}, but the network has {classes} classes")
            score = self.score(logits, y).nan_to_num(-torch.inf, torch.inf, -torch.inf)
            return score.scatter(1, y[:, None], -torch.inf)
