"""The residual networks with SiLU of Gowal et al. 2020 (arXiv 2010.03593).

Most published networks that were trained with generated data are of them. They pad as JAX does: a 3x3 convolution of
stride 2 sees a row and a column of zeros at the end alone. Layers carry the names of the wide networks' published
checkpoints (`init_conv`, `batchnorm_0`, `logits`); `weights.NAMINGS` has the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class GowalBlock(nn.Module):
    """Batch norm and SiLU before each of two 3x3 convolutions.

    Args:
        in_channels: of the input.
        channels: of the output.
        stride: of the first convolution.
        wide: whether a projected shortcut is 1x1 and starts after the first SiLU, as in the wide networks, or 3x3 and
            starts from the input, as in the others.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, wide: bool) -> None:
        super().__init__()
        self.stride, self.wide = stride, wide
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.conv_0 = nn.Conv2d(in_channels, channels, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(channels)
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        projected = in_channels != channels or (stride != 1 and not wide)
        self.shortcut = nn.Conv2d(in_channels, channels, 1 if wide else 3, stride, bias=False) if projected else None

    def forward(self, x: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out height2 width2"]:
        activated = F.silu(self.batchnorm_0(x))
        residual = self.conv_0(self._padded(activated))
        residual = self.conv_1(F.silu(self.batchnorm_1(residual)))
        if self.shortcut is None:
            return residual + x
        return residual + self.shortcut(activated if self.wide else self._padded(x))

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1) if self.stride == 1 else (0, 1, 0, 1))


def gowal_resnet(
    num_outputs: int,
    *,
    channels: int,
    depths: Sequence[int],
    width: int,
    wide: bool,
    stem_stride: int = 1,
) -> nn.Sequential:
    """A network of `GowalBlock`, `depths[i]` in stage i, each stage after the first halving the image and doubling
    `width`; the stem has 16 channels where it is `wide`, else `width`."""
    in_channels = stem = 16 if wide else width
    stages: dict[str, nn.Module] = {}
    for stage, depth in enumerate(depths):
        blocks = nn.Sequential()
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(GowalBlock(in_channels, width * 2**stage, stride, wide=wide))
            in_channels = width * 2**stage
        stages[f"layer_{stage}"] = blocks
    return nn.Sequential(
        OrderedDict(
            init_conv=nn.Conv2d(channels, stem, 3, stem_stride, padding=1, bias=False),
            **stages,
            batchnorm=nn.BatchNorm2d(in_channels),
            relu=nn.SiLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            logits=nn.Linear(in_channels, num_outputs),
        )
    )
