import gzip
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ducat import data
from ducat.data import specs

Pickle = Callable[[object], bytes]
Pack = Callable[[Path, Mapping[str, bytes]], Path]


@pytest.fixture
def cifar10_archive(tmp_path: Path, pack_tar: Pack, cifar10: dict[str, bytes]) -> Path:
    return pack_tar(tmp_path / "sample.tar.gz", cifar10)


def cache_files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*")) if cache.exists() else []


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)


def test_a_cifar10_sample_is_read_split_and_told_apart(cifar10_archive: Path) -> None:
    status = data.prepare("cifar10", cifar10_archive)
    assert status.title == "CIFAR-10 (subset)"
    assert status.sizes == {"train": 180, "validation": 20, "test": 20}
    assert status.notice == (
        "sample.tar.gz is not the published CIFAR-10, by its hash; a subset of 200 training and 20 test images"
    )
    dataset = data.load("cifar10")
    assert dataset.fingerprint == status.fingerprint == data.verify("cifar10").fingerprint
    assert dataset.spec.title == "CIFAR-10 (subset)"
    assert dataset.classes[3] == "cat"
    assert dataset.train.images.shape == (180, 3, 32, 32)
    assert dataset.validation.labels.bincount().tolist() == [2] * 10
    assert sorted(torch.cat([dataset.train.ids, dataset.validation.ids]).tolist()) == list(range(200))
    # The conftest numbers labels within each file of 40, and draws each file's pixels from one stream.
    random = np.random.default_rng(0)
    published = np.concatenate([random.integers(0, 256, (count, 3072), np.uint8) for count in [40] * 5 + [20]])
    for part in (dataset.train, dataset.validation):
        np.testing.assert_array_equal(part.images.flatten(1).numpy(), published[part.ids])
        assert part.labels.tolist() == [position % 40 % 10 for position in part.ids.tolist()]
    np.testing.assert_array_equal(dataset.test.images.flatten(1).numpy(), published[200:])
    images, labels = data.load_test("cifar10", 10)
    assert labels.bincount().tolist() == [1] * 10
    assert images.shape == (10, 3, 32, 32)


