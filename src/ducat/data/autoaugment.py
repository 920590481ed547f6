"""AutoAugment's CIFAR-10 policy on whole batches, bit for bit as Pillow does each operation on one image.

Source: E. Cubuk et al. (2019), arXiv 1805.09501: the 25 sub-policies for CIFAR-10 and the ranges of the operations, of
which levels 0 to 9 are even steps. As in the Pillow version that most later work uses, an enhancing operation goes
either way with probability 1/2 too, like a geometric one, and what comes in from outside the image is grey.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

OUTSIDE = 128
"""The grey of what geometric operations bring in from outside the image."""

ImageBatch = UInt8[Tensor, "batch channels height width"]
Magnitudes = Float64[Tensor, "batch"]


def _affine(images: ImageBatch, matrices: Float64[Tensor, "batch 6"]) -> ImageBatch:
    # The pixel at (x, y) comes from (ax + by + c, dx + ey + f), all taken at the pixels' centres. Pillow counts in
    # 65536ths of a pixel; so no device rounds differently.
    a, b, c, d, e, f = matrices.unbind(1)
    exact = torch.stack([a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2])
    a, b, c, d, e, f = (exact * 65536 + 0.5).floor().long().to(images.device)[:, :, None, None]
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).flatten(1)[:, None]
    moved = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)
    return moved.masked_fill(~inside[:, None], OUTSIDE)


def _matrices(count: int, **entries: Tensor) -> Float64[Tensor, "batch 6"]:
    matrices = torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(count, 1)
    for name, values in entries.items():
        matrices[:, "abcdef".index(name)] = values
    return matrices


def shear_x(images: ImageBatch, slopes: Magnitudes) -> ImageBatch:
    """Shift each row by its height in the image times the slope."""
    return _affine(images, _matrices(len(images), b=slopes))


def shear_y(images: ImageBatch, slopes: Magnitudes) -> ImageBatch:
    """Shift each column by its place in the image times the slope."""
    return _affine(images, _matrices(len(images), d=slopes))


def translate_x(images: ImageBatch, shares: Magnitudes) -> ImageBatch:
    """Move left by a share of the width, in whole pixels."""
    return _affine(images, _matrices(len(images), c=(shares * images.shape[3]).round()))


def translate_y(images: ImageBatch, shares: Magnitudes) -> ImageBatch:
    """Move up by a share of the height, in whole pixels."""
    return _affine(images, _matrices(len(images), f=(shares * images.shape[2]).round()))


def rotate(images: ImageBatch, degrees: Magnitudes) -> ImageBatch:
    """Turn counter-clockwise about the centre."""
    height, width = images.shape[2:]
    sine, cosine = (-degrees * math.pi / 180).sin(), (-degrees * math.pi / 180).cos()
    c = width / 2 - cosine * width / 2 - sine * height / 2
    f = height / 2 + sine * width / 2 - cosine * height / 2
    return _affine(images, _matrices(len(images), a=cosine, b=sine, c=c, d=-sine, e=cosine, f=f))


def _blend(base: Tensor, images: ImageBatch, factors: Magnitudes) -> ImageBatch:
    # 0 gives the base, 1 the images, more goes beyond them.
    base, weights = base.float(), factors.float().to(images.device)[:, None, None, None]
    return (base + weights * (images - base)).clamp(0, 255).to(torch.uint8)


def _grey(images: ImageBatch) -> Int64[Tensor, "batch 1 height width"]:
    if images.shape[1] == 1:
        return images.long()
    weights = torch.tensor([19595, 38470, 7471], device=images.device)[:, None, None]
    return ((images * weights).sum(1, keepdim=True) + 32768) >> 16


def brightness(images: ImageBatch, changes: Magnitudes) -> ImageBatch:
    """Scale all values by 1 + change."""
    return _blend(torch.zeros_like(images), images, 1 + changes)


def color(images: ImageBatch, changes: Magnitudes) -> ImageBatch:
    """Scale the distance from grey by 1 + change."""
    return _blend(_grey(images), images, 1 + changes)


def contrast(images: ImageBatch, changes: Magnitudes) -> ImageBatch:
    """Scale the distance from the image's mean grey by 1 + change."""
    pixels = images.shape[2] * images.shape[3]
    mean = (2 * _grey(images).sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)
    return _blend(mean, images, 1 + changes)


def sharpness(images: ImageBatch, changes: Magnitudes) -> ImageBatch:
    """Scale the distance from a smoothed image by 1 + change; the image's rim stays as it is."""
    height, width = images.shape[2:]
    smooth = images.long()
    if height > 2 and width > 2:
        shifts = [(down, right) for down in range(3) for right in range(3)]
        around = torch.stack(
            [smooth[:, :, down : height - 2 + down, right : width - 2 + right] for down, right in shifts]
        )
        # The mean of the nine, in which the middle one counts five times.
        smooth[:, :, 1:-1, 1:-1] = (around.sum(0) + 4 * around[4] + 6) // 13
    return _blend(smooth, images, 1 + changes)


