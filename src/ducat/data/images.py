"""Images in memory, their splits and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ducat.data.specs import DataSpec

SPLIT_SEED = 2410


@dataclass(frozen=True)
class Images:
    """Labelled images as they are stored: 8 bits a channel.

    Attributes:
        images: (n, channels, height, width), uint8.
        labels: (n,), int64, in [0, number of classes).
        ids: (n,), int64, each image's position in the split that its publisher calls train or test.
    """

    images: UInt8[Tensor, "n channels height width"]
    labels: Int64[Tensor, n]
    ids: Int64[Tensor, n]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """Return the same images on `device`."""
        return Images(self.images.to(device), self.labels.to(device), self.ids.to(device))

    def floats(self) -> Float[Tensor, "n channels height width"]:
        """Return the images as float32 in [0, 1], the form that models and attacks take."""
        return floats(self.images)

    def select(self, indices: Int64[Tensor, m]) -> Images:
        """Return the images at these positions, in this order."""
        return Images(self.images[indices], self.labels[indices], self.ids[indices])


def floats(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return images as float32 in [0, 1]: the value / 255, correctly rounded."""
    # GPUs multiply by 1 / 255 when the divisor is a number; a tensor they divide by.
    return images / torch.full((), 255.0, device=images.device)


@dataclass(frozen=True)
class Dataset:
    """A data set in three disjoint parts.

    Attributes:
        spec: its row of the table.
        classes: the class names, in the order of the labels.
        train: what the model learns from.
        validation: held out of the training split, for choosing checkpoints.
        test: for reporting only.
        fingerprint: "sha256:..." over every image and label of the three parts; a subset has its own.
    """

    spec: DataSpec
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    fingerprint: str


def stratified_order(labels: Int64[Tensor, n], seed: int = SPLIT_SEED) -> Int64[Tensor, n]:
    """Order positions so that every prefix holds each class in its share, to within one image.

    A subset is a prefix, so a larger subset contains every smaller one. The order depends on the labels and the seed
    alone.
    """
    # RandomState, because numpy guarantees its stream over releases; neither default_rng nor torch does.
    random = np.random.RandomState(seed)
    shuffled = random.permutation(len(labels))
    classes = labels.numpy()[shuffled]
    place = np.empty(len(labels))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        place[members] = (np.arange(len(members)) + random.uniform()) / len(members)
    return torch.from_numpy(shuffled[np.argsort(place, kind="stable")])


def stratified_subset(images: Images, samples: int, option: str = "data.samples") -> Images:
    """Return a fixed stratified subset of `samples` images, in their stored order.

    Raises:
        ValueError: `samples` is not in [1, len(images)]; the message names `option`.
    """
    if not 1 <= samples <= len(images):
        raise ValueError(f"{option}={samples} is outside [1, {len(images)}], the number of images there are")
    return images.select(stratified_order(images.labels.cpu())[:samples].sort().values)


def hold_out(images: Images, count: int) -> tuple[Images, Images]:
    """Split off a fixed stratified part of `count` images: (the rest, the part), each in its stored order.

    Raises:
        ValueError: nothing would be left on one of the two sides.
    """
    if not 0 < count < len(images):
        raise ValueError(f"cannot hold {count} images out of {len(images)}: both parts need at least one")
    order = stratified_order(images.labels)
    return images.select(order[count:].sort().values), images.select(order[:count].sort().values)


def named_tensors(train: Images, validation: Images, test: Images) -> dict[str, Tensor]:
    """Return the tensors of the three parts by name, as a prepared data set stores them."""
    parts = {"train": train, "validation": validation, "test": test}
    return {f"{part}.{item}": tensor for part, images in parts.items() for item, tensor in vars(images).items()}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash the exact images and labels: "sha256:" and 64 hexadecimal digits. `ids` do not count."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith(".ids"):
            digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
            digest.update(tensors[name].contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"
