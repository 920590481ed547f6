"""Images too many to decode beforehand: where they are is prepared once, and they are decoded as they come.

A stream is known by its index: which image of which part is where, its label, and a fingerprint of all content. An
index makes every image reachable at random, so streams give the same batches as images in memory do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ducat.data import decode
from ducat.data.archives import is_hidden, open_files, shown
from ducat.data.encoded import Encoded
from ducat.data.images import Lazy
from ducat.data.progress import shown_progress
from ducat.data.readers import Splits, Survey, read_folder, survey
from ducat.data.specs import DataSpec
from ducat.installing import install


@runtime_checkable
class Rows(Protocol):
    """Encoded images by row. One can be sent to another process."""

    def read(self, row: int) -> bytes:
        """Return a row's file."""

    def name(self, row: int) -> str:
        """Return what messages call a row."""

    def pack(self) -> dict[str, Tensor]:
        """Return what `STREAMS[kind].unpack` makes the same rows from, besides `Origin.paths`."""


@dataclass(frozen=True)
class Origin:
    """Where a stream's files are, as its index says it.

    Attributes:
        kind: a key of `STREAMS`.
        paths: the files or the folder, or the name that a library knows them by.
        digest: of the content of all of them.
        size: as `prepare` was given it.
        marks: size and time of change of each path, where they tell that it is the same; else empty.
    """

    kind: str
    paths: tuple[str, ...]
    digest: str
    size: int | None = None
    marks: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ValueError if a file has changed since the index was made."""
        for path, mark in zip(self.paths, self.marks, strict=False):
            if _mark(Path(path)) != mark:
                raise ValueError(
                    f"{path} has changed or gone since its stream was prepared: prepare it again, with --from and "
                    "--replace"
                )


@dataclass(frozen=True)
class Scanned:
    """What a stream turned out to be.

    Attributes:
        splits: its parts, as they are decoded.
        rows: the rows that all parts are of.
        origin: where they are.
    """

    splits: Splits
    rows: Rows
    origin: Origin


def parse(source: str) -> tuple[str, str] | None:
    """Split "wds:SHARDS" and the like into a key of `STREAMS` and the rest; None if it is no such name."""
    kind, colon, rest = source.partition(":")
    return (kind, rest) if colon and kind in STREAMS and rest else None


def entry_name(source: str) -> str:
    """Return the name that the index of "wds:SHARDS" and the like is kept under."""
    kind, _, rest = source.partition(":")
    place = rest if kind == "hf" and not Path(rest).exists() else os.path.abspath(rest)
    return f"{kind}-{hashlib.sha256(place.encode()).hexdigest()[:16]}"


def pixels(rows: Rows, spec: DataSpec) -> Encoded:
    """Return rows as they are decoded for a data set: brought to its shape."""
    return Encoded(rows.read, rows.name, spec.shape, resize=True, shorter=spec.shorter, resample=spec.resample)


def _mark(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "gone"
    return f"{found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True)
class FileRows:
    """Files under a folder: their names relative to it, one after the other as bytes, and where each begins."""

    root: str
    names: Tensor
    edges: Tensor

    @classmethod
    def of(cls, root: str, names: Sequence[str]) -> FileRows:
        """Take files by name."""
        encoded = [os.fsencode(name) for name in names]
        edges = torch.tensor([0, *map(len, encoded)]).cumsum(0)
        return cls(root, torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8), edges)

    def _path(self, row: int) -> str:
        start, stop = self.edges[row : row + 2].tolist()
        return os.path.join(self.root, os.fsdecode(self.names[start:stop].numpy().tobytes()))

    def read(self, row: int) -> bytes:
        """Return a row's file."""
        with open(self._path(row), "rb") as file:
            return file.read()

    def name(self, row: int) -> str:
        """Return a row's path."""
        return shown(self._path(row))

    def pack(self) -> dict[str, Tensor]:
        """Return the names."""
        return {"names": self.names, "edges": self.edges}

    @classmethod
    def unpack(cls, origin: Origin, tensors: Mapping[str, Tensor]) -> FileRows:
        """Make the rows of an index."""
        return cls(origin.paths[0], tensors["names"], tensors["edges"])

    @classmethod
    def scan(cls, source: str, spec: DataSpec | None, size: int | None) -> Scanned:
        """Index an image folder; its digest is of every image."""
        root = os.path.abspath(source)
        if not os.path.isdir(root):
            remedy = "an archive is prepared without folder:, or as shards with wds:"
            if spec is not None and spec.resized_crop:
                remedy = f"{spec.title} is decoded as it comes: unpack it, or give shards with wds:"
            raise ValueError(f"{source} is not a folder: {remedy}")
        with open_files(Path(root)) as files:
            digest = hashlib.sha256()
            splits = read_folder(files, spec, size, digest.update)
            rows = cls.of(root, files.names)
        return Scanned(splits, rows, Origin("folder", (root,), digest.hexdigest(), size))


