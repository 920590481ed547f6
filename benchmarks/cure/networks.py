"""What the search tries that the library does not offer: other networks with 2C logits, and targets from teachers."""

import math
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ducat import losses, methods
from ducat.averaging import WeightAverage
from ducat.dummy import recover


class ManyDummies(nn.Module):
    """Several dummy classes a class, seen as one: 2C logits, of which the dummy half is a logsumexp over `count`."""

    def __init__(self, base: Any, count: int) -> None:
        super().__init__()
        head = base.network.linear
        self.count, self.num_classes = count, head.out_features
        base.network.linear = nn.Linear(head.in_features, (1 + count) * head.out_features)
        with torch.no_grad():
            rows = [head.weight]
            noise = torch.Generator().manual_seed(0)
            for _ in range(count):
                shake = torch.randn(head.weight.shape, generator=noise) * 0.1 * head.weight.std()
                rows.append(head.weight + shake)
            base.network.linear.weight.copy_(torch.cat(rows))
            base.network.linear.bias.copy_(torch.cat([head.bias] + [head.bias - math.log(count)] * count))
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
        sharpen: what the robust expert's logits are multiplied by.
    """

    def __init__(self, experts: nn.Module, gate: float, sharpen: float) -> None:
        super().__init__()
        self.experts, self.gate, self.sharpen = experts, gate, sharpen

    def forward(self, x: Tensor) -> Tensor:
        accurate, robust = self.experts(x).chunk(2, dim=1)
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


@dataclass(frozen=True)
class Distilled(methods.Objective):
    """Soft targets from teachers in the place of labels, a share `taught` of them.

    Attributes:
        natural: an accurate network of C logits, the teacher of benign images; without it the average teaches them too.
        average: the average of the student's own weights, the teacher of adversarial images (and on recovered classes).
        taught: the teachers' share of the target; the label has the rest.
    """

    natural: nn.Module | None = None
    average: list[WeightAverage] = field(default_factory=list)
    taught: float = 0.5

    def loss(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        if not self.average:
            self.average.append(WeightAverage(model, 0.995))
        self.average[0].update(model)
        with torch.no_grad():
            own = self.average[0](torch.cat([x, adversarial])).float()
            taught = (recover(own, "logsumexp") if self.targets else own).softmax(1)
            calm, attacked = taught.chunk(2)
            if self.natural is not None:
                calm = self.natural(x).float().softmax(1)
            label = F.one_hot(y, calm.shape[1])
            calm, attacked = (self.taught * teacher + (1 - self.taught) * label for teacher in (calm, attacked))
        logits = model(torch.cat([x, adversarial])).float()
        if self.targets is None:
            values = losses.soft_cross_entropy(logits, torch.cat([calm, attacked])).view(2, -1).mean(1)
            return self.weight * values[0] + (1 - self.weight) * values[1]
        halves = [
            torch.cat([(1 - weight) * target, weight * target], dim=1)
            for weight, target in ((self.targets.benign, calm), (self.targets.adversarial, attacked))
        ]
        values = losses.soft_cross_entropy(logits, torch.cat(halves)).view(2, -1).mean(1)
        return self.targets.benign_share * values[0] + (1 - self.targets.benign_share) * values[1]
