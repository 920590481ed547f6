import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Pack = Callable[[Path, Mapping[str, bytes]], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("DUCAT_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _python2(value: object) -> bytes:
    if isinstance(value, int):
        return pickle.BININT + struct.pack("<i", value)
    if isinstance(value, bytes):
        return pickle.BINSTRING + struct.pack("<i", len(value)) + value
    if isinstance(value, list):
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(_python2, value)) + pickle.APPENDS
    if isinstance(value, dict):
        items = b"".join(_python2(key) + _python2(item) for key, item in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    assert isinstance(value, np.ndarray)
    shape = pickle.MARK + b"".join(map(_python2, map(int, value.shape))) + pickle.TUPLE
    dtype = (
        (b"cnumpy\ndtype\n" + _python2(value.dtype.str[1:].encode()) + _python2(0) + _python2(1) + pickle.TUPLE3 + b"R")
        + (pickle.MARK + _python2(3) + _python2(b"|") + pickle.NONE * 3 + _python2(-1) * 2 + _python2(0))
        + (pickle.TUPLE + pickle.BUILD)
    )
    return (
        (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + _python2(0) + pickle.TUPLE1 + _python2(b"b"))
        + (pickle.TUPLE3 + pickle.REDUCE + pickle.MARK + _python2(1) + shape + dtype + pickle.NEWFALSE)
        + (_python2(value.tobytes()) + pickle.TUPLE + pickle.BUILD)
    )


@pytest.fixture
def python2_pickle() -> Callable[[object], bytes]:
    """Pickles containers, byte strings, integers and arrays as Python 2 and its numpy did for the CIFAR archives."""
    return lambda value: pickle.PROTO + b"\x02" + _python2(value) + pickle.STOP


@pytest.fixture
def pack_tar() -> Pack:
    """Writes a .tar.gz of files given as name: content."""

    def pack(path: Path, files: Mapping[str, bytes]) -> Path:
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    return pack


@pytest.fixture
def cifar10(python2_pickle: Callable[[object], bytes]) -> dict[str, bytes]:
    """The files of a CIFAR-10 archive with 40 images a training batch and 20 test images."""
    random = np.random.default_rng(0)
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    files = {"batches.meta": {b"num_cases_per_batch": 40, b"label_names": names, b"num_vis": 3072}}
    parts = [(f"data_batch_{number}", b"training batch %d of 5" % number, 40) for number in range(1, 6)]
    for file, batch_label, count in [*parts, ("test_batch", b"testing batch 1 of 1", 20)]:
        files[file] = {
            b"batch_label": batch_label,
            b"labels": [number % 10 for number in range(count)],
            b"data": random.integers(0, 256, (count, 3072), np.uint8),
            b"filenames": [b"image.png"] * count,
        }
    return {f"cifar-10-batches-py/{name}": python2_pickle(content) for name, content in files.items()}


@pytest.fixture
def fashion_mnist(tmp_path: Path) -> Path:
    """A folder of Fashion-MNIST's four idx files, with 60 training images and 20 test images."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    random = np.random.default_rng(1)
    for split, count in (("train", 60), ("t10k", 20)):
        images = struct.pack(">4I", 0x803, count, 28, 28) + random.bytes(count * 784)
        labels = struct.pack(">2I", 0x801, count) + bytes(number % 10 for number in range(count))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """Encodes an image of random pixels: `picture(seed, mode, (width, height), format)`."""

    def encode(seed: int, mode: str = "RGB", size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, kind)
        return content.getvalue()

    return encode


@pytest.fixture
def image_folder(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """An image folder of 8 x 8 RGB images: 20 of `ant` and 20 of `bee` for training, 5 of each for the test."""
    for split, count in (("train", 20), ("test", 5)):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "insects" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number:02d}.png").write_bytes(picture(1000 * len(split) + 100 * label + number))
    return tmp_path / "insects"
