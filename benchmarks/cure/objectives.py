"""Objectives that the search tries and the library does not offer: soft targets from teachers, weights that change."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ducat import losses, methods
from ducat.config import Config
from ducat.dummy import dummy_head, recover
from ducat.training.averaging import WeightAverage

Change = Callable[[methods.Objective, float], methods.Objective]
"""Makes a row's objective of the config's, given the share of the epochs that are over."""


def changed(config: Config, change: Change) -> Callable[[int], methods.Objective]:
    """Return what each epoch minimises: the config's objective, changed."""
    return lambda epoch: change(config.objective(epoch), epoch / max(1, config.train.epochs - 1))


def inner(**values: Any) -> Change:
    """Change the row of the method: what its attack maximises, and where it starts."""
    return lambda plain, done: replace(plain, method=replace(plain.method, **values))


def scheduled(ends: Mapping[str, tuple[float, float]]) -> Change:
    """Let weights of the two-hot targets (attributes of `TwoHot`) go linearly from one value to another."""

    def change(plain: methods.Objective, done: float) -> methods.Objective:
        assert plain.targets is not None
        weights = {name: first + done * (last - first) for name, (first, last) in ends.items()}
        return replace(plain, targets=replace(plain.targets, **weights))

    return change


def detached(plain: methods.Objective, done: float) -> methods.Objective:
    """Keep the within-pair term's gradient out of the trunk, see `DetachedPair`."""
    return DetachedPair(**_values(plain))


def taught(natural: nn.Module | None) -> Change:
    """Take targets from teachers, see `Distilled`."""
    average: list[WeightAverage] = []

    def change(plain: methods.Objective, done: float) -> methods.Objective:
        return Distilled(**_values(plain), natural=natural, average=average)

    return change


def _values(plain: methods.Objective) -> dict[str, Any]:
    return {item.name: getattr(plain, item.name) for item in dataclasses.fields(plain)}


class DetachedPair(methods.Objective):
    """The two-hot loss of which the within-pair term trains the last layer alone: a detector on given features."""

    def loss(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        head, seen = dummy_head(model), []
        assert head is not None
        assert self.targets is not None
        handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            logits = model(torch.cat([x, adversarial])).float()
        finally:
            handle.remove()
        apart = F.linear(seen[0].detach().float(), head.weight, head.bias)
        weights, without = self.targets, replace(self.targets, pair_weight=0)
        pair = self.two_hot_loss(apart, y, weights) - self.two_hot_loss(apart, y, without)
        benign, attacked = (self.two_hot_loss(logits, y, without) + pair).view(2, -1).mean(1)
        return weights.benign_share * benign + (1 - weights.benign_share) * attacked


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
            for weight, target in ((self.targets.benign_weight, calm), (self.targets.adversarial_weight, attacked))
        ]
        values = losses.soft_cross_entropy(logits, torch.cat(halves)).view(2, -1).mean(1)
        return self.targets.benign_share * values[0] + (1 - self.targets.benign_share) * values[1]
