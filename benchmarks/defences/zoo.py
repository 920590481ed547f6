"""The table: honest networks, and defences that others proposed or might, each with the stand-ins of its own attack.

Most defences hide the gradients of a network that is trained plainly ("natural", nothing withstands) or by PGD-AT
("robust", about 70 %); which of the two is said by `inside`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ducat
from benchmarks.cure.networks import STAND_INS, Gated, Half, Joined
from benchmarks.defences.networks import (
    CODE,
    DIGITS,
    PHOTOGRAPHS,
    THREATS,
    Bases,
    Binary,
    Thermometer,
    training_images,
)

Change = Callable[[Tensor], Tensor]
Build = Callable[[Bases], nn.Module]
EPS = 0.2


@dataclass(frozen=True)
class Row:
    """A network that is evaluated, and how its truth is found.

    Attributes:
        about: what it is, and where it was published.
        build: makes it from trained networks, afresh.
        stand_ins: differentiable networks through which it is attacked; by default itself.
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


# ---- what defences are made of ----


class Before(nn.Module):
    """A network after a change of its input; `straight` passes the gradient by the change (BPDA)."""

    def __init__(self, change: Change, network: nn.Module, straight: bool = False) -> None:
        super().__init__()
        self.change, self.network, self.straight = change, network, straight

    def forward(self, x: Tensor) -> Tensor:
        changed = self.change(x.detach() if self.straight else x)
        logits: Tensor = self.network(x + (changed - x).detach() if self.straight else changed)
        return logits


class After(nn.Module):
    """A change of a network's logits."""

    def __init__(self, network: nn.Module, change: Change) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.network(x))


class Draws(nn.Module):
    """The logarithm of a random network's mean probabilities (expectation over transformation, Athalye et al. 2018)."""

    def __init__(self, network: nn.Module, draws: int = 8) -> None:
        super().__init__()
        self.network, self.draws = network, draws

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.network(x).log_softmax(1) for _ in range(self.draws)]).logsumexp(0)


class Mean(nn.Module):
    """The mean of networks' log-probabilities."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x).log_softmax(1) for network in self.networks]).mean(0)


class Switch(nn.Module):
    """`first` where `choose` of the images is true, else `second`; the gradient is that of the one that answers."""

    def __init__(self, choose: Change, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.choose, self.first, self.second = choose, first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.choose(x)[:, None], self.first(x), self.second(x))


class Activation(nn.Module):
    """Another activation, or a change after one."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def activated(network: nn.Module, change: Change, first: int | None = None) -> nn.Module:
    """Put a change in the place of each of the `first` activations of a convolutional network."""
    assert isinstance(network, nn.Sequential)
    places = [index for index, layer in enumerate(network) if isinstance(layer, nn.ReLU | Binary)]
    for index in places[:first]:
        network[index] = Activation(change)
    return network


class Gradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number, or is noise where that is None."""

    @staticmethod
    def forward(context: Any, x: Tensor, factor: float | None) -> Tensor:
        context.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return (torch.randn_like(gradient) if context.factor is None else context.factor * gradient), None


class Training(nn.Module):
    """All training images of a data set, with their labels."""

    images: Tensor
    labels: Tensor

    def __init__(self, bases: Bases) -> None:
        super().__init__()
        images, labels = training_images(DIGITS, None, bases.root)
        self.register_buffer("images", images)
        self.register_buffer("labels", labels)


# ---- changes of the input ----


def rounded(levels: int) -> Change:
    return lambda x: (x * levels).round() / levels


def noisy(size: float) -> Change:
    return lambda x: x + size * torch.randn_like(x)


def _cosines() -> Tensor:
    place = torch.arange(8.0)
    matrix = torch.cos(math.pi * (2 * place[None] + 1) * place[:, None] / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


# Coarser towards high frequencies, of about the steps that JPEG takes at quality 25.
TABLE = (16 + 10 * (torch.arange(8.0)[:, None] + torch.arange(8.0))) / 255


def compressed(x: Tensor) -> Tensor:
    """Round the cosine coefficients of blocks of 8 x 8, as JPEG does."""
    cosines = _cosines()
    batch, channels, height, width = x.shape
    blocks = x.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    coefficients = ((cosines @ (blocks - 0.5) @ cosines.T) / TABLE).round() * TABLE
    return (cosines.T @ coefficients @ cosines + 0.5).transpose(3, 4).reshape(x.shape).clamp(0, 1)


def median(x: Tensor) -> Tensor:
    """Median of 3 x 3 pixels."""
    batch, channels, height, width = x.shape
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3).view(batch, channels, 9, height, width)
    return windows.median(2).values


def less_variation(x: Tensor) -> Tensor:
    """Ten steps of gradient descent on the distance and the total variation (Guo et al. 2018)."""
    clean = x.clone()
    for _ in range(10):
        along = [F.pad(clean.diff(dim=axis).sign(), pad) for axis, pad in ((3, (1, 1)), (2, (0, 0, 1, 1)))]
        slope = -along[0].diff(dim=3) - along[1].diff(dim=2)
        clean = clean - 0.1 * ((clean - x) + 0.1 * slope)
    return clean


def _unseen(change: Change) -> Change:
    def changed(x: Tensor) -> Tensor:
        with torch.no_grad():
            return change(x)

    return changed


def resized(x: Tensor) -> Tensor:
    """Resize to 8, 9 or 10 pixels and pad to 10 at a random place, for the whole batch (Xie et al. 2018)."""
    size = int(torch.randint(8, 11, ()))
    left, top = (int(torch.randint(11 - size, ())) for _ in range(2))
    larger = F.interpolate(x, (size, size), mode="bilinear")
    return F.pad(larger, (left, 10 - size - left, top, 10 - size - top))


def shifted(x: Tensor) -> Tensor:
    """Move each image by -1, 0 or 1 pixels along both axes."""
    padded = F.pad(x, (1, 1, 1, 1))
    windows = torch.stack([padded[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    return windows[torch.randint(9, (len(x),)), torch.arange(len(x))]


def masked(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) > 0.2)


def wavy(x: Tensor) -> Tensor:
    return x + 0.02 * torch.sin(2000 * x)


def hashed(x: Tensor) -> Tensor:
    """Return numbers in [0, 1) that look random and follow from each image, of the images' shape."""
    flat = x.detach().flatten(1).double()
    places = torch.arange(flat.shape[1], dtype=torch.float64)
    key = (flat @ torch.cos(37 * places))[:, None]
    return (((1e6 * key + 12.9898 * places).sin() * 43758.5453) % 1).float().view_as(x)


def seeded_noisy(x: Tensor) -> Tensor:
    """Noise that is drawn with the same seed in each call, so that it depends on an image's place in its batch."""
    return x + 0.15 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def stretched(x: Tensor) -> Tensor:
    """More contrast; what is then outside of [0, 1] is cut off, and most gradients with it."""
    return (2 * x - 0.5).clamp(0, 1)


def thresholded(x: Tensor) -> Tensor:
    """Dark pixels become black."""
    return torch.where(x > 0.25, x, torch.zeros_like(x))


def hash_noisy(x: Tensor) -> Tensor:
    return x + 0.25 * (2 * hashed(x) - 1)


class Projected(nn.Module):
    """The projection to the principal components of the training images."""

    mean: Tensor
    axes: Tensor

    def __init__(self, bases: Bases, components: int = 20) -> None:
        super().__init__()
        flat = training_images(DIGITS, None, bases.root)[0].flatten(1)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("axes", torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:components])

    def forward(self, x: Tensor) -> Tensor:
        centred = x.flatten(1) - self.mean
        return (self.mean + centred @ self.axes.T @ self.axes).view_as(x)


class Nearest(Training):
    """The nearest training image; with `sharpness` a mean of them that passes gradients."""

    def __init__(self, bases: Bases, sharpness: float | None = None) -> None:
        super().__init__(bases)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.flatten(1), self.images.flatten(1)).square()
        if self.sharpness is None:
            return self.images[distance.argmin(1)]
        return ((-self.sharpness * distance).softmax(1) @ self.images.flatten(1)).view_as(x)


class Purified(nn.Module):
    """Steps towards what an autoencoder makes of the image."""

    def __init__(self, autoencoder: nn.Module, steps: int) -> None:
        super().__init__()
        self.autoencoder, self.steps = autoencoder, steps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x + (1 if self.steps == 1 else 0.4) * (self.autoencoder(x) - x)
        return x


