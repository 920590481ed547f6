"""Networks that the question needs and the library does not offer: one shared abstain class, and a small ball."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ducat.attacks.pgd import attackable
from ducat.dummy import recover
from ducat.evaluation.rejection import SIGNALS, Signal, lead, log_odds
from ducat.threat import ThreatModel

STEPS = 60  # of the small ball's own attack


class SharedAbstain(nn.Module):
    """C real classes and one abstain class, as 2C logits: its probability is spread over the dummy classes like theirs.

    The dummy logit of each class is its real logit plus one number g(x) for all. So the dummy classes together have the
    abstain class's probability, sigmoid(g), and whatever reads real classes against everything else reads C + 1.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        name, head = [pair for pair in base.named_modules() if isinstance(pair[1], nn.Linear)][-1]
        assert isinstance(head, nn.Linear)
        wide = nn.Linear(head.in_features, head.out_features + 1)
        with torch.no_grad():
            wide.weight.copy_(torch.cat([head.weight, torch.zeros_like(head.weight[:1])]))
            wide.bias.copy_(torch.cat([head.bias, torch.zeros_like(head.bias[:1])]))
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, wide)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        logits = self.base(x)
        real, abstain = logits[:, :-1], logits[:, -1:]
        return torch.cat([real, real + abstain - real.logsumexp(1, keepdim=True)], dim=1)


class SmallBall(nn.Module):
    """A classifier with the worst of its neighbourhood beside it (CPR, Chen et al. 2023, arXiv 2305.01139).

    From each image a few steps look, in a small L-inf ball and always in the same way, for where its own prediction is
    weakest. The 2C logits there follow those of the image itself. The gradient takes the way there as given.

    Args:
        network: images to 2C logits.
        radius: of the small ball, on images in [0, 1].
        steps: of half that length each.
    """

    def __init__(self, network: nn.Module, radius: float, steps: int = 2) -> None:
        super().__init__()
        self.network, self.radius, self.steps = network, radius, steps

    def forward(self, x: Tensor) -> Tensor:
        logits, shift = self.network(x), self._shift(x.detach())
        return torch.cat([logits, self.network((x + shift).clamp(0, 1))], dim=1)

    def _shift(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        """Return the way to where class `of`, by default the prediction, is weakest."""
        shift = torch.zeros_like(x)
        with torch.enable_grad():
            for _ in range(self.steps):
                moved = (x + shift).requires_grad_()
                decision = recover(self.network(moved))
                of = decision.argmax(1) if of is None else of
                value = lead(decision).gather(1, of[:, None]).sum()
                (gradient,) = torch.autograd.grad(value, moved)
                shift = (shift - self.radius / 2 * gradient.sign()).clamp(-self.radius, self.radius)
                shift = (x + shift).clamp(0, 1) - x
        return shift

    def attack(
        self, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator, targets: int = 9
    ) -> list[Tensor]:
        """Return for each of the nearest wrong classes the images where it is surest at *its own* worst nearby.

        The product's attack alone is misled by this network: what it climbs jumps down where the prediction changes,
        since before it the neighbourhood is searched against the label, and behind it against the wrong class. So it
        stays before the jump, and finds next to nothing. Images from here go into `found` of `rejection.measure`.
        """
        with attackable(self.network), torch.no_grad():
            order = recover(self.network(x)).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
            found = []
            for target in order[:, : min(targets, order.shape[1] - 1)].T:
                images = threat.random_start(x, generator)
                best, highest = images.clone(), torch.full((len(x),), -torch.inf)
                for step in range(STEPS + 1):
                    shift = self._shift(images, target)
                    with torch.enable_grad():
                        leaf = images.clone().requires_grad_()
                        sure = log_odds(recover(self.network((leaf + shift).clamp(0, 1))))
                        sure = sure.gather(1, target[:, None]).squeeze(1)
                        (gradient,) = torch.autograd.grad(sure.sum(), leaf)
                    higher = sure > highest
                    best[higher], highest[higher] = images[higher], sure.detach()[higher]
                    length = threat.eps * (0.25 * (1 - step / STEPS) + 0.01)
                    images = threat.project(images + length * gradient.sign(), x)
                found.append(best)
        return found


def _nearby(logits: Tensor) -> Tensor:
    return SIGNALS["confidence"].acceptance(logits.chunk(2, dim=1)[1])


def _here(logits: Tensor) -> Tensor:
    return recover(logits.chunk(2, dim=1)[0])


SMALL_BALL: Mapping[str, Signal] = {
    "small ball": Signal("confidence of the prediction at the worst image nearby", _nearby, False, _here)
}
