"""Files in a folder, a zip or a tar archive, read one by one into memory: nothing is ever extracted to disk."""

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

# No data set shrinks twentyfold when it is packed, and small archives may hold blank images.
LARGEST_EXPANSION = 20
ALWAYS_ALLOWED = 2**30
LEFT_BEHIND = ("__MACOSX", "Thumbs.db", "desktop.ini", "lost+found")

_PACKERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}

_DAMAGE = (
    lzma.LZMAError,
    OSError,
    EOFError,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
    RuntimeError,
    NotImplementedError,
)


class Files:
    """The regular files under one folder or in one archive.

    Attributes:
        path: the folder or archive, for messages.
        names: the files' names relative to it, sorted, with forward slashes.
        empty: names of folders without any file in them, sorted.
    """

    def __init__(
        self, path: Path, names: Iterable[str], read: Callable[[int], bytes], folders: Iterable[str] = ()
    ) -> None:
        self.path = path
        self.names = tuple(names)
        self.empty = tuple(sorted(name for name in folders if not self._starts(f"{name}/")))
        self._read = read

    def _starts(self, prefix: str) -> bool:
        position = bisect_left(self.names, prefix)
        return position < len(self.names) and self.names[position].startswith(prefix)

    def position(self, name: str) -> int:
        """Return the place of `name` in `names`.

        Raises:
            ValueError: there is no such file.
        """
        position = bisect_left(self.names, name)
        if position == len(self.names) or self.names[position] != name:
            raise ValueError(f"{self.path} has no {shown(name)}")
        return position

    def read(self, file: str | int) -> bytes:
        """Return the content of a file, given by its name or its place in `names`.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        position = self.position(file) if isinstance(file, str) else file
        try:
            return self._read(position)
        except _DAMAGE as error:
            name = shown(self.names[position])
            raise ValueError(f"{self.path}: {name} is truncated or corrupt ({_line(error)})") from error

    def find(self, name: str) -> str:
        """Return the full name of the one file called `name`, in whichever folder it is.

        Raises:
            ValueError: there is none, or more than one.
        """
        found = [candidate for candidate in self.names if f"/{candidate}".endswith(f"/{name}")]
        if len(found) != 1:
            raise ValueError(
                f"{self.path} has {'no' if not found else 'more than one'} {name}: is it another data set?"
            )
        return found[0]


def shown(name: str) -> str:
    """Return a name as a message can print it: what would steer a terminal, or is no text, is escaped."""
    return name if name.isprintable() else ascii(name)


def is_hidden(name: str) -> bool:
    """Tell whether a file is one that systems and tools leave behind: a part of its name begins with a dot, or so."""
    return any(part.startswith(".") or part in LEFT_BEHIND for part in name.split("/"))


@contextmanager
def open_files(path: Path) -> Iterator[Files]:
    """Open a folder, a zip, or a tar archive, plain or packed by gzip, bzip2 or xz, as its content says, not its name.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the archive is damaged, or is not safe: it has links, devices, absolute names, names with "..", or
            more unpacked bytes than any honest archive of its size; or it is a pipe or a device; or a folder in the
            folder cannot be read, or a link in it leads nowhere or in a circle. Other links in a folder are followed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path} is neither a folder nor a file: a pipe or a device cannot be read twice")
    with ExitStack() as stack:
        try:
            files = _folder(path) if path.is_dir() else _archive(path, stack)
        except _DAMAGE as error:
            raise ValueError(f"{path} is not a whole zip or tar archive ({_line(error)})") from error
        yield files


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _folder(path: Path) -> Files:
    def unreadable(error: OSError) -> None:  # else the walk goes on without a word
        if not is_hidden(os.path.relpath(error.filename, path)):
            raise ValueError(f"{path}: the folder {shown(str(error.filename))} cannot be read ({error.strerror})")

    names, folders = [], []
    for place, inner, files in os.walk(path, onerror=unreadable, followlinks=True):
        relative = Path(place).relative_to(path)
        prefix = "" if relative == Path() else f"{relative.as_posix()}/"
        around = {os.path.realpath(path / above) for above in (relative, *relative.parents)}
        for name in inner:
            if os.path.realpath(os.path.join(place, name)) in around:
                raise ValueError(f"{path}: {shown(prefix + name)} is a link to a folder that it lies in: remove it")
        for name in files:
            file = os.path.join(place, name)
            if os.path.isfile(file):
                names.append(prefix + name)
            elif os.path.islink(file) and not is_hidden(prefix + name) and not os.path.exists(file):
                raise ValueError(f"{path}: {shown(prefix + name)} is a link to nothing: mend it, or remove it")
        folders += [prefix + name for name in inner]
    names.sort()
    return Files(path, names, lambda position: (path / names[position]).read_bytes(), folders)


def _archive(path: Path, stack: ExitStack) -> Files:
    file: BinaryIO = stack.enter_context(path.open("rb"))
    magic = file.read(6)
    file.seek(0)
    limit = max(ALWAYS_ALLOWED, LARGEST_EXPANSION * path.stat().st_size)
    if magic.startswith(b"PK"):
        return _zip(path, stack.enter_context(zipfile.ZipFile(file)), limit)
    for start, unpacker in _PACKERS.items():
        if magic.startswith(start):
            file = stack.enter_context(_unpacked(path, unpacker(file), limit))
    return _tar(path, file, limit)


@contextmanager
def _unpacked(path: Path, stream: Any, limit: int) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as unpacked, stream:
        while chunk := stream.read(2**20):
            unpacked.write(chunk)
            _check_size(path, unpacked.tell(), limit)
        unpacked.seek(0)
        yield unpacked


def _zip(path: Path, archive: zipfile.ZipFile, limit: int) -> Files:
    members, folders, size = {}, [], 0
    for info in archive.infolist():
        _check_name(path, info.filename)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(
                f"{path}: {shown(info.filename)} is a link, which a data set has no use for; nothing was read"
            )
        # The format wants forward slashes; .NET and old PowerShell wrote others.
        name = info.filename.replace("\\", "/")
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
        else:
            members[name] = info
        size += info.file_size
    # The declared sizes bound what is read: zipfile reads no further.
    _check_size(path, size, limit)
    names = sorted(members)
    return Files(path, names, lambda position: archive.read(members[names[position]]), folders)


def _tar(path: Path, file: BinaryIO, limit: int) -> Files:
    members: dict[str, tuple[int, int]] = {}
    folders, size = [], 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined] # which would grow by a kilobyte a file
            _check_name(path, info.name)
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise ValueError(
                    f"{path}: {shown(info.name)} is a link or a device, which a data set has no use for; nothing was "
                    "read"
                )
            if info.isreg():
                members[info.name.removeprefix("./")] = info.offset_data, info.size
                size += info.size
            else:
                folders.append(info.name.removeprefix("./"))
    _check_size(path, size, limit)
    names = sorted(members)

    def read(position: int) -> bytes:
        offset, size = members[names[position]]
        file.seek(offset)
        content = file.read(size)
        if len(content) != size:
            raise EOFError(f"{len(content)} of {size} bytes are there")
        return content

    return Files(path, names, read, folders)


def _check_name(path: Path, name: str) -> None:
    # Windows' reading of a name is the wider one: it takes both slashes and knows drives.
    if PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
        raise ValueError(f"{path}: {name!r} points outside the archive; nothing was read")


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f"{path} unpacks to more than {limit:,} bytes, which no data set of its size does; nothing was read"
        )
