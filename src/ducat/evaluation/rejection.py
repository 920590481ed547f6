"""A classifier that may refuse: its signals, its threshold, and attacks that know both.

An image has one of three outcomes: accepted with the right class, accepted with a wrong one, or refused. An attacker
wants the second (*wrong and accepted*) or, to deny the service, anything but the first.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ducat.attacks.adaptive import Round, SilentDummies, ascended, tournament, with_dummy_classes
from ducat.attacks.objectives import Goal
from ducat.attacks.pgd import attackable
from ducat.attacks.queries import decisions
from ducat.dummy import RecoveredClassifier, recover
from ducat.evaluation.statistics import mcnemar, wilson
from ducat.evaluation.subject import spread
from ducat.seeding import generator as seeded
from ducat.threat import ThreatModel

Samples = Float[Tensor, "samples channels height width"]
Labels = Int[Tensor, " samples"]
Flags = Bool[Tensor, " samples"]
Logits = Float[Tensor, "batch outputs"]
PerClass = Float[Tensor, "batch classes"]
PerSample = Float[Tensor, " samples"]
Found = tuple[Int[Tensor, " _"], Float[Tensor, "_ channels height width"]]  # rows, as many as fell, and images

RADII = (0.25, 0.5, 1.0)  # of eps: where denial is measured
CURVE = 21  # points of the curve over thresholds
PER_SAMPLE = ("prediction", "acceptance", "wrong", "right")
SURE = 0.05  # a p-value below it is no accident
LOOKED_AT = 50  # samples that are attacked once more, by other gradients and by none
CHANCE = 1  # samples that two attacks of the same strength differ by now and then


def log_odds(logits: Logits) -> Logits:
    """Return log p_k / (1 - p_k) of each class k, p = softmax(logits): finite also where p_k rounds to 1."""
    total, top = logits.logsumexp(1, keepdim=True), logits.argmax(1, keepdim=True)
    others = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    # The clamp changes nothing, since only the top class has more than a half; it keeps log1p's gradient finite there.
    rest = total + torch.log1p(-(logits - total).exp().clamp_max(0.5))
    is_top = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top, True)
    return logits - torch.where(is_top, others, rest)


def _confidence(logits: Tensor) -> Tensor:
    return log_odds(recover(logits, "logsumexp"))


def _real(logits: Tensor) -> Tensor:
    return log_odds(logits).chunk(2, dim=1)[0]


def _pair(logits: Tensor) -> Tensor:
    real, dummy = logits.chunk(2, dim=1)
    return real - dummy


@dataclass(frozen=True)
class Signal:
    """What says how far a prediction is to be trusted: a row of the table.

    Attributes:
        about: what it is.
        acceptance: 2C logits, shape (B, 2C), to how acceptable each class would be as the prediction, shape (B, C), in
            logits (nats of log-odds).
        needs_dummy_classes: whether it says nothing without them.
        decision: 2C logits to the C whose largest is the prediction.
    """

    about: str
    acceptance: Callable[[Tensor], Tensor]
    needs_dummy_classes: bool = True
    decision: Callable[[Tensor], Tensor] = recover


SIGNALS: dict[str, Signal] = {
    "confidence": Signal("log-odds of the recovered class, log q_c / (1 - q_c)", _confidence, False),
    "real": Signal("log-odds of the real class among all 2C outputs, log p_c / (1 - p_c)", _real),
    "pair": Signal("real less dummy logit of the class, z_c - z_{c+C}", _pair),
}


def find(signal: str) -> Signal:
    """Return the signal of that name.

    Raises:
        ValueError: if there is none.
    """
    if signal not in SIGNALS:
        raise ValueError(f"signal {signal!r} is unknown: choose from {', '.join(SIGNALS)}")
    return SIGNALS[signal]


def signals_of(model: nn.Module, x: Tensor | None = None) -> list[str]:
    """Return the names of the signals that a classifier has: all of them with dummy classes, else `confidence`.

    Args:
        model: as `SelectiveClassifier` takes it.
        x: images that it takes; by default random ones.
    """
    paired = not isinstance(with_dummy_classes(model, x), SilentDummies)
    return [name for name, signal in SIGNALS.items() if paired or not signal.needs_dummy_classes]


class SelectiveClassifier(nn.Module):
    """A classifier with three outcomes: a class that is accepted, or one that is only a hint because it is refused.

    Args:
        model: a network with dummy classes made by `add_dummy_classes`, a `RecoveredClassifier`, or a classifier
            without dummy classes. One recovered by logsumexp counts as one without.
        signal: a name in `SIGNALS`: "confidence", for any classifier; "real" or "pair", for networks with dummy
            classes.
        threshold: the lowest value of the signal that is accepted, in nats of log-odds; `calibrate` finds it. Minus
            infinity accepts everything.

    The module maps images in [0, 1], shape (B, channels, H, W), to the recovered logits, shape (B, C), whose largest is
    the prediction, and to whether it is accepted, bool, shape (B,).

    Raises:
        ValueError: if the signal is unknown or the model has not got it, or the threshold is not a number.
    """

    def __init__(self, model: nn.Module, signal: str = "confidence", threshold: float | int = -math.inf) -> None:
        super().__init__()
        self.model = with_dummy_classes(model)
        check_signal(signal, dummy_classes=not isinstance(self.model, SilentDummies))
        if math.isnan(threshold):
            raise ValueError(f"threshold={threshold} is not a number")
        self.signal = signal
        self.threshold = float(threshold)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x)
        return find(self.signal).decision(logits), accepted(logits, self.signal, self.threshold)


def accepted(logits: Logits, signal: str, threshold: float) -> Bool[Tensor, " batch"]:
    """Tell from 2C logits which predictions a selective classifier accepts; in float32, as thresholds are set."""
    row, logits = find(signal), logits.float()
    high = _of(row.decision(logits).argmax(1), row.acceptance(logits)) >= threshold
    return high & logits.isfinite().all(1)  # outputs that are not finite are no prediction


def check_signal(signal: str, *, dummy_classes: bool) -> None:
    """Check that a classifier has a signal.

    Raises:
        ValueError: if the signal is unknown, or needs dummy classes and there are none.
    """
    if find(signal).needs_dummy_classes and not dummy_classes:
        raise ValueError(f"signal={signal!r} needs dummy classes, which this model has none of: use 'confidence'")


def _of(classes: Tensor, values: Tensor) -> Tensor:
    return values.gather(1, classes[:, None]).squeeze(1)


def _outcome(logits: Tensor, signal: Signal) -> tuple[Tensor, Tensor]:
    """Return the prediction and its acceptance; outputs that are not finite are no prediction, -1, and not accepted."""
    finite = logits.isfinite().all(1)
    prediction = signal.decision(logits).argmax(1)
    acceptance = _of(prediction, signal.acceptance(logits))
    return prediction.masked_fill(~finite, -1), acceptance.masked_fill(~finite, -torch.inf)


@dataclass(frozen=True)
class _Read:
    """What a selective classifier makes of images, per sample and on their device."""

    prediction: Tensor  # -1 where the outputs are not finite
    acceptance: Tensor  # of the predicted class

    def wrong(self, y: Tensor) -> Tensor:
        """Return the highest threshold at which the image is wrong and accepted; minus infinity if it is right."""
        return self.acceptance.masked_fill(self.prediction == y, -torch.inf)

    def right(self, y: Tensor) -> Tensor:
        """Return the highest threshold at which the image is right and accepted; minus infinity if it is wrong."""
        return self.acceptance.masked_fill(self.prediction != y, -torch.inf)


def _device(network: nn.Module) -> torch.device:
    return next((tensor.device for tensor in chain(network.parameters(), network.buffers())), torch.device("cpu"))


def _read(network: nn.Module, x: Tensor, signal: Signal, batch_size: int = 500) -> _Read:
    """Return what the network makes of images, on their device."""
    predictions, acceptances = [], []
    with attackable(network), torch.no_grad():
        for chunk in x.split(batch_size):
            prediction, acceptance = _outcome(network(chunk.to(_device(network))).float(), signal)
            predictions.append(prediction.to(x.device))
            acceptances.append(acceptance.to(x.device))
    return _Read(torch.cat(predictions), torch.cat(acceptances))


def calibrate(
    model: nn.Module,
    x: Samples,
    y: Labels,
    share: float | int,
    signal: str = "confidence",
    *,
    batch_size: int = 500,
) -> float:
    """Return the threshold at which a share of the correctly classified benign images is refused, and no more.

    Args:
        model: as `SelectiveClassifier` takes it.
        x: benign images that were not trained on, in [0, 1].
        y: their labels.
        share: of the correctly classified ones, how many may be refused, in [0, 1); with 0 none of these is.
        signal: a name in `SIGNALS`.
        batch_size: images in one pass.

    Raises:
        ValueError: if the share is out of range, no image is classified correctly, or the signal does not fit.
    """
    check_shares([share])
    network = with_dummy_classes(model, x)
    check_signal(signal, dummy_classes=not isinstance(network, SilentDummies))
    return _threshold(_read(network, x, find(signal), batch_size).right(y), share)


def check_shares(shares: Sequence[float | int]) -> None:
    """Check shares of benign images that may be refused.

    Raises:
        ValueError: if one is outside [0, 1).
    """
    for share in shares:
        if not 0 <= share < 1:
            raise ValueError(f"reject={share} is outside [0, 1): it is a share of the benign images, for example 0.05")


def _threshold(right: Tensor, share: float | int) -> float:
    ordered = right[right > -torch.inf].sort().values
    if not len(ordered):
        raise ValueError("no image is classified correctly: there is nothing to calibrate a threshold on")
    return float(ordered[math.floor(share * len(ordered))])


def lead(decision: PerClass) -> PerClass:
    """Return by how much each class is ahead of the best of the others: above 0 for the prediction alone."""
    best = decision.topk(2, dim=1)
    is_top = torch.zeros_like(decision, dtype=torch.bool).scatter(1, best.indices[:, :1], True)
    return decision - torch.where(is_top, best.values[:, 1:], best.values[:, :1])


def _both(first: Tensor, second: Tensor, smooth: bool) -> Tensor:
    """Return the lesser of two values, or a smooth lower bound of it that sends gradient to both."""
    return -torch.logaddexp(-first, -second) if smooth else torch.minimum(first, second)


def nearness(logits: Logits, signal: Signal, threshold: float, *, smooth: bool = False) -> PerClass:
    """Return min(lead of k, acceptance of k - threshold) for each class k: above 0 if k is predicted and accepted.

    Args:
        logits: shape (B, 2C).
        signal: whose acceptance counts.
        threshold: in the units of the signal.
        smooth: soften both minimum and lead, so that the gradient reaches every logit that matters.
    """
    decision = signal.decision(logits)
    ahead = log_odds(decision) if smooth else lead(decision)
    return _both(ahead, signal.acceptance(logits) - threshold, smooth)


# Of the wrong classes the nearest are tried one by one, first all samples, then ever more on ever fewer.
WRONG_BUDGETS: dict[str, tuple[Round, ...]] = {
    "quick": (
        Round("smooth", 20),
        Round("targeted-smooth", 20, targets=3),
        Round("targeted-exact", 20, share=0.5, targets=3),  # smooth is smooth on the scale of a nat
    ),
    "standard": (
        Round("smooth", 30),
        Round("exact", 30),
        Round("targeted-exact", 30, targets=9),
        Round("targeted-smooth", 50, restarts=2, share=0.3, targets=9),
        Round("targeted-exact", 100, restarts=4, share=0.05, targets=9),
    ),
}
DENIAL_STEPS: dict[str, tuple[int, int]] = {"quick": (20, 1), "standard": (40, 3)}  # steps and restarts


def wrong_and_accepted(
    model: nn.Module,
    x: Samples,
    y: Labels,
    threat: ThreatModel,
    signal: str | Signal,
    threshold: float,
    budget: str = "standard",
    generator: torch.Generator | None = None,
    starts: Sequence[Samples] = (),
    lead: nn.Module | None = None,
) -> Samples:
    """Look for images that are accepted with a wrong class: the attacker knows the signal and the threshold.

    It maximises, over images and wrong classes k, min(lead of k, acceptance of k - threshold): exactly, and smoothed so
    that neither of the two starves the other of gradient; for all classes at once, and for the nearest one by one.

    Args:
        model: as `SelectiveClassifier` takes it.
        x: benign images in [0, 1], shape (B, channels, H, W).
        y: labels in [0, C), shape (B,).
        threat: the ball; the budget sets the steps.
        signal: a name in `SIGNALS`, or a signal.
        threshold: in the units of the signal.
        budget: a row of `WRONG_BUDGETS`.
        generator: source of the random starts; PyTorch's global one by default.
        starts: images of the ball that other attacks found; they count, and are begun at.
        lead: a network of 2C logits whose gradients are followed, while the model decides what was found.

    Returns:
        Images in the ball: wrong and accepted where one was found, else the image that came nearest to it.
    """
    chosen = find(signal) if isinstance(signal, str) else signal
    if budget not in WRONG_BUDGETS:
        raise ValueError(f"budget {budget!r} is unknown: choose from {', '.join(WRONG_BUDGETS)}")

    def score(logits: Tensor, labels: Tensor) -> Tensor:
        return nearness(logits, chosen, threshold).nan_to_num(-torch.inf, neginf=-torch.inf)

    def success(logits: Tensor, labels: Tensor) -> Tensor:
        prediction, acceptance = _outcome(logits, chosen)
        return (prediction != labels) & (acceptance >= threshold)

    def aim(objective: str, target: Tensor | None) -> Goal:
        smooth = objective.endswith("smooth")

        def value(logits: Tensor, labels: Tensor, wanted: Tensor | None) -> Tensor:
            near = nearness(logits, chosen, threshold, smooth=smooth)
            if wanted is not None:
                return _of(wanted, near)
            near = near.scatter(1, labels[:, None], -torch.inf)
            return near.logsumexp(1) if smooth else near.amax(1)

        fixed = None if target is None else lambda clean_logits, labels: target
        return Goal(value, knows_recovery=True, reference=fixed, success=success)

    network, judge = _led(model, lead, x)
    return tournament(network, x, y, threat, WRONG_BUDGETS[budget], score, aim, generator, starts, judge)


def _led(model: nn.Module, lead: nn.Module | None, x: Tensor) -> tuple[nn.Module, nn.Module | None]:
    """Return the network that leads an attack and, if it is another, the one that judges."""
    network = with_dummy_classes(model, x)
    return (network, None) if lead is None else (lead, network)


def denied(
    model: nn.Module,
    x: Samples,
    y: Labels,
    threat: ThreatModel,
    signal: str | Signal,
    threshold: float,
    budget: str = "standard",
    generator: torch.Generator | None = None,
    lead: nn.Module | None = None,
) -> Samples:
    """Look for images that are not both right and accepted: the attacker wants to be refused, or to be wrong.

    Arguments and result as for `wrong_and_accepted`.
    """
    chosen = find(signal) if isinstance(signal, str) else signal
    steps, restarts = DENIAL_STEPS[budget]
    network, judge = _led(model, lead, x)

    def success(logits: Tensor, labels: Tensor) -> Tensor:
        prediction, acceptance = _outcome(logits, chosen)
        return (prediction != labels) | (acceptance < threshold)

    def objective(smooth: bool) -> Goal:
        return Goal(
            lambda logits, labels, reference: -_of(labels, nearness(logits, chosen, threshold, smooth=smooth)),
            knows_recovery=True,
            success=success,
        )

    found = x.clone()
    ball, standing = replace(threat, steps=steps), torch.ones_like(y, dtype=torch.bool)
    for smooth in [smooth for smooth in (True, False) for _ in range(restarts)]:
        rows = standing.nonzero().squeeze(1)
        if not len(rows):
            break
        found[rows] = ascended(network, x[rows], y[rows], ball, objective(smooth), generator, judge)
        read = _read(network if judge is None else judge, found[rows], chosen)
        standing[rows] = read.right(y[rows]) >= threshold
    return found


@dataclass(frozen=True)
class SignalResult:
    """What a signal achieves on each sample, as thresholds: whatever the threshold is, the outcome follows.

    Attributes:
        signal: its name.
        thresholds: by the share of correctly classified benign images that may be refused.
        prediction: recovered prediction of the benign image, shape (samples,).
        acceptance: the signal on the benign image.
        wrong: the highest threshold at which some image in the ball was found wrong and accepted, the benign image
            included; minus infinity for none.
        right: for each of `RADII` the highest threshold at which every image found in that ball is right and accepted;
            minus infinity if one was wrong. Shape (radii, samples).
    """

    signal: str
    thresholds: Mapping[float, float]
    prediction: Labels
    acceptance: PerSample
    wrong: PerSample
    right: Float[Tensor, "radii samples"]

    def robust(self, threshold: float) -> Flags:
        """Tell of which samples no image in the ball was found wrong and accepted."""
        return self.wrong < threshold

    def served(self, threshold: float, y: Labels) -> Flags:
        """Tell which samples are robust and, as they are, right and accepted: what Tramèr (2022) counts."""
        return self.robust(threshold) & (self.prediction == y) & (self.acceptance >= threshold)


@dataclass(frozen=True)
class Rejection:
    """What `measure` found out about a classifier that may refuse. All tensors are on the CPU.

    Attributes:
        threat: the ball.
        labels: of the samples, shape (samples,).
        calibrated: how many images the thresholds were set on.
        held_out: whether those are other images than the evaluated ones.
        half: whether the sample's prediction withstands attacks in the ball of half the radius, without refusing.
        signals: a result per signal.
        at_most: whether all of it is an upper bound only, since something hid the gradients. That attacks on the class
            alone arrive at 0 in the end, or through an equal network, says nothing of those on the refusal.
    """

    threat: ThreatModel
    labels: Labels
    calibrated: int
    held_out: bool
    half: Flags
    signals: Sequence[SignalResult]
    at_most: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything per sample, by the names under which it is kept."""
        found = {"rejection.half": self.half}
        for result in self.signals:
            for name in PER_SAMPLE:
                found[f"rejection.{result.signal}.{name}"] = getattr(result, name)
        return found

    @classmethod
    def restored(
        cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor], threat: ThreatModel, labels: Tensor
    ) -> "Rejection":
        """Undo `to_dict` and `tensors`."""
        signals = [
            SignalResult(
                each["signal"],
                {row["reject"]: row["threshold"] for row in each["rows"]},
                **{name: tensors[f"rejection.{each['signal']}.{name}"] for name in PER_SAMPLE},
            )
            for each in content["signals"]
        ]
        half = tensors["rejection.half"]
        at_most = content.get("at_most", False)
        return cls(threat, labels, content["calibrated"], content["held_out"], half, signals, at_most)

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before quoting a number."""
        found = []
        for result in self.signals:
            right = result.prediction == self.labels
            for share, threshold in result.thresholds.items():
                refused = result.acceptance[right] < threshold
                if self.held_out and self._surely_more(refused, share):
                    found.append(
                        f"{100 * share:g}% of the held-out images may be refused by {result.signal}, and "
                        f"{_percent(refused)} of the evaluated ones are: the network is surer of the held-out images, "
                        "as of images that it was trained on. What is robust here is so at the price of more refusals"
                    )
                served = result.served(threshold, self.labels)
                more, fewer = int((served & ~self.half).sum()), int((self.half & ~served).sum())
                if more > fewer and mcnemar(more, fewer) < SURE:
                    found.append(
                        f"with {100 * share:g}% refused by {result.signal}, {_percent(served)} are served and robust "
                        f"at eps {self.threat.eps:.4g}, more than the {_percent(self.half)} that are robust at half of "
                        "it without refusing. A detector that good would make a better classifier at eps/2 (Tramèr "
                        "2022): suspect the attack before you believe the number"
                    )
        return found

    def _surely_more(self, refused: Flags, share: float) -> bool:
        """Tell whether more of the correctly classified images are refused than by chance, by disjoint intervals."""
        if not len(refused):
            return False
        asked = wilson(round(share * self.calibrated), self.calibrated)
        return wilson(int(refused.sum()), len(refused))[0] > asked[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of "rejection" in evaluation.json."""
        return {
            "calibrated": self.calibrated,
            "held_out": self.held_out,
            "at_most": self.at_most,
            "robust_at_half_eps": share_of(self.half),
            "signals": [self._signal(result) for result in self.signals],
            "warnings": self.warnings,
        }

    def _signal(self, result: SignalResult) -> dict[str, Any]:
        return {
            "signal": result.signal,
            "rows": [self._row(result, share, threshold) for share, threshold in result.thresholds.items()],
            "curve": self._curve(result),
        }

    def _row(self, result: SignalResult, share: float, threshold: float) -> dict[str, Any]:
        y, accepted = self.labels, result.acceptance >= threshold
        correct = result.prediction == y
        return {
            "reject": share,
            "threshold": threshold,
            "clean_refused": share_of(~accepted),
            "clean_right": share_of(accepted & correct),
            "clean_wrong": share_of(accepted & ~correct),
            "right_refused": share_of(~accepted[correct]) if correct.any() else None,
            "robust": share_of(result.robust(threshold)),
            "served": share_of(result.served(threshold, y)),
            "denial": [
                {"eps": round(radius * self.threat.eps, 6), **share_of(right < threshold)}
                for radius, right in zip(RADII, result.right, strict=True)
            ],
        }

    def _curve(self, result: SignalResult) -> list[dict[str, float]]:
        """Return shares at thresholds that refuse evenly more of the correctly classified benign images.

        It ends at the strictest threshold that was attacked. Between those that were, the images found for others
        count, so that it is an upper bound there.
        """
        correct = result.prediction == self.labels
        if not correct.any():
            return []
        points, strictest = [], max(result.thresholds.values())
        for number in range(CURVE):
            part = number / (CURVE - 1)
            threshold = _threshold(result.acceptance[correct], max(result.thresholds) * part)
            if threshold > strictest:
                break
            points.append(
                {
                    "right_refused": _rounded(result.acceptance[correct] < threshold),
                    "robust": _rounded(result.robust(threshold)),
                    "served": _rounded(result.served(threshold, self.labels)),
                }
            )
        return points


