"""A surrogate: a small network that learns a classifier's answers near some images, to be attacked in its stead."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat.attacks.pgd import attackable, pgd
from ducat.threat import ThreatModel

__all__ = ["distil"]

ROUNDS, EPOCHS, COPIES = 3, 15, 4
WIDTH, BATCH = 32, 128


def distil(
    model: nn.Module,
    x: Float[Tensor, "batch channels height width"],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    generator: torch.Generator,
    *,
    extra: Float[Tensor, "images channels height width"] | None = None,
) -> nn.Module:
    """Teach a small convolutional network what a classifier answers in the balls around some images.

    In the manner of Papernot et al. 2017 (arXiv 1602.02697): it learns from random points of each ball, then also from
    its own adversarial images as the classifier labels them, and so on.

    Args:
        model: maps images in [0, 1] to C logits.
        x: benign images.
        y: labels.
        threat: the ball.
        generator: source of the points, the weights and the order.
        extra: more images to learn from.

    Returns:
        A network from images to C logits, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
        student = _student(x.shape[1], _answers(model, x[:1]).shape[1]).to(x.device)
        images = torch.cat([x, *(threat.random_start(x) for _ in range(COPIES)), *([] if extra is None else [extra])])
        optimizer = torch.optim.Adam(student.parameters(), 2e-3)
        for _ in range(ROUNDS):
            targets = torch.cat([_answers(model, part) for part in images.split(500)])
            student.train().requires_grad_(True)
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(images), device=x.device).split(BATCH):
                    with torch.enable_grad():
                        loss = nn.functional.kl_div(
                            student(images[rows]).log_softmax(1), targets[rows], reduction="batchmean"
                        )
                        optimizer.zero_grad()
                        loss.backward()
                    optimizer.step()
            student.eval().requires_grad_(False)
            images = torch.cat([images, pgd(student, x, y, threat, keep="last")])
    return student


@torch.no_grad()
def _answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return a classifier's answers as probabilities, whatever the scale of its logits."""
    with attackable(model):
        logits = model(images)
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        return logits / logits.sum(1, keepdim=True)
    spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).clamp_min(1e-30)
    return (10 * logits / spread).softmax(1)


def _student(channels: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, width, stride in ((channels, WIDTH, 1), (WIDTH, 2 * WIDTH, 2), (2 * WIDTH, 2 * WIDTH, 2)):
        layers += [nn.Conv2d(inputs, width, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * WIDTH, outputs))
