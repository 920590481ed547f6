"""A search that sees decisions alone: no gradients, no scores."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat.attacks.pgd import attackable
from ducat.threat import ThreatModel

__all__ = ["decisions"]

HALVINGS = 8


@torch.no_grad()
def decisions(
    model: nn.Module,
    x: Float[Tensor, "batch channels height width"],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    generator: torch.Generator | None = None,
    *,
    queries: int = 2000,
) -> Float[Tensor, "batch channels height width"]:
    """Search for the sign pattern along which the decision changes soonest (RayS, Chen & Gu 2020, arXiv 2006.12792).

    A pattern of signs is refined block by block, from all pixels at once to single ones. A change is kept where the
    image is misclassified at a smaller distance along it.

    Args:
        model: maps images in [0, 1] to logits, of which only the largest is used.
        x: benign images.
        y: labels, shape (B,).
        threat: the ball.
        generator: source of the blocks' signs at first; PyTorch's global one by default.
        queries: passes through the model for each image.

    Returns:
        Images in the ball, of x's shape: the point of the ball along the best pattern.
    """
    pixels = x[0].numel() if len(x) else 0
    size = len(x)
    if not size:
        return x.clone()
    device = generator.device if generator is not None else x.device
    unit = {"linf": 1.0, "l2": pixels**-0.5, "l1": 1.0 / pixels}[threat.norm]
    signs = torch.where(torch.rand(x.shape, generator=generator, device=device) < 0.5, -1.0, 1.0).to(x)

    def at(patterns: Tensor, distance: Tensor) -> Tensor:
        return (x + distance.view(-1, 1, 1, 1) * unit * patterns).clamp(0, 1)

    with attackable(model):

        def wrong(patterns: Tensor, distance: Tensor) -> Tensor:
            return model(at(patterns, distance)).argmax(1) != y

        furthest = torch.full((size,), 1.0 / unit, device=x.device)
        reach = torch.where(wrong(signs, furthest), furthest, torch.inf)
        asked, blocks, block = 1, 1, 0
        while asked < queries and bool((reach > threat.eps).any()):
            length = -(-pixels // blocks)
            low, high = block * length, min((block + 1) * length, pixels)
            trial = signs.flatten(1).clone()
            trial[:, low:high] *= -1
            trial = trial.view_as(x)
            limit = reach.clamp_max(1.0 / unit)
            better = wrong(trial, limit)
            asked += 1
            if bool(better.any()):
                near, distance = torch.zeros_like(limit), limit.clone()
                for _ in range(HALVINGS):
                    middle = (near + distance) / 2
                    hit = wrong(trial, middle)
                    distance = torch.where(hit, middle, distance)
                    near = torch.where(hit, near, middle)
                asked += HALVINGS
                better &= (distance < reach) | reach.isinf()
                signs = torch.where(better.view(-1, 1, 1, 1), trial, signs)
                reach = torch.where(better, distance, reach)
            block += 1
            if block * length >= pixels:
                blocks, block = (min(2 * blocks, pixels) if blocks < pixels else 1), 0
        nearest = torch.where(reach <= threat.eps, reach, threat.eps)
        return threat.project(at(signs, nearest), x)
