"""A network's description, which travels with its weights so that a checkpoint can be loaded by itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ducat.dummy import add_dummy_classes
from ducat.models import Normalize, build
from ducat.models.doors import Fit, door, is_foreign
from ducat.models.heads import describe, forward
from ducat.models.outputs import NoLogitsError

OURS = 8  # pixels a side that each of our networks takes
GIVEN = "given:"  # before the class of a network that was given to train as an object
GIVEN_NETWORK = "a network given to train"  # in a manifest, in place of a file


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build a network again.

    Attributes:
        name: a row of `models.MODELS`, or somebody else's network as `models.doors` names them.
        num_classes: C, the number of real classes.
        dummy_classes: whether the head has 2C outputs.
        channels: of the images.
        mean: per channel, of images in [0, 1], for the normalisation layer.
        std: per channel, likewise.
        width: channels of the first stage; None for the network's own.
        stem_stride: stride of the first convolution; 2 for 64 x 64 images.
        options: what else somebody else's network is made with.
        record: what has to be the same for somebody else's network: versions, its configuration, a file's SHA-256.
        image_size: pixels a side of the images; None in checkpoints of earlier versions.
        fit_size: pixels a side that images are resized to inside of the model; None leaves them.
        fit_channels: channels that grey images are repeated to inside of the model; None leaves them.
    """

    name: str
    num_classes: int
    dummy_classes: bool
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    width: int | None = None
    stem_stride: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    fit_size: int | None = None
    fit_channels: int | None = None

    def build(self, *, pretrained: bool = False, init: str = "he") -> nn.Module:
        """Return the network with new random weights, from PyTorch's global generator; dummy rows are random too.

        Args:
            pretrained: take the weights that the network's publisher trained instead, which may need network access;
                a head for another number of classes is new.
            init: how the convolutions of our networks begin, as for `models.build`; others have their own way.

        Raises:
            ValueError: if it cannot be built; the message says why.
        """
        if self.name.startswith(GIVEN):
            raise ValueError(
                f"the network is a {self.name.removeprefix(GIVEN)} that was given to train, which no run folder can "
                "build: make it as before, load ducat.weights.read(RUN).weights into it, or give it to resume as model="
            )
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # as images and checkpoints are, whatever the caller's default is
        try:
            model = self._foreign(pretrained) if is_foreign(self.name) else self._ours(pretrained, init)
            return self.doubled(model)[1] if self.dummy_classes else model
        finally:
            torch.set_default_dtype(dtype)

    def doubled(self, model: nn.Module, dummies: str = "random") -> tuple[Architecture, nn.Module]:
        """Add dummy classes to the network, and return its description with them, and the network."""
        size = self.image_size if is_foreign(self.name) and self.image_size else OURS
        images = torch.zeros(1, self.channels, size, size)
        return replace(self, dummy_classes=True), add_dummy_classes(model, dummies, images=images)

    def _ours(self, pretrained: bool, init: str) -> nn.Module:
        if pretrained:
            raise ValueError(f"model.weights=pretrained: nobody has published weights of {self.name}; give a file")
        if self.options:
            raise ValueError(f"model.options: {self.name} takes none besides model.width")
        return build(
            self.name,
            self.num_classes,
            channels=self.channels,
            mean=self.mean,
            std=self.std,
            width=self.width,
            stem_stride=self.stem_stride,
            init=init,
        )

    def _foreign(self, pretrained: bool) -> nn.Module:
        row, name = door(self.name)
        make = row.pretrained if pretrained else row.build
        if make is None:
            raise ValueError(f"model.weights=pretrained: {self.name} has none; give a file")
        channels = self.fit_channels or self.channels
        network = make(name, self.num_classes, channels, self.options, self.record)
        parts = OrderedDict[str, nn.Module](normalize=Normalize(self.channels, self.mean, self.std))
        if self.fit_size is not None or self.fit_channels is not None:
            parts["fit"] = Fit(self.fit_size, self.fit_channels)
        parts["network"] = network
        return nn.Sequential(parts)


def describe_foreign(
    architecture: Architecture, *, normalize: bool, fit_size: int | None = None, pretrained: bool = False
) -> Architecture:
    """Fill in what somebody else's network says of itself: what to record, its normalisation, and the size it takes.

    Images are given to it as they are if it takes them, else resized to the size of its own description.

    Args:
        architecture: with name, options and what the data are like.
        normalize: whether the publisher's normalisation, if there is one for as many channels, takes the place of the
            architecture's.
        fit_size: pixels a side to resize images to; None as said above.
        pretrained: whether the publisher's weights will be loaded: the network then keeps its number of channels.

    Raises:
        ValueError: if there is no such network, or it takes no such images.
    """
    row, name = door(architecture.name)
    record = row.record(name, architecture.channels, architecture.options, pretrained)
    found = replace(architecture, record=record, fit_size=fit_size)
    taken = record.get("config", {}).get("num_channels", architecture.channels)
    if taken != architecture.channels:
        if architecture.channels != 1:
            raise ValueError(f"{architecture.name} takes {taken} channels, and the images have {architecture.channels}")
        found = replace(found, fit_channels=taken)
    normalisation = row.normalisation(name, record) if normalize else None
    if normalisation is not None and len(normalisation[0]) == architecture.channels:
        mean, std = normalisation
        found = replace(found, mean=tuple(mean), std=tuple(std))
    with torch.random.fork_rng(devices=[]):
        model = replace(found, dummy_classes=False).build()
    size = architecture.image_size or OURS
    images = torch.zeros(2, architecture.channels, size, size)
    reason = _refusal(model, images, architecture)
    own = describe(model).get("shape", (None, None))[1]
    if reason is not None and fit_size is None and own is not None:
        found = replace(found, fit_size=own)
        with torch.random.fork_rng(devices=[]):
            model = replace(found, dummy_classes=False).build()
        reason = _refusal(model, images, architecture)
    if reason is not None:
        raise ValueError(
            f"{architecture.name} does not take images of {size} x {size} ({reason}): choose model.input_size, or "
            "model.options for that size"
        )
    return found


def _refusal(model: nn.Module, images: torch.Tensor, architecture: Architecture) -> str | None:
    """Return why a model cannot be used with images of that size, or None.

    Raises:
        ValueError: if it cannot be used with any.
    """
    try:
        logits = forward(model, images)
    except NoLogitsError as error:
        raise ValueError(f"{architecture.name} is no classifier: {error}") from error
    except Exception as error:  # other people's code fails in any way there is
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if logits.shape != (len(images), architecture.num_classes):
        return f"outputs of shape {tuple(logits.shape)} for {architecture.num_classes} classes"
    return None
