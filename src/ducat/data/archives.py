"""Files in a folder, a zip or a tar archive, read one by one into memory: nothing is ever extracted to disk."""

import gzip
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

# No data set shrinks twentyfold when it is packed, and small archives may hold blank images.
LARGEST_EXPANSION = 20
ALWAYS_ALLOWED = 2**30

_DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, RuntimeError, NotImplementedError)


class Files:
    """The regular files under one folder or in one archive.

    Attributes:
        path: the folder or archive, for messages.
        names: the files' names relative to it, sorted, with forward slashes.
    """

    def __init__(self, path: Path, members: Mapping[str, Any], read: Callable[[Any], bytes]) -> None:
        self.path = path
        self.names = tuple(sorted(members))
        self._members = members
        self._read = read

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        if name not in self._members:
            raise ValueError(f"{self.path} has no {name}")
        try:
            return self._read(self._members[name])
        except _DAMAGE as error:
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


@contextmanager
def open_files(path: Path) -> Iterator[Files]:
    """Open a folder, a zip, or a tar archive, plain or gzipped; its content decides which, not its name.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the archive is damaged, or is not safe: it has links, devices, absolute names, names with "..", or
            more unpacked bytes than any honest archive of its size.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with ExitStack() as stack:
        try:
            files = _folder(path) if path.is_dir() else _archive(path, stack)
        except _DAMAGE as error:
            raise ValueError(f"{path} is not a whole zip or tar archive ({_line(error)})") from error
        yield files


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _folder(path: Path) -> Files:
    members = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return Files(path, members, Path.read_bytes)


def _archive(path: Path, stack: ExitStack) -> Files:
    file: BinaryIO = stack.enter_context(path.open("rb"))
    magic = file.read(4)
    file.seek(0)
    limit = max(ALWAYS_ALLOWED, LARGEST_EXPANSION * path.stat().st_size)
    if magic.startswith(b"PK"):
        return _zip(path, stack.enter_context(zipfile.ZipFile(file)), limit)
    if magic.startswith(b"\x1f\x8b"):
        file = stack.enter_context(_gunzip(path, file, limit))
    return _tar(path, stack.enter_context(tarfile.open(fileobj=file, mode="r:")), limit)


@contextmanager
def _gunzip(path: Path, packed: BinaryIO, limit: int) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as unpacked, gzip.open(packed) as stream:
        while chunk := stream.read(2**20):
            unpacked.write(chunk)
            _check_size(path, unpacked.tell(), limit)
        unpacked.seek(0)
        yield unpacked


def _zip(path: Path, archive: zipfile.ZipFile, limit: int) -> Files:
    members = {}
    for info in archive.infolist():
        _check_name(path, info.filename)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"{path}: {info.filename} is a link, which a data set has no use for; nothing was read")
        if not info.is_dir():
            members[info.filename] = info
    # The declared sizes bound what is read: zipfile reads no further.
    _check_size(path, sum(info.file_size for info in members.values()), limit)
    return Files(path, members, archive.read)


def _tar(path: Path, archive: tarfile.TarFile, limit: int) -> Files:
    members = {}
    for info in archive.getmembers():
        _check_name(path, info.name)
        if not (info.isreg() or info.isdir()) or info.issparse():
            raise ValueError(
                f"{path}: {info.name} is a link or a device, which a data set has no use for; nothing was read"
            )
        if info.isreg():
            members[info.name] = info
    _check_size(path, sum(info.size for info in members.values()), limit)

    def read(info: tarfile.TarInfo) -> bytes:
        file = archive.extractfile(info)
        content = b"" if file is None else file.read()
        if len(content) != info.size:
            raise EOFError(f"{len(content)} of {info.size} bytes are there")
        return content

    return Files(path, members, read)


def _check_name(path: Path, name: str) -> None:
    # Windows' reading of a name is the wider one: it takes both slashes and knows drives.
    if PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
        raise ValueError(f"{path}: {name!r} points outside the archive; nothing was read")


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f"{path} unpacks to more than {limit:,} bytes, which no data set of its size does; nothing was read"
        )