def test_an_unpacked_archive_is_the_same_data(cifar10_archive: Path, cifar10: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in cifar10.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folder = data.prepare("cifar10", tmp_path / "cifar-10-batches-py")
    assert folder.fingerprint == data.prepare("cifar10", cifar10_archive).fingerprint


def test_cifar100_has_fine_labels(python2_pickle: Pickle, pack_tar: Pack, tmp_path: Path) -> None:
    names = [name.encode() for name in specs.SPECS["cifar100"].classes or ()]
    random = np.random.default_rng(0)
    files = {"meta": {b"fine_label_names": names, b"coarse_label_names": [b"fish"] * 20}}
    for file, batch_label, count in (("train", b"training batch 1 of 1", 200), ("test", b"testing batch 1 of 1", 100)):
        files[file] = {
            b"batch_label": batch_label,
            b"fine_labels": [number % 100 for number in range(count)],
            b"coarse_labels": [0] * count,
            b"data": random.integers(0, 256, (count, 3072), np.uint8),
        }
    archive = {f"cifar-100-python/{name}": python2_pickle(content) for name, content in files.items()}
    data.prepare("cifar100", pack_tar(tmp_path / "cifar-100-python.tar.gz", archive))
    dataset = data.load("cifar100")
    assert (dataset.classes[0], dataset.classes[99]) == ("apple", "worm")
    assert dataset.test.labels.tolist() == list(range(100))
    np.testing.assert_array_equal(dataset.test.images.flatten(1).numpy(), files["test"][b"data"])


def test_fashion_mnist_is_read_from_idx_files(fashion_mnist: Path) -> None:
    assert data.prepare("fashion-mnist", fashion_mnist).sizes == {"train": 54, "validation": 6, "test": 20}
    dataset = data.load("fashion-mnist")
    assert dataset.classes[9] == "ankle boot"
    assert dataset.test.labels.tolist() == [number % 10 for number in range(20)]
    content = gzip.decompress((fashion_mnist / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    assert dataset.test.images.shape == (20, 1, 28, 28)
    assert dataset.test.images.numpy().tobytes() == content


def test_fashion_mnist_comes_from_the_system_where_it_is_installed(
    fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(specs.SPECS["fashion-mnist"], system_folder=str(fashion_mnist))
    monkeypatch.setitem(specs.SPECS, "fashion-mnist", row)
    assert data.prepare("fashion-mnist").sizes["test"] == 20


@pytest.fixture
def tiny_imagenet(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """A Tiny-ImageNet zip of two classes, 10 training and 2 validation images each; one image is grey."""
    path = tmp_path / "tiny.zip"
    with zipfile.ZipFile(path, "w") as archive:
        root = "tiny-imagenet-200"
        archive.writestr(f"{root}/wnids.txt", "n02\nn01\n")
        archive.writestr(f"{root}/words.txt", "n01\tgoldfish, Carassius auratus\nn02\tcat\nn03\tdog\n")
        annotations = ""
        for label, wnid in enumerate(("n01", "n02")):
            for number in range(10):
                mode = "L" if (label, number) == (1, 3) else "RGB"
                content = picture(100 * label + number, mode, (64, 64), "JPEG")
                archive.writestr(f"{root}/train/{wnid}/images/{wnid}_{number}.JPEG", content)
            for number in range(2):
                name = f"val_{2 * label + number}.JPEG"
                archive.writestr(
                    f"{root}/val/images/{name}", picture(900 + 2 * label + number, size=(64, 64), kind="JPEG")
                )
                annotations += f"{name}\t{wnid}\t0\t0\t62\t62\n"
        archive.writestr(f"{root}/val/val_annotations.txt", annotations)
    return path


def test_tiny_imagenet_is_tested_on_its_annotated_validation_images(
    tiny_imagenet: Path, picture: Callable[..., bytes]
) -> None:
    assert data.prepare("tiny-imagenet", tiny_imagenet).sizes == {"train": 18, "validation": 2, "test": 4}
    dataset = data.load("tiny-imagenet")
    assert dataset.classes == ("goldfish", "cat")
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    for number, image in enumerate(dataset.test.images):
        np.testing.assert_array_equal(image.numpy(), pixels(picture(900 + number, size=(64, 64), kind="JPEG")))
    grey = torch.cat([dataset.train.images, dataset.validation.images])[
        torch.cat([dataset.train.ids, dataset.validation.ids]) == 13
    ]
    np.testing.assert_array_equal(grey[0].numpy(), pixels(picture(103, "L", (64, 64), "JPEG")))


@pytest.mark.parametrize("kind", ["folder", "zip", "nested zip"])
def test_an_image_folder_is_prepared_under_a_name_of_its_own(kind: str, image_folder: Path, tmp_path: Path) -> None:
    source = image_folder
    if kind != "folder":
        base = image_folder if kind == "zip" else image_folder.parent
        source = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", base, None if kind == "zip" else "insects"))
    status = data.prepare("insects", source)
    assert status.sizes == {"train": 36, "validation": 4, "test": 10}
    assert status.notice == ""
    dataset = data.load("insects")
    assert dataset.classes == ("ant", "bee")
    assert dataset.spec.shape == (3, 8, 8)
    expected = np.stack([pixels(file.read_bytes()) for file in sorted((image_folder / "test").rglob("*.png"))])
    np.testing.assert_array_equal(dataset.test.images.numpy(), expected)
    assert dataset.test.labels.tolist() == [0] * 5 + [1] * 5
    learnt_from = torch.cat([dataset.train.images, dataset.validation.images]).double() / 255
    assert dataset.spec.mean == pytest.approx(learnt_from.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert dataset.spec.std == pytest.approx(learnt_from.std((0, 2, 3), correction=0).tolist(), abs=1e-4)
    assert [status.name for status in data.list_datasets() if status.prepared] == ["digits", "insects"]


def test_an_image_folders_own_validation_images_are_used(image_folder: Path) -> None:
    shutil.copytree(image_folder / "test", image_folder / "val")
    assert data.prepare("insects", image_folder).sizes == {"train": 40, "validation": 10, "test": 10}
    shutil.rmtree(image_folder / "test")
    status = data.prepare("insects", image_folder, replace=True)
    assert status.sizes == {"train": 36, "validation": 4, "test": 10}
    assert "val is the test" in status.notice
    shutil.rmtree(image_folder / "val")
    status = data.prepare("insects", image_folder, replace=True)
    assert status.sizes == {"train": 33, "validation": 3, "test": 4}
    assert "a fixed tenth of train is the test" in status.notice


def test_grey_images_make_a_grey_data_set_unless_any_is_in_colour(image_folder: Path) -> None:
    for file in image_folder.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    data.prepare("grey", image_folder)
    assert data.load("grey").spec.shape == (1, 8, 8)
    file = image_folder / "test" / "bee" / "04.png"
    Image.open(file).convert("RGB").save(file)
    data.prepare("mixed", image_folder)
    mixed = data.load("mixed").test.images
    assert mixed.shape[1:] == (3, 8, 8)
    torch.testing.assert_close(mixed, data.load("grey").test.images.expand(-1, 3, -1, -1))


def test_an_odd_size_is_named_and_mended_by_size(
    image_folder: Path, picture: Callable[..., bytes], cache: Path
) -> None:
    (image_folder / "train" / "bee" / "odd.png").write_bytes(picture(7, size=(20, 12)))
    with pytest.raises(ValueError, match=r"insects: train/bee/odd\.png is 12 x 20, not 8 x 8: .*--size N"):
        data.prepare("insects", image_folder)
    assert cache_files(cache) == []
    data.prepare("insects", image_folder, size=6)
    assert data.load("insects").spec.shape == (3, 6, 6)


def remove_class(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "bee")


def add(name: str, content: bytes = b"not an image") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def halve(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def thirty_two_bits(folder: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "train" / "ant" / "deep.tif")


def escape(folder: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(folder / part / "ant", folder / part / "\x1b[2J")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_class, "has 1 classes under train/"),
        (add("train/ant/x.jpg"), r"train/ant/x\.jpg is not a PNG, JPEG, .* or AVIF image that can be read"),
        (halve("train/ant/00.png"), r"train/ant/00\.png is cut short or damaged"),
        (thirty_two_bits, r"train/ant/deep\.tif .* save it with 8 bits a channel"),
        (escape, r"the class '\\x1b\[2J' has characters that cannot be shown"),
        (add("test/wasp/x.png"), r"the class of test/wasp/x\.png is not among those of train/"),
        (add("train/x.png"), r"train/x\.png is not at train/CLASS/FILE"),
        (add("more/train/ant/x.png"), "more than one image folder"),
    ],
)
def test_what_is_wrong_with_an_image_folder_is_named(
    change: Callable[[Path], None], message: str, image_folder: Path, cache: Path
) -> None:
    change(image_folder)
    with pytest.raises(ValueError, match=message) as caught:
        data.prepare("insects", image_folder)
    assert "\n" not in str(caught.value)
    assert cache_files(cache) == []


def test_files_that_are_no_images_are_passed_over(image_folder: Path) -> None:
    for name in ("train/ant/notes.txt", "train/ant/._00.png", "__MACOSX/train/ant/00.png", "README.md"):
        add(name)(image_folder)
    assert data.prepare("insects", image_folder).sizes["train"] == 36


CIFAR10_DAMAGE = {
    "a label out of range": ("data_batch_3", b"labels", [*range(10), 10] * 3 + [0] * 7, r"label 10 of image 10"),
    "a negative label": ("test_batch", b"labels", [-1] * 20, "label -1 of image 0"),
    "a missing label": ("data_batch_1", b"labels", [0] * 39, "one label for each of its 40 images"),
    "swapped files": (
        "data_batch_2",
        b"batch_label",
        b"training batch 1 of 5",
        "data_batch_2 holds b'training batch 1",
    ),
    "images of another size": (
        "test_batch",
        b"data",
        np.zeros((20, 784), np.uint8),
        "does not hold images of 3 x 32 x 32",
    ),
    "no images": ("test_batch", b"data", b"none", "does not hold images"),
    "classes that are no names": ("batches.meta", b"label_names", [1, 2], "does not list the classes of CIFAR-10"),
    "other classes": ("batches.meta", b"label_names", [b"a", b"b"], "does not list the classes of CIFAR-10"),
}


@pytest.mark.parametrize("damage", CIFAR10_DAMAGE)
def test_what_is_wrong_with_a_cifar_archive_is_named(
    damage: str, cifar10: dict[str, bytes], python2_pickle: Pickle, pack_tar: Pack, tmp_path: Path, cache: Path
) -> None:
    from ducat.data.unpickle import unpickle

    file, key, value, message = CIFAR10_DAMAGE[damage]
    name = f"cifar-10-batches-py/{file}"
    cifar10[name] = python2_pickle({**unpickle(cifar10[name], ""), key: value})
    archive = pack_tar(tmp_path / "damaged.tar.gz", cifar10)
    with pytest.raises(
        ValueError, match=rf"damaged\.tar\.gz: {file}.*{message}|damaged\.tar\.gz: .*{message}"
    ) as caught:
        data.prepare("cifar10", archive)
    assert "\n" not in str(caught.value)
    assert cache_files(cache) == []


def test_an_archive_of_another_data_set_is_named(cifar10_archive: Path, tiny_imagenet: Path) -> None:
    with pytest.raises(ValueError, match=r"sample\.tar\.gz has no meta: is it another data set\?"):
        data.prepare("cifar100", cifar10_archive)
    with pytest.raises(ValueError, match=r"tiny\.zip has no batches\.meta: is it another data set\?"):
        data.prepare("cifar10", tiny_imagenet)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz", r"unsigned bytes of shape \(n\)"),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", r"unsigned bytes of shape \(n, 28, 28\)"),
        ("train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "one label for each of its 60 images"),
        (
            "t10k-labels-idx1-ubyte.gz",
            struct.pack(">2I", 0x801, 20) + bytes([10] * 20),
            r"label 10 of image 0 .* \[0, 9\]",
        ),
        ("t10k-labels-idx1-ubyte.gz", struct.pack(">2I", 0x801, 20) + bytes(19), "announces 20 bytes"),
        ("t10k-labels-idx1-ubyte.gz", struct.pack(">2I", 0x801, 2**32 - 1) + bytes(19), "announces 4294967295 bytes"),
        ("t10k-labels-idx1-ubyte.gz", b"\0\0", "truncated or corrupt"),
    ],
)
def test_what_is_wrong_with_idx_files_is_named(
    name: str, content: bytes | str, message: str, fashion_mnist: Path, cache: Path
) -> None:
    packed = (fashion_mnist / content).read_bytes() if isinstance(content, str) else gzip.compress(content)
    (fashion_mnist / name).write_bytes(packed)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        data.prepare("fashion-mnist", fashion_mnist)
    assert cache_files(cache) == []


def test_truncated_idx_files_are_named(fashion_mnist: Path) -> None:
    halve("train-images-idx3-ubyte.gz")(fashion_mnist)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is truncated or corrupt"):
        data.prepare("fashion-mnist", fashion_mnist)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/n03/images/n03_0.JPEG", b"", r"the class of .*n03_0\.JPEG, 'n03', is not in wnids\.txt"),
        ("val/val_annotations.txt", b"", "has no test images"),
        ("val/val_annotations.txt", b"val_0.JPEG", "the class of .*val_0.JPEG, '', is not in"),
        ("val/val_annotations.txt", b"val_9.JPEG\tn01", r"has no .*val/images/val_9\.JPEG"),
        ("val/val_annotations.txt", b"val_0.JPEG\t\xff", "is not in wnids"),
        ("wnids.txt", b"n02\n", "'n01', is not in wnids"),
    ],
)
def test_what_is_wrong_with_tiny_imagenet_is_named(
    name: str, content: bytes, message: str, tiny_imagenet: Path, tmp_path: Path, cache: Path
) -> None:
    with zipfile.ZipFile(tiny_imagenet) as archive:
        archive.extractall(tmp_path / "tiny")
    path = tmp_path / "tiny" / "tiny-imagenet-200" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.prepare("tiny-imagenet", tmp_path / "tiny")
    assert cache_files(cache) == []


def test_classes_without_test_images_are_said(image_folder: Path, picture: Callable[..., bytes]) -> None:
    for name in ("train/wasp/1.png", "train/fly/1.png"):
        add(name, picture(1))(image_folder)
    assert data.prepare("insects", image_folder).notice == "no test image of: fly, wasp"


def test_test_images_that_are_trained_on_are_counted(image_folder: Path) -> None:
    for number, path in enumerate(sorted((image_folder / "train" / "ant").iterdir())[:3]):
        shutil.copy(path, image_folder / "test" / "bee" / f"again-{number}{path.suffix}")
    notice = data.prepare("insects", image_folder).notice
    assert notice == "test images that are among those for training or validation, pixel by pixel: 3"


def test_what_an_image_folder_leaves_out_is_said(image_folder: Path, picture: Callable[..., bytes]) -> None:
    for name in ("train/ant/notes.txt", "train/bee/x.tga", "train/bee/y.tga", "train/.cache/x.png"):
        add(name, picture(1))(image_folder)
    (image_folder / "train" / "wasp").mkdir()
    (image_folder / "train" / "fly").mkdir()
    add("train/fly/readme.md")(image_folder)
    status = data.prepare("insects", image_folder)
    assert status.classes == 2
    assert status.notice == (
        "left out, as no image by the name's ending: 2 .tga, 1 .txt, 1 .md (the first is train/ant/notes.txt); "
        "no class, for want of images: fly, wasp"
    )


def test_whatever_pillow_reads_safely_is_an_image(image_folder: Path, picture: Callable[..., bytes]) -> None:
    kinds = {"a.JPG": "JPEG", "b.jfif": "JPEG", "c.webp": "WEBP", "d.bmp": "BMP", "e.gif": "GIF", "f.tif": "TIFF"}
    for name, kind in kinds.items():
        add(f"train/ant/{name}", picture(5, kind=kind))(image_folder)
    Image.fromarray(np.full((8, 8), 5 << 8, np.uint16)).save(image_folder / "train" / "bee" / "deep.png")
    status = data.prepare("insects", image_folder)
    assert status.sizes == {"train": 43, "validation": 4, "test": 10}
    assert status.notice == "1 images are 16 bits a channel, of which the upper 8 are kept"


def test_a_set_that_differs_is_not_replaced_unasked(image_folder: Path, cache: Path) -> None:
    before = data.prepare("insects", image_folder)
    assert data.prepare("insects", str(image_folder), root=str(cache)) == before
    (image_folder / "train" / "ant" / "00.png").unlink()
    with pytest.raises(ValueError, match=r"insects is prepared already, with other images .*--replace"):
        data.prepare("insects", image_folder)
    assert cache_files(cache) == ["insects.safetensors"]
    assert data.verify("insects") == before
    assert data.prepare("insects", image_folder, replace=True).fingerprint != before.fingerprint


class Stop(KeyboardInterrupt):
    pass


def test_an_interrupted_preparation_is_continued(
    image_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ducat.data import decode, images

    whole = data.prepare("whole", image_folder)
    monkeypatch.setattr(images, "CHUNK_BYTES", 5 * 8 * 8 * 3)  # five images
    decoded = []
    original = decode.decode

    def watched(content: bytes) -> Image.Image:
        if len(decoded) == 23:
            raise Stop
        decoded.append(content)
        return original(content)

    monkeypatch.setattr(decode, "decode", watched)
    with pytest.raises(Stop):
        data.prepare("insects", image_folder)
    assert cache_files(cache) == [".preparing-insects", "journal.json", "lock", "part", "whole.safetensors"]
    decoded.clear()
    monkeypatch.setattr(decode, "decode", lambda content: (decoded.append(content), original(content))[1])
    assert data.prepare("insects", image_folder).fingerprint == whole.fingerprint
    assert len(decoded) == 50 - 20
    assert cache_files(cache) == ["insects.safetensors", "whole.safetensors"]


def test_files_that_changed_since_an_interruption_are_read_anew(
    image_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ducat.data import images

    monkeypatch.setattr(images, "CHUNK_BYTES", 5 * 8 * 8 * 3)
    original = images.Lazy.select

    def stopping(self: images.Lazy, rows: torch.Tensor) -> images.Images:
        if rows[0] > 10:
            raise Stop
        return original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(images.Lazy, "select", stopping)
        with pytest.raises(Stop):
            data.prepare("insects", image_folder)
    for file in image_folder.rglob("*.png"):
        Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
    assert data.prepare("insects", image_folder).fingerprint == data.prepare("again", image_folder).fingerprint


def test_two_preparations_of_one_name_do_not_mix(image_folder: Path, cache: Path) -> None:
    from filelock import FileLock

    (cache / ".preparing-insects").mkdir(parents=True)
    with (
        FileLock(cache / ".preparing-insects" / "lock"),
        pytest.raises(ValueError, match="another process is preparing insects"),
    ):
        data.prepare("insects", image_folder)
    assert data.prepare("insects", image_folder).prepared


def test_a_failed_preparation_keeps_what_was_there(cifar10_archive: Path, cache: Path) -> None:
    before = data.prepare("cifar10", cifar10_archive)
    halve(cifar10_archive.name)(cifar10_archive.parent)
    with pytest.raises(ValueError, match=r"sample\.tar\.gz"):
        data.prepare("cifar10", cifar10_archive)
    assert cache_files(cache) == ["cifar10.safetensors"]
    assert data.verify("cifar10") == data.prepare("cifar10") == before


def test_a_disk_that_fills_up_leaves_no_half_a_cache(
    cifar10_archive: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    for function in ("os.fsync", "os.posix_fallocate"):
        with monkeypatch.context() as patch:
            patch.setattr(function, lambda *_: full(0))
            with pytest.raises(OSError, match="No space left on device: cifar10 was not prepared, nothing is left"):
                data.prepare("cifar10", cifar10_archive)
        assert cache_files(cache) == []


def test_a_damaged_cache_is_named(cifar10_archive: Path, cache: Path) -> None:
    data.prepare("cifar10", cifar10_archive)
    path = cache / "cifar10.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for read in (data.verify, data.load):
        with pytest.raises(ValueError, match=r"cifar10\.safetensors has changed since it was made"):
            read("cifar10")
    path.write_bytes(content[:-100])
    for read in (data.verify, data.load, data.load_test):
        with pytest.raises(ValueError, match=r"cifar10\.safetensors is truncated or corrupt: run `ducat data prepare"):
            read("cifar10")
    notice = next(status.notice for status in data.list_datasets() if status.name == "cifar10")
    assert notice.endswith("run `ducat data prepare cifar10 [--from ARCHIVE]`")


def test_what_is_damaged_or_unwanted_is_prepared_anew_from_where_it_comes_from(
    fashion_mnist: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        specs.SPECS, "fashion-mnist", replace(specs.SPECS["fashion-mnist"], system_folder=str(fashion_mnist))
    )
    first = data.prepare("fashion-mnist")
    path = cache / "fashion-mnist.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert data.prepare("fashion-mnist") == first
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="run `ducat data prepare fashion-mnist --replace"):
        data.verify("fashion-mnist")
    data.prepare("fashion-mnist", replace=True)
    assert data.verify("fashion-mnist") == first


def test_a_cache_of_another_version_is_named(cifar10_archive: Path, cache: Path) -> None:
    from safetensors.torch import load_file, save_file

    data.prepare("cifar10", cifar10_archive)
    path = cache / "cifar10.safetensors"
    save_file(load_file(path), path, metadata={"ducat": json.dumps({"format": 999})})
    with pytest.raises(ValueError, match="another version of ducat"):
        data.load("cifar10")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", r"run `ducat data prepare cifar10 \[--from ARCHIVE\]`"),
        ("cifar10-jpeg", "run `ducat data prepare cifar10-jpeg --from FOLDER-OR-ZIP`"),
        ("cifra10", r"known: digits, fashion-mnist, .*prepare cifra10 --from"),
    ],
)
def test_a_data_set_that_is_not_prepared_says_how_to(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        data.load(name)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("insects", {}, "insects is unknown .* needs --from FOLDER"),
        ("../insects", {"source": Path()}, "cannot name a data set"),
        (300 * "a", {"source": Path()}, "cannot name a data set.* at most 100"),
        ("digits", {"source": "empty"}, "--from empty: the digits come with scikit-learn"),
        ("insects", {"source": Path(), "size": 100_000}, r"size=100000 does not fit: .* \[1, 4096\]"),
        ("insects", {"source": Path(), "size": 10**20}, "does not fit"),
        ("cifar10-jpeg", {}, "cifar10-jpeg is not offered for download"),
        ("cifar10", {"size": 8}, "size=8 does not fit"),
        ("insects", {"source": Path(), "size": 0}, "size=0 does not fit"),
    ],
)
def test_what_cannot_be_prepared_is_an_error(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.prepare(name, **settings)


def test_digits_are_always_there() -> None:
    assert data.prepare("digits") == data.verify("digits") == data.list_datasets()[0]
    assert data.list_datasets()[0].sizes == {"train": 1097, "validation": 200, "test": 500}


def corruption_files(count: int = 20) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    files = {name: random.integers(0, 256, (5 * count, 32, 32, 3), np.uint8) for name in ("fog", "gaussian_noise")}
    return {**files, "labels": np.tile(np.arange(count) % 10, 5)}


def write_corruptions(folder: Path, files: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for name, array in files.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_corruptions_come_by_severity(tmp_path: Path) -> None:
    files = corruption_files()
    status = data.prepare("cifar10-c", write_corruptions(tmp_path / "CIFAR-10-C", files))
    assert status.sizes == {"gaussian_noise": 100, "fog": 100}
    assert data.verify("cifar10-c").fingerprint == status.fingerprint
    seen = []
    for corruption, severity, images, labels in data.load_corruptions("cifar10-c"):
        seen.append((corruption, severity))
        expected = files[corruption][20 * (severity - 1) : 20 * severity].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal((images * 255).round().numpy(), expected)
        assert labels.tolist() == [number % 10 for number in range(20)]
    assert seen == [(name, severity) for name in ("gaussian_noise", "fog") for severity in range(1, 6)]
    for *_, images, labels in data.load_corruptions("cifar10-c", samples=10):
        assert images.shape == (10, 3, 32, 32)
        assert sorted(labels.tolist()) == list(range(10))
    with pytest.raises(ValueError, match=r"cifar10-c holds corrupted test images of cifar10"):
        data.load("cifar10-c")
    with pytest.raises(ValueError, match="cifar10 holds no corruptions; cifar10-c, cifar100-c do"):
        next(data.load_corruptions("cifar10"))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("fog", np.zeros((100, 32, 32), np.uint8), r"fog\.npy is uint8 of shape \(100, 32, 32\)"),
        ("fog", np.zeros((100, 32, 32, 3), np.float32), r"fog\.npy is float32"),
        ("fog", np.full((100, 32, 32, 3), None, object), r"fog\.npy is not an array"),
        ("labels", np.array(3), r"labels\.npy is int64 of shape \(\), not of shape \(n\)"),
        ("labels", np.zeros(0, int), "the same labels for five severities"),
        ("labels", np.full(100, 10), r"labels\.npy: label 10 of image 0"),
        ("labels", np.arange(100) % 9, "the same labels for five severities"),
        ("labels", np.zeros(99, int), "the same labels for five severities"),
    ],
)
def test_what_is_wrong_with_corruptions_is_named(name: str, array: np.ndarray, message: str, tmp_path: Path) -> None:
    folder = write_corruptions(tmp_path / "CIFAR-10-C", {**corruption_files(), name: array})
    with pytest.raises(ValueError, match=message):
        data.prepare("cifar10-c", folder)