@dataclass(frozen=True)
class ShardRows:
    """Members of tar files: number of the file, offset and size of each."""

    shards: tuple[str, ...]
    places: Tensor

    @cached_property
    def _files(self) -> dict[tuple[int, int], int]:
        return {}

    def read(self, row: int) -> bytes:
        """Return a row's file."""
        shard, offset, size = self.places[row].tolist()
        # Open once in each process.
        key = os.getpid(), shard
        if key not in self._files:
            self._files[key] = os.open(self.shards[shard], os.O_RDONLY)
        content = os.pread(self._files[key], size, offset)
        if len(content) != size:
            raise ValueError(f"{self.name(row)} is cut short")
        return content

    def name(self, row: int) -> str:
        """Return a row's shard and place."""
        shard, offset, _ = self.places[row].tolist()
        return f"{self.shards[shard]}: the image at byte {offset:,}"

    def pack(self) -> dict[str, Tensor]:
        """Return the places."""
        return {"places": self.places}

    @classmethod
    def unpack(cls, origin: Origin, tensors: Mapping[str, Tensor]) -> ShardRows:
        """Make the rows of an index."""
        return cls(origin.paths, tensors["places"])

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "places": self.places}

    @classmethod
    def scan(cls, source: str, spec: DataSpec | None, size: int | None) -> Scanned:
        """Index shards as webdataset writes them: samples KEY.jpg (or another image) and KEY.cls, a number from 0.

        Shards are of the part that their names say: train, val or valid or validation, test; all of `train` if none
        does. A file classes.txt beside them names the classes, a line each. The digest is of the shards' own.
        """
        shards = _shards(source)
        parts = [_part(path) for path in shards]
        if not any(parts):
            parts = ["train"] * len(shards)
        places: dict[str, list[tuple[int, int, int]]] = {"train": [], "val": [], "test": []}
        labels: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        digest, left_out = hashlib.sha256(), Counter[str]()
        with shown_progress(f"Indexing {len(shards)} shards", sum(path.stat().st_size for path in shards)) as advance:
            for number, (path, part) in enumerate(zip(shards, parts, strict=True)):
                if part is None:
                    raise ValueError(f"{path}: the name says neither train nor val nor test, as those of others do")
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
                for label, offset, length in _samples(path, left_out):
                    places[part].append((number, offset, length))
                    labels[part].append(label)
                advance(path.stat().st_size)
        rows = cls(tuple(map(str, shards)), torch.tensor([p for part in places.values() for p in part]).view(-1, 3))
        top = max((label for part in labels.values() for label in part), default=-1)
        classes, notices = _class_names(shards[0].parent / "classes.txt", spec, top)
        notices += (
            [f"left out of shards: {', '.join(f'{n:,} .{kind}' for kind, n in left_out.items())}"] if left_out else []
        )
        found = survey(rows.read, rows.name, range(len(rows.places)), None if spec is None else spec.shape, size)
        counts = [len(part) for part in labels.values()]
        splits = _splits(rows, counts, [y for part in labels.values() for y in part], classes, notices, found)
        marks = tuple(map(_mark, shards))
        return Scanned(splits, rows, Origin("wds", rows.shards, digest.hexdigest(), size, marks))


