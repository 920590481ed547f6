"""The training methods as one table: an inner objective, a start of the attack, and an outer loss.

Dummy classes plug into every row by the same rules (`PHASES`), so that no method is written twice:

- off: the method on C logits.
- published: before `start_epoch` the method on all 2C logits with one-hot targets; then two-hot targets, while the
  inner attack and the regulariser go on reading the 2C logits and so are blind to recovery.
- recovery-aware: before `start_epoch` the method on the C real logits; then two-hot targets, while the inner attack and
  the regulariser read recovered logits, where a pair is one class.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat import losses
from ducat.attacks import objectives
from ducat.attacks.pgd import pgd
from ducat.dummy import TwoHot, recover, two_hot
from ducat.threat import ThreatModel

Batch = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]
Kind = Literal["off", "published", "recovery-aware"]
Reading = Literal["all", "real", "recovered"]

GAUSSIAN_START = 0.001  # standard deviation, on images in [0, 1] (Zhang et al. 2019)
CONSISTENCY_TEMPERATURE = 0.5  # Tack et al. 2022


class Phases(NamedTuple):
    """Which logits the inner attack and the regulariser read, before dummy classes are in use and while they are."""

    before: Reading
    active: Reading


PHASES: dict[str, Phases] = {
    "off": Phases("all", "all"),
    "published": Phases("all", "all"),
    "recovery-aware": Phases("real", "recovered"),
}


class Paper(NamedTuple):
    """Where something was published; the address is empty where there is none."""

    title: str
    address: str = ""


DUMMY_CLASSES = Paper(
    "New Paradigm of Adversarial Training: Breaking Inherent Trade-Off between Accuracy and Robustness via Dummy "
    "Classes",
    "https://arxiv.org/abs/2410.12671",
)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: how tables and plots call it.
        paper: where it was published.
        objective: what the inner attack maximises, a blind row of `attacks.objectives.OBJECTIVES` or its name; None for
            no attack, so that the adversarial images are the benign ones.
        gaussian_start: begin PGD at x + 0.001 N(0, 1) instead of uniformly in the ball.
        clip_start: whether that start is cut to the ball and to [0, 1]; in the code of the papers it is not.
        target: the half of the batch that the cross-entropy is on, without dummy classes; for "both" the weight is the
            share of the benign half, in [0, 1].
        regulariser: `(clean_logits, adversarial_logits, y, weight)` to one value per sample, added to the
            cross-entropy; None for none. The logits are read as the inner attack reads them.
        reads_benign: whether the regulariser looks at `clean_logits`; where nothing does, benign images are not
            forwarded and `clean_logits` is empty.
        forwards_apart: whether the regulariser's benign and adversarial images are forwarded apart, each with
            batch-norm statistics of its own, as its paper does, or all images as one batch.
        weight: the regulariser's default weight.
        weights: the least and the greatest weight.
        weight_is: what the weight is.
        views: augmentations of each image, which the batch holds one after the other.
        augmentation: what photographs are augmented with: "base" is random crop and flip, "strong" AutoAugment and
            cutout as well.
        no_dummy_classes: why dummy classes do not fit it, and what to do instead; empty where they do.
    """

    title: str
    paper: Paper | None = None
    objective: str | objectives.Goal | None = "cross-entropy"
    gaussian_start: bool = False
    clip_start: bool = True
    target: Literal["benign", "adversarial", "both"] = "adversarial"
    regulariser: Callable[[Tensor, Tensor, Tensor, float | int], Tensor] | None = None
    reads_benign: bool = False
    forwards_apart: bool = False
    weight: float = 0.0
    weights: tuple[float, float] = (0.0, math.inf)
    weight_is: str = "what the regulariser is multiplied by"
    views: int = 1
    augmentation: Literal["base", "strong"] = "base"
    no_dummy_classes: str = ""

    @property
    def reads_weight(self) -> bool:
        """Whether the loss has a place for a weight."""
        return self.regulariser is not None or self.target == "both"

    def check_weight(self, weight: float | int | None) -> None:
        """Raise ValueError if a weight is out of range."""
        low, high = self.weights
        if weight is not None and not low <= weight <= high:
            raise ValueError(f"method.weight={weight} is outside [{low:g}, {high:g}]: it is {self.weight_is}")

    def check_dummy_classes(self, kind: str) -> None:
        """Raise ValueError if dummy classes of that kind do not fit the method."""
        if kind != "off" and self.no_dummy_classes:
            raise ValueError(f"dummy.kind={kind} does not fit this method, which {self.no_dummy_classes}")