def share_of(flags: Bool[Tensor, " some"]) -> dict[str, Any]:
    """Return the share of a set of flags that is true, with its 95 % interval."""
    count = int(flags.sum())
    return {"share": _rounded(flags), "ci95": [round(end, 6) for end in wilson(count, len(flags))]}


def _rounded(flags: Tensor) -> float:
    return round(int(flags.sum()) / len(flags), 6)


def _percent(flags: Tensor) -> str:
    return f"{100 * _rounded(flags):.1f} %"


def measure(
    model: nn.Module,
    x: Samples,
    y: Labels,
    threat: ThreatModel,
    shares: Sequence[float | int],
    *,
    held_out: tuple[Float[Tensor, "held_out channels height width"], Int[Tensor, " held_out"]] | None = None,
    found: Sequence[Samples] = (),
    attacked: nn.Module | None = None,
    guides: Sequence[nn.Module] = (),
    signals: Mapping[str, Signal] | None = None,
    budget: str = "standard",
    seed: int = 0,
    batch_size: int = 500,
    progress: Callable[[str], None] = lambda attack: None,
) -> Rejection:
    """Attack a classifier that may refuse, with every signal that it has and at every share of refusals.

    Whatever image was found for one signal and threshold counts for all of them.

    Args:
        model: as `SelectiveClassifier` takes it.
        x: benign images in [0, 1], shape (samples, channels, H, W), on any device.
        y: labels, shape (samples,).
        threat: the ball.
        shares: of the correctly classified benign images, how many may be refused, each in [0, 1).
        held_out: images and labels that the thresholds are set on; by default x and y themselves.
        found: images that other attacks found, each of x's shape; what is outside the ball does not count.
        attacked: the model's 2C logits in the form that is fastest to attack; the model itself by default.
        guides: networks of 2C logits whose gradients are followed besides, by the budget "quick", while the model
            decides what was found: for a model that hides its own.
        signals: the signals by their names; by default all in `SIGNALS` that the model has.
        budget: "quick" or "standard".
        seed: of the random starts.
        batch_size: samples attacked at a time.
        progress: told of each attack as it starts.

    Raises:
        ValueError: if a share or the budget is out of range, or nothing is classified correctly.
    """
    if budget not in WRONG_BUDGETS:
        raise ValueError(f"budget {budget!r} is unknown: choose from {', '.join(WRONG_BUDGETS)}")
    check_shares(shares)
    table = {name: SIGNALS[name] for name in signals_of(model, x)} if signals is None else signals
    network = with_dummy_classes(model, x)
    thresholds: dict[str, dict[float, float]] = {}
    calibration = (x, y) if held_out is None else held_out
    for name, signal in table.items():
        right = _read(network, calibration[0], signal, batch_size).right(calibration[1].to(calibration[0].device))
        thresholds[name] = {float(share): _threshold(right, share) for share in sorted(shares)}
    parts = []
    for number, rows in enumerate(torch.arange(len(x)).split(batch_size)):
        place = f", samples {int(rows[0]) + 1} to {int(rows[-1]) + 1}" if len(x) > batch_size else ""
        few = [each[rows.to(each.device)].to(_device(network)) for each in (x, y, *found)]
        led = network if attacked is None else attacked
        part = _Part(network, led, guides, few[0], few[1], threat, table, thresholds, budget, (seed, number))
        part.run(few[2:], partial(_placed, progress, place))
        parts.append(part)
    results = [
        SignalResult(
            name,
            thresholds[name],
            torch.cat([part.benign[name].prediction for part in parts]).cpu(),
            torch.cat([part.benign[name].acceptance for part in parts]).cpu(),
            torch.cat([part.wrong[name] for part in parts]).cpu(),
            torch.cat([part.right[name] for part in parts], dim=1).cpu(),
        )
        for name in table
    ]
    half = torch.cat([part.half for part in parts]).cpu()
    apart = held_out is not None and not _share_an_image(held_out[0], x)
    return Rejection(threat, y.cpu(), len(calibration[1]), apart, half, results)


