"""One reader a layout: from a publisher's files to labelled images."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import math
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ducat.data import decode
from ducat.data.archives import ALWAYS_ALLOWED, Files, is_hidden, shown
from ducat.data.encoded import Encoded
from ducat.data.images import Images, Lazy, Source, hold_out
from ducat.data.progress import shown_progress
from ducat.data.specs import SPECS, DataSpec
from ducat.data.unpickle import unpickle


@dataclass(frozen=True)
class Survey:
    """What the headers of images say.

    Attributes:
        shape: channels, height and width that all of them fit, or are brought to.
        even: whether all of them have that height and width already.
        remarks: what the rule of decoding changes in them.
    """

    shape: tuple[int, int, int]
    even: bool
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """A data set as its publisher splits it.

    Attributes:
        classes: the class names, in the order of the labels.
        train: the training images; while the files are open, if they are decoded as they are asked for.
        test: the test images, likewise.
        validation: the validation images, where the publisher holds some out.
        notices: what the user should know of how these came about.
        survey: what the images' headers say, where they were looked at.
    """

    classes: tuple[str, ...]
    train: Source
    test: Source
    validation: Source | None = None
    notices: tuple[str, ...] = ()
    survey: Survey | None = None

    @classmethod
    def of(
        cls,
        classes: tuple[str, ...],
        everything: Lazy,
        counts: Sequence[int],
        notices: Sequence[str] = (),
        survey: Survey | None = None,
    ) -> Splits:
        """Divide images that come as train, val and test: without test, val is the test, or else a tenth of train.

        Args:
            classes: the class names.
            everything: the images of train, then those of val, then those of test.
            counts: how many there are of each.
            notices: what the user should know besides.
            survey: of all of them.
        """
        starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        train, val, test = (
            Lazy(everything.pixels, part.labels, torch.arange(len(part)), part.rows)
            for part in (everything.subset(torch.arange(*edges)) for edges in pairwise(starts))
        )
        if len(test):
            return cls(classes, train, test, val if len(val) else None, tuple(notices), survey)
        if len(val):
            return cls(classes, train, val, None, ("there is no test part: val is the test", *notices), survey)
        rest, tenth = hold_out(train, max(1, len(train) // 10))
        said = "there is no test part: a fixed tenth of train is the test"
        return cls(classes, rest, tenth, None, (said, *notices), survey)


def read_digits() -> Splits:
    """Read scikit-learn's 1,797 handwritten digits of 8 x 8.

    They come as one set; 500 for testing and 200 for validation are fixed stratified parts of it. `ids` are positions
    in the whole set.
    Source: E. Alpaydin, C. Kaynak (1998), UCI Machine Learning Repository, "Optical Recognition of Handwritten Digits".
    """
    rows = _digits()
    images = rows[:, :-1].reshape(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    labels = rows[:, -1].long()
    train, test = hold_out(_images(images, labels), 500)
    train, validation = hold_out(train, SPECS["digits"].validation)
    return Splits(tuple("0123456789"), train, test, validation)


def _digits() -> Tensor:
    """Return scikit-learn's table: the 64 pixels, 0 to 16, and the label in each row."""
    # Its file by itself: importing scikit-learn takes three seconds.
    package = importlib.util.find_spec("sklearn")
    places = [] if package is None else package.submodule_search_locations or []
    file = next((file for place in places if (file := Path(place, "datasets/data/digits.csv.gz")).is_file()), None)
    if file is not None:
        return torch.from_numpy(np.loadtxt(file, delimiter=","))
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(np.column_stack([digits.data, digits.target]))


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
        return [line for line in files.read(name).decode(errors="replace").splitlines() if line.strip()]

    listed = files.find("wnids.txt")
    wnids = sorted(set(map(str.strip, lines(listed))))
    words = {wnid: name for wnid, _, name in (line.partition("\t") for line in lines(files.find("words.txt")))}
    classes = tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids)
    label = {wnid: number for number, wnid in enumerate(wnids)}

    root = listed.removesuffix("wnids.txt")
    images: dict[str, list[int]] = {"train": [], "val": []}
    for position, name in enumerate(files.names):
        part = name.removeprefix(root).split("/")[0]
        if part in images and name.startswith(root) and name.endswith(".JPEG") and not is_hidden(name):
            images[part].append(position)

    def classed(positions: list[int], wnid: Sequence[str]) -> Source:
        for position, name in zip(positions, wnid, strict=True):
            if name not in label:
                raise ValueError(
                    f"{files.path}: the class of {shown(files.names[position])}, {name!r}, is not in wnids.txt"
                )
        return _decoded(files, positions, [label[name] for name in wnid], spec.shape)

    train = classed(
        images["train"], [files.names[position].removeprefix(root).split("/")[1] for position in images["train"]]
    )
    # By its annotations, in their order, wherever a usual script may have moved an image within val; without them by
    # the folders that such a script makes.
    there = {PurePosixPath(files.names[position]).name: position for position in images["val"]}
    if f"{root}val/val_annotations.txt" in files.names:
        annotated = [f"{line}\t".split("\t")[:2] for line in lines(f"{root}val/val_annotations.txt")]
        for name, _ in annotated:
            if name not in there:
                raise ValueError(f"{files.path} has no {root}val/images/{shown(name)}")
        test = classed([there[name] for name, _ in annotated], [wnid for _, wnid in annotated])
    else:
        folders = [files.names[position].removeprefix(root).split("/")[1] for position in images["val"]]
        test = classed(images["val"], folders)
    return Splits(classes, train, test)


