"""A second opinion: projected gradient ascent written apart from the attacks of this package, on the network as it is.

It shares no code with the engine, the objectives, the ensemble or the folded copy: a fault in any of these shows here
as an image that the whole suite left standing and a plain attack breaks.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLES = 50
STEPS = 40


def plain_pgd(
    network: nn.Module,
    images: Float[Tensor, "samples channels height width"],
    labels: Int[Tensor, " samples"],
    norm: str,
    eps: float,
    recovery: str | None,
    seed: int,
) -> Float[Tensor, "samples channels height width"]:
    """Attack samples by their difference of logits: from each image itself and a random point, smoothed, and in 8 bits.

    Attacks make an image rough, and a network may tell rough images from smooth ones. So the third and the fourth time
    begin at the blurred image and nearest to the image's mean, and go in small steps. Stored images have 8 bits a
    pixel, and a network may tell them from others. So the last time every point is rounded to the steps of 1/255 before
    the network sees it, towards the benign image, which leaves it in every ball.

    Args:
        network: images in [0, 1] to outputs, (samples, C) or (samples, 2C), as the caller gave it.
        images: benign images.
        labels: in [0, C).
        norm: "linf", "l2" or "l1".
        eps: radius of the ball.
        recovery: "max" or "logsumexp" of each real class and its dummy class; None without dummy classes.
        seed: of the random point.

    Returns:
        For each sample the first image that is classified wrongly, or else the last one; all in the ball.
    """
    noise = torch.Generator().manual_seed(seed)
    rows, kept = torch.arange(len(images)), images.clone()
    broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def pulled_back(points: Tensor) -> Tensor:
        change = (points.clamp(0, 1) - images).double()
        if norm == "linf":
            change = change.clamp(-eps, eps)
        else:
            length = change.flatten(1).norm(p=2 if norm == "l2" else 1, dim=1)
            change = change * (eps / length.clamp(min=1e-30)).clamp(max=1)[:, None, None, None]
        return (images.double() + change).clamp(0, 1).to(images.dtype)

    def stored(points: Tensor) -> Tensor:
        scaled = points * 255
        rounded = torch.where(points > images, (scaled + 1e-3).floor(), (scaled - 1e-3).ceil()) / 255
        # Where no step of 1/255 lies between, the pixel stays benign.
        beyond = (rounded - images).abs() > (points - images).abs() + 1e-5
        return torch.where(beyond | ((rounded - images) * (points - images) < 0), images, rounded)

    def lead(points: Tensor) -> Tensor:
        outputs = network(points)
        if recovery is not None:
            real, dummy = outputs[:, : outputs.shape[1] // 2], outputs[:, outputs.shape[1] // 2 :]
            pair = torch.stack([real, dummy])
            outputs = pair.amax(0) if recovery == "max" else pair.logsumexp(0)
        own = outputs[rows, labels]
        others = outputs.clone()
        others[rows, labels] = -float("inf")
        return others.max(1).values - own

    direction = torch.rand(images.shape, generator=noise).to(images) * 2 - 1
    size = eps if norm == "linf" else eps / direction.flatten(1).norm(p=2 if norm == "l2" else 1, dim=1).max()
    far = pulled_back(images + size * direction)
    blurred = pulled_back(F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1))
    flat = pulled_back(images.mean((1, 2, 3), keepdim=True).expand_as(images))
    for start, seen, longest in (
        (images, torch.clone, eps / 2),
        (far, torch.clone, eps / 2),
        (blurred, torch.clone, eps / 8),
        (flat, torch.clone, eps / 8),
        (images, stored, eps / 2),
    ):
        points = start.clone()
        for step in range(STEPS + 1):
            with torch.enable_grad():
                shown = seen(points.detach()).requires_grad_()
                ahead = lead(shown)
                gradient = torch.autograd.grad(ahead.sum(), shown)[0].nan_to_num()
            shown = shown.detach()
            fooled = ~(ahead.detach() <= 0) & ~broken
            kept[fooled] = shown[fooled]
            broken |= fooled
            if step == STEPS or bool(broken.all()):
                break
            length = longest * (1 - step / STEPS)
            if norm == "linf":
                points = pulled_back(points + length * gradient.sign())
            else:
                # In l1 the steps are long, which the small ones may not be.
                order = 1 if norm == "l1" and longest < eps / 2 else 2
                unit = gradient / gradient.flatten(1).norm(p=order, dim=1).clamp(min=1e-30)[:, None, None, None]
                points = pulled_back(points + length * unit)
        kept[~broken] = shown[~broken]
    return kept