def second_look(
    model: nn.Module,
    x: Samples,
    y: Labels,
    threat: ThreatModel,
    measured: Rejection,
    guides: Sequence[nn.Module],
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda attack: None,
) -> tuple[list[Found], bool]:
    """Attack some of what is left by other gradients than the network's own, and by decisions alone.

    A network may hide what its signal depends on, though the gradients of its classes are honest: no attack on the
    class alone sees that.

    Args:
        model: as `SelectiveClassifier` takes it.
        x: benign images in [0, 1], shape (samples, channels, H, W).
        y: labels, shape (samples,).
        threat: the ball.
        measured: what `measure` found; its signals are those in `SIGNALS`.
        guides: networks of 2C logits whose gradients are followed.
        seed: of the random starts.
        progress: told of each signal and share.

    Returns:
        For each signal, threshold and aim by which some samples fell that were left, their rows and images, on the CPU;
        and whether more fell than by chance.
    """
    network = with_dummy_classes(model, x)
    device, doubted = _device(network), False
    found: list[Found] = []
    for result in measured.signals:
        signal = SIGNALS[result.signal]
        for share, threshold in result.thresholds.items():
            progress(f"a second look at {result.signal}, {100 * share:g}% refused")
            # Whose image is accepted with a wrong class, and whose can be refused or wrong.
            for attack, left in (
                (wrong_and_accepted, result.robust(threshold)),
                (denied, result.right[-1] >= threshold),
            ):
                rows = left.nonzero().squeeze(1)
                rows = rows[spread(len(rows), LOOKED_AT)]
                given = x[rows.to(x.device)].to(device), y[rows.to(y.device)].to(device)
                noise = seeded(seed, "reject", "second look", attack.__name__, result.signal, str(threshold))
                images, standing = given[0].clone(), torch.ones(len(rows), dtype=torch.bool, device=device)
                for guide in (*guides, None):
                    some = standing.nonzero().squeeze(1)
                    if not len(some) or (guide is None and attack is denied):
                        break
                    few = given[0][some], given[1][some]
                    tried = (
                        decisions(Accepting(network, few[1], signal, threshold), *few, threat, noise)
                        if guide is None
                        else attack(network, *few, threat, signal, threshold, "quick", noise, lead=guide)
                    )
                    read = _read(network, tried, signal)
                    fell = read.right(few[1]) < threshold if attack is denied else read.wrong(few[1]) >= threshold
                    fell &= threat.allows(tried, few[0])
                    images[some[fell]] = tried[fell]
                    standing[some[fell]] = False
                broken = (~standing).cpu()
                doubted |= int(broken.sum()) > CHANCE
                if broken.any():
                    found.append((rows[broken], images.cpu()[broken]))
    return found, doubted


