"""A plain convolutional network for small grey images, cheap enough for adversarial training on a CPU."""

from __future__ import annotations

from torch import nn


def small_cnn(num_outputs: int, *, channels: int, width: int = 16, stem_stride: int = 1) -> nn.Sequential:
    """Four 3x3 convolutions with batch norm, widths w, w, 2w, 2w, the third with stride 2; average pool; linear."""
    plan = ((width, stem_stride), (width, 1), (2 * width, 2), (2 * width, 1))
    layers: list[nn.Module] = []
    for out_channels, stride in plan:
        layers += [
            nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
        channels = out_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_outputs))
