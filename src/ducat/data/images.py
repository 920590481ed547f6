"""Labelled images in memory, in a file or still encoded; their splits and their fingerprint."""

from __future__ import annotations

import hashlib
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ducat.data.specs import DataSpec

SPLIT_SEED = 2410
CHUNK_BYTES = 2**22
"""Most bytes of pixels that are read at once where all of a set goes by."""

CACHED = 2**17
"""Pixels that a core's cache holds as float32."""


class Source(ABC):
    """Labelled images, 8 bits a channel, that are fetched by their positions.

    Attributes:
        labels: (n,), int64, in [0, number of classes).
        ids: (n,), int64, each image's position in the split that its publisher calls train or test.
    """

    labels: Int64[Tensor, n]
    ids: Int64[Tensor, n]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return len(self) * math.prod(self.shape)

    @abstractmethod
    def select(self, indices: Int64[Tensor, m]) -> Images:
        """Fetch the images at these positions, in this order, into memory."""

    @abstractmethod
    def subset(self, indices: Int64[Tensor, m]) -> Source:
        """Return the images at these positions, in this order, without fetching them."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Images:
        """Return the same images in the memory of `device`."""

    def floats(self) -> Float[Tensor, "n channels height width"]:
        """Return all images as float32 in [0, 1], the form that models and attacks take."""
        return self.to(self.labels.device).floats()

    def chunks(self) -> Iterator[Images]:
        """Fetch all images in order, `CHUNK_BYTES` at a time."""
        for rows in torch.arange(len(self)).split(max(1, CHUNK_BYTES // math.prod(self.shape))):
            yield self.select(rows)


@dataclass(frozen=True)
class Images(Source):
    """Labelled images in memory.

    Attributes:
        images: (n, channels, height, width), uint8.
        labels: (n,), int64, in [0, number of classes).
        ids: (n,), int64, each image's position in the split that its publisher calls train or test.
    """

    images: UInt8[Tensor, "n channels height width"]
    labels: Int64[Tensor, n]
    ids: Int64[Tensor, n]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Images:
        """Return the same images on `device`."""
        return Images(self.images.to(device), self.labels.to(device), self.ids.to(device))

    def floats(self) -> Float[Tensor, "n channels height width"]:
        """Return the images as float32 in [0, 1], the form that models and attacks take."""
        return floats(self.images)

    def select(self, indices: Int64[Tensor, m]) -> Images:
        """Return the images at these positions, in this order."""
        return Images(self.images[indices], self.labels[indices], self.ids[indices])

    subset = select


@runtime_checkable
class Pixels(Protocol):
    """Where the pixels of images are fetched from, by row; `decodes` says that fetching is work for the processor."""

    shape: tuple[int, int, int]
    decodes: bool

    def read(self, rows: Int64[Tensor, m]) -> UInt8[Tensor, "m channels height width"]:
        """Fetch these rows."""


class Lazy(Source):
    """Labelled images that are in memory only where they are fetched.

    Args:
        pixels: where they are.
        labels: as in `Source`.
        ids: as in `Source`.
        rows: the row of `pixels` of each image; None is all of them in order.
    """

    def __init__(
        self, pixels: Pixels, labels: Int64[Tensor, n], ids: Int64[Tensor, n], rows: Int64[Tensor, n] | None = None
    ) -> None:
        self.pixels, self.labels, self.ids = pixels, labels, ids
        self.rows = torch.arange(len(labels)) if rows is None else rows

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""
        return self.pixels.shape

    @property
    def images(self) -> UInt8[Tensor, "n channels height width"]:
        """All the pixels, fetched into memory."""
        return self.to("cpu").images

    def select(self, indices: Int64[Tensor, m]) -> Images:
        """Fetch the images at these positions, in this order, into memory."""
        return Images(self.pixels.read(self.rows[indices]), self.labels[indices], self.ids[indices])

    def subset(self, indices: Int64[Tensor, m]) -> Lazy:
        """Return the images at these positions, in this order, without fetching them."""
        return Lazy(self.pixels, self.labels[indices], self.ids[indices], self.rows[indices])

    def to(self, device: torch.device | str) -> Images:
        """Return the same images in the memory of `device`, fetched a chunk at a time."""
        there = torch.empty((len(self), *self.shape), dtype=torch.uint8, device=device)
        start = 0
        for chunk in self.chunks():
            there[start : start + len(chunk)] = chunk.images.to(device)
            start += len(chunk)
        return Images(there, self.labels.to(device), self.ids.to(device))


class _Joined:
    """The rows of two sources, one after the other."""

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second, self.shape = first, second, first.shape
        self.decodes = any(isinstance(source, Lazy) and source.pixels.decodes for source in (first, second))

    def read(self, rows: Int64[Tensor, m]) -> UInt8[Tensor, "m channels height width"]:
        """Fetch these rows."""
        fetched = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        late = rows >= len(self.first)
        fetched[~late] = self.first.select(rows[~late]).images
        fetched[late] = self.second.select(rows[late] - len(self.first)).images
        return fetched


def join(first: Source, second: Source) -> Source:
    """Return the images of two sources of one shape, one after the other."""
    labels, ids = torch.cat([first.labels, second.labels]), torch.cat([first.ids, second.ids])
    if isinstance(first, Images) and isinstance(second, Images):
        return Images(torch.cat([first.images, second.images]), labels, ids)
    if isinstance(first, Lazy) and isinstance(second, Lazy) and first.pixels is second.pixels:
        return Lazy(first.pixels, labels, ids, torch.cat([first.rows, second.rows]))
    return Lazy(_Joined(first, second), labels, ids)


def floats(images: UInt8[Tensor, "*shape"], memory: Memory | None = None) -> Float[Tensor, "*shape"]:
    """Return images as float32 in [0, 1]: the value / 255, correctly rounded."""
    # GPUs multiply by 1 / 255 when the divisor is a number; a tensor they divide by.
    there, divisor = empty_like(images, torch.float32, memory), torch.full((), 255.0, device=images.device)
    if images.device.type != "cpu" or not images.numel() or not images.ndim:
        return there.copy_(images).div_(divisor)
    # Not in one step, which is not vectorised on CPUs, but both while the numbers are in the cache.
    rows = max(1, CACHED // images[0].numel())
    for part, pixels in zip(there.split(rows), images.split(rows), strict=True):
        part.copy_(pixels).div_(divisor)
    return there


class Memory:
    """Memory that tensors leave, for those that come after them: what is new the system has to clear first."""

    def __init__(self) -> None:
        self._left: list[np.ndarray] = []

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        """Send nothing of it to other processes."""
        return Memory, ()

    def take(self, size: int) -> np.ndarray:
        """Return so many bytes, which come back as soon as nothing refers to them."""
        whole = self._left.pop() if self._left else None
        if whole is None or len(whole) < size:
            whole = np.empty(size, np.uint8)
        taken = whole[:size]
        weakref.finalize(taken, self._left.append, whole).atexit = False
        return taken


def empty_like(images: Tensor, dtype: torch.dtype | None = None, memory: Memory | None = None) -> Tensor:
    """Return memory for as many numbers; on a CPU NumPy's, which asks for huge pages.

    Else touching it first takes longer than filling it.
    """
    dtype = dtype or images.dtype
    if images.device.type != "cpu":
        return torch.empty_like(images, dtype=dtype)
    size, aligned = images.numel() * dtype.itemsize, 64  # bytes, as PyTorch's is: sums over it may depend on that
    count = size + aligned
    bare = torch.from_numpy(np.empty(count, np.uint8) if memory is None else memory.take(count))
    start = -bare.data_ptr() % aligned
    return bare[start : start + size].view(dtype).view(images.shape)


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
    train: Source
    validation: Source
    test: Source
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


def stratified_subset(images: Source, samples: int, option: str = "data.samples") -> Source:
    """Return a fixed stratified subset of `samples` images, in their stored order.

    Raises:
        ValueError: `samples` is not in [1, len(images)]; the message names `option`.
    """
    if not 1 <= samples <= len(images):
        raise ValueError(f"{option}={samples} is outside [1, {len(images)}], the number of images there are")
    return images.subset(stratified_order(images.labels.cpu())[:samples].sort().values)


def hold_out(images: Source, count: int) -> tuple[Source, Source]:
    """Split off a fixed stratified part of `count` images: (the rest, the part), each in its stored order.

    Raises:
        ValueError: nothing would be left on one of the two sides.
    """
    if not 0 < count < len(images):
        raise ValueError(f"cannot hold {count} images out of {len(images)}: both parts need at least one")
    order = stratified_order(images.labels)
    return images.subset(order[count:].sort().values), images.subset(order[:count].sort().values)


def named_tensors(train: Source, validation: Source, test: Source) -> dict[str, Tensor | Source]:
    """Return what a prepared data set stores of the three parts, by name: pixels, labels and ids."""
    parts = {"train": train, "validation": validation, "test": test}
    named: dict[str, Tensor | Source] = {}
    for part, images in parts.items():
        named |= {f"{part}.images": images, f"{part}.labels": images.labels, f"{part}.ids": images.ids}
    return named


def fingerprint(tensors: Mapping[str, Tensor | Source]) -> str:
    """Hash the exact images and labels: "sha256:" and 64 hexadecimal digits. `ids` do not count.

    Args:
        tensors: by name; of images, their pixels count.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.endswith(".ids"):
            continue
        tensor = tensors[name]
        if isinstance(tensor, Source):
            digest.update(f"{name} {(len(tensor), *tensor.shape)} {torch.uint8}\n".encode())
            for chunk in tensor.chunks():
                digest.update(chunk.images.contiguous().numpy().data)
        else:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"
