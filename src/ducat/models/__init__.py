"""Networks that take images in [0, 1]: `build` makes one from its name, with input normalisation as its first layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ducat.models.doors import allow_code
from ducat.models.gowal import gowal_resnet
from ducat.models.resnet import BasicBlock, Bottleneck, preact_resnet, resnet
from ducat.models.small import small_cnn
from ducat.models.wide_resnet import wide_resnet

__all__ = ["MODELS", "Normalize", "allow_code", "build"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small": small_cnn,
    "resnet8": partial(resnet, BasicBlock, depths=(1, 1, 1), width=16),
    "resnet20": partial(resnet, BasicBlock, depths=(3, 3, 3), width=16),
    "resnet18": partial(resnet, BasicBlock, depths=(2, 2, 2, 2), width=64),
    "resnet18-bottleneck": partial(resnet, Bottleneck, depths=(2, 2, 2, 2), width=64),
    "preact-resnet20": partial(preact_resnet, depths=(3, 3, 3), width=16),
    "preact-resnet18": partial(preact_resnet, depths=(2, 2, 2, 2), width=64),
    "wrn-28-10": partial(wide_resnet, depth=28, width=160),
    "wrn-34-10": partial(wide_resnet, depth=34, width=160),
    "preact-resnet18-silu": partial(gowal_resnet, depths=(2, 2, 2, 2), width=64, wide=False),
    "wrn-28-10-silu": partial(gowal_resnet, depths=(4, 4, 4), width=160, wide=True),
    "wrn-70-16-silu": partial(gowal_resnet, depths=(11, 11, 11), width=256, wide=True),
}
"""Every network by name. A row is called as `builder(num_outputs, channels=, stem_stride=)`, and with `width=`, the
channels of its first stage, when the default of the row is overridden."""


class Normalize(nn.Module):
    """`(images - mean) / std` per channel, so that everything outside the model works on images in [0, 1].

    Args:
        channels: number of image channels.
        mean: one value per channel, in the units of the images; None for 0.
        std: one positive value per channel, in the units of the images; None for 1.

    Raises:
        ValueError: `mean` or `std` does not have one value per channel, or `std` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()
        for name, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = [default] * channels if values is None else list(values)
            if len(values) != channels:
                raise ValueError(f"{name}={values} has {len(values)} values: give one for each of {channels} channels")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(channels, 1, 1))
        if not (self.std > 0).all():
            raise ValueError(f"std={std} is not positive: images are divided by it")

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        # One channel would broadcast against three and give a plausible, wrong image.
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"the images have {images.shape[1]} channels, but the model was built for {len(self.mean)}"
            )
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def build(
    name: str,
    num_outputs: int,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    width: int | None = None,
    stem_stride: int = 1,
    init: str = "he",
) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global generator as `torch.nn` draws them.

    The last `nn.Linear`
    in module order is the classification head. Every network ends in global average pooling, so it takes images of
    any size.

    Args:
        name: a key of `MODELS`.
        num_outputs: logits per image, C or 2C.
        channels: image channels.
        mean: per-channel mean for the normalisation inside the model, for images in [0, 1]; None for 0.
        std: per-channel standard deviation for it; None for 1.
        width: channels of the first stage, which later stages double; None for the network's own.
        stem_stride: stride of the first convolution; 2 brings 64x64 images to the cost of 32x32 ones.
        init: "he" gives convolutions He's normal initialisation over the fan out (He et al. 2015, arXiv 1502.01852);
            "torch" leaves them, as all other layers, with torch's own.

    Returns:
        A module from images in [0, 1], (batch, channels, height, width), to logits, (batch, num_outputs).

    Raises:
        ValueError: the name is unknown, or a number is out of range.
    """
    if name not in MODELS:
        close = get_close_matches(name.lower(), MODELS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"model name {name!r} is unknown: {hint}known names are {', '.join(MODELS)}; timm/NAME, hf:REPO and "
            "file.py:function are networks of others"
        )
    sizes = {"num_outputs": num_outputs, "channels": channels, "stem_stride": stem_stride}
    if width is not None:
        sizes["width"] = width
    for option, value in sizes.items():
        if value < 1:
            raise ValueError(f"{option}={value} is not possible: it must be at least 1")
    network = MODELS[name](**sizes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and init == "he":
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(normalize=Normalize(channels, mean, std), network=network))
