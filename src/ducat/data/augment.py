"""Augmentation of whole batches, with parameters drawn apart from the pixels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Which random changes a training image goes through.

    Attributes:
        crop_padding: pixels of black added on each side before a random crop back to the image's size; 0 is no crop.
        flip: mirror left to right with probability 1/2.
    """

    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding={self.crop_padding} is negative: give pixels, 0 for no crop")

    def __call__(
        self,
        images: UInt8[Tensor, "batch channels height width"],
        generator: torch.Generator,
        start: int = 0,
        total: int | None = None,
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Augment a batch on the device it is on.

        Args:
            images: the batch, or one process's rows of it.
            generator: a CPU generator. The draws are made on the CPU and for the global batch, so that neither the
                device nor the number of processes changes them.
            start: which row of the global batch `images` begins at.
            total: how many rows the global batch has; None is as many as `images`.
        """
        total = len(images) if total is None else total
        mine = slice(start, start + len(images))
        if self.crop_padding:
            offsets = torch.randint(2 * self.crop_padding + 1, (total, 2), generator=generator)
            images = crop(images, offsets[mine].to(images.device), self.crop_padding)
        if self.flip:
            images = flip(images, torch.randint(2, (total,), generator=generator)[mine].bool().to(images.device))
        return images


def crop(
    images: UInt8[Tensor, "batch channels height width"], offsets: Int64[Tensor, "batch 2"], padding: int
) -> UInt8[Tensor, "batch channels height width"]:
    """Pad with black and cut each image's window out again; `offsets` are (down, right) in [0, 2 * padding]."""
    height, width = images.shape[2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.arange(len(images), device=images.device)
    return windows[rows, :, offsets[:, 0], offsets[:, 1]]


def flip(
    images: UInt8[Tensor, "batch channels height width"], flipped: Bool[Tensor, "batch"]
) -> UInt8[Tensor, "batch channels height width"]:
    """Mirror the images marked in `flipped` left to right."""
    return torch.where(flipped[:, None, None, None], images.flip(3), images)