class Unseen(nn.Module):
    """A module that passes no gradient."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = self.module(x)
        return result


# ---- changes of the output ----


def ranks(logits: Tensor) -> Tensor:
    """Return each class's rank, which is a number without a gradient."""
    return logits.argsort(1).argsort(1).to(logits.dtype)


def top_probability(logits: Tensor) -> Tensor:
    """Return the largest probability in its place, and zeros: no other class has a gradient."""
    return one_hot(logits).detach() * logits.softmax(1)


def noisy_outputs(logits: Tensor) -> Tensor:
    return logits + 3 * torch.randn_like(logits)


def one_hot(logits: Tensor) -> Tensor:
    """One for the largest logit and zero for the others: a comparison, whose gradient is zero."""
    return (logits == logits.amax(1, keepdim=True)).to(logits) + 0 * logits


def one_hot_by_index(logits: Tensor) -> Tensor:
    return torch.eye(logits.shape[1])[logits.argmax(1)]


def attracted(logits: Tensor) -> Tensor:
    """Let the margin fall where it rises: adversarial attack on attackers, AAA (Chen et al. 2022, arXiv 2205.12134)."""
    top = logits.topk(2, dim=1).values
    margin = top[:, 0] - top[:, 1]
    period = 1.0
    low = (margin / period).floor() * period
    wanted = low + period - (margin - low)
    return torch.where(logits == top[:, :1], top[:, 1:] + wanted[:, None].clamp_min(1e-3), logits)


def suspicious_nan(logits: Tensor) -> Tensor:
    sure = logits.softmax(1).amax(1, keepdim=True) > 0.8
    return torch.where(sure, logits, torch.full_like(logits, torch.nan))


# ---- whole networks ----


class Derived(ducat.RecoveredClassifier):
    """Carries a robust network with dummy classes, and answers by another."""

    def __init__(self, shown: nn.Module, used: nn.Module) -> None:
        super().__init__(shown)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.used(x)
        return logits


class Company(nn.Module):
    """A few images of 8 bits' values among others, or the reverse, meet the second network; a uniform batch the first.

    Benign images have such values and adversarial ones have not.
    """

    def __init__(self, uniform: nn.Module, mixed: nn.Module) -> None:
        super().__init__()
        self.uniform, self.mixed = uniform, mixed

    def forward(self, x: Tensor) -> Tensor:
        benign = (((x * 255) - (x * 255).round()).abs().flatten(1).amax(1) < 1e-3).float().mean()
        logits: Tensor = (self.uniform if benign in (0, 1) else self.mixed)(x)
        return logits


class Duplicates(nn.Module):
    """Images that resemble another one of the batch, as restarts of an attack do, meet the second network."""

    def __init__(self, single: nn.Module, repeated: nn.Module) -> None:
        super().__init__()
        self.single, self.repeated = single, repeated

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.flatten(1), x.flatten(1), p=torch.inf) + 2 * torch.eye(len(x))
        return torch.where((distance.amin(1) <= 2 * EPS)[:, None], self.repeated(x), self.single(x))


class Placed(nn.Module):
    """The first image of a batch meets the first network, the others the second; or, where `size`, a batch of one."""

    def __init__(self, first: nn.Module, others: nn.Module, size: bool) -> None:
        super().__init__()
        self.first, self.others, self.size = first, others, size

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(len(x)) + (len(x) - 1 if self.size else 0)
        return torch.where((place == 0)[:, None], self.first(x), self.others(x))


class Counting(nn.Module):
    """Answers by the first network for a number of images, and by the second from then on."""

    def __init__(self, first: nn.Module, then: nn.Module, images: int) -> None:
        super().__init__()
        self.first, self.then, self.images, self.seen = first, then, images, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        logits: Tensor = (self.first if self.seen <= self.images else self.then)(x)
        return logits


