"""What defences are made of: changes of the input, of the output, of what is inside, and of who answers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ducat
from benchmarks.defences.networks import CODE, DIGITS, Bases, Binary, training_images

Change = Callable[[Tensor], Tensor]
EPS = 0.2  # of the ball that the stateful and the batch-dependent ones know


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

    def __init__(self, network: nn.Module, draws: int = 4) -> None:
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


def opaque(change: Change) -> Change:
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
    """Return numbers in [0, 1) that look random and follow from each image, of the images' shape.

    In whole numbers: a sum of others would depend on the size of the batch.
    """
    bits = x.detach().float().contiguous().view(torch.int32).long().flatten(1)
    places = torch.arange(1, bits.shape[1] + 1)
    mixed = (bits * (2 * places + 1) * 2654435761).sum(1, keepdim=True) + places * 40503
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 15)) * 2246822519
    return ((mixed >> 20) % 2**24).view_as(x).float() / 2**24


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


class Wary(nn.Module):
    """Answers by the second network where something about the whole batch, or about how it is run, is so."""

    def __init__(self, usual: nn.Module, other: nn.Module, notices: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.usual, self.other, self.notices = usual, other, notices

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.other if self.notices(x) else self.usual)(x)
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


def quantised_weights(network: nn.Module, levels: int = 127) -> nn.Module:
    for parameter in network.parameters():
        if parameter.ndim > 1:
            size = parameter.abs().amax() / levels
            parameter.data = (parameter / size).round() * size
    return network


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
