"""The networks that the defences are built from: trained once, in seconds, and kept as safetensors."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import ducat
from ducat import checkpoint

DIGITS, PHOTOGRAPHS = "digits", "cifar10-jpeg"
THREATS = {DIGITS: ducat.ThreatModel("linf", 0.2), PHOTOGRAPHS: ducat.ThreatModel("linf", "8/255")}
LEVELS = 16
VICTIMS = ("natural", "robust")  # whose attacked images a detector learns


class TinyViT(nn.Module):
    """A vision transformer of patches of 2 x 2, two layers, and width 32 (Dosovitskiy et al. 2021)."""

    def __init__(self, channels: int = 1, size: int = 8, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 2) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.positions
        logits: Tensor = self.head(self.norm(self.layers(tokens).mean(1)))
        return logits


class Thermometer(nn.Module):
    """Each pixel becomes `LEVELS` bits, bit i set where the pixel exceeds i / LEVELS (Buckman et al. 2018).

    `sharpness` is None for the encoding as it is deployed, which has no gradient, and otherwise that of a sigmoid.
    """

    def __init__(self, sharpness: float | None = None) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.arange(LEVELS, device=x.device).view(1, 1, -1, 1, 1) / LEVELS
        above = x.unsqueeze(2) - levels
        bits = (above > 0).to(x.dtype) if self.sharpness is None else torch.sigmoid(self.sharpness * above)
        return bits.flatten(1, 2)


class WinnersTakeAll(nn.Module):
    """Keep the largest tenth of a layer's activations and set the rest to zero (Xiao et al. 2020, k-WTA)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        limit = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return torch.where(flat >= limit, flat, torch.zeros_like(flat)).view_as(x)


class Binary(nn.Module):
    """The sign, with the gradient of a hard tangent (Hubara et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        soft = x.clamp(-1, 1)
        return soft + (x.sign() - soft).detach()


def convolutional(
    outputs: int = 10,
    channels: int = 1,
    width: int = 16,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    activation: Callable[[], nn.Module] = nn.ReLU,
    dropout: float = 0.0,
    stride: int = 1,
) -> nn.Sequential:
    """Return four 3 x 3 convolutions with normalisation and activation, an average pool, and a linear head."""
    layers: list[nn.Module] = []
    for wide, step in ((width, stride), (width, 1), (2 * width, 2), (2 * width, 1)):
        layers += [nn.Conv2d(channels, wide, 3, step, 1, bias=False), norm(wide), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
        channels = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def autoencoder() -> nn.Sequential:
    """Return 64 pixels, 16 numbers, 64 pixels."""
    inside = (nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU())
    return nn.Sequential(*inside, nn.Linear(64, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))


CODE = torch.tensor([[(row >> bit) & 1 for bit in range(4)] * 4 for row in range(10)]).float() * 2 - 1
CODE[:, 4:] *= torch.randint(0, 2, (10, 12), generator=torch.Generator().manual_seed(7)).float() * 2 - 1


@dataclass(frozen=True)
class Base:
    """How a network is made.

    Attributes:
        build: fresh weights, from the global generator.
        eps: of adversarial training with PGD-7; 0 for none.
        loss: "labels", "dummy-published", "dummy-aware", "parity" (two classes), "smooth" (label smoothing 0.8),
            "codes" (error-correcting bits), "images" (an autoencoder), "adversarial" (tell attacked images from benign
            ones).
        epochs: passes over the training images.
        rate: the highest learning rate of AdamW, one-cycle.
        seed: of weights and batches.
        start: the base whose weights are the first ones.
        data: digits or photographs.
        samples: how many training images; None for all.
    """

    build: Callable[[], nn.Module]
    eps: float = 0.0
    loss: str = "labels"
    epochs: int = 30
    rate: float = 0.01
    seed: int = 0
    start: str | None = None
    data: str = DIGITS
    samples: int | None = None

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the networks that it is made from."""
        if self.loss == "adversarial":
            return VICTIMS
        return () if self.start is None else (self.start,)


def _with_dummies() -> nn.Module:
    return ducat.add_dummy_classes(convolutional())


def _photographer() -> nn.Module:
    return convolutional(channels=3, width=16, stride=2)


