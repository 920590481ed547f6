"""Prepared data sets, as the rest of the package takes them."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ducat.data import cache, spooled, streams
from ducat.data.images import Dataset, Lazy, Source, fingerprint, hold_out, join, named_tensors, stratified_subset
from ducat.data.prepare import prepare
from ducat.data.readers import CORRUPTIONS, read_digits
from ducat.data.specs import SPECS, DataSpec
from ducat.data.stored import Stored

PARTS = ("train", "validation", "test")


def load(
    name: str, *, samples: int | None = None, root: Path | str | None = None, held_out: float | int | None = None
) -> Dataset:
    """Load a prepared data set, whole or with a fixed stratified subset of its training images.

    Args:
        name: a row of `ducat data list`, or a stream: "wds:SHARDS", "hf:NAME" or "folder:PATH".
        samples: how many training images to keep; validation and test images stay as they are.
        root: the cache folder; None is `DUCAT_DATA`, or the user's cache folder.
        held_out: how many training images to hold out for validation, a number or a share below 1, a fixed stratified
            part; 0 holds none out. None is as they were prepared.

    Raises:
        FileNotFoundError: the data set is not prepared; the message says how to prepare it.
        ValueError: its file is damaged, or it has fewer training images than `samples` or `held_out`.
    """
    dataset = _load(name, root, verify=samples is None and held_out is None)
    if samples is None and held_out is None:
        return dataset
    train, validation = dataset.train, dataset.validation
    if held_out is not None:
        train, validation = _held_out_anew(train, validation, held_out)
    if samples is not None:
        train = stratified_subset(train, samples)
    if isinstance(train, Lazy) and train.pixels.decodes:
        # Which images these are follows from all there are and these numbers.
        exact = f"{dataset.fingerprint} {samples}" + ("" if held_out is None else f" {float(held_out)}")
        measured = f"sha256:{hashlib.sha256(exact.encode()).hexdigest()}"
    else:
        measured = fingerprint(named_tensors(train, validation, dataset.test))
    return replace(dataset, train=train, validation=validation, fingerprint=measured)


def _held_out_anew(train: Source, validation: Source, held_out: float | int) -> tuple[Source, Source]:
    together = join(train, validation)
    together = together.subset(together.ids.argsort(stable=True))
    count = held_out * len(together) if held_out < 1 else held_out
    if held_out >= 1 and count != int(count):
        raise ValueError(f"data.held_out={held_out:g} is neither a number of images nor a share below 1")
    if not 0 <= count < len(together):
        raise ValueError(f"data.held_out={held_out:g} is outside [0, {len(together) - 1}], of the training images")
    return hold_out(together, round(count)) if round(count) else (together, together.subset(torch.arange(0)))


def find_spec(name: str, root: Path | str | None = None) -> DataSpec | None:
    """Return the settings that fit a data set, without its images; None of a stream or folder not prepared here."""
    with contextlib.suppress(OSError, ValueError):
        return SPECS[name] if name in SPECS else cache.read(_entry_name(name), root)[1].spec
    return None


def _entry_name(name: str) -> str:
    return name if streams.parse(name) is None else streams.entry_name(name)


def load_test(
    name: str, samples: int | None = None, root: Path | str | None = None
) -> tuple[Float[Tensor, "n channels height width"], Int64[Tensor, "n"]]:
    """Load test images as float32 in [0, 1], and their labels. Many large images are on disk, not in memory.

    Args:
        name: a row of `ducat data list`.
        samples: how many, a fixed stratified subset: the very images that `evaluate` uses for that many samples.
        root: the cache folder; None is `DUCAT_DATA`, or the user's cache folder.

    Raises:
        FileNotFoundError: the data set is not prepared; the message says how to prepare it.
        ValueError: its file is damaged, or it has fewer test images than `samples`.
    """
    test = _load(name, root).test
    if samples is not None:
        test = stratified_subset(test, samples, option="samples")
    x, start = spooled.empty((len(test), *test.shape), folder=cache.folder(root)), 0
    for chunk in test.chunks():
        x[start : start + len(chunk)] = chunk.floats()
        spooled.release(x)
        start += len(chunk)
    return x, test.labels


def load_corruptions(
    name: str, samples: int | None = None, root: Path | str | None = None
) -> Iterator[tuple[str, int, Float[Tensor, "n channels height width"], Int64[Tensor, "n"]]]:
    """Yield (corruption, severity, images, labels) for each corruption that is there and severities 1 to 5.

    Args:
        name: "cifar10-c" or "cifar100-c".
        samples: how many images of each; the subset that `load_test` takes of the uncorrupted images.
        root: the cache folder; None is `DUCAT_DATA`, or the user's cache folder.

    Yields:
        Images as float32 in [0, 1].

    Raises:
        FileNotFoundError: the data set is not prepared; the message says how to prepare it.
        ValueError: it is no set of corruptions, its file is damaged, or it has fewer images than `samples`.
    """
    if name not in SPECS or SPECS[name].corruption_of is None:
        raise ValueError(f"{name} holds no corruptions; {', '.join(n for n, s in SPECS.items() if s.corruption_of)} do")
    tensors, _ = cache.read(name, root)
    labels = tensors["labels"]
    assert isinstance(labels, Tensor)
    count = len(labels)
    for corruption in CORRUPTIONS:
        if corruption in tensors:
            pixels = tensors[corruption]
            assert isinstance(pixels, Stored)
            for severity, rows in enumerate(torch.arange(5 * count).split(count), start=1):
                part: Source = Lazy(pixels, labels, torch.arange(count), rows)
                if samples is not None:
                    part = stratified_subset(part, samples, option="samples")
                yield corruption, severity, part.floats(), part.labels


def _load(name: str, root: Path | str | None, verify: bool = False) -> Dataset:
    if name == "digits":
        splits = read_digits()
        assert splits.validation is not None
        parts = splits.train, splits.validation, splits.test
        return Dataset(SPECS[name], splits.classes, *parts, fingerprint(named_tensors(*parts)))
    if name in SPECS and SPECS[name].corruption_of:
        raise ValueError(
            f"{name} holds corrupted test images of {SPECS[name].corruption_of}: "
            "train on that, and take these from ducat.data.load_corruptions"
        )
    if streams.parse(name) is not None:
        prepare(name, root=root)
    tensors, header = cache.read(_entry_name(name), root, verify=verify)
    if header.stream is not None:
        header.stream.check()
        index = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, Tensor)}
        packed = {key.removeprefix("rows."): tensor for key, tensor in index.items()}
        pixels = streams.pixels(streams.STREAMS[header.stream.kind].unpack(header.stream, packed), header.spec)
        train, validation, test = (
            Lazy(pixels, *[index[f"{part}.{item}"] for item in ("labels", "ids", "rows")]) for part in PARTS
        )
        return Dataset(header.spec, header.classes, train, validation, test, header.fingerprint)
    train, validation, test = (
        Lazy(*(tensors[f"{part}.{item}"] for item in ("images", "labels", "ids")))  # type: ignore[arg-type]
        for part in PARTS
    )
    return Dataset(header.spec, header.classes, train, validation, test, header.fingerprint)
