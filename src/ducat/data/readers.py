"""One reader a layout: from a publisher's files to labelled images."""

import gzip
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ducat.data.archives import ALWAYS_ALLOWED, Files
from ducat.data.images import Images, hold_out
from ducat.data.specs import SPECS, DataSpec
from ducat.data.unpickle import unpickle


@dataclass(frozen=True)
class Splits:
    """A data set as its publisher splits it.

    Attributes:
        classes: the class names, in the order of the labels.
        train: the training images.
        test: the test images.
        validation: the validation images, where the publisher holds some out.
        notices: what the user should know of how these came about.
    """

    classes: tuple[str, ...]
    train: Images
    test: Images
    validation: Images | None = None
    notices: tuple[str, ...] = ()


def read_digits() -> Splits:
    """Read scikit-learn's 1,797 handwritten digits of 8 x 8.

    They come as one set; 500 for testing and 200 for validation are fixed stratified parts of it. `ids` are positions
    in the whole set.
    Source: E. Alpaydin, C. Kaynak (1998), UCI Machine Learning Repository, "Optical Recognition of Handwritten Digits".
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = hold_out(_images(images, labels), 500)
    train, validation = hold_out(train, SPECS["digits"].validation)
    return Splits(tuple("0123456789"), train, test, validation)


_CIFAR_FILES = {
    "cifar10": (
        [(f"data_batch_{number}", f"training batch {number} of 5") for number in range(1, 6)],
        [("test_batch", "testing batch 1 of 1")],
        ("labels", "batches.meta", "label_names"),
    ),
    "cifar100": (
        [("train", "training batch 1 of 1")],
        [("test", "testing batch 1 of 1")],
        ("fine_labels", "meta", "fine_label_names"),
    ),
}


def read_cifar(files: Files, spec: DataSpec) -> Splits:
    """Read the official python archive of CIFAR-10 or CIFAR-100 (fine labels).

    Source: A. Krizhevsky (2009), "Learning Multiple Layers of Features from Tiny Images".
    """
    train_files, test_files, (label_key, meta_file, names_key) = _CIFAR_FILES[spec.name]
    meta = unpickle(files.read(files.find(meta_file)), f"{files.path}: {meta_file}")
    classes = spec.classes or ()
    if meta.get(names_key.encode()) != [name.encode() for name in classes]:
        raise ValueError(f"{files.path}: {meta_file} does not list the classes of {spec.title}")

    def read(parts: list[tuple[str, str]]) -> Images:
        arrays, labels = [], []
        for file, batch_label in parts:
            where = f"{files.path}: {file}"
            content = unpickle(files.read(files.find(file)), where)
            if content.get(b"batch_label") != batch_label.encode():
                raise ValueError(f"{where} holds {content.get(b'batch_label')!r}, not the {batch_label}")
            images = content.get(b"data")
            if not isinstance(images, np.ndarray) or images.shape[1:] != (math.prod(spec.shape),):
                raise ValueError(f"{where} does not hold images of {' x '.join(map(str, spec.shape))} bytes")
            arrays.append(images.reshape(-1, *spec.shape))
            labels.append(_labels(content.get(label_key.encode()), len(images), len(classes), where))
        return _images(torch.from_numpy(np.concatenate(arrays)), torch.cat(labels))

    return Splits(classes, read(train_files), read(test_files))


def read_idx(files: Files, spec: DataSpec) -> Splits:
    """Read the four idx files of Fashion-MNIST, gzipped or not.

    Source: H. Xiao, K. Rasul, R. Vollgraf (2017), arXiv 1708.07747; the format is that of Y. LeCun's MNIST page.
    """
    classes = spec.classes or ()

    def read(split: str) -> Images:
        images, _ = _idx(files, f"{split}-images-idx3-ubyte", spec.shape[1:])
        labels, where = _idx(files, f"{split}-labels-idx1-ubyte", ())
        tensor = torch.from_numpy(images.copy()).unsqueeze(1)
        return _images(tensor, _labels(labels.tolist(), len(images), len(classes), where))

    return Splits(classes, read("train"), read("t10k"))


def _idx(files: Files, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    packed = f"{name}.gz" in {PurePosixPath(candidate).name for candidate in files.names}
    name = f"{name}.gz" if packed else name
    where = f"{files.path}: {name}"
    content: io.BytesIO | gzip.GzipFile = io.BytesIO(files.read(files.find(name)))
    if packed:
        content = gzip.GzipFile(fileobj=content)
    try:
        # Two zero bytes, 8 for unsigned bytes, the number of dimensions, then each dimension as a big-endian integer.
        header = struct.unpack(f">I{1 + len(shape)}I", content.read(4 * (2 + len(shape))))
        if header[0] != 0x801 + len(shape) or header[2:] != shape:
            raise ValueError(
                f"{where} does not hold unsigned bytes of shape (n{''.join(f', {side}' for side in shape)})"
            )
        size = math.prod(header[1:])
        body = content.read(min(size, ALWAYS_ALLOWED))
        if len(body) != size or content.read(1):
            raise EOFError(f"its header announces {size} bytes")
    except (EOFError, OSError, struct.error, zlib.error) as error:
        raise ValueError(f"{where} is truncated or corrupt ({error})") from error
    return np.frombuffer(body, np.uint8).reshape(header[1:]), where


def read_tiny_imagenet(files: Files, spec: DataSpec) -> Splits:
    """Read Tiny-ImageNet-200: its validation images, the only ones with public labels besides training's, are the test.

    Classes are in the order of their WordNet ids, as in an image folder. Source: Stanford CS231n (2015).
    """

    def lines(name: str) -> list[str]:
        return files.read(name).decode(errors="replace").splitlines()

    wnids = sorted(filter(None, map(str.strip, lines(files.find("wnids.txt")))))
    words = {wnid: name for wnid, _, name in (line.partition("\t") for line in lines(files.find("words.txt")))}
    classes = tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids)
    label = {wnid: number for number, wnid in enumerate(wnids)}

    annotations = files.find("val_annotations.txt")
    root = annotations.removesuffix("val/val_annotations.txt")
    train = [
        (name, name.removeprefix(root).split("/")[1])
        for name in files.names
        if name.startswith(f"{root}train/") and name.endswith(".JPEG")
    ]
    test = [
        (f"{root}val/images/{name}", wnid)
        for name, wnid, *_ in (f"{line}\t".split("\t") for line in lines(annotations))
    ]

    def read(part: list[tuple[str, str]]) -> Images:
        for name, wnid in part:
            if wnid not in label:
                raise ValueError(f"{files.path}: the class of {name}, {wnid!r}, is not in wnids.txt")
        return _decode(files, [(name, label[wnid]) for name, wnid in part], spec.shape)

    return Splits(classes, read(train), read(test))


_SUFFIXES = (".png", ".jpg", ".jpeg")


def read_folder(files: Files, spec: DataSpec | None, size: int | None = None) -> Splits:
    """Read an image folder: `train/CLASS/*.png|jpg`, and `val` and `test` likewise where they are there.

    The classes are the folders of `train`, sorted. Without `test`, `val` is the test; without both, a fixed stratified
    tenth of `train` is. Images are all grey, or all RGB if any is not grey.

    Args:
        files: the folder, or an archive of it; `train` may lie in another folder.
        spec: its row, if it has one: the images must then have its shape.
        size: bring every image to size x size, the shorter side by bicubic resampling and the longer by cropping.

    Raises:
        ValueError: the layout is another one, a class or an image cannot be used; the message names the file.
    """
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    roots = set()
    for name in files.names:
        path = PurePosixPath(name)
        if path.suffix.lower() not in _SUFFIXES or path.name.startswith(".") or path.parts[0] == "__MACOSX":
            continue
        if len(path.parts) < 3 or path.parts[-3] not in parts:
            raise ValueError(f"{files.path}: {name} is not at train/CLASS/FILE, val/CLASS/FILE or test/CLASS/FILE")
        roots.add(path.parts[:-3])
        parts[path.parts[-3]].append((name, path.parts[-2]))
    if len(roots) > 1:
        raise ValueError(
            f"{files.path} holds more than one image folder: {', '.join('/'.join(r) or '.' for r in roots)}"
        )
    classes = tuple(sorted({name for _, name in parts["train"]}))
    if len(classes) < 2:
        raise ValueError(f"{files.path} has {len(classes)} classes under train/: put images into train/CLASS/*.png|jpg")
    if spec is not None and spec.classes not in (None, classes):
        raise ValueError(f"{files.path} does not have the classes of {spec.title} under train/")

    number = {name: label for label, name in enumerate(classes)}
    labelled = []
    for name, class_name in (image for part in parts.values() for image in part):
        if class_name not in number:
            raise ValueError(f"{files.path}: the class of {name} is not among those of train/")
        labelled.append((name, number[class_name]))
    # Together, so that the splits share one shape.
    everything = _decode(files, labelled, None if spec is None else spec.shape, size)
    counts = [len(part) for part in parts.values()]
    train, val, test = map(_images, everything.images.split(counts), everything.labels.split(counts))
    if len(test):
        return Splits(classes, train, test, val if len(val) else None)
    if len(val):
        return Splits(classes, train, val, notices=("there is no test folder: val is the test",))
    train, test = hold_out(train, max(1, len(train) // 10))
    return Splits(classes, train, test, notices=("there is no test folder: a fixed tenth of train is the test",))


CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
)
"""The 15 corruptions of the benchmark, then the 4 extra ones."""


def read_corruptions(files: Files, spec: DataSpec) -> dict[str, Tensor]:
    """Read CIFAR-10-C or CIFAR-100-C: a .npy file a corruption, the test images at severities 1 to 5 in turn.

    Returns:
        "labels" of the test images, and the uint8 images of each corruption that is there, (5 n, channels, height,
        width). Source: D. Hendrycks, T. Dietterich (2019), arXiv 1903.12261.
    """
    there = {PurePosixPath(name).name for name in files.names}
    channels, height, width = spec.shape

    def array(name: str) -> np.ndarray:
        try:
            return np.load(io.BytesIO(files.read(files.find(f"{name}.npy"))), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{files.path}: {name}.npy is not an array ({error})") from error

    labels = array("labels")
    count = len(labels) // 5
    if len(labels) != 5 * count or not (labels.reshape(5, -1) == labels[:count]).all():
        raise ValueError(f"{files.path}: labels.npy does not hold the same labels for five severities")
    tensors = {"labels": _labels(labels[:count].tolist(), count, len(spec.classes or ()), f"{files.path}: labels.npy")}
    for name in CORRUPTIONS:
        if f"{name}.npy" in there:
            images = array(name)
            if images.dtype != np.uint8 or images.shape != (5 * count, height, width, channels):
                raise ValueError(
                    f"{files.path}: {name}.npy is {images.dtype} of shape {images.shape}, "
                    f"not uint8 of shape {(5 * count, height, width, channels)}"
                )
            tensors[name] = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    if len(tensors) == 1:
        raise ValueError(f"{files.path} has labels.npy but no corruption, for example gaussian_noise.npy")
    return tensors


def _images(images: Tensor, labels: Tensor) -> Images:
    return Images(images, labels, torch.arange(len(labels)))


def _labels(labels: object, count: int, num_classes: int, where: str) -> Tensor:
    if not isinstance(labels, list) or len(labels) != count:
        raise ValueError(f"{where} does not hold one label for each of its {count} images")
    for position, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < num_classes:
            raise ValueError(f"{where}: label {label!r} of image {position} is outside [0, {num_classes - 1}]")
    return torch.tensor(labels, dtype=torch.int64)


def _decode(
    files: Files,
    labelled: Sequence[tuple[str, int]],
    shape: tuple[int, int, int] | None = None,
    size: int | None = None,
) -> Images:
    # Without a shape to keep, the first image sets the height and width, and any image in colour makes all RGB.
    sides: tuple[int, int] | None = None if shape is None else shape[1:]
    sides = (size, size) if size is not None else sides
    arrays = []
    for name, _ in _progress(labelled, f"Reading {files.path.name}"):
        array = _decode_one(files, name, sides, resize=size is not None)
        sides = array.shape[1], array.shape[2]
        arrays.append(array)
    channels = max((len(array) for array in arrays), default=1) if shape is None else shape[0]
    images = np.empty((len(arrays), channels, *(sides or (1, 1))), np.uint8)
    for row, array in zip(images, arrays, strict=True):
        row[:] = array
    return _images(torch.from_numpy(images), torch.tensor([label for _, label in labelled], dtype=torch.int64))


def _decode_one(files: Files, name: str, sides: tuple[int, int] | None, resize: bool) -> np.ndarray:
    from PIL import Image, ImageOps

    content = io.BytesIO(files.read(name))
    try:
        # The header is read first, so that no more pixels are unpacked than are wanted.
        with Image.open(content, formats=("PNG", "JPEG")) as image:
            if sides is not None and not resize and image.size != sides[::-1]:
                raise ValueError(
                    f"{files.path}: {name} is {image.height} x {image.width}, not {sides[0]} x {sides[1]}: "
                    "all images need one size; --size N brings an image folder to N x N"
                )
            if image.mode.startswith(("I", "F")):
                raise OSError(f"it has {image.mode} pixels: save it with 8 bits a channel")
            pixels = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            if resize and sides is not None:
                pixels = ImageOps.fit(pixels, sides[::-1], Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{files.path}: {name} is not a PNG or JPEG that can be read ({error})") from error
    array = np.asarray(pixels)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _progress(items: Sequence[Any], description: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    return track(items, description, console=Console(stderr=True), transient=True, disable=len(items) < 5000)


READERS: dict[str, Callable[[Files, DataSpec], Splits]] = {
    "cifar": read_cifar,
    "idx": read_idx,
    "tiny-imagenet": read_tiny_imagenet,
    "folder": read_folder,
}
