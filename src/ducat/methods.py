"""The training methods as one table: an inner objective, a start of the attack, and an outer loss.

Dummy classes plug into every row by the same rules, so that no method is written twice:

- off: the method on C logits.
- published: before `start_epoch` the method on all 2C logits with one-hot targets; then two-hot targets, while the
  inner attack and the regulariser go on reading the 2C logits and so are blind to recovery.
- recovery-aware: before `start_epoch` the method on the C real logits; then two-hot targets, while the inner attack and
  the regulariser read recovered logits, where a pair is one class.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat import losses
from ducat.attacks.pgd import pgd
from ducat.dummy import recover, two_hot
from ducat.threat import ThreatModel

Images = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]
Reading = Literal["all", "real", "recovered"]

GAUSSIAN_START = 0.001  # standard deviation, on images in [0, 1] (Zhang et al. 2019)
CONSISTENCY_TEMPERATURE = 0.5  # Tack et al. 2022


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: how tables and plots call it.
        objective: what the inner attack maximises, a blind name in `attacks.objectives.OBJECTIVES`; None for no attack,
            so that the adversarial images are the benign ones. Its recovery-aware counterpart is called "recovered-"
            and this name.
        gaussian_start: begin PGD at x + 0.001 N(0, 1) instead of uniformly in the ball.
        target: the half of the batch that the cross-entropy is on, without dummy classes; for "both" the weight is the
            share of the benign half, in [0, 1].
        regulariser: `(clean_logits, adversarial_logits, y, weight)` to one value per sample, added to the
            cross-entropy; None for none. The logits are read as the inner attack reads them.
        reads_benign: whether the regulariser looks at `clean_logits`; where nothing does, benign images are not
            forwarded and `clean_logits` is empty.
        weight: the regulariser's default weight: beta or lambda of the method's paper.
        views: augmentations of each image, which the batch holds one after the other.
        augmentation: what photographs are augmented with: "base" is random crop and flip, "strong" AutoAugment and
            cutout as well.
    """

    title: str
    objective: str | None = "cross-entropy"
    gaussian_start: bool = False
    target: Literal["benign", "adversarial", "both"] = "adversarial"
    regulariser: Callable[[Tensor, Tensor, Tensor, float | int], Tensor] | None = None
    reads_benign: bool = False
    weight: float = 0.0
    views: int = 1
    augmentation: Literal["base", "strong"] = "base"


def _trades(clean_logits: Tensor, adversarial_logits: Tensor, y: Tensor, weight: float | int) -> Tensor:
    return weight * losses.kl(clean_logits, adversarial_logits)


def _mart(clean_logits: Tensor, adversarial_logits: Tensor, y: Tensor, weight: float | int) -> Tensor:
    divergence = losses.mart_divergence(clean_logits, adversarial_logits, y)
    return losses.mart_margin(adversarial_logits, y) + weight * divergence


def _consistency(clean_logits: Tensor, adversarial_logits: Tensor, y: Tensor, weight: float | int) -> Tensor:
    first, second = adversarial_logits.chunk(2)
    return weight * losses.js(first, second, CONSISTENCY_TEMPERATURE)


METHODS: dict[str, Method] = {
    "natural": Method("natural", objective=None),
    # Goodfellow et al. 2015, arXiv 1412.6572: the weight is the share of the benign images in the cross-entropy.
    "mixed": Method("benign + adversarial", target="both", weight=0.5),
    # Madry et al. 2018, arXiv 1706.06083
    "pgd-at": Method("PGD-AT"),
    # Zhang et al. 2019, arXiv 1901.08573
    "trades": Method(
        "TRADES",
        objective="kl",
        gaussian_start=True,
        target="benign",
        regulariser=_trades,
        reads_benign=True,
        weight=6.0,
    ),
    # Wang et al. 2020, ICLR: "Improving adversarial robustness requires revisiting misclassified examples"
    "mart": Method("MART", gaussian_start=True, regulariser=_mart, reads_benign=True, weight=6.0),
    # Tack et al. 2022, arXiv 2103.04623
    "consistency": Method("Consistency-AT", regulariser=_consistency, weight=1.0, views=2, augmentation="strong"),
}


@dataclass(frozen=True)
class InnerAttack:
    """How training solves the inner problem: a row of a table. Lengths are in units of eps.

    Attributes:
        strides: length of each step; None for the steps of the threat model.
        noise: radius of the uniform random start.
        ball: radius of the ball that the result is cut to.
    """

    strides: tuple[float, ...] | None = None
    noise: float = 1.0
    ball: float = 1.0

    @property
    def single_step(self) -> bool:
        """Whether training with it risks catastrophic overfitting."""
        return self.strides is not None and len(self.strides) == 1

    def start(self, x: Images, threat: ThreatModel, generator: torch.Generator | None) -> Images:
        """Draw where the attack begins."""
        return _scaled(threat, self.noise).random_start(x, generator)

    def run(self, model: nn.Module, x: Images, y: Labels, threat: ThreatModel, objective: str, start: Images) -> Images:
        """Return the last iterate."""
        strides = None if self.strides is None else [factor * threat.radius for factor in self.strides]
        return pgd(model, x, y, _scaled(threat, self.ball), objective, start=start, keep="last", strides=strides)


