"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146), without dropout."""

from __future__ import annotations

from torch import nn

from ducat.models.resnet import preact_resnet


def wide_resnet(num_outputs: int, *, channels: int, depth: int, width: int, stem_stride: int = 1) -> nn.Sequential:
    """WRN-`depth`: three pre-activation stages of (depth - 4) / 6 blocks, of which the first has `width` channels.

    The stem keeps 16 channels at any width, so WRN-28-10 is `depth=28, width=160`.
    """
    blocks, remainder = divmod(depth - 4, 6)
    if remainder or blocks < 1:
        raise ValueError(f"depth={depth} is not possible: a wide residual network has 6n + 4 layers")
    return preact_resnet(
        num_outputs, channels=channels, depths=(blocks,) * 3, width=width, stem_width=16, stem_stride=stem_stride
    )
