"""Where prepared data sets live: one safetensors file each, which appears whole or not at all."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ducat.data.images import fingerprint
from ducat.data.specs import SPECS, DataSpec

FORMAT = 1


@dataclass(frozen=True)
class Header:
    """What a prepared data set says of itself.

    Attributes:
        spec: its row; for an image folder without one, the row made from its images.
        classes: the class names, in the order of the labels.
        fingerprint: of everything in it.
        source: the file or folder that it was made from.
        notice: what its user should know, for example that it is a subset; else empty.
    """

    spec: DataSpec
    classes: tuple[str, ...]
    fingerprint: str
    source: str
    notice: str


def folder(root: Path | None = None) -> Path:
    """Return the cache folder: `root`, else the environment's DUCAT_DATA, else the user's cache folder."""
    import platformdirs

    return Path(root or os.environ.get("DUCAT_DATA") or platformdirs.user_cache_dir("ducat")).expanduser()


def entry(name: str, root: Path | None = None) -> Path:
    """Return the file that holds the data set `name` once it is prepared."""
    return folder(root) / f"{name}.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write a prepared data set, replacing one that is there, so that no reader ever sees a part of it."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(header)})
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".preparing-") as place:
        part = Path(place) / path.name
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"ducat": text})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)


def read(name: str, root: Path | None = None, *, verify: bool = False) -> tuple[dict[str, Tensor], Header]:
    """Read a prepared data set. Its tensors are mapped from the file, so they take memory only as they are used.

    Args:
        name: the data set.
        root: the cache folder, as for `folder`.
        verify: read everything, and compare its fingerprint with the one in the header.

    Raises:
        FileNotFoundError: it is not prepared.
        ValueError: the file is truncated, corrupt, or of another version of the format.
    """
    from safetensors import SafetensorError, safe_open

    path = entry(name, root)
    if not path.is_file():
        known = "" if name in SPECS else f" (known: {', '.join(SPECS)})"
        source = "[--from ARCHIVE]" if name in SPECS and SPECS[name].sources else "--from FOLDER-OR-ZIP"
        raise FileNotFoundError(f"data set {name} is not prepared{known}: run `ducat data prepare {name} {source}`")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["ducat"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is truncated or corrupt: run `ducat data prepare {name}` again") from error
    if header.pop("format") != FORMAT:
        raise ValueError(f"{path} is of another version of ducat: run `ducat data prepare {name}` again")
    if verify and fingerprint(tensors) != header["fingerprint"]:
        raise ValueError(f"{path} has changed since it was made: run `ducat data prepare {name}` again")
    return tensors, _header(name, header)


def _header(name: str, fields: dict[str, Any]) -> Header:
    stored: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.pop("spec").items()
    }
    # The settings of a row may have been improved since; the title says what the file holds.
    spec = dataclasses.replace(SPECS[name], title=stored["title"]) if name in SPECS else DataSpec(**stored)
    return Header(spec, tuple(fields.pop("classes")), **fields)
