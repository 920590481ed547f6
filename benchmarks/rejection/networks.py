"""Networks that the question needs and the library does not offer: one shared abstain class, and a small ball."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ducat.dummy import recover
from ducat.evaluation.rejection import SIGNALS, Signal, lead


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

    def _shift(self, x: Tensor) -> Tensor:
        shift = torch.zeros_like(x)
        with torch.enable_grad():
            prediction: Tensor | None = None
            for _ in range(self.steps):
                moved = (x + shift).requires_grad_()
                decision = recover(self.network(moved))
                prediction = decision.argmax(1) if prediction is None else prediction
                value = lead(decision).gather(1, prediction[:, None]).sum()
                (gradient,) = torch.autograd.grad(value, moved)
                shift = (shift - self.radius / 2 * gradient.sign()).clamp(-self.radius, self.radius)
                shift = (x + shift).clamp(0, 1) - x
        return shift


def _nearby(logits: Tensor) -> Tensor:
    return SIGNALS["confidence"].acceptance(logits.chunk(2, dim=1)[1])


def _here(logits: Tensor) -> Tensor:
    return recover(logits.chunk(2, dim=1)[0])


SMALL_BALL: Mapping[str, Signal] = {
    "small ball": Signal("confidence of the prediction at the worst image nearby", _nearby, False, _here)
}
