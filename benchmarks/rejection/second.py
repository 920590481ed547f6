"""A second attack on classifiers that may refuse, written apart from the product's, to see what that left standing.

It shares no search, objective or projection with `ducat.evaluation.rejection`; only the definition of the deployed
decision is the same. Where the product climbs a minimum with signed steps, this one descends a penalty with Adam, in
coordinates that cannot leave the box, and changes the penalty's weight as the constraint is broken or met; a random
search without gradients follows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ducat.evaluation.rejection import Signal

STEPS, RATE = 150, 0.1
QUERIES = 300


def second(
    model: nn.Module, signal: Signal, threshold: float, x: Tensor, y: Tensor, eps: float, seed: int = 0
) -> Tensor:
    """Return which images fell: some image within `eps` in L-inf, or the image itself, is accepted with a wrong class.

    Args:
        model: a `RecoveredClassifier`, of which the 2C outputs are attacked.
        signal: that decides on acceptance.
        threshold: in the units of the signal.
        x: benign images in [0, 1].
        y: their labels.
        eps: radius of the ball.
        seed: of the starts and of the random search.
    """
    network = model.model
    assert isinstance(network, nn.Module)
    generator = torch.Generator().manual_seed(seed)

    def outcome(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the C decisive logits, the acceptance of each class less the threshold, and the prediction."""
        logits = network(images)
        decision = signal.decision(logits)
        return decision, signal.acceptance(logits) - threshold, decision.argmax(1)

    def fell(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            _, spare, prediction = outcome(images)
        return (prediction != labels) & (spare.gather(1, prediction[:, None]).squeeze(1) >= 0)

    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    fallen = fell(x, y)
    with torch.no_grad():
        decision, _, _ = outcome(x)
    order = decision.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    for rank in range(min(decision.shape[1] - 1, 5)):
        rows = (~fallen).nonzero().squeeze(1)
        if not len(rows):
            return fallen
        images = _penalised(outcome, low[rows], high[rows], y[rows], order[rows, rank], fell, generator)
        fallen[rows] |= fell(images, y[rows])
    rows = (~fallen).nonzero().squeeze(1)
    if len(rows):
        images = _squares(outcome, low[rows], high[rows], y[rows], generator)
        fallen[rows] |= fell(images, y[rows])
    return fallen


def _penalised(
    outcome: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    low: Tensor,
    high: Tensor,
    y: Tensor,
    target: Tensor,
    fell: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Raise the target's acceptance, with a multiplier on the classes that are ahead of it."""
    free = torch.randn(low.shape, generator=generator).mul(0.5).requires_grad_()
    multiplier = torch.ones(len(y))
    optimizer = torch.optim.Adam([free], lr=RATE)
    best = (low + high) / 2
    done = torch.zeros(len(y), dtype=torch.bool)
    own = target[:, None]
    for _ in range(STEPS):
        images = low + (high - low) * (free.tanh() + 1) / 2
        decision, spare, prediction = outcome(images)
        gap = decision.scatter(1, own, -torch.inf).amax(1) - decision.gather(1, own).squeeze(1)
        hit = (prediction != y) & (spare.gather(1, prediction[:, None]).squeeze(1) >= 0)
        best[hit & ~done] = images.detach()[hit & ~done]
        done |= hit
        if done.all():
            break
        multiplier = torch.where(gap.detach() > -0.05, multiplier * 1.05, multiplier / 1.05).clamp(0.05, 20)
        loss = (multiplier * gap.clamp_min(-0.5) - spare.gather(1, own).squeeze(1)).sum()
        optimizer.zero_grad()
        loss.backward(inputs=[free])
        # Each image's step is its own: gradients of sure and of unsure images differ by orders of magnitude.
        assert free.grad is not None
        free.grad /= free.grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        optimizer.step()
    last = (low + (high - low) * (free.detach().tanh() + 1) / 2).clamp(0, 1)
    corners = torch.where(free.detach() > 0, high, low)
    for images in (last, corners):
        hit = fell(images, y) & ~done
        best[hit] = images[hit]
        done |= hit
    best[~done] = last[~done]
    return best


@torch.no_grad()
def _squares(
    outcome: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    low: Tensor,
    high: Tensor,
    y: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Set random rectangles to a side of the box, and keep what does not make the exact goal worse."""

    def goal(images: Tensor) -> Tensor:
        decision, spare, _ = outcome(images)
        top = decision.topk(2, dim=1)
        rival = torch.where(torch.arange(decision.shape[1]) == top.indices[:, :1], top.values[:, 1:], top.values[:, :1])
        return torch.minimum(decision - rival, spare).scatter(1, y[:, None], -torch.inf).amax(1)

    samples, channels, height, width = low.shape
    sides = torch.rand(samples, channels, 1, width, generator=generator) < 0.5
    now = torch.where(sides, low, high)
    value = goal(now)
    for query in range(QUERIES):
        share = 0.5 * (1 - query / QUERIES) + 0.02
        tall, wide = max(1, round(height * share**0.5)), max(1, round(width * share**0.5))
        top = int(torch.randint(height - tall + 1, (), generator=generator))
        left = int(torch.randint(width - wide + 1, (), generator=generator))
        ahead = now.clone()
        area = (..., slice(top, top + tall), slice(left, left + wide))
        sides = torch.rand(samples, channels, 1, 1, generator=generator) < 0.5
        ahead[area] = torch.where(sides, low[area], high[area])
        better = goal(ahead)
        keep = better >= value
        now[keep], value[keep] = ahead[keep], better[keep]
    return now
