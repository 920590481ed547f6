"""`ducat data list | prepare | verify`: from a publisher's files to a prepared data set."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ducat.data import cache
from ducat.data.archives import open_files
from ducat.data.download import download
from ducat.data.images import Images, fingerprint, hold_out, named_tensors
from ducat.data.loading import load
from ducat.data.readers import READERS, Splits, read_corruptions, read_folder
from ducat.data.specs import SPECS, DataSpec


@dataclass(frozen=True)
class Status:
    """A data set, and what is prepared of it.

    Attributes:
        name: what `--data.name` takes.
        title: what tables and figures call it.
        prepared: whether it can be loaded.
        sizes: how many images it has: "train", "validation" and "test", or one key for each corruption.
        fingerprint: "sha256:..." of what is prepared, else empty.
        notice: what the user should know of it, else empty.
    """

    name: str
    title: str
    prepared: bool
    sizes: dict[str, int]
    fingerprint: str = ""
    notice: str = ""


def list_datasets(root: Path | None = None) -> list[Status]:
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


def prepare(name: str, source: Path | None = None, *, size: int | None = None, root: Path | None = None) -> Status:
    """Prepare a data set: read its publisher's files, hold out validation images, and write it to the cache.

    Args:
        name: a row of `ducat data list`, or a new name for an image folder.
        source: a local archive or folder in the publisher's layout, which may be a subset; None is what the operating
            system has, else a download, and leaves a data set that is prepared already as it is.
        size: for an image folder under a name of its own: bring every image to size x size pixels.
        root: the cache folder; None is `DUCAT_DATA`, or the user's cache folder.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: the name cannot be used, or a file is damaged, unsafe or of another data set. What was prepared
            before is then still there.
    """
    spec = SPECS.get(name)
    if size is not None and (spec is not None or size < 1):
        raise ValueError(
            f"size={size} does not fit: it is a number of pixels, for image folders without a row of their own"
        )
    if name == "digits" or (source is None and cache.entry(name, root).is_file()):
        return _status(name, root)
    if spec is None:
        if source is None:
            raise ValueError(
                f"data set {name} is unknown (known: {', '.join(SPECS)}); an image folder needs --from FOLDER"
            )
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
            raise ValueError(f"{name!r} cannot name a data set: use a-z, 0-9, '.', '_' and '-'")
    with _source(spec, source, root) as path, open_files(path) as files:
        notices = [] if spec is None else _provenance(spec, path)
        if spec is not None and spec.layout == "corruptions":
            classes, tensors = spec.classes or (), read_corruptions(files, spec)
        else:
            splits = read_folder(files, None, size) if spec is None else READERS[spec.layout](files, spec)
            if not (len(splits.train) and len(splits.test)):
                raise ValueError(f"{path} has no {'test' if len(splits.train) else 'training'} images")
            spec = spec or _folder_spec(name, splits)
            sizes = len(splits.train), len(splits.test)
            if spec.sizes not in (None, sizes):
                notices.append(f"a subset of {sizes[0]:,} training and {sizes[1]:,} test images")
                spec = replace(spec, title=f"{spec.title} (subset)")
            notices += splits.notices
            classes, tensors = splits.classes, named_tensors(*_parts(spec, splits))
        header = cache.Header(spec, classes, fingerprint(tensors), path.resolve().name, "; ".join(notices))
        cache.write(cache.entry(name, root), tensors, header)
    return _status(name, root)


def verify(name: str, root: Path | None = None) -> Status:
    """Read all that is prepared of a data set again, and compare it with what was recorded then.

    Raises:
        FileNotFoundError: it is not prepared.
        ValueError: its file is damaged or has changed.
    """
    if name != "digits":
        cache.read(name, root, verify=True)
    return _status(name, root)


def _status(name: str, root: Path | None) -> Status:
    if name == "digits":
        dataset = load(name)
        sizes = {part: len(getattr(dataset, part)) for part in ("train", "validation", "test")}
        return Status(name, dataset.spec.title, True, sizes, dataset.fingerprint)
    tensors, header = cache.read(name, root)
    if header.spec.corruption_of:
        sizes = {key: len(tensor) for key, tensor in tensors.items() if key != "labels"}
    else:
        sizes = {part: len(tensors[f"{part}.labels"]) for part in ("train", "validation", "test")}
    return Status(name, header.spec.title, True, sizes, header.fingerprint, header.notice)


@contextmanager
def _source(spec: DataSpec | None, source: Path | None, root: Path | None) -> Iterator[Path]:
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


def _parts(spec: DataSpec, splits: Splits) -> tuple[Images, Images, Images]:
    if splits.validation is not None:
        return splits.train, splits.validation, splits.test
    train, validation = hold_out(splits.train, max(1, min(spec.validation, len(splits.train) // 10)))
    return train, validation, splits.test


def _folder_spec(name: str, splits: Splits) -> DataSpec:
    images = splits.train.images
    counts = [channel.flatten().bincount(minlength=256).double() for channel in images.unbind(1)]
    levels = torch.arange(256, dtype=torch.float64) / 255
    means = [float(count @ levels / count.sum()) for count in counts]
    # A channel that is the same everywhere must not be divided by zero.
    deviations = [
        max(float((count @ (levels - mean).square() / count.sum()).sqrt()), 1 / 255)
        for count, mean in zip(counts, means, strict=True)
    ]
    channels, height, width = images.shape[1:]
    return DataSpec(
        name=name,
        title=name,
        layout="folder",
        shape=(channels, height, width),
        mean=tuple(round(mean, 4) for mean in means),
        std=tuple(round(deviation, 4) for deviation in deviations),
        crop_padding=height // 8,
    )