def counted(model: nn.Module, x: Samples, y: Labels, measured: Rejection, found: Sequence[Found]) -> Rejection:
    """Return what was measured, with images that were found afterwards for some rows of x."""
    network, table = with_dummy_classes(model, x), {one.signal: SIGNALS[one.signal] for one in measured.signals}
    signals = [replace(one, wrong=one.wrong.clone(), right=one.right.clone()) for one in measured.signals]
    half = measured.half.clone()
    for rows, images in found:
        given, labels = (each[rows.to(each.device)].to(_device(network)) for each in (x, y))
        seen = Seen(network, given, labels, measured.threat, table)
        seen.look(images.to(given))
        for one in signals:
            one.wrong[rows] = torch.maximum(one.wrong[rows], seen.wrong[one.signal].cpu())
            one.right[:, rows] = torch.minimum(one.right[:, rows], seen.right[one.signal].cpu())
        half[rows] &= seen.half.cpu()
    return replace(measured, signals=signals, half=half)


class Accepting(nn.Module):
    """One-hot rows that say the label of each image of a batch, unless a wrong class is accepted there."""

    def __init__(self, network: nn.Module, y: Labels, signal: Signal, threshold: float) -> None:
        super().__init__()
        self.network, self.y, self.signal, self.threshold = network, y, signal, threshold

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x).float()
        prediction, acceptance = _outcome(logits, self.signal)
        said = torch.where(acceptance >= self.threshold, prediction, self.y)
        return nn.functional.one_hot(said, logits.shape[1]).float()