def posterize(images: ImageBatch, bits: Magnitudes) -> ImageBatch:
    """Keep the highest bits of each value."""
    dropped = 2 ** (8 - bits.round().long()) - 1
    return images & (255 - dropped).to(images)[:, None, None, None]


def solarize(images: ImageBatch, thresholds: Magnitudes) -> ImageBatch:
    """Invert the values at or above a threshold in [0, 256]."""
    return torch.where(images < thresholds.to(images.device)[:, None, None, None], images, 255 - images)


def invert(images: ImageBatch, _: Magnitudes) -> ImageBatch:
    """Invert all values."""
    return 255 - images


def autocontrast(images: ImageBatch, _: Magnitudes) -> ImageBatch:
    """Stretch each channel's values to [0, 255]."""
    low, high = (extreme((2, 3), keepdim=True).double() for extreme in (images.amin, images.amax))
    # A tensor, because a number divided by a tensor is rounded twice.
    scale = torch.tensor(255, dtype=torch.float64) / (high - low).clamp(min=1)
    stretched = (images * scale + -low * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def equalize(images: ImageBatch, _: Magnitudes) -> ImageBatch:
    """Spread each channel's values so that all are about as frequent."""
    pixels = images.flatten(0, 1).flatten(1).long()
    rows = torch.arange(len(pixels), device=images.device)[:, None]
    histogram = (256 * rows + pixels).flatten().bincount(minlength=256 * len(pixels)).view(-1, 256)
    last = histogram.gather(1, pixels.amax(1, keepdim=True))
    step = (pixels.shape[1] - last) // 255
    below = histogram.cumsum(1) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(1, pixels), pixels).to(torch.uint8).view_as(images)


class Operation(NamedTuple):
    """An operation and its range: level 0 is `low`, level 9 is `high`; `signed` ones go either way."""

    apply: Callable[[ImageBatch, Magnitudes], ImageBatch]
    low: float = 0
    high: float = 0
    signed: bool = False


OPERATIONS = {
    "shear-x": Operation(shear_x, 0, 0.3, signed=True),
    "shear-y": Operation(shear_y, 0, 0.3, signed=True),
    "translate-x": Operation(translate_x, 0, 150 / 331, signed=True),
    "translate-y": Operation(translate_y, 0, 150 / 331, signed=True),
    "rotate": Operation(rotate, 0, 30, signed=True),
    "brightness": Operation(brightness, 0, 0.9, signed=True),
    "color": Operation(color, 0, 0.9, signed=True),
    "contrast": Operation(contrast, 0, 0.9, signed=True),
    "sharpness": Operation(sharpness, 0, 0.9, signed=True),
    "posterize": Operation(posterize, 8, 4),
    "solarize": Operation(solarize, 256, 0),
    "invert": Operation(invert),
    "autocontrast": Operation(autocontrast),
    "equalize": Operation(equalize),
}

# Two operations a sub-policy, each with its probability and its level; a level that has no effect is 0.
POLICY = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate-x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear-y", 0.5, 8), ("translate-y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear-y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate-x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate-y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate-y", 0.9, 9), ("translate-y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate-y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


def draw(count: int, generator: torch.Generator) -> tuple[Int64[Tensor, "batch 2"], Float64[Tensor, "batch 2"]]:
    """Draw a sub-policy for each image.

    Returns:
        For each image its two operations, as positions in `OPERATIONS` or -1 for none, and their magnitudes.
    """
    names = list(OPERATIONS)
    ranges = {name: torch.linspace(row.low, row.high, 10, dtype=torch.float64) for name, row in OPERATIONS.items()}
    numbers = torch.tensor([[names.index(name) for name, _, _ in pair] for pair in POLICY])
    magnitudes = torch.tensor(
        [[float(ranges[name][level]) for name, _, level in pair] for pair in POLICY], dtype=torch.float64
    )
    probabilities = torch.tensor([[probability for _, probability, _ in pair] for pair in POLICY])
    signed = torch.tensor([[OPERATIONS[name].signed for name, _, _ in pair] for pair in POLICY])

    drawn = torch.randint(len(POLICY), (count,), generator=generator)
    applied = torch.rand(count, 2, generator=generator) < probabilities[drawn]
    negative = torch.randint(2, (count, 2), generator=generator).bool() & signed[drawn]
    return numbers[drawn].masked_fill(~applied, -1), torch.where(negative, -magnitudes[drawn], magnitudes[drawn])


def apply(
    images: ImageBatch, operations: Int64[Tensor, "batch 2"], magnitudes: Float64[Tensor, "batch 2"]
) -> ImageBatch:
    """Do to each image its own two operations, which are on the CPU as `draw` gives them, in turn."""
    images = images.clone()
    for turn in range(2):
        for number, operation in enumerate(OPERATIONS.values()):
            rows = (operations[:, turn] == number).nonzero().squeeze(1)
            if len(rows):
                there = rows.to(images.device)
                images.index_copy_(0, there, operation.apply(images[there], magnitudes[rows, turn]))
    return images