def read_folder(
    files: Files, spec: DataSpec | None, size: int | None = None, update: Callable[[bytes], None] | None = None
) -> Splits:
    """Read an image folder: `train/CLASS/FILE`, and `val` and `test` likewise where they are there.

    The classes are the folders of `train`, sorted. Without `test`, `val` is the test; without both, a fixed stratified
    tenth of `train` is. Images are all grey, or all RGB if any is not grey; `ducat.data.decode` says how they are read.

    Args:
        files: the folder, or an archive of it; `train` may lie in another folder.
        spec: its row, if it has one: the images must then have its shape.
        size: bring every image to size x size, the shorter side by bicubic resampling and the longer by cropping.
        update: of a stream: told the hash of every image's content, in turn.

    Raises:
        ValueError: the layout is another one, a class or an image cannot be used; the message names the file.
    """
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    roots = set()
    left_out: list[str] = []
    for position, name in enumerate(files.names):
        parents = name.split("/")[:-1]
        if is_hidden(name):
            continue
        if not name.lower().endswith(decode.SUFFIXES):
            if any(part in parts for part in parents):
                left_out.append(name)
            continue
        if len(parents) < 2 or parents[-2] not in parts:
            raise ValueError(
                f"{files.path}: {shown(name)} is not at train/CLASS/FILE, val/CLASS/FILE or test/CLASS/FILE"
            )
        roots.add("/".join(parents[:-2]))
        parts[parents[-2]].append(position)
    if len(roots) > 1:
        raise ValueError(f"{files.path} holds more than one image folder: {', '.join(r or '.' for r in sorted(roots))}")
    # Systems write an accented letter as one character or as two.
    names = [unicodedata.normalize("NFC", files.names[position].split("/")[-2]) for position in parts["train"]]
    classes = tuple(sorted(set(names)))
    if len(classes) < 2:
        raise ValueError(f"{files.path} has {len(classes)} classes under train/: put images into train/CLASS/")
    if spec is not None and spec.classes not in (None, classes):
        raise ValueError(f"{files.path} does not have the classes of {spec.title} under train/")

    number = {name: label for label, name in enumerate(classes)}
    labels = []
    for position in (position for part in parts.values() for position in part):
        name = unicodedata.normalize("NFC", files.names[position].split("/")[-2])
        if name not in number:
            raise ValueError(f"{files.path}: the class of {shown(files.names[position])} is not among those of train/")
        labels.append(number[name])
    # Together, so that the splits share one shape.
    positions = [position for part in parts.values() for position in part]
    notices = [
        *_left_out(files, left_out),
        *_without_images(files, f"{''.join(f'{root}/' for root in roots if root)}train/", classes),
    ]
    found = None
    if spec is None or update is not None:
        found = survey(files.read, naming(files), positions, None if spec is None else spec.shape, size, update)
        notices += found.remarks
    if parts["test"] or parts["val"]:
        tested = set(labels[len(parts["train"]) + (len(parts["val"]) if parts["test"] else 0) :])
        notices += _named_few("no test image of", [name for name in classes if number[name] not in tested])
    shape = spec.shape if spec is not None else found.shape if found is not None else None
    assert shape is not None
    everything = _decoded(files, positions, labels, shape, resize=size is not None)
    return Splits.of(classes, everything, [len(part) for part in parts.values()], notices, found)


def _left_out(files: Files, names: list[str]) -> list[str]:
    if not names:
        return []
    kinds = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in names)
    counts = ", ".join(f"{count:,} {shown(kind)}" for kind, count in kinds.most_common(5))
    return [f"left out, as no image by the name's ending: {counts} (the first is {shown(names[0])})"]


def _without_images(files: Files, train: str, classes: Sequence[str]) -> list[str]:
    """Name the folders of `train` in which there is nothing to learn from."""
    inside = {
        name.removeprefix(train).split("/")[0]
        for name in files.names
        if name.startswith(train) and "/" in name.removeprefix(train)
    }
    inside |= {name.removeprefix(train).split("/")[0] for name in files.empty if name.startswith(train)}
    lost = sorted({unicodedata.normalize("NFC", name) for name in inside} - set(classes))
    return _named_few("no class, for want of images", [name for name in lost if not is_hidden(name)])