@dataclass(frozen=True)
class TableRows:
    """Rows of a Hugging Face data set: the number of the split and the row of each."""

    source: str
    places: Tensor

    @cached_property
    def _tables(self) -> list[tuple[Any, str]]:
        return [(table, _column(table, "Image", self.source)) for _, table in _tables(self.source)]

    def read(self, row: int) -> bytes:
        """Return a row's file."""
        split, position = self.places[row].tolist()
        table, column = self._tables[split]
        cell = table[position][column]
        if cell["bytes"] is not None:
            return cell["bytes"]
        with open(cell["path"], "rb") as file:
            return file.read()

    def name(self, row: int) -> str:
        """Return a row's split and place."""
        split, position = self.places[row].tolist()
        return f"{self.source}: image {position:,} of split {split}"

    def pack(self) -> dict[str, Tensor]:
        """Return the places."""
        return {"places": self.places}

    @classmethod
    def unpack(cls, origin: Origin, tensors: Mapping[str, Tensor]) -> TableRows:
        """Make the rows of an index."""
        return cls(origin.paths[0], tensors["places"])

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "places": self.places}

    @classmethod
    def scan(cls, source: str, spec: DataSpec | None, size: int | None) -> Scanned:
        """Index a Hugging Face data set, from a folder or the local cache; its digest is of every image."""
        source = os.path.abspath(source) if Path(source).exists() else source
        numbers: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
        names: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
        classes: tuple[str, ...] | None = None
        tables = _tables(source)
        unknown = [split for split, _ in tables if _part(Path(split)) is None]
        left_out = unknown if len(tables) > 1 else []
        if len(left_out) == len(tables):
            raise ValueError(f"hf:{source}: call its splits train, validation and test: it has {', '.join(unknown)}")
        notices = [f"left out, as neither train nor validation nor test: {', '.join(left_out)}"] if left_out else []
        for number, (split, table) in enumerate(tables):
            part = _part(Path(split)) or "train"
            if split in left_out:  # it may hold images of the others
                continue
            column = _column(table, "ClassLabel", source, "label", "fine_label", "labels")
            feature = table.features[column]
            classes = tuple(getattr(feature, "names", None) or ()) or classes
            numbers[part] += [(number, row) for row in range(len(table))]
            names[part] += list(table.select_columns([column])[:][column])
        if classes is None:
            classes = tuple(map(str, sorted({name for part in names.values() for name in part})))
            number_of: Callable[[Any], int] = {name: label for label, name in enumerate(classes)}.__getitem__
            labels = [number_of(str(name)) for part in names.values() for name in part]
        else:
            labels = [int(name) for part in names.values() for name in part]
        if spec is not None and spec.classes not in (None, classes) and len(spec.classes or ()) != len(classes):
            raise ValueError(f"{source} has {len(classes)} classes, {spec.title} {len(spec.classes or ())}")
        notices += _check_order(source, classes, spec)
        bad = next((label for label in labels if not 0 <= label < len(classes)), None)
        if bad is not None:
            raise ValueError(
                f"{source}: label {bad} is outside [0, {len(classes) - 1}]: this part has no public labels"
            )
        rows = cls(source, torch.tensor([place for part in numbers.values() for place in part]).view(-1, 2))
        digest = hashlib.sha256()
        found = survey(
            rows.read, rows.name, range(len(labels)), None if spec is None else spec.shape, size, digest.update
        )
        counts = [len(part) for part in numbers.values()]
        names_of = spec.classes if spec is not None and spec.classes is not None else classes
        splits = _splits(rows, counts, labels, names_of, notices, found)
        return Scanned(splits, rows, Origin("hf", (source,), digest.hexdigest(), size))


STREAMS: dict[str, type[FileRows] | type[ShardRows] | type[TableRows]] = {
    "folder": FileRows,
    "wds": ShardRows,
    "hf": TableRows,
}
"""By the prefix of a data set's name."""


def _splits(
    rows: Rows,
    counts: Sequence[int],
    labels: Sequence[int],
    classes: tuple[str, ...],
    notices: Sequence[str],
    found: Survey,
) -> Splits:
    """Divide rows that come as train, val and test into these, by the rule for image folders."""
    encoded = Encoded(rows.read, rows.name, found.shape, resize=True)
    everything = Lazy(encoded, torch.tensor(labels, dtype=torch.int64), torch.arange(len(labels)))
    return Splits.of(classes, everything, counts, (*notices, *found.remarks), found)


def _part(path: Path) -> str | None:
    found = re.search(r"(?:^|[^a-z])(train|validation|valid|val|test)(?:[^a-z]|$)", path.name.lower())
    return {"train": "train", "test": "test"}.get(found[1], "val") if found else None


def _shards(source: str) -> list[Path]:
    """Return the files of a folder, of a pattern with * or {000..012}, or of several that are joined by ::."""
    found: list[Path] = []
    for pattern in source.split("::"):
        for path in map(Path, _braces(pattern)):
            if path.is_dir():
                found += sorted(path.glob("*.tar"))
            elif "*" in path.name or "?" in path.name:
                found += sorted(path.parent.glob(path.name))
            else:
                found.append(path)
    missing = next((path for path in found if not path.is_file()), None)
    if missing is not None or not found:
        kind = "wds: reads local files, so fetch or mount them" if "://" in source or source.startswith("pipe") else ""
        raise FileNotFoundError(f"{missing or source}: there are no such shards{kind and f' ({kind})'}")
    path, times = Counter(path.resolve() for path in found).most_common(1)[0]
    if times > 1:  # and its images might be trained on and tested with
        raise ValueError(f"wds:{source}: {path} is named {times} times: name it once")
    return [path.absolute() for path in found]


