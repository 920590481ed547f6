"""The table: honest networks, and defences that others proposed or might, each with the stand-ins of its own attack.

Most defences hide the gradients of a network that is trained plainly ("natural", nothing withstands) or by PGD-AT
("robust", about 70 %); which of the two is said by `inside`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ducat
from benchmarks.cure.networks import STAND_INS, Gated, Half, Joined
from benchmarks.defences.attacks import selective
from benchmarks.defences.networks import DIGITS, PHOTOGRAPHS, THREATS, Bases, Thermometer, training_images
from benchmarks.defences.parts import (
    After,
    AntiAdversary,
    BatchStatistics,
    Before,
    Blended,
    Change,
    Codes,
    Company,
    Counting,
    Derived,
    Draws,
    Duplicates,
    Exploding,
    ForeignGradient,
    Gradient,
    InDouble,
    InPlace,
    Mean,
    Nearest,
    Neighbours,
    Placed,
    Projected,
    Prototypes,
    Purified,
    Remembering,
    Smoothed,
    Switch,
    Unseen,
    Votes,
    Wary,
    Wrapped,
    activated,
    attracted,
    compressed,
    hash_noisy,
    hashed,
    less_variation,
    masked,
    median,
    noisy,
    noisy_outputs,
    one_hot,
    one_hot_by_index,
    opaque,
    pruned,
    quantised,
    quantised_straight,
    quantised_weights,
    ranks,
    resized,
    rounded,
    seeded_noisy,
    shifted,
    stretched,
    suspicious_nan,
    thresholded,
    top_probability,
    wavy,
)

Build = Callable[[Bases], nn.Module]


@dataclass(frozen=True)
class Row:
    """A network that is evaluated, and how its truth is found.

    Attributes:
        about: what it is, and where it was published.
        build: makes it from trained networks, afresh.
        stand_ins: differentiable networks through which it is attacked; by default itself.
        guesses: `(bases, images, labels, eps)` to further images that may fool it, one for each sample.
        inside: names of trained networks whose adversarial images, found once by long attacks, are tried first.
        honest: whether it is a network and not a defence.
        judged: a row of `attacks.JUDGEMENTS`.
        data: digits or photographs.
        classes: C.
        eps: radius in L-inf; None for the data's own.
        samples: test images, at most; None for as many as are asked for.
    """

    about: str
    build: Build
    stand_ins: Callable[[Bases], Sequence[nn.Module]] | None = None
    guesses: Callable[[Bases, Tensor, Tensor, float], Sequence[Tensor]] = lambda bases, x, y, eps: ()
    inside: Sequence[str] = ()
    honest: bool = False
    judged: str = "plain"
    data: str = DIGITS
    classes: int = 10
    eps: float | None = None
    samples: int | None = None

    @property
    def threat(self) -> ducat.ThreatModel:
        return THREATS[self.data] if self.eps is None else ducat.ThreatModel("linf", self.eps)

    def proxies(self, bases: Bases) -> Sequence[nn.Module]:
        return [self.build(bases)] if self.stand_ins is None else self.stand_ins(bases)

    def labels(self, y: Tensor) -> Tensor:
        return y % 2 if self.classes == 2 else y


def _thermometer(bases: Bases, sharpness: float) -> nn.Module:
    return nn.Sequential(Thermometer(sharpness), bases("thermometer")[1])  # type: ignore[index]


def _detected(bases: Bases) -> Change:
    detector = bases("detector")
    return lambda x: detector(x).squeeze(1) > 0


def _sure(network: nn.Module) -> Change:
    return lambda x: network(x).softmax(1).amax(1) > 0.9


def _mixture(bases: Bases, gate: float, sharpen: float, power: float = 1) -> nn.Module:
    return Gated(Joined(bases("natural"), bases("robust")), gate, sharpen, power)


def _mixtures(bases: Bases) -> Sequence[nn.Module]:
    choices = ((0.9999, 1, 1), (0.5, 1, 1), (0.85, 1, 1), (0.95, 1, 1), (0.5, 0.2, 1), (0.85, 2, 1), (0.5, 0.2, 2))
    return [_mixture(bases, *choice) for choice in choices]


def _between(bases: Bases, x: Tensor, y: Tensor, eps: float) -> Sequence[Tensor]:
    """Return what is nearest, in the ball, to training images of other classes, or farthest from those of its own."""
    images, labels = training_images(DIGITS, None, bases.root)
    distance, own = torch.cdist(x.flatten(1), images.flatten(1)), labels == y[:, None]
    friend = images[distance.masked_fill(~own, torch.inf).argmin(1)]
    guesses = []
    for place in distance.masked_fill(own, torch.inf).topk(20, largest=False).indices.unbind(1):
        wrong = images[place]
        guesses += [wrong.clamp(x - eps, x + eps), (x + eps * (wrong - friend).sign()).clamp(0, 1)]
    return guesses


def _undetected(bases: Bases, x: Tensor, y: Tensor, eps: float) -> Sequence[Tensor]:
    detector = bases("detector")
    return [selective(bases("natural"), lambda images: detector(images).squeeze(1), x, y, eps)]


def _of_eight_bits(x: Tensor) -> Tensor:
    scaled = x * 255
    return (scaled - scaled.round()).abs().flatten(1).amax(1) < 1e-3


def _in_eight_bits(bases: Bases, x: Tensor, y: Tensor, eps: float) -> Sequence[Tensor]:
    smaller = ducat.ThreatModel("linf", eps - 1 / 255)
    found = ducat.attacks.adaptive(bases("natural"), x, y, smaller, generator=torch.Generator().manual_seed(0))
    return [(found * 255).round() / 255]


def _smooth(bases: Bases, x: Tensor, y: Tensor, eps: float) -> Sequence[Tensor]:
    return [selective(bases("photograph-natural"), _roughness, x, y, eps)]


def _of(*names: str) -> Callable[[Bases], Sequence[nn.Module]]:
    return lambda bases: [bases(name) for name in names]


def _after(name: str, change: Change) -> Build:
    return lambda bases: After(bases(name), change)


def _outputs(about: str, name: str, change: Change, **settings: Any) -> Row:
    return Row(about, _after(name, change), _of(), inside=(name,), **settings)


def _inputs(about: str, name: str, change: Change, *smooth: Change, **settings: Any) -> Row:
    """A change of the input, attacked past it, by the identity, and through other changes."""

    def stand_ins(bases: Bases) -> Sequence[nn.Module]:
        network = bases(name)
        return [Before(change, network, straight=True), *(Before(each, network) for each in smooth)]

    return Row(about, lambda bases: Before(change, bases(name)), stand_ins, inside=(name,), **settings)


def _random(about: str, name: str, change: Change, **settings: Any) -> Row:
    def stand_ins(bases: Bases) -> Sequence[nn.Module]:
        return [Draws(Before(change, bases(name))), bases(name)]

    return Row(about, lambda bases: Before(change, bases(name)), stand_ins, inside=(name,), judged="random", **settings)


def _honest(about: str, name: str, change: Build | None = None, **settings: Any) -> Row:
    stand_ins = _of() if change is None else None  # its own long attack is that of `inside`
    return Row(about, change or (lambda bases: bases(name)), stand_ins, inside=(name,), honest=True, **settings)


def _roughness(x: Tensor) -> Tensor:
    """Return a score above 0 for images whose brightness jumps from pixel to pixel, as that of attacked ones does."""
    curve = x[..., 2:] - 2 * x[..., 1:-1] + x[..., :-2]
    return curve.abs().mean((1, 2, 3)) - 0.06


_FEW: dict[str, Any] = {"data": PHOTOGRAPHS, "samples": 50}

ROWS: dict[str, Row] = {
    # ---- honest networks ----
    "natural": _honest("four convolutions, trained plainly", "natural"),
    "robust": _honest("the same by PGD-AT", "robust"),
    "recovery-aware": _honest("2C outputs, trained against an attacker who knows recovery", "recovery-aware"),
    "published": _honest("2C outputs, dummy classes as published (arXiv 2410.12671)", "published"),
    "by-sum": _honest(
        "2C outputs recovered by logsumexp",
        "recovery-aware",
        lambda bases: ducat.RecoveredClassifier(bases("recovery-aware"), "logsumexp"),
    ),
    "group-norm": _honest("group norm, trained plainly", "group-norm"),
    "vit": _honest("a vision transformer of two layers, trained plainly", "vit"),
    "vit-robust": _honest("the same by PGD-AT in a ball of 0.1", "vit-robust"),
    "linear": _honest("one linear layer", "linear"),
    "dropout": _honest("with dropout, in evaluation mode", "dropout"),
    "half": _honest(
        "the robust network in half precision", "robust", lambda bases: InDouble(bases("robust"), torch.half)
    ),
    "double": _honest("and in double precision", "robust", lambda bases: InDouble(bases("robust"), torch.double)),
    "two-classes": _honest("even or odd, PGD-AT in a ball of 0.1", "parity", classes=2),
    "thousand-classes": _honest("1,000 outputs, of which ten were seen in training", "thousand", classes=1000),
    "preact-resnet20": _honest("a pre-activation network, trained plainly", "preact-resnet20"),
    "softmax": _honest("the robust network's probabilities", "robust", _after("robust", lambda z: z.softmax(1))),
    "log-softmax": _honest("their logarithm", "robust", _after("robust", lambda z: z.log_softmax(1))),
    "shifted-logits": _honest("its logits and 50", "robust", _after("robust", lambda z: z + 50)),
    "quantised-weights": _honest(
        "its weights rounded to 8 bits", "robust", lambda bases: quantised_weights(bases("robust"))
    ),
    "averaged": _honest("two robust networks' mean", "robust", lambda bases: Mean(bases("robust"), bases("robust-2"))),
    # ---- another network answers ----
    "derived-class": Row(
        "a class derived from RecoveredClassifier, whose forward asks a natural network",
        lambda bases: Derived(bases("recovery-aware"), bases("natural")),
        _of(),
        inside=("natural",),
    ),
    "batch-company": Row(
        "an adversarial image among benign ones meets a natural network, a uniform batch a robust one",
        lambda bases: Company(bases("robust"), bases("natural")),
        _of("natural"),
        inside=("natural", "robust"),
        judged="company",
    ),
    "batch-duplicates": Row(
        "images that resemble others of their batch meet a robust network",
        lambda bases: Duplicates(bases("natural"), bases("robust")),
        _of(),
        inside=("natural",),
        judged="company",
    ),
    "batch-place": Row(
        "the first image of a batch meets a natural network, the others a robust one",
        lambda bases: Placed(bases("natural"), bases("robust"), size=False),
        _of(),
        inside=("natural",),
        judged="company",
    ),
    "batch-of-one": Row(
        "an image alone meets a natural network, a batch a robust one",
        lambda bases: Placed(bases("natural"), bases("robust"), size=True),
        _of(),
        inside=("natural",),
        judged="company",
    ),
    "counts-queries": Row(
        "after 300 images a natural network gives way to the nearest training image",
        lambda bases: Counting(bases("natural"), Neighbours(bases), 300),
        _of(),
        inside=("natural",),
        judged="fresh",
    ),
    "remembers-images": Row(
        "an image that resembles one that was seen gets the same answer again (Chen et al. 2020)",
        lambda bases: Remembering(bases("natural")),
        _of(),
        inside=("natural",),
        judged="fresh",
    ),
    "notices-gradients": Row(
        "answers by a robust network while a gradient is wanted, else by a natural one",
        lambda bases: Wary(bases("natural"), bases("robust"), lambda x: x.requires_grad),
        _of(),
        inside=("natural",),
    ),
    "inference-mode": Row(
        "answers by a natural network in inference mode, else by a robust one",
        lambda bases: Wary(bases("robust"), bases("natural"), lambda x: torch.is_inference_mode_enabled()),
        _of(),
        inside=("natural",),
        judged="inference",
    ),
    "large-batches": Row(
        "batches of more than 80 meet a robust network, smaller ones a natural one",
        lambda bases: Wary(bases("natural"), bases("robust"), lambda x: len(x) > 80),
        _of(),
        inside=("natural",),
        judged="company",
    ),
    "eight-bits": Row(
        "images of 8 bits meet a natural network, all others a robust one",
        lambda bases: Switch(_of_eight_bits, bases("natural"), bases("robust")),
        _of(),
        guesses=_in_eight_bits,
        inside=("robust",),
    ),
    "foreign-gradient": Row(
        "the logits of a natural network with the gradient of a robust one",
        lambda bases: ForeignGradient(bases("natural"), bases("robust")),
        _of(),
        inside=("natural",),
    ),
    "detector-switch": Row(
        "what a detector takes for adversarial meets a robust network, the rest a natural one (MagNet's idea)",
        lambda bases: Switch(_detected(bases), bases("robust"), bases("natural")),
        lambda bases: [
            *(Blended(bases("natural"), bases("detector"), share) for share in (0.3, 1, 3, 10)),
            *(bases(name) for name in ("robust", "natural")),
        ],
        guesses=_undetected,
        inside=("natural", "robust"),
    ),
    "detector-constant": Row(
        "what a detector takes for adversarial is answered by class 0, the rest by a natural network",
        lambda bases: Switch(
            _detected(bases),
            After(bases("natural"), lambda z: 0 * z + 9 * F.one_hot(0 * z.argmax(1), 10)),
            bases("natural"),
        ),
        lambda bases: [
            *(Blended(bases("natural"), bases("detector"), share) for share in (0.3, 1, 3, 10)),
            bases("natural"),
        ],
        guesses=_undetected,
        inside=("natural", "robust"),
    ),
    "brightest-pixel": Row(
        "where the brightest pixel is below 0.99 a robust network answers, else a natural one",
        lambda bases: Switch(lambda x: x.flatten(1).amax(1) < 0.99, bases("robust"), bases("natural")),
        lambda bases: [
            Before(lambda x: torch.where(x > 0.8, x + (1 - x).detach(), x), bases("natural")),
            bases("natural"),
            bases("robust"),
        ],
        inside=("natural", "robust"),
    ),
    "hash-switch": Row(
        "a hash of the image chooses between a natural and a robust network",
        lambda bases: Switch(lambda x: hashed(x)[:, 0, 0, 0] < 0.5, bases("robust"), bases("natural")),
        _of("natural", "robust"),
        inside=("natural", "robust"),
    ),
    "early-exit": Row(
        "a small network answers where it is sure, else a large one (Teerapittayanon et al. 2016); both natural",
        lambda bases: Switch(_sure(bases("other")), bases("other"), bases("natural")),
        lambda bases: [bases("other"), bases("natural"), Mean(bases("other"), bases("natural"))],
        inside=("natural", "other"),
    ),
    # ---- random ----
    "noise": _random("a robust network with noise of 0.15 on its input", "robust", noisy(0.15)),
    "noise-natural": _random("a natural network with noise of 0.3 on its input", "natural", noisy(0.3)),
    "random-network": Row(
        "each image meets a natural or a robust network, by chance",
        lambda bases: Switch(lambda x: torch.rand(len(x)) < 0.5, bases("natural"), bases("robust")),
        lambda bases: [Mean(bases("natural"), bases("robust")), bases("robust"), bases("natural")],
        inside=("natural", "robust"),
        judged="random",
    ),
    "random-resize": _random("random resizing and padding (Xie et al. 2018)", "natural", resized),
    "random-shift": _random("random shifts of a pixel", "natural", shifted),
    "random-mask": _random("a fifth of the pixels is set to zero", "natural", masked),
    "random-dropout": Row(
        "dropout of 0.15 at inference",
        lambda bases: activated(bases("natural"), lambda x: F.dropout(F.relu(x), 0.15)),
        lambda bases: [Draws(activated(bases("natural"), lambda x: F.dropout(F.relu(x), 0.15))), bases("natural")],
        inside=("natural",),
        judged="random",
    ),
    "random-pruning": Row(
        "stochastic activation pruning (Dhillon et al. 2018)",
        lambda bases: activated(bases("natural"), pruned),
        lambda bases: [Draws(activated(bases("natural"), pruned)), bases("natural")],
        inside=("natural",),
        judged="random",
    ),
    "noisy-outputs": Row(
        "noise of 3 on the logits",
        _after("robust", noisy_outputs),
        lambda bases: [Draws(After(bases("robust"), noisy_outputs)), bases("robust")],
        inside=("robust",),
        judged="random",
    ),
    "seeded-noise": Row(
        "noise of 0.15 that is drawn with the same seed in each call",
        lambda bases: Before(seeded_noisy, bases("robust")),
        lambda bases: [
            Before(seeded_noisy, bases("robust")),
            Draws(Before(noisy(0.15), bases("robust"))),
            bases("robust"),
        ],
        inside=("robust",),
        judged="company",
    ),
    "hash-noise": _inputs(
        "noise that a hash of the image decides",
        "natural",
        hash_noisy,
        lambda x: x + 0.25 * (2 * torch.rand_like(x) - 1),
    ),
    # ---- mixtures ----
    "mixture-0.5": Row(
        "natural and robust network at gate 0.5, the robust one sharpened (Bai et al. 2024)",
        lambda bases: _mixture(bases, 0.5, 4, 2),
        _mixtures,
        inside=("natural", "robust"),
    ),
    "mixture-0.85": Row(
        "the same at gate 0.85", lambda bases: _mixture(bases, 0.85, 4, 2), _mixtures, inside=("natural", "robust")
    ),
    "mixture-cure": Row(
        "`joined-calibrated` of results/cure.md, seed 1: natural and PGD-AT, gate 0.5, sharpening 4, power 2",
        lambda bases: Gated(bases.joined(), 0.5, 4, 2),
        lambda bases: [
            *(Gated(bases.joined(), *stand_in) for stand_in in STAND_INS),
            *(Half(bases.joined(), half) for half in (0, 1)),
        ],
        eps=0.3,
        samples=500,
    ),
    # ---- outputs ----
    "one-hot": _outputs("one-hot outputs by comparison: the gradient is zero", "robust", one_hot),
    "one-hot-index": _outputs("one-hot outputs by indexing: no gradient at all", "robust", one_hot_by_index),
    "one-hot-natural": _outputs("one-hot outputs of a natural network", "natural", one_hot_by_index),
    "ranks": _outputs("the ranks of the logits", "robust", ranks),
    "top-probability": _outputs("the largest probability, and zeros", "robust", top_probability),
    "attracted": _outputs("margins made to mislead score-based search: AAA (Chen et al. 2022)", "robust", attracted),
    "scaled-up": _outputs("logits times 10,000", "natural", lambda z: 1e4 * z),
    "scaled-down": _outputs("logits divided by 10,000", "natural", lambda z: 1e-4 * z),
    "underflow": _outputs("logits divided by 1e34: gradients underflow", "natural", lambda z: 1e-34 * z),
    "temperature": _outputs(
        "probabilities at temperature 0.01 (Papernot et al. 2016)", "natural", lambda z: (100 * z).softmax(1)
    ),
    "saturated": _outputs(
        "hyperbolic tangent of ten times the logits, in double", "natural", lambda z: (z.double() * 2).tanh()
    ),
    "clipped": _outputs(
        "logits at most 1 below the largest", "natural", lambda z: (z - z.amax(1, keepdim=True)).clamp_min(-1)
    ),
    "integers": Row("logits rounded to integers", _after("robust", torch.round), _of("robust"), inside=("robust",)),
    "half-overflow": _outputs("half-precision outputs that overflow", "natural", lambda z: (2e4 * z).half()),
    "suspicious-nan": Row(
        "not a number where it is not sure", _after("robust", suspicious_nan), _of("robust"), inside=("robust",)
    ),
    "detached": _outputs("the gradient is cut", "robust", lambda z: z.detach()),
    "zero-gradient": _outputs("a backward of zeros", "robust", lambda z: Gradient.apply(z, 0.0)),
    "random-gradient": _outputs("a backward of noise", "natural", lambda z: Gradient.apply(z, None)),
    "negated-gradient": _outputs("a backward of the opposite sign", "natural", lambda z: Gradient.apply(z, -1.0)),
    # ---- inputs ----
    "bits-8": _inputs("inputs rounded to 8 bits", "robust", rounded(255)),
    "bits-3": _inputs("inputs rounded to 3 bits (Xu et al. 2018)", "robust", rounded(7)),
    "bits-1": _inputs("inputs rounded to one bit", "natural", rounded(1), lambda x: torch.sigmoid(20 * (x - 0.5))),
    "jpeg": _inputs("cosine coefficients rounded, as in JPEG", "natural", compressed),
    "median": _inputs("a median filter without its gradient (Xu et al. 2018)", "natural", opaque(median), median),
    "less-variation": _inputs(
        "total variation minimisation without its gradient (Guo et al. 2018)",
        "natural",
        opaque(less_variation),
    ),
    "stretched": _inputs("contrast doubled and cut off", "natural", stretched, lambda x: torch.sigmoid(8 * (x - 0.5))),
    "thresholded": _inputs(
        "pixels below a quarter become black", "natural", thresholded, lambda x: x * torch.sigmoid(30 * (x - 0.25))
    ),
    "sine-waves": _inputs("a sine of high frequency is added to the input", "robust", wavy),
    "thermometer": Row(
        "thermometer encoding (Buckman et al. 2018)",
        lambda bases: bases("thermometer"),
        lambda bases: [_thermometer(bases, sharpness) for sharpness in (5, 15, 50)],
    ),
    "principal-components": Row(
        "projection to 20 principal components, without its gradient",
        lambda bases: Before(Unseen(Projected(bases)), bases("natural")),
        lambda bases: [Before(Projected(bases), bases("natural")), bases("natural")],
        inside=("natural",),
    ),
    "autoencoder": Row(
        "an autoencoder cleans the image, without its gradient (Gu & Rigazio 2015)",
        lambda bases: Before(Unseen(Purified(bases("autoencoder"), 1)), bases("natural")),
        lambda bases: [Before(Purified(bases("autoencoder"), 1), bases("natural")), bases("natural")],
        inside=("natural",),
    ),
    "purified": Row(
        "ten steps towards what an autoencoder makes of it, without their gradient",
        lambda bases: Before(Unseen(Purified(bases("autoencoder"), 10)), bases("natural")),
        lambda bases: [Before(Purified(bases("autoencoder"), steps), bases("natural")) for steps in (10, 1)],
        inside=("natural",),
    ),
    "nearest-image": Row(
        "the nearest training image is classified in the image's place (Dubey et al. 2019)",
        lambda bases: Before(Nearest(bases), bases("natural")),
        lambda bases: [
            *(Before(Nearest(bases, sharpness), bases("natural")) for sharpness in (1, 4)),
            *(Neighbours(bases, sharpness) for sharpness in (0.3, 1, 3, 10)),
        ],
        guesses=_between,
        inside=("natural", "robust"),
    ),
    # ---- insides ----
    "anti-adversary": Row(
        "an anti-adversary layer on PGD-AT (Alfarra et al. 2022)",
        lambda bases: AntiAdversary(bases("robust")),
        lambda bases: [AntiAdversary(bases("robust"))],
        inside=("robust",),
    ),
    "nearest-neighbour": Row(
        "the class of the nearest training image",
        Neighbours,
        lambda bases: [Neighbours(bases, sharpness) for sharpness in (0.3, 1, 3, 10)],
        guesses=_between,
        inside=("natural", "robust"),
    ),
    "prototypes": Row(
        "the nearest mean feature of a robust network, by argmin",
        lambda bases: Prototypes(bases, bases("robust"), hard=True),
        lambda bases: [Prototypes(bases, bases("robust"), hard=False), bases("robust")],
        inside=("robust",),
    ),
    "votes": Row(
        "the votes of three natural networks and a robust one",
        lambda bases: Votes(*(bases(name) for name in ("natural", "natural-2", "natural-3", "robust"))),
        lambda bases: [
            Mean(*(bases(name) for name in ("natural", "natural-2", "natural-3", "robust"))),
            Mean(*(bases(name) for name in ("natural", "natural-2", "natural-3"))),
        ],
        inside=("natural", "robust"),
    ),
    "smoothed": Row(
        "votes over 16 fixed noises of 0.2 (Cohen et al. 2019)",
        lambda bases: Smoothed(bases("natural")),
        lambda bases: [Smoothed(bases("natural"), soft=True)],
        inside=("natural",),
    ),
    "exploding-gradient": Row(
        "waves of high frequency on the logits",
        lambda bases: Exploding(bases("robust")),
        _of(),
        inside=("robust",),
    ),
    "binary-activations": Row(
        "activations of -1 and 1, without gradient (Galloway et al. 2018)",
        lambda bases: activated(bases("binary"), torch.sign),
        lambda bases: [
            bases("binary"),
            *(activated(bases("binary"), soft) for soft in (torch.tanh, lambda x: torch.tanh(4 * x))),
        ],
    ),
    "codes": Row(
        "error-correcting codes with signed bits (Verma & Swami 2019)",
        lambda bases: Codes(bases("codes")),
        lambda bases: [
            Codes(bases("codes"), change) for change in (torch.tanh, lambda z: z, lambda z: torch.tanh(z / 5))
        ],
    ),
    "winners-take-all": Row(
        "k-winners-take-all (Xiao et al. 2020)",
        lambda bases: bases("winners"),
        lambda bases: [
            bases("winners"),
            Draws(Before(noisy(0.05), bases("winners")), 16),
            *(bases(name) for name in ("natural", "natural-2", "other")),
        ],
        inside=("natural", "robust"),
    ),
    "label-smoothing": Row("label smoothing of 0.8", lambda bases: bases("smooth"), None, inside=("natural",)),
    "quantised-activations": Row(
        "activations rounded to halves, without gradient",
        lambda bases: activated(bases("robust"), quantised),
        lambda bases: [activated(bases("robust"), quantised_straight), bases("robust")],
        inside=("robust",),
    ),
    "denoised-features": Row(
        "features through a median filter, without its gradient",
        lambda bases: activated(bases("natural"), opaque(lambda x: median(F.relu(x))), 1),
        lambda bases: [activated(bases("natural"), lambda x: median(F.relu(x)), 1), bases("natural")],
        inside=("natural",),
    ),
    "batch-statistics": Row(
        "batch norm with the statistics of the batch at inference",
        lambda bases: BatchStatistics(bases("robust")),
        lambda bases: [
            BatchStatistics(bases("robust"), of=ducat.data.load_test(DIGITS, samples=100)[0]),
            BatchStatistics(bases("robust"), alone=True),
            BatchStatistics(bases("robust")),
            bases("robust"),
        ],
        inside=("robust",),
        judged="company",
    ),
    # ---- photographs, which need `ducat data prepare cifar10-jpeg` ----
    "photograph-natural": _honest("four convolutions, trained plainly", "photograph-natural", **_FEW),
    "photograph-robust": _honest("the same by PGD-AT", "photograph-robust", **_FEW),
    "photograph-jpeg": _inputs("cosine coefficients rounded, as in JPEG", "photograph-natural", compressed, **_FEW),
    "photograph-one-hot": _outputs("one-hot outputs by indexing", "photograph-robust", one_hot_by_index, **_FEW),
    "photograph-noise": _random("noise of 0.1 on its input", "photograph-robust", noisy(0.1), **_FEW),
    "photograph-detector": Row(
        "where the image is rough a robust network answers, else a natural one",
        lambda bases: Switch(lambda x: _roughness(x) > 0, bases("photograph-robust"), bases("photograph-natural")),
        _of("photograph-natural", "photograph-robust"),
        guesses=_smooth,
        inside=("photograph-natural", "photograph-robust"),
        **_FEW,
    ),
    # ---- forms ----
    "tuple": Row("answers a tuple", lambda bases: Wrapped(bases("natural"), lambda z: (z, z.mean())), _of("natural")),
    "dictionary": Row(
        "answers a dictionary", lambda bases: Wrapped(bases("natural"), lambda z: {"logits": z}), _of("natural")
    ),
    "object": Row(
        "answers an object",
        lambda bases: Wrapped(bases("natural"), lambda z: SimpleNamespace(logits=z)),
        _of("natural"),
    ),
    "no-grad": Row("runs under no_grad", lambda bases: Unseen(bases("natural")), _of(), inside=("natural",)),
    "numpy": Row(
        "goes through NumPy",
        lambda bases: After(bases("natural"), lambda z: torch.from_numpy(z.detach().numpy().copy())),
        _of(),
        inside=("natural",),
    ),
    "in-place": Row("changes its input in place", lambda bases: InPlace(bases("robust")), _of(), inside=("robust",)),
}