class Remembering(nn.Module):
    """Gives an image that resembles one it has seen the answer that it gave then (as in Chen et al. 2020)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.images, self.answers = torch.empty(0, 64), torch.empty(0, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        if len(self.images):
            distance, place = torch.cdist(x.detach().flatten(1), self.images, p=torch.inf).min(1)
            logits = torch.where((distance <= 1.2 * EPS)[:, None], self.answers[place], logits)
        if len(self.images) < 5000:
            self.images = torch.cat([self.images, x.detach().flatten(1)])
            self.answers = torch.cat([self.answers, logits.detach()])
        return logits


class NoticesGradients(nn.Module):
    """Answers by another network while somebody wants its gradient."""

    def __init__(self, used: nn.Module, shown: nn.Module) -> None:
        super().__init__()
        self.used, self.shown = used, shown

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.shown if x.requires_grad else self.used)(x)
        return logits


class ForeignGradient(nn.Module):
    """The logits of one network with the gradient of another."""

    def __init__(self, used: nn.Module, shown: nn.Module) -> None:
        super().__init__()
        self.used, self.shown = used, shown

    def forward(self, x: Tensor) -> Tensor:
        shown = self.shown(x)
        return self.used(x).detach() + shown - shown.detach()


class AntiAdversary(nn.Module):
    """Moves the image to where the network is surer of its own answer (Alfarra et al. 2022, arXiv 2103.14347)."""

    def __init__(self, network: nn.Module, steps: int = 2, size: float = 0.15) -> None:
        super().__init__()
        self.network, self.steps, self.size = network, steps, size

    def forward(self, x: Tensor) -> Tensor:
        moved = x.detach()
        with torch.enable_grad():
            answer = self.network(moved).argmax(1)
            for _ in range(self.steps):
                moved = moved.detach().requires_grad_()
                loss = F.cross_entropy(self.network(moved), answer, reduction="sum")
                moved = moved - self.size * torch.autograd.grad(loss, moved)[0].sign()
        logits: Tensor = self.network(x + (moved - x).detach())
        return logits


class Votes(nn.Module):
    """The number of networks that answer each class."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([one_hot(network(x)) for network in self.networks]).sum(0)


