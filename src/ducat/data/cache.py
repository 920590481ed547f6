"""Where prepared data sets live: one safetensors file each, which appears whole or not at all."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ducat.data.images import Images, Source, fingerprint
from ducat.data.progress import Advance, shown_progress
from ducat.data.specs import SPECS, DataSpec, known_names
from ducat.data.stored import Layout, Stored
from ducat.data.streams import Origin

FORMAT = 1
LONGEST_NAME = 100


@dataclass(frozen=True)
class Header:
    """What a prepared data set says of itself.

    Attributes:
        spec: its row; for an image folder without one, the row made from its images.
        classes: the class names, in the order of the labels.
        fingerprint: of everything in it.
        source: the file or folder that it was made from.
        notice: what its user should know, for example that it is a subset; else empty.
        stream: where the images are, if they are decoded as they come; None if they are in the file.
    """

    spec: DataSpec
    classes: tuple[str, ...]
    fingerprint: str
    source: str
    notice: str
    stream: Origin | None = None


def folder(root: Path | str | None = None) -> Path:
    """Return the cache folder: `root`, else the environment's DUCAT_DATA, else the user's cache folder."""
    import platformdirs

    return Path(root or os.environ.get("DUCAT_DATA") or platformdirs.user_cache_dir("ducat")).expanduser()


def entry(name: str, root: Path | str | None = None) -> Path:
    """Return the file that holds the data set `name` once it is prepared.

    Raises:
        ValueError: no data set can have that name.
    """
    if len(name) > LONGEST_NAME or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise ValueError(
            f"{name[:LONGEST_NAME]!r} cannot name a data set: use a-z, 0-9, '.', '_' and '-', at most {LONGEST_NAME}"
        )
    return folder(root) / f"{name}.safetensors"


def write(
    path: Path,
    tensors: Mapping[str, Tensor | Source],
    header: Header,
    *,
    stamp: str = "",
    finish: Callable[[Mapping[str, Tensor | Stored]], Header] | None = None,
    replace: bool = True,
) -> None:
    """Write a prepared data set so that no reader ever sees a part of it, holding a few images in memory at a time.

    What an interruption leaves is continued by the next call with the same stamp; any error leaves nothing.

    Args:
        path: the file.
        tensors: its content, by name.
        header: what it says of itself.
        stamp: says of lazy images what they are, as far as that can be told without reading them.
        finish: makes the final header from what has been written.
        replace: whether a file that is there with another fingerprint may be replaced.

    Raises:
        ValueError: there is a data set of another fingerprint, or another process is preparing this one.
        OSError: the disk is full, or cannot be written to.
    """
    from filelock import FileLock, Timeout

    place = path.parent / f".preparing-{path.stem}"
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / "lock", timeout=0):
            part = _fill(place, tensors, header, stamp)
            layout = Layout.read(part)
            done = header if finish is None else finish(layout.open(part))
            _refuse_another(path, done, replace)
            with part.open("r+b") as file:
                file.write(layout.header(_metadata(done)))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
    except Timeout as error:
        raise ValueError(f"another process is preparing {path.stem}: wait for it") from error
    except OSError as error:
        shutil.rmtree(place, ignore_errors=True)
        raise OSError(
            error.errno, f"{error.strerror or error}: {path.stem} was not prepared, nothing is left"
        ) from error
    except Exception:
        shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)


def _fill(place: Path, tensors: Mapping[str, Tensor | Source], header: Header, stamp: str) -> Path:
    part, journal = place / "part", place / "journal.json"
    layout = Layout.plan(tensors, _metadata(header))
    begun = {"stamp": stamp, "size": layout.size, "done": 0}
    if stamp and part.is_file() and journal.is_file():
        earlier = json.loads(journal.read_text())
        if {**earlier, "done": 0} == begun:
            begun = earlier
    images = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Source)}
    with part.open("r+b" if begun["done"] else "wb") as file:
        if not begun["done"]:
            # A disk that is too small says so now, not after hours.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, layout.size)
            file.write(layout.header(_metadata(header)))
            for name in tensors.keys() - images.keys():
                tensor = tensors[name]
                assert isinstance(tensor, Tensor)
                file.seek(layout.entries[name][2])
                file.write(tensor.contiguous().numpy().data)
        with shown_progress(
            f"Preparing {place.name.removeprefix('.preparing-')}", sum(map(len, images.values()))
        ) as advance:
            seen = 0
            for name, source in images.items():
                file.seek(layout.entries[name][2])
                seen = _append(file, source, seen, begun, journal, advance)
    return part


def _append(file: BinaryIO, source: Source, seen: int, begun: dict[str, Any], journal: Path, advance: Advance) -> int:
    """Write the images after the first `begun["done"]` of the file, of which `seen` come before this source."""
    start = file.tell()
    skipped = min(len(source), max(0, begun["done"] - seen))
    advance(skipped)
    rest = source.subset(torch.arange(skipped, len(source)))
    file.seek(start + skipped * math.prod(source.shape))
    done = seen + skipped
    for chunk in rest.chunks():
        file.write(chunk.images.contiguous().numpy().data)
        done += len(chunk)
        advance(len(chunk))
        if not isinstance(source, Images):
            file.flush()
            os.fdatasync(file.fileno())
            note = journal.with_suffix(".new")
            note.write_text(json.dumps({**begun, "done": done}))
            note.replace(journal)
    return seen + len(source)


def _refuse_another(path: Path, header: Header, replace: bool) -> None:
    if replace or not path.is_file():
        return
    try:
        there = _read_header(path)["fingerprint"]
    except ValueError:
        return  # damaged: nothing is lost with it
    if there != header.fingerprint:
        raise ValueError(
            f"{path.stem} is prepared already, with other images ({there[:19]}..., not {header.fingerprint[:19]}...), "
            "which runs may have been trained on: choose another name, or replace it with --replace"
        )


def _metadata(header: Header) -> dict[str, str]:
    return {"ducat": json.dumps({"format": FORMAT, **dataclasses.asdict(header)})}


def read(
    name: str, root: Path | str | None = None, *, verify: bool = False
) -> tuple[dict[str, Tensor | Stored], Header]:
    """Read a prepared data set: labels into memory, and images as rows that are fetched as they are asked for.

    Args:
        name: the data set.
        root: the cache folder, as for `folder`.
        verify: read everything, and compare its fingerprint with the one in the header; a stream's images are not
            in the file.

    Raises:
        FileNotFoundError: it is not prepared.
        ValueError: the file is truncated, corrupt, or of another version of the format.
    """
    path = entry(name, root)
    if not path.is_file():
        known = "" if name in SPECS else f" ({known_names(name)})"
        where, option = ("", "") if root is None else (f" in {root}", f" --root {shlex.quote(str(root))}")
        raise FileNotFoundError(f"data set {name} is not prepared{where}{known}: run {_command(name, option)}")
    header = _read_header(path)
    tensors = Layout.read(path).open(path)
    if verify and not header.get("stream"):
        everything = {key: value.source() if isinstance(value, Stored) else value for key, value in tensors.items()}
        if fingerprint(everything) != header["fingerprint"]:
            raise ValueError(f"{path} has changed since it was made: run {_command(name, ' --replace')}")
    return tensors, _header(name, header)


def _command(name: str, options: str = "") -> str:
    source = "[--from ARCHIVE]" if name in SPECS and SPECS[name].sources else "--from FOLDER-OR-ZIP"
    return f"`ducat data prepare {name}{options} {source}`"


def _read_header(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["ducat"])
            version = header.pop("format")
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or corrupt: run {_command(path.stem)}") from error
    if version != FORMAT or not {"spec", "classes", "fingerprint", "source", "notice"} <= header.keys():
        raise ValueError(f"{path} is of another version of ducat: run {_command(path.stem)}")
    return header


def _header(name: str, fields: dict[str, Any]) -> Header:
    stored: dict[str, Any] = {key: _tuples(value) for key, value in fields.pop("spec").items()}
    # The settings of a row may have been improved since; the title says what the file holds.
    spec = dataclasses.replace(SPECS[name], title=stored["title"]) if name in SPECS else DataSpec(**stored)
    if fields.get("stream"):
        fields["stream"] = Origin(**{key: _tuples(value) for key, value in fields["stream"].items()})
    return Header(spec, tuple(fields.pop("classes")), **fields)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
