"""A network's description, which travels with its weights so that a checkpoint can be loaded by itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ducat.dummy import add_dummy_classes
from ducat.models import build


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build a network again.

    Attributes:
        name: a row of `models.MODELS`.
        num_classes: C, the number of real classes.
        dummy_classes: whether the head has 2C outputs.
        channels: of the images.
        mean: per channel, of images in [0, 1], for the normalisation layer.
        std: per channel, likewise.
        width: channels of the first stage; None for the network's own.
        stem_stride: stride of the first convolution; 2 for 64 x 64 images.
    """

    name: str
    num_classes: int
    dummy_classes: bool
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    width: int | None = None
    stem_stride: int = 1

    def build(self) -> nn.Module:
        """Return the network with new random weights, from PyTorch's global generator; dummy rows are random too."""
        model = build(
            self.name,
            self.num_classes,
            channels=self.channels,
            mean=self.mean,
            std=self.std,
            width=self.width,
            stem_stride=self.stem_stride,
        )
        images = torch.zeros(1, self.channels, 8, 8)
        return add_dummy_classes(model, init="random", images=images) if self.dummy_classes else model