def _trades(clean_logits: Tensor, adversarial_logits: Tensor, y: Tensor, weight: float | int) -> Tensor:
    return weight * losses.kl(clean_logits, adversarial_logits)


def _mart(clean_logits: Tensor, adversarial_logits: Tensor, y: Tensor, weight: float | int) -> Tensor:
    divergence = losses.mart_divergence(clean_logits, adversarial_logits, y)
    return losses.mart_margin(adversarial_logits, y) + weight * divergence


def _consistency(clean_logits: Tensor, adversarial_logits: Tensor, y: Tensor, weight: float | int) -> Tensor:
    first, second = adversarial_logits.chunk(2)
    return weight * losses.js(first, second, CONSISTENCY_TEMPERATURE)


METHODS: dict[str, Method] = {
    "natural": Method(
        "natural",
        objective=None,
        no_dummy_classes="has no adversarial images: choose an adversarial method",
    ),
    # Here and in the weights below, the values are those of the method's paper.
    "mixed": Method(
        "benign + adversarial",
        Paper("Explaining and Harnessing Adversarial Examples", "https://arxiv.org/abs/1412.6572"),
        target="both",
        weight=0.5,
        weights=(0.0, 1.0),
        weight_is="the share of benign images in the cross-entropy",
        no_dummy_classes="mixes benign and adversarial images itself: choose pgd-at, and the share of the benign ones "
        "by dummy.benign_share",
    ),
    "pgd-at": Method(
        "PGD-AT",
        Paper("Towards Deep Learning Models Resistant to Adversarial Attacks", "https://arxiv.org/abs/1706.06083"),
    ),
    "trades": Method(
        "TRADES",
        Paper("Theoretically Principled Trade-off between Robustness and Accuracy", "https://arxiv.org/abs/1901.08573"),
        objective="kl",
        gaussian_start=True,
        target="benign",
        regulariser=_trades,
        reads_benign=True,
        forwards_apart=True,
        weight=6.0,
        weight_is="beta of its paper",
    ),
    "mart": Method(
        "MART",
        Paper("Improving Adversarial Robustness Requires Revisiting Misclassified Examples"),
        gaussian_start=True,
        regulariser=_mart,
        reads_benign=True,
        forwards_apart=True,
        weight=6.0,
        weight_is="beta of its paper",
    ),
    "consistency": Method(
        "Consistency-AT",
        Paper("Consistency Regularization for Adversarial Robustness", "https://arxiv.org/abs/2103.04623"),
        regulariser=_consistency,
        weight=1.0,
        weight_is="lambda of its paper",
        views=2,
        augmentation="strong",
    ),
}


@dataclass(frozen=True)
class InnerAttack:
    """How training solves the inner problem: a row of a table. Lengths are in units of eps.

    Attributes:
        step_sizes: length of each step; None for the steps of the threat model.
        noise: radius of the uniform random start.
        ball: radius of the ball that the result is cut to.
    """

    step_sizes: tuple[float, ...] | None = None
    noise: float = 1.0
    ball: float = 1.0

    @property
    def single_step(self) -> bool:
        """Whether training with it risks catastrophic overfitting."""
        return self.step_sizes is not None and len(self.step_sizes) == 1

    def start(self, x: Batch, threat: ThreatModel, generator: torch.Generator | None) -> Batch:
        """Draw where the attack begins."""
        return _scaled(threat, self.noise).random_start(x, generator)

    def run(
        self,
        model: nn.Module,
        x: Batch,
        y: Labels,
        threat: ThreatModel,
        goal: str | objectives.Goal,
        start: Batch,
    ) -> Batch:
        """Return the last iterate of an attack from `start` that raises `goal`."""
        step_sizes = None if self.step_sizes is None else [factor * threat.eps for factor in self.step_sizes]
        return pgd(model, x, y, _scaled(threat, self.ball), goal, start=start, keep="last", step_sizes=step_sizes)


def _scaled(threat: ThreatModel, factor: float) -> ThreatModel:
    radius = factor * threat.eps
    return replace(threat, eps=min(radius, 1.0) if threat.norm == "linf" else radius)


def _cosine(steps: int, first: float) -> tuple[float, ...]:
    return tuple(first * (1 + math.cos(math.pi * (step + 0.5) / steps)) / 2 for step in range(steps))


