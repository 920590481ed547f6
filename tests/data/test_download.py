import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ducat import data
from ducat.data import specs
from ducat.data.download import CHUNK, download
from ducat.data.specs import Source

CONTENT = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """A server on this machine whose answers break off after `limit` bytes."""

    content = CONTENT
    limit: int | None = None
    understands_ranges = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ranges: list[str | None] = []

    @property
    def source(self) -> Source:
        digest = hashlib.sha256(self.content).hexdigest()
        return Source(f"http://127.0.0.1:{self.server_port}/data.bin", (f"sha256:{digest}",))


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if self.server.understands_ranges else 0
        rest = self.server.content[start:]
        self.send_response((206 if rest else 416) if self.server.understands_ranges else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.limit])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_download_is_kept_and_not_repeated(server: Server, tmp_path: Path) -> None:
    assert download(server.source, tmp_path).read_bytes() == CONTENT
    assert download(server.source, tmp_path) == tmp_path / "data.bin"
    assert len(server.ranges) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("understands_ranges", [True, False])
def test_an_interrupted_download_is_continued(server: Server, understands_ranges: bool, tmp_path: Path) -> None:
    server.limit = 300_000
    server.understands_ranges = understands_ranges
    with pytest.raises(ValueError, match=r"data\.bin could not be downloaded .* run the command again to continue"):
        download(server.source, tmp_path)
    assert not (tmp_path / "data.bin").exists()
    server.limit = None
    assert download(server.source, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=0-", f"bytes={300_000 // CHUNK * CHUNK}-"]


def test_a_download_that_lacked_only_its_name_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert download(server.source, tmp_path).read_bytes() == CONTENT


def test_a_file_with_another_hash_is_not_kept(server: Server, tmp_path: Path) -> None:
    source = server.source
    server.content = CONTENT[::-1]
    with pytest.raises(ValueError, match=r"data\.bin is not the published file: its sha256 is not"):
        download(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/data\.bin could not be downloaded .* --from"):
        download(Source("http://127.0.0.1:9/data.bin", ("md5:0",)), tmp_path)


def test_prepare_downloads_checks_and_tidies_up(
    server: Server, image_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    server.content = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", image_folder)).read_bytes()
    row = replace(
        specs.SPECS["cifar10-jpeg"], shape=(3, 8, 8), classes=("ant", "bee"), sizes=(40, 10), sources=(server.source,)
    )
    monkeypatch.setitem(specs.SPECS, "cifar10-jpeg", row)
    status = data.prepare("cifar10-jpeg")
    assert status.title == "CIFAR-10 (JPEG)"
    assert status.notice == ""
    assert sorted(path.name for path in (cache / "downloads").iterdir()) == []
    assert data.prepare("cifar10-jpeg") == status
    assert len(server.ranges) == 1