BASES: Mapping[str, Base] = {
    "natural": Base(convolutional),
    "robust": Base(convolutional, eps=0.2),
    "robust-2": Base(convolutional, eps=0.2, seed=1),
    "recovery-aware": Base(_with_dummies, eps=0.2, loss="dummy-aware", start="robust", epochs=15, rate=0.003),
    "published": Base(_with_dummies, eps=0.2, loss="dummy-published", start="robust", epochs=15, rate=0.003),
    "other": Base(perceptron, rate=0.003, seed=2),
    "group-norm": Base(lambda: convolutional(norm=lambda wide: nn.GroupNorm(4, wide))),
    "vit": Base(TinyViT, rate=0.003),
    "vit-robust": Base(TinyViT, eps=0.1, rate=0.003),
    "linear": Base(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))),
    "dropout": Base(lambda: convolutional(dropout=0.2), eps=0.1),
    "parity": Base(lambda: convolutional(2), eps=0.1, loss="parity"),
    "thousand": Base(lambda: convolutional(1000), eps=0.2),
    "preact-resnet20": Base(lambda: ducat.models.build("preact-resnet20", 10, channels=1, width=4), epochs=15),
    "thermometer": Base(lambda: nn.Sequential(Thermometer(), convolutional(channels=LEVELS))),
    "winners": Base(lambda: convolutional(activation=WinnersTakeAll)),
    "binary": Base(lambda: convolutional(activation=Binary)),
    "smooth": Base(convolutional, loss="smooth"),
    "codes": Base(lambda: convolutional(16), loss="codes"),
    "natural-2": Base(convolutional, seed=3),
    "natural-3": Base(convolutional, seed=4),
    "autoencoder": Base(autoencoder, loss="images", rate=0.003, epochs=60),
    "detector": Base(lambda: convolutional(1, width=8), loss="adversarial", epochs=10),
    "photograph-natural": Base(_photographer, data=PHOTOGRAPHS, samples=4000, epochs=6),
    "photograph-robust": Base(_photographer, eps=8 / 255, data=PHOTOGRAPHS, samples=1500, epochs=8),
}


@cache
def training_images(data: str, samples: int | None, root: Path | None) -> tuple[Tensor, Tensor]:
    part = ducat.data.load(data, samples=samples, root=root).train
    return part.floats(), part.labels


class Bases:
    """Trained networks by name, from a folder or trained into it.

    Args:
        folder: where the weights are kept.
        root: the cache folder of prepared data; None for the user's.
    """

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self.folder, self.root = folder, root

    def key(self, name: str) -> str:
        """Return a network's name with a digest of how it is made, and how those are that it is made from."""
        base = BASES[name]
        with torch.random.fork_rng():
            layers = str(base.build())
        own = (base.eps, base.loss, base.epochs, base.rate, base.seed, base.start, base.samples, layers)
        settings = (*own, *(self.key(other) for other in base.others))
        return f"{name}-{hashlib.blake2b(repr(settings).encode(), digest_size=4).hexdigest()}"

    def __call__(self, name: str) -> nn.Module:
        """Return a fresh copy in evaluation mode."""
        base, path = BASES[name], self.folder / f"{self.key(name)}.safetensors"
        with torch.random.fork_rng():
            torch.manual_seed(base.seed)
            network = base.build()
            if path.is_file():
                network.load_state_dict(load_file(path))
                return network.eval().requires_grad_(False)
            if base.start is not None:
                network = ducat.add_dummy_classes(self(base.start).requires_grad_(True))
            self._fit(network, base)
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        checkpoint.write_atomically(path, lambda temporary: save_file(weights, temporary))
        return network.eval().requires_grad_(False)

    def joined(self) -> nn.Module:
        """Return the natural and the PGD-AT network of the search for a cure, as one (digits, seed 1)."""
        from benchmarks.cure.__main__ import Search

        work = self.folder / "cure"
        network = Search(work, DIGITS, seed=1).joined()[0]
        return network.eval().requires_grad_(False)

    def _fit(self, network: nn.Module, base: Base) -> None:
        x, y = training_images(base.data, base.samples, self.root)
        y = y % 2 if base.loss == "parity" else y
        size = 64
        steps = base.epochs * (len(x) // size)
        optimizer = torch.optim.AdamW(network.parameters(), base.rate, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, base.rate, total_steps=steps)
        ball = ducat.ThreatModel("linf", base.eps, base.eps / 4 if base.eps else None, 7)
        goal = {"dummy-aware": "recovered-cross-entropy"}.get(base.loss, "cross-entropy")
        victims = [self(name) for name in VICTIMS if base.loss == "adversarial"]
        for _ in range(base.epochs):
            for rows in torch.randperm(len(x))[: len(x) // size * size].split(size):
                images, labels = x[rows], y[rows]
                attacked = images
                if base.eps:
                    attacked = ducat.attacks.pgd(network, images, labels, ball, goal, keep="last")
                elif base.loss == "adversarial":
                    victim = victims[int(torch.randint(2, ()))]
                    attacked = ducat.attacks.pgd(victim, images, labels, ducat.ThreatModel("linf", 0.2), keep="last")
                network.train()
                loss = _loss(network, base.loss, images, attacked, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        network.eval()


def _loss(network: nn.Module, loss: str, x: Tensor, attacked: Tensor, y: Tensor) -> Tensor:
    if loss == "images":
        noisy = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
        return F.mse_loss(network(noisy), x)
    if loss == "adversarial":
        both, answers = torch.cat([x, attacked]), torch.arange(2).repeat_interleave(len(x)).float()
        return F.binary_cross_entropy_with_logits(network(both).squeeze(1), answers)
    if loss == "codes":
        return F.binary_cross_entropy_with_logits(network(attacked), (CODE[y] + 1) / 2)
    if loss.startswith("dummy"):
        targets = torch.cat([ducat.two_hot(y, 10, weight) for weight in (0.25, 1.0)])
        return F.cross_entropy(network(torch.cat([x, attacked])), targets)
    return F.cross_entropy(network(attacked), y, label_smoothing=0.8 if loss == "smooth" else 0)