def _braces(pattern: str) -> Iterator[str]:
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [
        [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    for numbers in product(*ranges):
        yield "".join(text + number for text, number in zip(pieces[::3], [*numbers, ""], strict=True))


def _samples(path: Path, left_out: Counter[str]) -> Iterator[tuple[int, int, int]]:
    """Yield label, offset and size of each image of a shard."""
    key, label = "", None
    images: dict[str, tuple[int, int]] = {}

    def sample() -> tuple[int, int, int]:
        # Of KEY.png and KEY.mask.png, the first is the image.
        chosen = [kind for kind in images if "." not in kind] or list(images)
        if len(chosen) > 1:
            raise ValueError(f"{path}: sample {shown(key)} has {len(chosen)} images: .{', .'.join(chosen)}; leave one")
        if not chosen or label is None:
            raise ValueError(f"{path}: sample {shown(key)} has no {'.cls with its label' if chosen else 'image'}")
        left_out.update(kind for kind in images if kind not in chosen)
        return label, *images[chosen[0]]

    try:
        with tarfile.open(path, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # which would grow by a kilobyte a file
                name = info.name.removeprefix("./")
                if not info.isreg() or is_hidden(name):
                    continue
                folder, _, base = name.rpartition("/")
                stem, _, kind = base.partition(".")
                if key and f"{folder}/{stem}" != key:
                    yield sample()
                    images, label = {}, None
                key = f"{folder}/{stem}"
                if f".{kind.lower()}".endswith(decode.SUFFIXES):
                    images[kind] = info.offset_data, info.size
                elif kind == "cls":
                    file = archive.extractfile(info)
                    text = b"" if file is None else file.read(20)
                    if not text.strip().isdigit():
                        raise ValueError(f"{path}: {shown(info.name)} holds {text!r}, not the number of a class")
                    label = int(text)
                else:
                    left_out[kind] += 1
        if key:
            yield sample()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole tar file ({' '.join(str(error).split())}): shards are plain .tar"
        ) from error


def _class_names(path: Path, spec: DataSpec | None, top: int) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of the classes, and what is to be said of them."""
    classes, notices = spec.classes if spec is not None else None, []
    if path.is_file():
        named = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        notices = _check_order(str(path), named, spec)
        classes = classes or named
    if classes is None:
        classes = tuple(str(label) for label in range(top + 1))
    if top >= len(classes):
        raise ValueError(f"label {top} is outside [0, {len(classes) - 1}], the classes of {path}")
    if len(classes) < 2:
        raise ValueError(f"{path.parent}: the shards hold {len(classes)} classes: at least 2 are needed")
    return classes, notices


def _check_order(source: str, named: Sequence[str], spec: DataSpec | None) -> list[str]:
    """See that a stream numbers its classes as the data set does whose name it is given; return what is to be said.

    Raises:
        ValueError: if the names are the same ones in another order.
    """
    expected = None if spec is None else spec.classes
    if spec is None or expected is None or not named:
        return []
    plain = [[re.sub(r"[\W_]+", " ", name).strip().lower() for name in names] for names in (named, expected)]
    if plain[0] == plain[1]:
        return []
    if sorted(plain[0]) == sorted(plain[1]):
        place = next(place for place, (one, other) in enumerate(zip(*plain, strict=True)) if one != other)
        raise ValueError(
            f"{source}: class {place} is {named[place]}, of {spec.title} it is {expected[place]}: number the classes "
            "in the same order, or prepare the data under a name of their own"
        )
    return [
        f"classes are numbered as there, and called as those of {spec.title}: {named[0]} is {expected[0]}, and so on"
    ]


def _tables(source: str) -> list[tuple[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"hf: needs the package datasets: {install('hf')}")
    import datasets

    try:
        saved = Path(source) / "dataset_dict.json", Path(source) / "state.json"
        load = datasets.load_from_disk if any(file.is_file() for file in saved) else datasets.load_dataset
        found = load(source)
    except Exception as error:  # what that library raises is its own
        raise ValueError(f"hf:{source} cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    tables = found.items() if isinstance(found, dict) else [("train", found)]
    return [
        (name, table.cast_column(_column(table, "Image", source), datasets.Image(decode=False)))
        for name, table in tables
    ]


def _column(table: Any, kind: str, source: str, *names: str) -> str:
    typed = [name for name, feature in table.features.items() if type(feature).__name__ == kind]
    found = typed or [name for name in names if name in table.features]
    if not found:
        raise ValueError(f"hf:{source} has no column of {kind} (its columns: {', '.join(table.features)})")
    return found[0]
