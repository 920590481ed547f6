"""Training objectives whose attacker knows that images may be refused; the library does not offer them.

Each is made of the objective that the config gives, and has its `attack` and `loss`.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ducat import losses, methods
from ducat.attacks.adaptive import SilentDummies
from ducat.attacks.objectives import Goal
from ducat.attacks.pgd import attackable
from ducat.evaluation.rejection import SIGNALS, nearness
from ducat.threat import ThreatModel

SHARE = 0.05  # of a batch's benign images: what the training's attacker takes to be refused
RHO = 10  # Stutz et al. 2020, section 3: how fast confidence falls with distance


def refusing(kind: type[methods.Objective], **values: Any) -> Callable[[methods.Objective, float], methods.Objective]:
    """Return what makes an objective of `kind` of the config's."""

    def change(plain: methods.Objective, done: float) -> methods.Objective:
        return kind(**{item.name: getattr(plain, item.name) for item in dataclasses.fields(plain)}, **values)

    return change


@dataclass(frozen=True)
class Accepted(methods.Objective):
    """The inner attack seeks *wrong and accepted*, at the threshold that refuses `SHARE` of the batch's benign images.

    Attributes:
        signal: that the attacker has to get past.
    """

    signal: str = "confidence"

    def attack(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator | None = None
    ) -> Tensor:
        network, signal = SilentDummies(model) if self.targets is None else model, SIGNALS[self.signal]
        with attackable(network), torch.no_grad():
            logits = network(x)
            own = signal.acceptance(logits).gather(1, y[:, None]).squeeze(1)
            right = own[signal.decision(logits).argmax(1) == y]
        threshold = float(right.quantile(SHARE)) if len(right) else -math.inf

        def value(logits: Tensor, labels: Tensor, reference: object) -> Tensor:
            near = nearness(logits, signal, threshold, smooth=True)
            return near.scatter(1, labels[:, None], -torch.inf).logsumexp(1)

        goal = Goal(value, knows_recovery=True)
        return self.inner.run(network, x, y, threat, goal, self.inner.start(x, threat, generator))


@dataclass(frozen=True)
class Lowered(Accepted):
    """Confidence is lowered on the adversarial half: its target is partly uniform, over all outputs.

    Attributes:
        uniform: the uniform distribution's share of the target. None is the rule of CCAT (Stutz et al. 2020, arXiv
            1910.06259): the perturbation is shortened to a random part s of it, and the label's share is (1 - s)^rho.
    """

    uniform: float | None = None

    def loss(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        if self.uniform is None:
            # Half of the images keep the whole perturbation.
            part = (2 * torch.rand(len(x), device=x.device)).clamp_max(1)
            adversarial = x + part.view(-1, 1, 1, 1) * (adversarial - x)
            uniform = 1 - (1 - part) ** RHO
        else:
            uniform = torch.full((len(x),), self.uniform, device=x.device)
        clean_logits, logits = model(torch.cat([x, adversarial])).float().chunk(2)
        if self.targets is None:
            benign, target = losses.cross_entropy(clean_logits, y), F.one_hot(y, logits.shape[1]).float()
            share = self.weight
        else:
            benign = self.two_hot_loss(clean_logits.repeat(2, 1), y, self.targets)[: len(x)]
            target, share = self._two_hot(y, logits, self.targets.adversarial_weight), self.targets.benign_share
        target = torch.lerp(target, torch.full_like(target, 1 / target.shape[1]), uniform[:, None])
        return share * benign.mean() + (1 - share) * losses.soft_cross_entropy(logits, target).mean()


@dataclass(frozen=True)
class Abstaining(methods.Objective):
    """Adversarial images may be the label's or any abstain class's (Baharlouei et al. 2022, arXiv 2210.14410).

    -log p_y on benign images and -log(p_y + sum of all dummy classes) on adversarial ones, which the inner attack
    raises. On a `SharedAbstain` network the dummy classes are one class.

    Attributes:
        even: weight of the regulariser that keeps all dummy classes in use: minus the entropy of their mean share.
    """

    even: float = 0.0

    def attack(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator | None = None
    ) -> Tensor:
        goal = Goal(lambda logits, labels, reference: _abstained(logits, labels), knows_recovery=True)
        return self.inner.run(model, x, y, threat, goal, self.inner.start(x, threat, generator))

    def loss(self, model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor) -> Tensor:
        clean_logits, logits = model(torch.cat([x, adversarial])).float().chunk(2)
        shares = logits.chunk(2, dim=1)[1].softmax(1).mean(0)
        uneven = (shares * shares.clamp_min(1e-12).log()).sum()
        return (losses.cross_entropy(clean_logits, y).mean() + _abstained(logits, y).mean()) / 2 + self.even * uneven


def _abstained(logits: Tensor, y: Tensor) -> Tensor:
    classes = logits.shape[1] // 2
    allowed = torch.cat([logits.gather(1, y[:, None]), logits[:, classes:]], dim=1)
    return logits.logsumexp(1) - allowed.logsumexp(1)