def _scaled(threat: ThreatModel, factor: float) -> ThreatModel:
    radius = factor * threat.radius
    return replace(threat, eps=min(radius, 1.0) if threat.norm == "linf" else radius)


def _cosine(steps: int, first: float) -> tuple[float, ...]:
    return tuple(first * (1 + math.cos(math.pi * (step + 0.5) / steps)) / 2 for step in range(steps))


ATTACKS: dict[str, InnerAttack] = {
    "pgd": InnerAttack(),
    # Ours: long steps first, then ever shorter ones. docs/performance.md measures how strong it is for its cost.
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
class TwoHot:
    """Weights of the two-hot loss, each in [0, 1].

    Attributes:
        benign: the dummy class's share of a benign image's target.
        adversarial: the dummy class's share of an adversarial image's target.
        benign_share: what the benign half of the batch counts in the loss; the adversarial half counts the rest.
        pair: weight, 0 or more, of the term that tells benign from adversarial within a pair. The two-hot cross-entropy
            is that of the recovered classes plus this term: CE(z, t(y, w)) = -log q_y + BCE(w, p_{y+C} / q_y).
    """

    benign: float | int = 0.25
    adversarial: float | int = 1.0
    benign_share: float | int = 0.5
    pair: float | int = 1.0


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
        self, model: nn.Module, x: Images, y: Labels, threat: ThreatModel, generator: torch.Generator | None = None
    ) -> Images:
        """Solve the inner problem: return the adversarial images to train on (the benign ones for natural training)."""
        if self.method.objective is None:
            return x
        if self.method.gaussian_start and not self.inner.single_step:
            device = generator.device if generator is not None else x.device
            noise = torch.randn(x.shape, generator=generator, device=device).to(x)
            start = threat.project(x + GAUSSIAN_START * noise, x)
        else:
            start = self.inner.start(x, threat, generator)
        name = f"recovered-{self.method.objective}" if self.reading == "recovered" else self.method.objective
        network = _RealHalf(model) if self.reading == "real" else model
        return self.inner.run(network, x, y, threat, name, start)

    def forwarded(self, x: Images, adversarial: Images) -> Float[Tensor, "rows channels height width"]:
        """Return the images that the loss forwards: the adversarial ones, after the benign ones if it needs them."""
        return torch.cat([x, adversarial]) if self.needs_benign else adversarial

    def loss(self, model: nn.Module, x: Images, adversarial: Images, y: Labels) -> Float[Tensor, ""]:
        """Return the outer loss, a mean over the batch, from one forward pass.

        Args:
            model: in training mode; maps images to logits.
            x: benign images; for a method with several views, all first views, then all second ones.
            adversarial: what `attack` returned for them.
            y: labels of x.
        """
        logits = model(self.forwarded(x, adversarial)).to(x.dtype)
        clean_logits, adversarial_logits = logits[: -len(x)], logits[-len(x) :]
        if self.targets is None:
            shares = {"benign": 1.0, "adversarial": 0.0, "both": self.weight}
            loss = self._cross_entropy(clean_logits, adversarial_logits, y, shares[self.method.target])
        else:
            benign, attacked = self._two_hot_loss(logits, y, self.targets).view(2, -1).mean(1)
            loss = self.targets.benign_share * benign + (1 - self.targets.benign_share) * attacked
        if self.method.regulariser is not None:
            pair = self._read(clean_logits), self._read(adversarial_logits)
            loss = loss + self.method.regulariser(*pair, y, self.weight).mean()
        return loss

    def _cross_entropy(self, clean_logits: Tensor, adversarial_logits: Tensor, y: Tensor, share: float | int) -> Tensor:
        parts = [
            weight * losses.cross_entropy(self._read(logits), y, self.label_smoothing).mean()
            for weight, logits in ((share, clean_logits), (1 - share, adversarial_logits))
            if weight
        ]
        return torch.stack(parts).sum()

    def _two_hot_loss(self, logits: Tensor, y: Tensor, weights: TwoHot) -> Tensor:
        """Return a value per image, the benign half first."""
        targets = torch.cat([self._two_hot(y, logits, weight) for weight in (weights.benign, weights.adversarial)])
        whole = losses.soft_cross_entropy(logits, targets)
        if weights.pair == 1:
            return whole
        recovered = losses.cross_entropy(recover(logits, "logsumexp"), y.repeat(2), self.label_smoothing)
        return recovered + weights.pair * (whole - recovered)

    def _two_hot(self, y: Tensor, logits: Tensor, dummy_weight: float) -> Tensor:
        num_classes = logits.shape[1] // 2
        targets = two_hot(y, num_classes, dummy_weight)
        everything = two_hot(torch.arange(num_classes, device=y.device), num_classes, dummy_weight).mean(0)
        return targets.lerp(everything, self.label_smoothing)

    def _read(self, logits: Tensor) -> Tensor:
        if self.reading == "real":
            return logits.chunk(2, dim=1)[0]
        return recover(logits, "logsumexp") if self.reading == "recovered" else logits


class _RealHalf(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).chunk(2, dim=1)[0]
