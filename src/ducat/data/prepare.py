"""`ducat data list | prepare | verify`: from a publisher's files to a prepared data set."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from importlib import resources
from pathlib import Path, PurePath

import PIL
import torch
from torch import Tensor

from ducat.data import cache, streams
from ducat.data.archives import Files, open_files
from ducat.data.download import download
from ducat.data.images import Lazy, Source, fingerprint, hold_out, named_tensors, stratified_order
from ducat.data.readers import READERS, Splits, read_corruptions, read_digits, read_folder
from ducat.data.specs import SPECS, DataSpec, known_names
from ducat.data.stored import Stored

LARGEST_SIDE = 2**12
"""Pixels: the largest side that images can be brought to."""

SMALLEST_CROP = 0.08
"""Share of the area that the random resized crop of streamed images of several sizes keeps at least, as is usual."""

MEASURED = 2000
"""Training images of a stream that its mean and deviation are measured on, a fixed stratified part."""


@dataclass(frozen=True)
class Status:
    """A data set, and what is prepared of it.

    Attributes:
        name: what `--data.name` takes.
        title: what tables and figures call it.
        prepared: whether it can be loaded.
        sizes: how many images it has: "train", "validation" and "test", or one key for each corruption.
        classes: how many classes it has.
        fingerprint: "sha256:..." of what is prepared, else empty.
        notice: what the user should know of it, else empty.
    """

    name: str
    title: str
    prepared: bool
    sizes: dict[str, int]
    classes: int = 0
    fingerprint: str = ""
    notice: str = ""


def list_datasets(root: Path | str | None = None) -> list[Status]:
    """Return every data set there is a row for, then the image folders prepared under names of their own."""
    own = sorted(path.stem for path in cache.folder(root).glob("*.safetensors") if path.stem not in SPECS)
    statuses = []
    for name in (*SPECS, *own):
        title = SPECS[name].title if name in SPECS else name
        try:
            statuses.append(_status(name, root))
        except FileNotFoundError:
            statuses.append(Status(name, title, prepared=False, sizes={}))
        except ValueError as error:
            statuses.append(Status(name, title, prepared=False, sizes={}, notice=str(error)))
    return statuses


def prepare(
    name: str,
    source: Path | str | None = None,
    *,
    size: int | None = None,
    replace: bool = False,
    test_images: Path | str | None = None,
    root: Path | str | None = None,
) -> Status:
    """Prepare a data set: read its publisher's files, hold out validation images, and write it to the cache.

    Images are decoded and written a few at a time, whatever their number. An interrupted preparation is continued by
    the next one from the same files.

    Args:
        name: a row of `ducat data list`, or a new name for an image folder; or a stream, as for `source`.
        source: a local archive or folder in the publisher's layout, which may be a subset; None is what the operating
            system has, else a download, and leaves a data set that is prepared already as it is. "folder:PATH",
            "wds:SHARDS" and "hf:NAME" are streams: only where each image is gets prepared, and its content hashed.
        size: for an image folder under a name of its own: bring every image to size x size pixels.
        replace: replace a data set of that name that holds other images.
        test_images: of a folder that is a stream: a file that names the test images to keep, one a line; folders before
            a name do not count.
        root: the cache folder; None is `DUCAT_DATA`, or the user's cache folder.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: the name cannot be used, a file is damaged, unsafe or of another data set, or other images are
            prepared under the name. What was prepared before is then still there.
        OSError: the disk is full; nothing is left of the attempt.
    """
    spec = SPECS.get(name)
    stream = streams.parse(str(source or name))
    if spec is not None and spec.resized_crop and source is not None and stream is None:
        stream = "folder", str(source)  # whatever is cropped as it is decoded cannot be decoded beforehand
    entry = cache.entry(streams.entry_name(name) if streams.parse(name) else name, root)
    if size is not None and (spec is not None or not 1 <= size <= LARGEST_SIDE):
        raise ValueError(
            f"size={size} does not fit: it is a number of pixels in [1, {LARGEST_SIDE}], for image folders without a "
            "row of their own"
        )
    if test_images is not None and (stream is None or stream[0] != "folder"):
        raise ValueError(f"test_images={test_images} does not fit: it is for folders that are decoded as they come")
    if name == "digits" and source is not None:
        raise ValueError(f"--from {source}: the digits come with scikit-learn and are always there")
    if name == "digits":
        if replace:
            raise ValueError("--replace: the digits come with scikit-learn and are always there")
        return _status(name, root)
    if source is None and entry.is_file() and not replace and size is None and test_images is None:
        try:
            return _status(name, root)
        except ValueError:  # it is damaged, or of another version
            if stream is None and (spec is None or not spec.sources):
                raise
    if stream is not None:
        tensors, header = _stream(name, spec, stream, size, None if test_images is None else Path(test_images))
        cache.write(entry, tensors, header, replace=replace)
        return _status(name, root)
    if spec is None and source is None:
        raise ValueError(f"data set {name} is unknown ({known_names(name)}); an image folder needs --from FOLDER")
    with _source(spec, None if source is None else Path(source), root) as path, open_files(path) as files:
        notices = [] if spec is None else _provenance(spec, path)
        stamp = _stamp(files, size)
        origin = path.resolve().name
        if spec is not None and spec.layout == "corruptions":
            tensors, classes, held_out = read_corruptions(files, spec), spec.classes or (), False
        else:
            splits = read_folder(files, None, size) if spec is None else READERS[spec.layout](files, spec)
            if not (len(splits.train) and len(splits.test)):
                raise ValueError(f"{path} has no {'test' if len(splits.train) else 'training'} images")
            sizes = len(splits.train), len(splits.test)
            if spec is not None and spec.sizes not in (None, sizes):
                notices.append(f"a subset of {sizes[0]:,} training and {sizes[1]:,} test images")
                spec = replace_fields(spec, title=f"{spec.title} (subset)")
            notices += splits.notices
            check_classes(path, splits.classes)
            classes, held_out = splits.classes, splits.validation is None
            tensors = named_tensors(*_parts(spec, splits))
        own = spec is None
        spec = spec or _folder_spec(name, splits.train.shape)

        def finish(written: Mapping[str, Tensor | Stored]) -> cache.Header:
            everything = {key: value.source() if isinstance(value, Stored) else value for key, value in written.items()}
            assert spec is not None
            row = measured(spec, everything, held_out) if own else spec
            shown = "; ".join(notice for notice in (*notices, _repeated(everything)) if notice)
            return cache.Header(row, classes, fingerprint(everything), origin, shown)

        draft = cache.Header(spec, classes, f"sha256:{64 * '0'}", origin, "; ".join(notices))
        cache.write(entry, tensors, draft, stamp=stamp, finish=finish, replace=replace)
    return _status(name, root)


def _repeated(tensors: Mapping[str, Tensor | Source]) -> str:
    """Say how many test images are trained on or chosen by as well, pixel by pixel; nothing where none is."""

    def marks(part: str) -> Iterator[bytes]:
        images = tensors.get(f"{part}.images")
        for chunk in images.chunks() if isinstance(images, Source) else ():
            yield from (hashlib.sha256(image.contiguous().numpy().data).digest() for image in chunk.images)

    learnt = {*marks("train"), *marks("validation")}
    count = sum(mark in learnt for mark in marks("test"))
    return f"test images that are among those for training or validation, pixel by pixel: {count:,}" if count else ""


def _stream(
    name: str, spec: DataSpec | None, stream: tuple[str, str], size: int | None, listed: Path | None
) -> tuple[dict[str, Tensor | Source], cache.Header]:
    """Return what the index of a stream holds, and what it says of itself."""
    kind, source = stream
    scanned = streams.STREAMS[kind].scan(source, spec, size)
    splits, notices = scanned.splits, list(scanned.splits.notices)
    assert splits.survey is not None
    check_classes(source, splits.classes)
    if not (len(splits.train) and len(splits.test)):
        raise ValueError(f"{source} has no {'test' if len(splits.train) else 'training'} images")
    sizes = len(splits.train), len(splits.test)
    if spec is not None and spec.sizes not in (None, sizes):
        notices.append(f"a subset of {sizes[0]:,} training and {sizes[1]:,} test images")
        spec = replace_fields(spec, title=f"{spec.title} (subset)")
    train, validation, test = _parts(spec, splits)
    if listed is not None:
        test = _listed(test, scanned.rows, listed)
        notices.append(f"the {len(test):,} test images that {listed.name} names")
    if spec is None:
        row = _folder_spec(name, splits.survey.shape)
        row = replace_fields(row, title=f"{Path(source).name or source}, streamed" if name.startswith(kind) else name)
        if not splits.survey.even:
            row = replace_fields(row, resized_crop=SMALLEST_CROP)
        some = splits.train.subset(stratified_order(splits.train.labels)[:MEASURED].sort().values)
        row = measured(row, {"train.images": some}, held_out=False)
    else:
        row = spec
    tensors: dict[str, Tensor | Source] = {f"rows.{key}": tensor for key, tensor in scanned.rows.pack().items()}
    for part, images in (("train", train), ("validation", validation), ("test", test)):
        assert isinstance(images, Lazy)
        tensors |= {f"{part}.labels": images.labels, f"{part}.ids": images.ids, f"{part}.rows": images.rows}
    parts = {key: tensor for key, tensor in tensors.items() if not key.startswith("rows.")}
    exact = f"{scanned.origin.digest} {row.shape} {row.shorter} {row.resample} {fingerprint(parts)}"
    exact = f"sha256:{hashlib.sha256(exact.encode()).hexdigest()}"
    return tensors, cache.Header(row, _named(splits.classes, row), exact, source, "; ".join(notices), scanned.origin)


def check_classes(where: Path | str, classes: Sequence[str]) -> None:
    """Raise ValueError for names of classes that would steer a terminal, or are no text."""
    for name in classes:
        if not name.isprintable():
            raise ValueError(f"{where}: the class {name!a} has characters that cannot be shown: rename it")


def _named(classes: tuple[str, ...], spec: DataSpec) -> tuple[str, ...]:
    """Return the names of classes that go by WordNet ids, or by their number in the order of these."""
    if spec.words is None:
        return classes
    lines = resources.files("ducat.data").joinpath(spec.words).read_text(encoding="utf-8").splitlines()
    words = dict(line.split("\t") for line in lines)
    if classes == tuple(map(str, range(len(words)))):
        return tuple(words.values())
    return tuple(words.get(name, name) for name in classes)


def _listed(test: Source, rows: streams.Rows, listed: Path) -> Source:
    """Return the test images that a file names."""
    assert isinstance(test, Lazy)
    wanted = {PurePath(line.strip()).name for line in listed.read_text().splitlines() if line.strip()}
    names = [PurePath(rows.name(row)).name for row in test.rows.tolist()]
    counts = Counter(names)
    twice = next((name for name in sorted(wanted) if counts[name] > 1), None)
    if twice is not None:
        raise ValueError(f"{listed} names {twice}, as {counts[twice]} test images are called: each needs its own name")
    missing = sorted(wanted - set(names))
    if missing or not wanted:
        raise ValueError(f"{listed} names {missing[0] if missing else 'nothing'}, which is not among the test images")
    return test.subset(torch.tensor([place for place, name in enumerate(names) if name in wanted]))


def verify(name: str, root: Path | str | None = None) -> Status:
    """Read all that is prepared of a data set again, and compare it with what was recorded then.

    Raises:
        FileNotFoundError: it is not prepared.
        ValueError: its file is damaged or has changed.
    """
    if name == "digits":
        return _status(name, root)
    entry = streams.entry_name(name) if streams.parse(name) else name
    _, header = cache.read(entry, root, verify=True)
    if header.stream is not None:
        spec, origin = SPECS.get(name), header.stream
        again = streams.STREAMS[origin.kind].scan("::".join(origin.paths), spec, origin.size).origin
        if again.digest != origin.digest:
            raise ValueError(f"{header.source} has changed since it was prepared: prepare {name} again")
    return _status(name, root)


def _status(name: str, root: Path | str | None) -> Status:
    if name == "digits":
        splits = read_digits()
        assert splits.validation is not None
        parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
        sizes = {part: len(images) for part, images in parts.items()}
        return Status(name, SPECS[name].title, True, sizes, len(splits.classes), fingerprint(named_tensors(**parts)))
    tensors, header = cache.read(streams.entry_name(name) if streams.parse(name) else name, root)
    if header.spec.corruption_of:
        sizes = {key: len(tensor) for key, tensor in tensors.items() if key != "labels"}
    else:
        sizes = {part: len(tensors[f"{part}.labels"]) for part in ("train", "validation", "test")}
    # A stream without a name of its own goes by its prefix and place.
    name = header.spec.name if header.spec.layout == "folder" else name
    return Status(name, header.spec.title, True, sizes, len(header.classes), header.fingerprint, header.notice)


@contextmanager
def _source(spec: DataSpec | None, source: Path | None, root: Path | str | None) -> Iterator[Path]:
    if source is not None:
        yield source
    elif spec is not None and spec.system_folder and Path(spec.system_folder).is_dir():
        yield Path(spec.system_folder)
    elif spec is None or not spec.sources:
        raise ValueError(f"data set {spec.name if spec else ''} is not offered for download: give a copy with --from")
    else:
        # Kept if anything fails, so that nothing is downloaded twice.
        folder = cache.folder(root) / "downloads" / spec.name
        files = [download(part, folder) for part in spec.sources]
        yield files[0] if len(files) == 1 else folder
        shutil.rmtree(folder)


def _provenance(spec: DataSpec, path: Path) -> list[str]:
    for part in spec.sources:
        file = path / part.file if path.is_dir() else path
        if not file.is_file() or not any(_hash(file, known) == known for known in part.hashes):
            return [f"{path.resolve().name} is not the published {spec.title}, by its hash"]
    return []


def _hash(path: Path, known: str) -> str:
    algorithm = known.split(":")[0]
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _stamp(files: Files, size: int | None) -> str:
    """Return what tells whether an interrupted preparation was of the same files: names, sizes, times, and the rule."""
    digest = hashlib.sha256(f"{cache.FORMAT} {PIL.__version__} {size}".encode())
    paths = [files.path / name for name in files.names] if files.path.is_dir() else [files.path]
    for path in paths:
        found = path.stat()
        digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _parts(spec: DataSpec | None, splits: Splits) -> tuple[Source, Source, Source]:
    if splits.validation is not None:
        return splits.train, splits.validation, splits.test
    wanted = DataSpec.validation if spec is None else spec.validation
    train, validation = hold_out(splits.train, max(1, min(wanted, len(splits.train) // 10)))
    return train, validation, splits.test


def _folder_spec(name: str, shape: tuple[int, int, int]) -> DataSpec:
    unknown = (0.0,) * shape[0]
    return DataSpec(name, name, "folder", shape, unknown, unknown, crop_padding=shape[1] // 8)


def measured(spec: DataSpec, tensors: Mapping[str, Tensor | Source], held_out: bool) -> DataSpec:
    """Return a row with the mean and deviation of all training images, of which some may have been held out."""
    counts = torch.zeros(spec.shape[0], 256, dtype=torch.int64)
    for part in ("train", "validation") if held_out else ("train",):
        images = tensors[f"{part}.images"]
        assert isinstance(images, Source)
        for chunk in images.chunks():
            for count, channel in zip(counts, chunk.images.unbind(1), strict=True):
                count += channel.flatten().bincount(minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts.double() / counts.sum(1, keepdim=True)
    means = (shares * levels).sum(1)
    # A channel that is the same everywhere must not be divided by zero.
    deviations = (shares * (levels - means[:, None]).square()).sum(1).sqrt().clamp_min(1 / 255)
    rounded = [tuple(round(value, 4) for value in values.tolist()) for values in (means, deviations)]
    return replace_fields(spec, mean=rounded[0], std=rounded[1])
