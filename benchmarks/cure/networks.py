"""Networks that the search tries and the library does not offer."""

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ducat.attacks.pgd import pgd
from ducat.dummy import recover
from ducat.threat import ThreatModel


class ManyDummies(nn.Module):
    """Several dummy classes a class, seen as one: 2C logits, of which the dummy half is a logsumexp over `count`."""

    def __init__(self, base: nn.Module, count: int) -> None:
        super().__init__()
        name, head = [pair for pair in base.named_modules() if isinstance(pair[1], nn.Linear)][-1]
        assert isinstance(head, nn.Linear)
        self.count, self.num_classes = count, head.out_features
        wide = nn.Linear(head.in_features, (1 + count) * head.out_features)
        with torch.no_grad():
            rows = [head.weight]
            noise = torch.Generator().manual_seed(0)
            for _ in range(count):
                shake = torch.randn(head.weight.shape, generator=noise) * 0.1 * head.weight.std()
                rows.append(head.weight + shake)
            wide.weight.copy_(torch.cat(rows))
            wide.bias.copy_(torch.cat([head.bias] + [head.bias - math.log(count)] * count))
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, wide)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        real, *dummies = self.base(x).split(self.num_classes, dim=1)
        return torch.cat([real, torch.stack(dummies).logsumexp(0)], dim=1)


class SplitLate(nn.Module):
    """A trunk with two last stages: the real half of the 2C logits from one, the dummy half from a copy of it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        layers = dict(base.network.named_children())
        late = {name: layers.pop(name) for name in ("layer3", "pool", "flatten", "linear")}
        self.trunk = nn.Sequential(base.normalize, *layers.values())
        self.real = nn.Sequential(*late.values())
        self.dummy = deepcopy(self.real)

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return torch.cat([self.real(features), self.dummy(features)], dim=1)


class Gated(nn.Module):
    """Two experts of 2C logits mixed by a constant gate: [log(1 - g) + log a; log g + log b], recovered by their sum.

    Args:
        experts: maps images to 2C logits, the accurate expert's and the robust one's.
        gate: g, the robust expert's weight.
        sharpen: what the robust expert's logits, less their mean, are multiplied by.
        power: what their size is raised to first: above 1 a sure expert becomes surer still and an unsure one less so
            (the idea of MixedNUTS, Bai et al. 2024, arXiv 2402.02263).
    """

    def __init__(self, experts: nn.Module, gate: float, sharpen: float, power: float = 1) -> None:
        super().__init__()
        self.experts, self.gate, self.sharpen, self.power = experts, gate, sharpen, power

    def forward(self, x: Tensor) -> Tensor:
        accurate, robust = self.experts(x).chunk(2, dim=1)
        if self.power != 1:
            robust = robust - robust.mean(1, keepdim=True)
            robust = robust.sign() * robust.abs().clamp_min(1e-6) ** self.power
        accurate = F.log_softmax(accurate, dim=1) + math.log(1 - self.gate)
        robust = F.log_softmax(self.sharpen * robust, dim=1) + math.log(self.gate)
        return torch.logaddexp(accurate, robust)


class Joined(nn.Module):
    """Two networks as one of 2C logits."""

    def __init__(self, accurate: nn.Module, robust: nn.Module) -> None:
        super().__init__()
        self.accurate, self.robust = accurate, robust

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.accurate(x), self.robust(x)], dim=1)


class BySum(nn.Module):
    """A network with dummy classes, recovered by logsumexp: C logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return recover(self.model(x), "logsumexp")


class Half(nn.Module):
    """The real half of a network's 2C logits (0) or the dummy half (1), as a classifier of its own."""

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).chunk(2, dim=1)[self.index]


@dataclass(frozen=True)
class Held:
    """Images that nothing was trained on, for choices after training: images in [0, 1], labels, and the attacker."""

    x: Tensor
    y: Tensor
    threat: ThreatModel


STAND_INS = (
    (0.9999, 1, 1),
    (0.5, 1, 1),
    (0.85, 1, 1),
    (0.85, 2, 1),
    (0.95, 1, 1),
    (0.5, 2, 1),
    (0.5, 4, 1),
    (0.5, 1, 2),
    (0.95, 4, 2),
    (0.5, 0.2, 2),
)


def through_stand_ins(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator
) -> Tensor:
    """Attack the mixture in `model` through other mixtures of its experts: one that is sharp hides its gradients.

    PGD-50 on the cross-entropy and the margin of each stand-in (gate, sharpening, power); `model` judges the result,
    and a sample that is fooled is attacked no more.
    """
    mixture = next(module for module in model.modules() if isinstance(module, Gated))
    result = x.clone()
    with torch.no_grad():
        left = (recover(model(x)).argmax(1) == y).nonzero().squeeze(1)
    for stand_in, objective in product(STAND_INS, ("cross-entropy", "margin")):
        if len(left) == 0:
            break
        surrogate, ball = Gated(mixture.experts, *stand_in), replace(threat, steps=50)
        found = pgd(surrogate, x[left], y[left], ball, objective, generator=generator, keep="last")
        with torch.no_grad():
            fooled = recover(model(found)).argmax(1) != y[left]
        result[left[fooled]] = found[fooled]
        left = left[~fooled]
    return result


GATES, SHARPENINGS, POWERS = (0.5, 0.7, 0.85, 0.95), (1, 2, 4), (1, 2)
GIVEN_UP = 0.01
HELD = 400


def calibrated(experts: nn.Module, held: Held) -> Gated:
    """Mix two experts by the gate that is most accurate for at most a point of robust accuracy, on held-out images.

    The attack is PGD-20 on the mixture itself. Where no gate keeps that much, the most robust one is taken.
    """
    x, y = held.x[:HELD], held.y[:HELD]
    alone = _accuracies(Gated(experts, 0.999, 1), x, y, held.threat)[1]
    measured = {
        choice: _accuracies(Gated(experts, *choice), x, y, held.threat)
        for choice in product(GATES, SHARPENINGS, POWERS)
    }
    kept = {choice: pair for choice, pair in measured.items() if pair[1] >= alone - GIVEN_UP}
    best = max(kept, key=lambda choice: kept[choice]) if kept else max(measured, key=lambda choice: measured[choice][1])
    print(
        f"gate {best[0]}, sharpened by {best[1]}, power {best[2]}: clean and robust {measured[best]} on held-out images"
    )
    return Gated(experts, *best)


def _accuracies(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[float, float]:
    adversarial = pgd(model, x, y, replace(threat, steps=20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean, robust = ((model(images).argmax(1) == y).float().mean().item() for images in (x, adversarial))
    return clean, robust
