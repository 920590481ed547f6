"""Residual networks for small images: a 3x3 stem without pooling.

Post-activation blocks are He et al. 2016a (arXiv 1512.03385), pre-activation blocks He et al. 2016b (arXiv 1603.05027).
Layers carry the names that research code gives them (`conv1`, `layer1.0.bn2`, `shortcut.0`, `linear`), so that its
checkpoints load as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut is projected where the shape changes."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _projection(in_channels, channels, stride)

    def forward(self, x: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out height2 width2"]:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the last has four times as many channels as the others."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _projection(in_channels, out_channels, stride)

    def forward(self, x: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out height2 width2"]:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return F.relu(residual + self.shortcut(x))


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions; a projected shortcut starts after the first ReLU."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            if stride != 1 or in_channels != channels
            else None
        )

    def forward(self, x: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out height2 width2"]:
        activated = F.relu(self.bn1(x))
        residual = self.conv1(activated)
        residual = self.conv2(F.relu(self.bn2(residual)))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def resnet(
    block: type[BasicBlock] | type[Bottleneck],
    num_outputs: int,
    *,
    channels: int,
    depths: Sequence[int],
    width: int,
    stem_stride: int = 1,
) -> nn.Sequential:
    """A ResNet with `depths[i]` blocks in stage i, each after the first halving the image and doubling `width`."""
    stages, out_channels = _stages(block, width, depths, width)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, width, 3, stem_stride, padding=1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
            **stages,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(out_channels, num_outputs),
        )
    )


def preact_resnet(
    num_outputs: int,
    *,
    channels: int,
    depths: Sequence[int],
    width: int,
    stem_width: int | None = None,
    stem_stride: int = 1,
) -> nn.Sequential:
    """A pre-activation ResNet: `resnet` with `PreActBlock`, a bare stem convolution, a last batch norm and ReLU.

    `stem_width` is the channels of the stem, `width` if None.
    """
    stem_width = width if stem_width is None else stem_width
    stages, out_channels = _stages(PreActBlock, stem_width, depths, width)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, stem_width, 3, stem_stride, padding=1, bias=False),
            **stages,
            bn=nn.BatchNorm2d(out_channels),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(out_channels, num_outputs),
        )
    )


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The shortcut of a post-activation block; empty, hence the identity, where the shape stays."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _stages(
    block: type[BasicBlock] | type[Bottleneck] | type[PreActBlock],
    in_channels: int,
    depths: Sequence[int],
    width: int,
) -> tuple[dict[str, nn.Module], int]:
    """The stages by name, and the channels after the last."""
    stages: dict[str, nn.Module] = {}
    for stage, depth in enumerate(depths):
        blocks = nn.Sequential()
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(block(in_channels, width * 2**stage, stride))
            in_channels = block.expansion * width * 2**stage
        stages[f"layer{stage + 1}"] = blocks
    return stages, in_channels
