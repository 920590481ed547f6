"""A second opinion: projected gradient ascent written apart from the attacks of this package, on the network as it is.

It shares no code with the engine, the objectives, the ensemble or the folded copy: a fault in any of these shows here
as an image that the whole suite left standing and a plain attack breaks.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

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
    """Attack samples by their difference of logits, once from each image itself and once from a random point.

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
    for start in (images, pulled_back(images + size * direction)):
        points = start.clone()
        for step in range(STEPS + 1):
            with torch.enable_grad():
                points = points.detach().requires_grad_()
                ahead = lead(points)
                gradient = torch.autograd.grad(ahead.sum(), points)[0].nan_to_num()
            points = points.detach()
            fooled = ~(ahead.detach() <= 0) & ~broken
            kept[fooled] = points[fooled]
            broken |= fooled
            if step == STEPS or bool(broken.all()):
                break
            length = 2 * eps * (1 - step / STEPS) / 4
            if norm == "linf":
                points = pulled_back(points + length * gradient.sign())
            else:
                unit = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None, None]
                points = pulled_back(points + length * unit)
        kept[~broken] = points[~broken]
    return kept
