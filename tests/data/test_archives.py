import gzip
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from ducat.data import archives
from ducat.data.archives import open_files

CONTENT = {"set/a.txt": b"first", "set/deep/b.txt": b"second" * 1000}


def write_tar(path: Path, *members: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"\1" * member.size))
    return path


def member(name: str, size: int = 3, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info


def write_zip(path: Path, name: str, mode: int = stat.S_IFREG | 0o644) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name  # as an attacker would: ZipInfo() itself tidies names up
        info.external_attr = mode << 16
        archive.writestr(info, b"content")
    return path


@pytest.fixture(params=["folder", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    path = tmp_path / "misnamed.bin"
    if request.param == "folder":
        return folder
    if request.param == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in CONTENT:
                archive.write(folder / name, name)
        return path
    with tarfile.open(path, "w" if request.param == "tar" else f"w:{request.param.removeprefix('tar.')}") as archive:
        archive.add(folder / "set", "set")
    return path


def test_folders_and_archives_read_alike(packed: Path) -> None:
    with open_files(packed) as files:
        assert files.names == tuple(CONTENT)
        assert {name: files.read(name) for name in files.names} == CONTENT
        assert files.find("b.txt") == "set/deep/b.txt"
        with pytest.raises(ValueError, match=r"has no c\.txt"):
            files.find("c.txt")
        with pytest.raises(ValueError, match="has no set/c"):
            files.read("set/c")


OUTSIDE = ["/etc/passwd", "../up.txt", "in/../../up.txt", r"..\up.txt", r"C:\up.txt"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_outside_the_archive_are_refused(name: str, tmp_path: Path) -> None:
    for path in (write_zip(tmp_path / "a.zip", name), write_tar(tmp_path / "a.tar", member(name))):
        with pytest.raises(ValueError, match=r"a\.(zip|tar): .* points outside the archive"), open_files(path):
            pass


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", member("ok"), member("bad", 0, kind, "/etc/passwd"))
    with pytest.raises(ValueError, match=r"a\.tar: bad is a link or a device"), open_files(path):
        pass


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", "bad", stat.S_IFLNK | 0o777)
    with pytest.raises(ValueError, match=r"a\.zip: bad is a link"), open_files(path):
        pass


def test_bombs_are_refused_before_they_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 10_000)
    zipped = tmp_path / "bomb.zip"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(3_000_000))
    tarred = write_tar(tmp_path / "bomb.tar.gz", member("ones", 3_000_000), mode="w:gz")
    # A name is read into memory before anything is known of it.
    named = tmp_path / "name.tar.gz"
    header = member("name", 3_000_000, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    named.write_bytes(gzip.compress(header + bytes(3_000_000)))
    for path in (zipped, tarred, named):
        with pytest.raises(ValueError, match=f"{path.name} unpacks to more than"), open_files(path):
            pass


@pytest.mark.parametrize("packed", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"], indirect=True)
@pytest.mark.parametrize("keep", [0.05, 0.4, 0.6])
def test_truncated_archives_are_named(packed: Path, keep: float) -> None:
    content = packed.read_bytes()
    packed.write_bytes(content[: int(keep * len(content))])
    # Either it is noticed when it is opened, or when its last file is read; never is half a file returned.
    with pytest.raises(ValueError, match=r"misnamed\.bin"), open_files(packed) as files:
        assert {name: files.read(name) for name in CONTENT} == CONTENT


def test_a_flipped_bit_in_a_zip_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", "file.txt")
    content = bytearray(path.read_bytes())
    content[content.index(b"content")] ^= 1
    path.write_bytes(content)
    with open_files(path) as files, pytest.raises(ValueError, match=r"a\.zip: file\.txt is truncated or corrupt"):
        files.read("file.txt")


def test_what_is_no_archive_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("hello")
    with (
        pytest.raises(ValueError, match=r"text\.zip is not a whole zip or tar archive"),
        open_files(tmp_path / "text.zip"),
    ):
        pass
    with pytest.raises(FileNotFoundError, match=r"gone\.zip does not exist"), open_files(tmp_path / "gone.zip"):
        pass


def test_one_name_in_two_places_is_an_error(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test").write_text("x")
    with open_files(tmp_path) as files, pytest.raises(ValueError, match="more than one test"):
        files.find("test")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a folder nor a file"), open_files(tmp_path / "pipe"):
        pass
    with open_files(tmp_path) as files:
        assert files.names == ()


def test_backslashes_of_windows_in_a_zip_are_slashes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("set\\a.txt", "set\\none\\"):
            info = zipfile.ZipInfo("placeholder")
            info.filename = name
            archive.writestr(info, b"" if name.endswith("\\") else b"first")
    with open_files(tmp_path / "a.zip") as files:
        assert files.names == ("set/a.txt",)
        assert files.empty == ("set/none",)
        assert files.read("set/a.txt") == b"first"


def test_names_that_would_steer_a_terminal_are_escaped(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", "set/\x1b[2J.txt")
    content = path.read_bytes().replace(b"content", b"CONTENT")
    path.write_bytes(content)
    with open_files(path) as files, pytest.raises(ValueError, match="truncated or corrupt") as caught:
        files.read(0)
    assert "\x1b" not in str(caught.value)


def test_links_in_a_folder_are_followed(tmp_path: Path) -> None:
    for place in ("images/train/a", "elsewhere/test/a", "one"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.png").write_bytes(b"")
    (tmp_path / "images" / "test").symlink_to(tmp_path / "elsewhere" / "test")
    (tmp_path / "images" / "train" / "b").symlink_to("../../one")
    (tmp_path / "images" / "train" / "a" / "2.png").symlink_to("1.png")
    (tmp_path / "images" / "train" / "a" / ".#1.png").symlink_to("user@host")  # an editor's lock
    with open_files(tmp_path / "images") as files:
        assert files.names == ("test/a/1.png", "train/a/1.png", "train/a/2.png", "train/b/1.png")


@pytest.mark.parametrize(
    ("target", "message"), [("gone.png", "a/link is a link to nothing"), ("..", "a/link is a link to a folder that it")]
)
def test_links_that_lead_nowhere_are_named(target: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(target)
    with pytest.raises(ValueError, match=message), open_files(tmp_path):
        pass


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = os.scandir

    def refusing(path: str) -> object:
        if os.path.basename(path) in ("test", "lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scanned(path)

    (tmp_path / "lost+found").mkdir()
    monkeypatch.setattr(os, "scandir", refusing)
    with open_files(tmp_path) as files:
        assert not files.names
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="test cannot be read"), open_files(tmp_path):
        pass