def _share_an_image(
    first: Float[Tensor, "first channels height width"], second: Float[Tensor, "second channels height width"]
) -> bool:
    known = {image.cpu().numpy().tobytes() for image in first}
    return any(image.cpu().numpy().tobytes() in known for image in second)


def _placed(progress: Callable[[str], None], place: str, attack: str) -> None:
    progress(attack + place)


class Seen:
    """What images have shown of some samples, for every signal.

    Args:
        network: images to 2C logits.
        x: benign images, on the network's device.
        y: their labels.
        threat: the ball.
        signals: the signals by name.
    """

    def __init__(
        self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, signals: Mapping[str, Signal]
    ) -> None:
        self.network, self.x, self.y, self.threat, self.signals = network, x, y, threat, signals
        self.balls = [ThreatModel(threat.norm, radius * threat.eps, steps=threat.steps) for radius in RADII]
        self.benign = {name: _read(network, x, signal) for name, signal in signals.items()}
        self.wrong = {name: read.wrong(y) for name, read in self.benign.items()}
        self.right = {name: read.right(y).repeat(len(RADII), 1) for name, read in self.benign.items()}
        # For each signal the images that were accepted highest with a wrong class: where its next attacks begin.
        self.nearest = {name: x.clone() for name in signals}
        self.half = next(iter(self.benign.values())).prediction == y

    def look(self, images: Tensor) -> None:
        """Learn from images, for every signal and radius; those outside the ball are not counted."""
        inside = self.threat.allows(images, self.x)
        within = [ball.allows(images, self.x) for ball in self.balls]
        for name, signal in self.signals.items():
            read = _read(self.network, images, signal)
            wrong, right = read.wrong(self.y), read.right(self.y)
            higher = inside & (wrong > self.wrong[name])
            self.wrong[name] = torch.where(higher, wrong, self.wrong[name])
            self.nearest[name][higher] = images[higher]
            for number, allowed in enumerate(within):
                lower = torch.minimum(self.right[name][number], right)
                self.right[name][number] = torch.where(allowed, lower, self.right[name][number])
            self.half &= (read.prediction == self.y) | ~within[1]