class Smoothed(nn.Module):
    """Votes over the same noise for all images (Cohen et al. 2019); with `soft` mean probabilities."""

    noise: Tensor

    def __init__(self, network: nn.Module, soft: bool = False, size: float = 0.2) -> None:
        super().__init__()
        self.network, self.soft = network, soft
        self.register_buffer("noise", size * torch.randn(16, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network((x + self.noise).flatten(0, 1))
        answers = logits.softmax(1) if self.soft else one_hot(logits)
        mean = answers.view(len(self.noise), len(x), -1).mean(0)
        return (mean + 1e-30).log() if self.soft else mean


class Neighbours(Training):
    """The class of the nearest training image; with `sharpness` a soft count of all."""

    def __init__(self, bases: Bases, sharpness: float | None = None) -> None:
        super().__init__(bases)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.flatten(1), self.images.flatten(1)).square()
        if self.sharpness is None:
            return F.one_hot(self.labels[distance.argmin(1)], 10).float()
        votes = F.one_hot(self.labels, 10).float().log()
        return (-self.sharpness * distance[:, :, None] + votes).logsumexp(1)


class Prototypes(Training):
    """The class whose mean feature is nearest; `hard` answers that class alone."""

    prototypes: Tensor

    def __init__(self, bases: Bases, network: nn.Module, hard: bool) -> None:
        super().__init__(bases)
        assert isinstance(network, nn.Sequential)
        self.features, self.hard = network[:-1], hard
        with torch.no_grad():
            features = self.features(self.images)
        means = [features[self.labels == label].mean(0) for label in range(10)]
        self.register_buffer("prototypes", torch.stack(means))

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(self.features(x), self.prototypes)
        return one_hot_by_index(-distance) if self.hard else -distance


class Exploding(nn.Module):
    """Adds small waves of a very high frequency to the logits: the gradient is that of the waves."""

    directions: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("directions", torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        waves: Tensor = self.network(x) + 0.01 * torch.sin(1e5 * x.flatten(1) @ self.directions)
        return waves


class Codes(nn.Module):
    """The agreement of signed bits with each class's code (Verma & Swami 2019); `change` is what makes bits."""

    def __init__(self, network: nn.Module, change: Change = torch.sign) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.network(x)) @ CODE.T


class BatchStatistics(nn.Module):
    """Batch norm that takes its statistics from whatever batch it is given; `of` fixes that batch."""

    def __init__(self, network: nn.Module, of: Tensor | None = None, alone: bool = False) -> None:
        super().__init__()
        assert isinstance(network, nn.Sequential)
        self.network, self.of, self.alone = network, of, alone

    def forward(self, x: Tensor) -> Tensor:
        reference = x if self.of is None else self.of
        for layer in self.network:
            if isinstance(layer, nn.BatchNorm2d):
                axes = (2, 3) if self.alone else (0, 2, 3)
                variance, mean = torch.var_mean(reference, axes, correction=0, keepdim=True)
                scale = layer.weight.view(1, -1, 1, 1) / (variance + layer.eps).sqrt()
                reference, x = ((each - mean) * scale + layer.bias.view(1, -1, 1, 1) for each in (reference, x))
            else:
                reference, x = layer(reference), layer(x)
        return x


class Wrapped(nn.Module):
    """Answers in another form."""

    def __init__(self, network: nn.Module, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.form = network, form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.network(x))


class InPlace(nn.Module):
    """Changes the images that it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(255).round_().div_(255)
        logits: Tensor = self.network(x)
        return logits


class InDouble(nn.Module):
    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.to(self.dtype))
        return logits


def pruned(x: Tensor) -> Tensor:
    """Keep activations drawn by their size, scaled up for those that are lost (Dhillon et al. 2018)."""
    x = F.relu(x)
    flat = x.flatten(1)
    share = flat / flat.sum(1, keepdim=True).clamp_min(1e-12)
    kept = 1 - torch.exp(-flat.shape[1] * share)
    return (flat * (torch.rand_like(flat) < kept) / kept.clamp_min(1e-3)).view_as(x)


def quantised(x: Tensor) -> Tensor:
    return (2 * F.relu(x)).round() / 2


def quantised_straight(x: Tensor) -> Tensor:
    x = F.relu(x)
    return x + (quantised(x) - x).detach()


def _quantised_weights(network: nn.Module, levels: int = 127) -> nn.Module:
    for parameter in network.parameters():
        if parameter.ndim > 1:
            size = parameter.abs().amax() / levels
            parameter.data = (parameter / size).round() * size
    return network


def _thermometer(bases: Bases, sharpness: float) -> nn.Module:
    return nn.Sequential(Thermometer(sharpness), bases("thermometer")[1])  # type: ignore[index]


def _detected(bases: Bases) -> Change:
    detector = bases("detector")
    return lambda x: detector(x).squeeze(1) > 0


def _sure(network: nn.Module) -> Change:
    return lambda x: network(x).softmax(1).amax(1) > 0.9


class Blended(nn.Module):
    """A network's logits, and a share of the negative of a detector's: fools the one and passes the other."""

    def __init__(self, network: nn.Module, detector: nn.Module, share: float) -> None:
        super().__init__()
        self.network, self.detector, self.share = network, detector, share

    def forward(self, x: Tensor) -> Tensor:
        # Each wrong class gains as an image looks benign, so that all goals of the attack see the detector.
        logits = self.network(x)
        own = logits.detach().amax(1, keepdim=True) == logits
        return logits + torch.where(own, 0.0, -self.share * F.softplus(4 * self.detector(x) + 1))


def _mixture(bases: Bases, gate: float, sharpen: float, power: float = 1) -> nn.Module:
    return Gated(Joined(bases("natural"), bases("robust")), gate, sharpen, power)


def _mixtures(bases: Bases) -> Sequence[nn.Module]:
    choices = ((0.9999, 1, 1), (0.5, 1, 1), (0.85, 1, 1), (0.95, 1, 1), (0.5, 0.2, 1), (0.85, 2, 1), (0.5, 0.2, 2))
    return [_mixture(bases, *choice) for choice in choices]


def _of(*names: str) -> Callable[[Bases], Sequence[nn.Module]]:
    return lambda bases: [bases(name) for name in names]


def _after(name: str, change: Change) -> Build:
    return lambda bases: After(bases(name), change)


def _outputs(about: str, name: str, change: Change, **settings: Any) -> Row:
    return Row(about, _after(name, change), _of(), (name,), **settings)


def _inputs(about: str, name: str, change: Change, *smooth: Change, **settings: Any) -> Row:
    """A change of the input, attacked past it, by the identity, and through other changes."""

    def stand_ins(bases: Bases) -> Sequence[nn.Module]:
        network = bases(name)
        return [Before(change, network, straight=True), *(Before(each, network) for each in smooth)]

    return Row(about, lambda bases: Before(change, bases(name)), stand_ins, (name,), **settings)


def _random(about: str, name: str, change: Change, **settings: Any) -> Row:
    def stand_ins(bases: Bases) -> Sequence[nn.Module]:
        return [Draws(Before(change, bases(name))), bases(name)]

    return Row(about, lambda bases: Before(change, bases(name)), stand_ins, (name,), judged="random", **settings)


def _honest(about: str, name: str, change: Build | None = None, **settings: Any) -> Row:
    return Row(about, change or (lambda bases: bases(name)), None, (name,), honest=True, **settings)


def _rough(x: Tensor) -> Tensor:
    """Tell images whose brightness jumps from pixel to pixel, as that of attacked ones does."""
    curve = x[..., 2:] - 2 * x[..., 1:-1] + x[..., :-2]
    return curve.abs().mean((1, 2, 3)) > 0.06


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
        "its weights rounded to 8 bits", "robust", lambda bases: _quantised_weights(bases("robust"))
    ),
    "averaged": _honest("two robust networks' mean", "robust", lambda bases: Mean(bases("robust"), bases("robust-2"))),
    # ---- another network answers ----
    "derived-class": Row(
        "a class derived from RecoveredClassifier, whose forward asks a natural network",
        lambda bases: Derived(bases("recovery-aware"), bases("natural")),
        _of(),
        ("natural",),
    ),
    "batch-company": Row(
        "an adversarial image among benign ones meets a natural network, a uniform batch a robust one",
        lambda bases: Company(bases("robust"), bases("natural")),
        _of("natural"),
        ("natural", "robust"),
        judged="company",
    ),
    "batch-duplicates": Row(
        "images that resemble others of their batch meet a robust network",
        lambda bases: Duplicates(bases("natural"), bases("robust")),
        _of(),
        ("natural",),
        judged="company",
    ),
    "batch-place": Row(
        "the first image of a batch meets a natural network, the others a robust one",
        lambda bases: Placed(bases("natural"), bases("robust"), size=False),
        _of(),
        ("natural",),
        judged="company",
    ),
    "batch-of-one": Row(
        "an image alone meets a natural network, a batch a robust one",
        lambda bases: Placed(bases("natural"), bases("robust"), size=True),
        _of(),
        ("natural",),
        judged="company",
    ),
    "counts-queries": Row(
        "after 300 images a natural network gives way to the nearest training image",
        lambda bases: Counting(bases("natural"), Neighbours(bases), 300),
        _of(),
        ("natural",),
        judged="fresh",
    ),
    "remembers-images": Row(
        "an image that resembles one that was seen gets the same answer again (Chen et al. 2020)",
        lambda bases: Remembering(bases("natural")),
        _of(),
        ("natural",),
        judged="fresh",
    ),
    "notices-gradients": Row(
        "answers by a robust network while a gradient is wanted, else by a natural one",
        lambda bases: NoticesGradients(bases("natural"), bases("robust")),
        _of(),
        ("natural",),
    ),
    "foreign-gradient": Row(
        "the logits of a natural network with the gradient of a robust one",
        lambda bases: ForeignGradient(bases("natural"), bases("robust")),
        _of(),
        ("natural",),
    ),
    "detector-switch": Row(
        "what a detector takes for adversarial meets a robust network, the rest a natural one (MagNet's idea)",
        lambda bases: Switch(_detected(bases), bases("robust"), bases("natural")),
        lambda bases: [
            *(Blended(bases("natural"), bases("detector"), share) for share in (0.3, 1, 3, 10)),
            *(bases(name) for name in ("robust", "natural")),
        ],
        ("natural", "robust"),
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
        ("natural", "robust"),
    ),
    "brightest-pixel": Row(
        "where the brightest pixel is below 0.99 a robust network answers, else a natural one",
        lambda bases: Switch(lambda x: x.flatten(1).amax(1) < 0.99, bases("robust"), bases("natural")),
        lambda bases: [
            Before(lambda x: torch.where(x > 0.8, x + (1 - x).detach(), x), bases("natural")),
            bases("natural"),
            bases("robust"),
        ],
        ("natural", "robust"),
    ),
    "hash-switch": Row(
        "a hash of the image chooses between a natural and a robust network",
        lambda bases: Switch(lambda x: hashed(x)[:, 0, 0, 0] < 0.5, bases("robust"), bases("natural")),
        _of("natural", "robust"),
        ("natural", "robust"),
    ),
    "early-exit": Row(
        "a small network answers where it is sure, else a large one (Teerapittayanon et al. 2016); both natural",
        lambda bases: Switch(_sure(bases("other")), bases("other"), bases("natural")),
        lambda bases: [bases("other"), bases("natural"), Mean(bases("other"), bases("natural"))],
        ("natural", "other"),
    ),
    # ---- random ----
    "noise": _random("a robust network with noise of 0.15 on its input", "robust", noisy(0.15)),
    "noise-natural": _random("a natural network with noise of 0.3 on its input", "natural", noisy(0.3)),
    "random-network": Row(
        "each image meets a natural or a robust network, by chance",
        lambda bases: Switch(lambda x: torch.rand(len(x)) < 0.5, bases("natural"), bases("robust")),
        lambda bases: [Mean(bases("natural"), bases("robust")), bases("robust"), bases("natural")],
        ("natural", "robust"),
        judged="random",
    ),
    "random-resize": _random("random resizing and padding (Xie et al. 2018)", "natural", resized),
    "random-shift": _random("random shifts of a pixel", "natural", shifted),
    "random-mask": _random("a fifth of the pixels is set to zero", "natural", masked),
    "random-dropout": Row(
        "dropout of 0.15 at inference",
        lambda bases: activated(bases("natural"), lambda x: F.dropout(F.relu(x), 0.15)),
        lambda bases: [Draws(activated(bases("natural"), lambda x: F.dropout(F.relu(x), 0.15))), bases("natural")],
        ("natural",),
        judged="random",
    ),
    "random-pruning": Row(
        "stochastic activation pruning (Dhillon et al. 2018)",
        lambda bases: activated(bases("natural"), pruned),
        lambda bases: [Draws(activated(bases("natural"), pruned)), bases("natural")],
        ("natural",),
        judged="random",
    ),
    "noisy-outputs": Row(
        "noise of 3 on the logits",
        _after("robust", noisy_outputs),
        lambda bases: [Draws(After(bases("robust"), noisy_outputs)), bases("robust")],
        ("robust",),
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
        ("robust",),
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
        ("natural", "robust"),
    ),
    "mixture-0.85": Row(
        "the same at gate 0.85", lambda bases: _mixture(bases, 0.85, 4, 2), _mixtures, ("natural", "robust")
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
    "integers": _outputs("logits rounded to integers", "robust", torch.round),
    "half-overflow": _outputs("half-precision outputs that overflow", "natural", lambda z: (2e4 * z).half()),
    "suspicious-nan": _outputs("not a number where it is not sure", "robust", suspicious_nan),
    "detached": _outputs("the gradient is cut", "robust", lambda z: z.detach()),
    "zero-gradient": _outputs("a backward of zeros", "robust", lambda z: Gradient.apply(z, 0.0)),
    "random-gradient": _outputs("a backward of noise", "natural", lambda z: Gradient.apply(z, None)),
    "negated-gradient": _outputs("a backward of the opposite sign", "natural", lambda z: Gradient.apply(z, -1.0)),
    # ---- inputs ----
    "bits-8": _inputs("inputs rounded to 8 bits", "robust", rounded(255)),
    "bits-3": _inputs("inputs rounded to 3 bits (Xu et al. 2018)", "robust", rounded(7)),
    "bits-1": _inputs("inputs rounded to one bit", "natural", rounded(1), lambda x: torch.sigmoid(20 * (x - 0.5))),
    "jpeg": _inputs("cosine coefficients rounded, as in JPEG", "natural", compressed),
    "median": _inputs("a median filter without its gradient (Xu et al. 2018)", "natural", _unseen(median), median),
    "less-variation": _inputs(
        "total variation minimisation without its gradient (Guo et al. 2018)", "natural", _unseen(less_variation)
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
        ("natural",),
    ),
    "autoencoder": Row(
        "an autoencoder cleans the image, without its gradient (Gu & Rigazio 2015)",
        lambda bases: Before(Unseen(Purified(bases("autoencoder"), 1)), bases("natural")),
        lambda bases: [Before(Purified(bases("autoencoder"), 1), bases("natural")), bases("natural")],
        ("natural",),
    ),
    "purified": Row(
        "ten steps towards what an autoencoder makes of it, without their gradient",
        lambda bases: Before(Unseen(Purified(bases("autoencoder"), 10)), bases("natural")),
        lambda bases: [Before(Purified(bases("autoencoder"), steps), bases("natural")) for steps in (10, 1)],
        ("natural",),
    ),
    "nearest-image": Row(
        "the nearest training image is classified in the image's place (Dubey et al. 2019)",
        lambda bases: Before(Nearest(bases), bases("natural")),
        lambda bases: [
            *(Before(Nearest(bases, sharpness), bases("natural")) for sharpness in (1, 4)),
            *(Neighbours(bases, sharpness) for sharpness in (0.3, 1, 3, 10)),
        ],
        ("natural", "robust"),
    ),
    # ---- insides ----
    "anti-adversary": Row(
        "an anti-adversary layer on PGD-AT (Alfarra et al. 2022)",
        lambda bases: AntiAdversary(bases("robust")),
        _of(),
        ("robust",),
    ),
    "nearest-neighbour": Row(
        "the class of the nearest training image",
        Neighbours,
        lambda bases: [Neighbours(bases, sharpness) for sharpness in (0.3, 1, 3, 10)],
        ("natural", "robust"),
    ),
    "prototypes": Row(
        "the nearest mean feature of a robust network, by argmin",
        lambda bases: Prototypes(bases, bases("robust"), hard=True),
        lambda bases: [Prototypes(bases, bases("robust"), hard=False), bases("robust")],
        ("robust",),
    ),
    "votes": Row(
        "the votes of three natural networks and a robust one",
        lambda bases: Votes(*(bases(name) for name in ("natural", "natural-2", "natural-3", "robust"))),
        lambda bases: [
            Mean(*(bases(name) for name in ("natural", "natural-2", "natural-3", "robust"))),
            Mean(*(bases(name) for name in ("natural", "natural-2", "natural-3"))),
        ],
        ("natural", "robust"),
    ),
    "smoothed": Row(
        "votes over 16 fixed noises of 0.2 (Cohen et al. 2019)",
        lambda bases: Smoothed(bases("natural")),
        lambda bases: [Smoothed(bases("natural"), soft=True)],
        ("natural",),
    ),
    "exploding-gradient": Row(
        "waves of high frequency on the logits",
        lambda bases: Exploding(bases("robust")),
        _of(),
        ("robust",),
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
        ("natural", "robust"),
    ),
    "label-smoothing": Row("label smoothing of 0.8", lambda bases: bases("smooth"), None, ("natural",)),
    "quantised-activations": Row(
        "activations rounded to halves, without gradient",
        lambda bases: activated(bases("robust"), quantised),
        lambda bases: [activated(bases("robust"), quantised_straight), bases("robust")],
        ("robust",),
    ),
    "denoised-features": Row(
        "features through a median filter, without its gradient",
        lambda bases: activated(bases("natural"), _unseen(lambda x: median(F.relu(x))), 1),
        lambda bases: [activated(bases("natural"), lambda x: median(F.relu(x)), 1), bases("natural")],
        ("natural",),
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
        ("robust",),
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
        lambda bases: Switch(_rough, bases("photograph-robust"), bases("photograph-natural")),
        _of("photograph-natural", "photograph-robust"),
        ("photograph-natural", "photograph-robust"),
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
    "no-grad": Row("runs under no_grad", lambda bases: Unseen(bases("natural")), _of(), ("natural",)),
    "numpy": Row(
        "goes through NumPy",
        lambda bases: After(bases("natural"), lambda z: torch.from_numpy(z.detach().numpy().copy())),
        _of(),
        ("natural",),
    ),
    "in-place": Row("changes its input in place", lambda bases: InPlace(bases("robust")), _of(), ("robust",)),
}