ATTACKS: dict[str, InnerAttack] = {
    "pgd": InnerAttack(),
    # Ours: long steps first, then ever shorter ones. results/training-step.md measures how strong it is.
    "pgd-cosine": InnerAttack(_cosine(5, 1.5)),
    # Wong et al. 2020, arXiv 2001.03994
    "fgsm-rs": InnerAttack((1.25,)),
    # de Jorge et al. 2022, arXiv 2202.01181, with k = 2. Nothing is cut to the ball of radius eps, so that an image may
    # change by (k + 1) eps: the noise is an augmentation, and the step of length eps is the attack.
    "n-fgsm": InnerAttack((1.0,), noise=2.0, ball=3.0),
}


def find(name: str) -> Method:
    """Return the method of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in METHODS:
        close = get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(METHODS)}"
        raise ValueError(f"method {name!r} is unknown: {hint}")
    return METHODS[name]


@dataclass(frozen=True)
class Objective:
    """What one epoch minimises: a method, and how it uses the dummy classes at that time.

    Attributes:
        method: the row of the table.
        reading: which logits the attack and the regulariser see: "all" outputs, the "real" ones, or the "recovered"
            ones.
        targets: weights of the two-hot targets, or None while dummy classes are not in use.
        weight: of the regulariser.
        inner: how the attack goes about it.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1). With two-hot targets
            every class's share is itself two-hot with the same weight w: with u the smoothed distribution over C
            classes the targets are [(1 - w) u; w u], and the loss decomposes as without smoothing, into the
            cross-entropy of the recovered probabilities q with u, and sum_c u_c binary CE(w, p_{c+C} / q_c).
    """

    method: Method
    reading: Reading = "all"
    targets: TwoHot | None = None
    weight: float | int = 0.0
    inner: InnerAttack = ATTACKS["pgd"]
    label_smoothing: float | int = 0.0

    @property
    def needs_benign(self) -> bool:
        """Whether the loss looks at benign images too."""
        method = self.method
        return self.targets is not None or method.target != "adversarial" or method.reads_benign

    def attack(
        self, model: nn.Module, x: Batch, y: Labels, threat: ThreatModel, generator: torch.Generator | None = None
    ) -> Batch:
        """Solve the inner problem: return the adversarial images to train on (the benign ones for natural training)."""
        if self.method.objective is None:
            return x
        if self.method.gaussian_start and not self.inner.single_step:
            device = generator.device if generator is not None else x.device
            noise = torch.randn(x.shape, generator=generator, device=device).to(x)
            start = x + GAUSSIAN_START * noise
            start = threat.project(start, x) if self.method.clip_start else start
        else:
            start = self.inner.start(x, threat, generator)
        goal = objectives.find(self.method.objective)
        if self.reading == "recovered":
            if goal.recovered is None:
                raise ValueError(
                    f"{self.method.title}: what its attack maximises has no recovery-aware counterpart: set `recovered`"
                )
            goal = goal.recovered
        network = _RealHalf(model) if self.reading == "real" else model
        return self.inner.run(network, x, y, threat, goal, start)

    def passes(self, x: Batch, adversarial: Batch) -> list[Tensor]:
        """Return the batches that the loss forwards, one after the other.

        Where a method forwards apart, the two-hot loss has a joint pass of both halves, as PGD-AT's, and the
        regulariser one of the adversarial and one of the benign images. Else one pass holds all that is needed, the
        benign images first.
        """
        if not self.needs_benign:
            return [adversarial]
        joint = [torch.cat([x, adversarial])]
        if not (self.method.forwards_apart and self.method.reads_benign):
            return joint
        return [*([] if self.targets is None else joint), adversarial, x]

    def loss(self, model: nn.Module, x: Batch, adversarial: Batch, y: Labels) -> Float[Tensor, ""]:
        """Return the outer loss, a mean over the batch, from the forward passes of `passes`.

        Args:
            model: in training mode; maps images to logits.
            x: benign images; for a method with several views, all first views, then all second ones.
            adversarial: what `attack` returned for them.
            y: labels of x.
        """
        logits, *apart = [model(images).to(x.dtype) for images in self.passes(x, adversarial)]
        if apart:
            adversarial_logits, clean_logits = [logits, *apart][-2:]
        else:
            clean_logits, adversarial_logits = logits[: -len(x)], logits[-len(x) :]
        if self.targets is None:
            shares = {"benign": 1.0, "adversarial": 0.0, "both": self.weight}
            loss = self._cross_entropy(clean_logits, adversarial_logits, y, shares[self.method.target])
        else:
            benign, attacked = self.two_hot_loss(logits, y, self.targets).view(2, -1).mean(1)
            loss = self.targets.benign_share * benign + (1 - self.targets.benign_share) * attacked
        if self.method.regulariser is not None:
            pair = self.read(clean_logits), self.read(adversarial_logits)
            loss = loss + self.method.regulariser(*pair, y, self.weight).mean()
        return loss

    def _cross_entropy(self, clean_logits: Tensor, adversarial_logits: Tensor, y: Tensor, share: float | int) -> Tensor:
        parts = [
            weight * losses.cross_entropy(self.read(logits), y, self.label_smoothing).mean()
            for weight, logits in ((share, clean_logits), (1 - share, adversarial_logits))
            if weight
        ]
        return torch.stack(parts).sum()

    def two_hot_loss(self, logits: Tensor, y: Tensor, weights: TwoHot) -> Tensor:
        """Return the two-hot loss of each image, the benign half first, as the logits."""
        shares = weights.benign_weight, weights.adversarial_weight
        targets = torch.cat([self._two_hot(y, logits, share) for share in shares])
        whole = losses.soft_cross_entropy(logits, targets)
        if weights.pair_weight == 1:
            return whole
        recovered = losses.cross_entropy(recover(logits, "logsumexp"), y.repeat(2), self.label_smoothing)
        return recovered + weights.pair_weight * (whole - recovered)

    def _two_hot(self, y: Tensor, logits: Tensor, dummy_weight: float) -> Tensor:
        num_classes = logits.shape[1] // 2
        targets = two_hot(y, num_classes, dummy_weight)
        everything = two_hot(torch.arange(num_classes, device=y.device), num_classes, dummy_weight).mean(0)
        return targets.lerp(everything, self.label_smoothing)

    def read(self, logits: Tensor) -> Tensor:
        """Return the logits as the inner attack and the regulariser see them."""
        if self.reading == "real":
            return logits.chunk(2, dim=1)[0]
        return recover(logits, "logsumexp") if self.reading == "recovered" else logits


def objective(
    method: str | Method = "pgd-at",
    dummy: str = "recovery-aware",
    active: bool = True,
    *,
    weight: float | int | None = None,
    attack: str | InnerAttack = "pgd",
    label_smoothing: float | int = 0.0,
    **weights: float | int,
) -> Objective:
    """Return what a step of training minimises, for a training loop of any kind.

    Its `attack(model, x, y, threat, generator)` returns adversarial images, and its `loss(model, x, adversarial, y)`
    the scalar to call `backward` on.

    Args:
        method: a name in `METHODS`, or a row of one's own.
        dummy: "off" for a network of C outputs; "published" or "recovery-aware" for one of 2C, see `PHASES`.
        active: whether dummy classes are in use already; before, the method is trained as it is.
        weight: of the method's regulariser; by default that of its paper.
        attack: how the inner problem is solved, a name in `ATTACKS` or a row of one's own.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1).
        weights: of the two-hot loss, by the names of `ducat.dummy.TwoHot`.

    Raises:
        ValueError: if a name is unknown, a weight is out of its range, or dummy classes do not fit the method.
    """
    row = find(method) if isinstance(method, str) else method
    if dummy not in PHASES:
        raise ValueError(f"dummy={dummy!r} is unknown: choose from {', '.join(PHASES)}")
    row.check_dummy_classes(dummy)
    row.check_weight(weight)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 1)")
    if isinstance(attack, str) and attack not in ATTACKS:
        raise ValueError(f"attack {attack!r} is unknown: choose from {', '.join(ATTACKS)}")
    unknown = sorted(set(weights) - {each.name for each in fields(TwoHot)})
    if unknown:
        raise ValueError(f"{unknown[0]} is unknown: choose from {', '.join(each.name for each in fields(TwoHot))}")
    two_hot_weights = TwoHot(**weights)
    return Objective(
        row,
        PHASES[dummy].active if active else PHASES[dummy].before,
        two_hot_weights if active and dummy != "off" else None,
        row.weight if weight is None else weight,
        ATTACKS[attack] if isinstance(attack, str) else attack,
        label_smoothing,
    )


class _RealHalf(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).chunk(2, dim=1)[0]
