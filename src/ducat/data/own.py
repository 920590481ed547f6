"""A data set from what a program holds: arrays, or any map-style `torch.utils.data.Dataset` of (image, label)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from ducat.data.decode import array, plain
from ducat.data.images import Dataset, Images, Lazy, Source, fingerprint, hold_out, named_tensors, stratified_order
from ducat.data.prepare import MEASURED, check_classes, measured
from ducat.data.specs import DataSpec
from ducat.seeding import seeded


@runtime_checkable
class MapStyle(Protocol):
    """What has a length and gives (image, label) for a position, as `torch.utils.data.Dataset` does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Given = MapStyle | tuple[Any, Any]
COMPARED = 8  # labels of items with those that a dataset lists


def own(
    train: Given,
    test: Given,
    validation: Given | None = None,
    *,
    name: str = "own",
    classes: Sequence[str] | None = None,
    crop_padding: int = 0,
    flip: bool = False,
) -> Dataset:
    """Return a data set for `ducat.training.train(..., data=...)`.

    Each part is a pair of arrays (images, labels), or a map-style dataset of (image, label), which is asked for images
    as they are needed, by worker processes. Arrays are uint8, or floats in [0, 1], of shape (n, channels, height,
    width); an image of a dataset is a Pillow image, read as `ducat.data.decode` says but for its orientation, or such
    an array without its first dimension. Floats are rounded to 8 bits. Normalisation is a layer of the model, so leave
    it out. Random transforms draw from Python's, NumPy's and PyTorch's global generators, which are seeded for each
    image, epoch and view: so they, too, are functions of the run's seed.

    Args:
        train: what the model learns from.
        test: for reporting only.
        validation: for choosing checkpoints; by default a fixed stratified tenth of `train`, 1,000 images at most.
        name: what tables and figures call it.
        classes: the class names, in the order of the labels; by default their numbers.
        crop_padding: pixels of black added on each side before the random crop; 0 is none.
        flip: whether a mirrored image is still an image of its class.

    Returns:
        Its fingerprint is of all images, if all are arrays; of a map-style dataset, of its first 100 images and all
        labels, since reading it whole may take hours: it does not prove that all are the same.

    Raises:
        ValueError: the images cannot be used: they are of different sizes, have their channels last, are outside
            [0, 1], or have no label each.
    """
    parts = {"train": _source(train, "train"), "test": _source(test, "test")}
    if validation is None:
        count = max(1, min(DataSpec.validation, len(parts["train"]) // 10))
        parts["train"], parts["validation"] = hold_out(parts["train"], count)
    else:
        parts["validation"] = _source(validation, "validation")
    shape = parts["train"].shape
    top = max(int(part.labels.max()) for part in parts.values())
    names = tuple(classes) if classes is not None else tuple(str(label) for label in range(top + 1))
    check_classes(name, names)
    for part, images in parts.items():
        if images.shape != shape:
            raise ValueError(f"{part}: images are {_by(images.shape)}, those of train {_by(shape)}")
        if int(images.labels.min()) < 0 or top >= len(names):
            raise ValueError(
                f"{part}: labels run from {int(images.labels.min())} to {top}, outside the {len(names)} classes"
            )
    if len(names) < 2:
        raise ValueError("train holds 1 class: at least 2 are needed")
    unknown = (0.0,) * shape[0]
    spec = DataSpec(name, name, "folder", shape, unknown, unknown, crop_padding=crop_padding, flip=flip)
    some = parts["train"].subset(stratified_order(parts["train"].labels)[:MEASURED].sort().values)
    spec = measured(spec, {"train.images": some}, held_out=False)
    if any(isinstance(part, Lazy) for part in parts.values()):
        digest = hashlib.sha256()
        for part, images in sorted(parts.items()):
            first = images.select(torch.arange(min(100, len(images)))).images
            digest.update(f"{part} {len(images)} {tuple(first.shape)}".encode())
            digest.update(images.labels.numpy().data)
            digest.update(first.numpy().data)
        exact = f"sha256:{digest.hexdigest()}"
    else:
        exact = fingerprint(named_tensors(**parts))
    return Dataset(spec, names, parts["train"], parts["validation"], parts["test"], exact)


def check_channels(shape: Sequence[int], what: str) -> None:
    """Raise ValueError for images (n, height, width, channels), which would train as if rows were channels."""
    if len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3) and shape[2] > 3:
        raise ValueError(
            f"{what} of shape {tuple(shape)} have their channels last: give (n, channels, height, width), "
            "for example by transpose(0, 3, 1, 2)"
        )


class Items:
    """Rows of a map-style dataset."""

    decodes = True

    def __init__(self, dataset: MapStyle, shape: tuple[int, int, int], where: str) -> None:
        self.dataset, self.shape, self.where = dataset, shape, where

    def read(self, rows: Int64[Tensor, m]) -> UInt8[Tensor, "m channels height width"]:
        """Fetch these rows, as in an epoch and a view of their own."""
        return self.draw(rows, 0, "fixed")

    def draw(self, rows: Int64[Tensor, m], *key: int | str) -> UInt8[Tensor, "m channels height width"]:
        """Fetch these rows with transforms that are functions of the key and the row."""
        fetched = np.empty((len(rows), *self.shape), np.uint8)
        for place, row in zip(fetched, rows.tolist(), strict=True):
            with seeded(*key, "item", row):
                pixels, _ = _item(self.dataset, row, self.where)
            if pixels.shape != self.shape:
                raise ValueError(
                    f"{self.where}: image {row} is {_by(pixels.shape)}, the first {_by(self.shape)}: bring them to one "
                    "size in the dataset"
                )
            place[:] = pixels
        return torch.from_numpy(fetched)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _source(given: Given, where: str) -> Source:
    if isinstance(given, tuple) and len(given) == 2:
        images, labels = np.asarray(given[0]), np.asarray(given[1])
        check_channels(images.shape, f"{where}: images")
        if images.ndim != 4 or not len(images):
            raise ValueError(f"{where}: images of shape {images.shape} are not (n, channels, height, width)")
        return Images(
            torch.from_numpy(_bytes(images, where)), _labels(labels, len(images), where), torch.arange(len(images))
        )
    if not isinstance(given, MapStyle) or isinstance(given, tuple | list | dict | np.ndarray | Tensor):
        raise ValueError(f"{where}: give (images, labels) or a map-style dataset, not a {type(given).__name__}")
    if not len(given):
        raise ValueError(f"{where} is empty")
    with seeded(0, "fixed", "item", 0):
        first, _ = _item(given, 0, where)
    channels, height, width = first.shape
    known = next((getattr(given, name) for name in ("targets", "labels") if hasattr(given, name)), None)
    known = None if known is None else np.asarray(known)
    if known is None or known.shape != (len(given),) or not _are_labels(known, given, where):
        known = [_item(given, row, where)[1] for row in range(len(given))]
    items = Items(given, (channels, height, width), where)
    return Lazy(items, _labels(np.asarray(known), len(given), where), torch.arange(len(given)))


def _are_labels(known: np.ndarray, given: MapStyle, where: str) -> bool:
    """Tell by some items whether these are the labels: a dataset may change them as it gives an item out."""
    if getattr(given, "target_transform", None) is not None:
        return False
    rows = np.linspace(0, len(given) - 1, min(len(given), COMPARED)).astype(int).tolist()
    with seeded(0, "fixed", "labels"):
        return all(np.array_equal(known[row], np.asarray(_item(given, row, where)[1])) for row in rows)


def _labels(labels: np.ndarray, count: int, where: str) -> Int64[Tensor, n]:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: labels of shape {labels.shape} and type {labels.dtype} are not {count} whole numbers, one each"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _item(dataset: MapStyle, row: int, where: str) -> tuple[np.ndarray, Any]:
    try:
        image, label = dataset[row]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: item {row} is not (image, label) ({' '.join(str(error).split())})") from error
    if isinstance(image, Image.Image):
        try:
            image = plain(image)
        except ValueError as error:
            raise ValueError(f"{where}: image {row} {error}") from error
        return array(image, 1 if image.mode == "L" else 3), label
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[None]
    check_channels((1, *pixels.shape), f"{where}: images")
    if pixels.ndim != 3:
        raise ValueError(f"{where}: image {row} has shape {pixels.shape}, not (channels, height, width)")
    return _bytes(pixels, where), label


def _bytes(pixels: np.ndarray, where: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    if pixels.dtype.kind != "f" or not (low >= 0 and high <= 1):
        raise ValueError(
            f"{where}: images are {pixels.dtype} from {low:g} to {high:g}: give uint8, or floats in [0, 1] before any "
            "normalisation"
        )
    return np.ascontiguousarray((pixels * 255).round().astype(np.uint8))