class _Part(Seen):
    """One chunk under attack."""

    def __init__(
        self,
        network: nn.Module,
        attacked: nn.Module,
        guides: Sequence[nn.Module],
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        signals: Mapping[str, Signal],
        thresholds: Mapping[str, Mapping[float, float]],
        budget: str,
        key: tuple[int, int],
    ) -> None:
        super().__init__(network, x, y, threat, signals)
        # As recovered: bare, 2C outputs that `add_dummy_classes` has not made would be taken for 2C classes.
        deployed = RecoveredClassifier(network)
        self.ways: list[tuple[nn.Module, nn.Module | None]] = [(RecoveredClassifier(attacked), None)]
        self.ways += [(deployed, guide) for guide in guides]
        self.thresholds, self.budget, self.key = thresholds, budget, key

    def run(self, found: Sequence[Tensor], progress: Callable[[str], None]) -> None:
        for images in found:
            self.look(images)
        progress("robust at eps/2")
        name = next(iter(self.signals))
        self.attack(lambda: self.half, wrong_and_accepted, self.balls[1], name, -math.inf, "half")
        for name in self.signals:
            self.look_for_wrong(name, progress)
        for name in self.signals:
            self.look_for_denial(name, progress)

    def noise(self, *key: str | float | int) -> torch.Generator:
        return seeded(*self.key, "reject", *(str(each) for each in key))

    def attack(
        self,
        standing: Callable[[], Tensor],
        attack: Callable[..., Tensor],
        ball: ThreatModel,
        name: str,
        threshold: float,
        *key: str | float | int,
        starts: Callable[[], Sequence[Tensor]] = lambda: (),
    ) -> None:
        """Attack the samples that stand, in one way after the other, and learn from what is found."""
        for number, (model, lead) in enumerate(self.ways):
            rows = standing().nonzero().squeeze(1)
            if not len(rows):
                return
            begin = {"starts": [each[rows] for each in starts()]} if starts() else {}
            noise = self.noise(*key, name, threshold, *([number] if number else []))
            images = self.x.clone()
            budget = "quick" if number else self.budget  # there may be many guides
            given = self.x[rows], self.y[rows], ball, self.signals[name], threshold, budget, noise
            images[rows] = attack(model, *given, lead=lead, **begin)
            self.look(images)

    def look_for_wrong(self, name: str, progress: Callable[[str], None]) -> None:
        # From the strictest threshold down: what is accepted there is accepted everywhere.
        for share, threshold in sorted(self.thresholds[name].items(), reverse=True):
            progress(f"wrong and accepted by {name}, {100 * share:g}% refused")
            standing = partial(self._stands, name, threshold)
            nearest = partial(self._nearest, name)
            self.attack(standing, wrong_and_accepted, self.threat, name, threshold, "wrong", starts=nearest)

    def look_for_denial(self, name: str, progress: Callable[[str], None]) -> None:
        # From the smallest ball and the most lenient threshold up: what is denied there is denied everywhere.
        for number, ball in enumerate(self.balls):
            for share, threshold in sorted(self.thresholds[name].items()):
                progress(f"denied by {name}, {100 * share:g}% refused, eps {ball.eps:.4g}")
                self.attack(
                    partial(self._undenied, name, number, threshold), denied, ball, name, threshold, "denied", number
                )

    def _stands(self, name: str, threshold: float) -> Tensor:
        return self.wrong[name] < threshold

    def _nearest(self, name: str) -> list[Tensor]:
        return [self.nearest[name]]

    def _undenied(self, name: str, number: int, threshold: float) -> Tensor:
        return self.right[name][number] >= threshold