def _named_few(said: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return [f"{said}: {', '.join(map(shown, names[:5]))}{more}"]


def survey(
    read: Callable[[int], bytes],
    name: Callable[[int], str],
    rows: Sequence[int],
    shape: tuple[int, int, int] | None,
    size: int | None,
    update: Callable[[bytes], None] | None = None,
) -> Survey:
    """Read the headers of images.

    Args:
        read: returns the file of a row.
        name: returns what messages call it.
        rows: which to read.
        shape: what they are brought to; None is their own, which must then be one.
        size: or this many pixels a side, with the channels that they need.
        update: told the hash of every image's content, in turn.

    Raises:
        ValueError: one is no image, or their sizes differ and there is neither a shape nor a size.
    """
    sides = None if shape is None else shape[1:]
    sides = sides if size is None else (size, size)
    grey, even, remarks = True, True, Counter[str]()
    with shown_progress("Looking through the images", len(rows)) as advance:
        for row in rows:
            content = read(row)
            try:
                outline = decode.outline(content)
            except ValueError as error:
                raise ValueError(f"{name(row)} {error}") from error
            sides = sides or outline.size
            even &= outline.size == sides
            if not even and size is None and shape is None:
                raise ValueError(
                    f"{name(row)} is {outline.size[0]} x {outline.size[1]}, not {sides[0]} x {sides[1]}: all images "
                    "need one size; --size N brings them to N x N"
                )
            grey &= outline.grey
            remarks.update(outline.remarks)
            if update is not None:
                update(hashlib.sha256(content).digest())
            advance(1)
    if sides is None:
        raise ValueError("there are no images")
    channels = shape[0] if shape is not None else 1 if grey else 3
    return Survey((channels, *sides), even, tuple(f"{count:,} images are {said}" for said, count in remarks.items()))


def naming(files: Files) -> Callable[[int], str]:
    """Return what messages call the files."""
    return lambda row: f"{files.path}: {shown(files.names[row])}"


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


def read_corruptions(files: Files, spec: DataSpec) -> dict[str, Tensor | Source]:
    """Read CIFAR-10-C or CIFAR-100-C: a .npy file a corruption, the test images at severities 1 to 5 in turn.

    Returns:
        "labels" of the test images, and the uint8 images of each corruption that is there, (5 n, channels, height,
        width). Source: D. Hendrycks, T. Dietterich (2019), arXiv 1903.12261.
    """
    there = {PurePosixPath(name).name for name in files.names if not is_hidden(name)}
    channels, height, width = spec.shape

    def array(name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        where = f"{files.path}: {name}.npy"
        content = io.BytesIO(files.read(files.find(f"{name}.npy")))
        try:
            version = np.lib.format.read_magic(content)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            found, _, dtype = read_header[version](content)
            # Before anything of that size is asked for.
            if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape, strict=True)):
                wanted = ", ".join("n" if side is None else str(side) for side in shape)
                raise ValueError(f"{where} is {dtype} of shape {found}, not of shape ({wanted})")
            if math.prod(found) * dtype.itemsize > len(content.getbuffer()):
                raise EOFError("it ends before its last number")
            content.seek(0)
            return np.load(content, allow_pickle=False)
        except (ValueError, EOFError, OSError, KeyError, SyntaxError) as error:
            if str(error).startswith(where):
                raise
            raise ValueError(f"{where} is not an array ({error})") from error

    labels = array("labels", (None,))
    count = len(labels) // 5
    if not count or len(labels) != 5 * count or not (labels.reshape(5, -1) == labels[:count]).all():
        raise ValueError(f"{files.path}: labels.npy does not hold the same labels for five severities")

    class Corruption:
        """The images of one file, which is read again for each part: all of them are 3 GB."""

        shape, decodes = spec.shape, False

        def __init__(self, name: str) -> None:
            self.name = name

        def read(self, rows: Tensor) -> Tensor:
            return torch.from_numpy(images(self.name)[rows.numpy()].transpose(0, 3, 1, 2).copy())

    @lru_cache(1)
    def images(name: str) -> np.ndarray:
        found = array(name, (5 * count, height, width, channels))
        if found.dtype != np.uint8:
            raise ValueError(f"{files.path}: {name}.npy is {found.dtype}, not uint8")
        return found

    where = f"{files.path}: labels.npy"
    tensors: dict[str, Tensor | Source] = {
        "labels": _labels(labels[:count].tolist(), count, len(spec.classes or ()), where)
    }
    for name in CORRUPTIONS:
        if f"{name}.npy" in there:
            every = torch.arange(5 * count)
            tensors[name] = Lazy(Corruption(name), torch.zeros_like(every), every)
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


def _decoded(
    files: Files, positions: Sequence[int], labels: Sequence[int], shape: tuple[int, int, int], resize: bool = False
) -> Lazy:
    """Return images that are decoded as they are asked for."""
    encoded = Encoded(files.read, naming(files), shape, resize=resize)
    count = torch.arange(len(positions))
    return Lazy(encoded, torch.tensor(labels, dtype=torch.int64), count, torch.tensor(positions, dtype=torch.int64))


READERS: dict[str, Callable[[Files, DataSpec], Splits]] = {
    "cifar": read_cifar,
    "idx": read_idx,
    "tiny-imagenet": read_tiny_imagenet,
    "folder": read_folder,
}
