import io
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ducat import data
from ducat.data import Augmentation, Batches, batches, images
from ducat.data.augment import window
from ducat.data.encoded import Encoded
from ducat.data.images import Lazy, floats

Picture = Callable[..., bytes]


def shard(path: Path, samples: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(image_folder: Path, tmp_path: Path) -> Path:
    """The images of `image_folder` in five shards, in its order."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for part, count in (("train", 3), ("test", 2)):
        files = sorted((image_folder / part).rglob("*.png"))
        size = -(-len(files) // count)
        for number in range(count):
            samples = {}
            for place, file in enumerate(files[number * size : (number + 1) * size]):
                key = f"{number * size + place:06d}"
                samples[f"{key}.png"] = file.read_bytes()
                samples[f"{key}.cls"] = str(["ant", "bee"].index(file.parent.name)).encode()
            shard(folder / f"insects-{part}-{number:03d}.tar", samples)
    (folder / "classes.txt").write_text("ant\nbee\n")
    return folder


def epoch(source: images.Source, **settings: object) -> list:
    options = {"seed": 0, "augment": Augmentation(2, flip=True), "workers": 0, **settings}
    return list(Batches(source, 8, **options).epoch(1))  # type: ignore[arg-type]


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second) > 0
    for (x, y), (other_x, other_y) in zip(first, second, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_streams_and_prepared_files_give_the_same_batches(image_folder: Path, shards: Path) -> None:
    data.prepare("insects", image_folder)
    prepared = data.load("insects", samples=30)
    for name in (f"folder:{image_folder}", f"wds:{shards}"):
        stream = data.load(name, samples=30)
        assert isinstance(stream.train, Lazy)
        assert isinstance(stream.train.pixels, Encoded)
        assert stream.classes == prepared.classes
        assert stream.spec.shape == prepared.spec.shape
        assert stream.spec.crop_padding == prepared.spec.crop_padding
        assert stream.spec.mean == prepared.spec.mean
        assert stream.train.ids.tolist() == prepared.train.ids.tolist()
        for part in ("train", "validation", "test"):
            assert torch.equal(getattr(stream, part).images, getattr(prepared, part).images)
            assert torch.equal(getattr(stream, part).labels, getattr(prepared, part).labels)
        assert_same(epoch(stream.train, views=2), epoch(prepared.train, views=2))
    assert torch.equal(data.load_test(f"wds:{shards}", 6)[0], data.load_test("insects", 6)[0])


def uneven(folder: Path, picture: Picture) -> Path:
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        file.write_bytes(picture(number, size=(9 + number % 5, 8 + number % 3)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_do_not_depend_on_workers_or_processes(
    workers: int, processes: int, image_folder: Path, picture: Picture
) -> None:
    data.prepare("insects", f"folder:{uneven(image_folder, picture)}", size=8)
    dataset = data.load("insects")
    assert dataset.spec.resized_crop == 0.08
    options = {"augment": Augmentation.base(dataset.spec), "views": 2}
    alone = epoch(dataset.train, **options)
    shared = [
        epoch(dataset.train, **options, workers=workers, rank=rank, world_size=processes) for rank in range(processes)
    ]
    joined = [
        (torch.cat([x for x, _ in parts], dim=1), torch.cat([y for _, y in parts]))
        for parts in zip(*shared, strict=True)
    ]
    assert_same(joined, alone)
    assert not torch.equal(alone[0][0][0], alone[0][0][1])  # each view has a crop of its own


@pytest.mark.slow
def test_what_is_decoded_stays_until_the_batch_is_made(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, augment = data.load(f"wds:{shards}").train, Augmentation(flip=True, resized_crop=0.3)
    assert len(train) > 20
    settings: dict[str, Any] = {"seed": 0, "augment": augment, "drop_last": False}
    expected = list(Batches(train, 2, **settings, workers=0).epoch(0))

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.03)  # in which the workers decode whatever they may
        return floats(*arguments)

    monkeypatch.setattr(batches, "floats", slow)
    assert_same(list(Batches(train, 2, **settings, workers=2).epoch(0)), expected)


def test_an_epoch_of_a_stream_visits_each_image_once_and_can_be_entered_anywhere(shards: Path) -> None:
    train = data.load(f"wds:{shards}").train
    loader = Batches(train, 8, seed=0, augment=None, drop_last=False, workers=2)
    whole = list(loader.epoch(3))
    seen = torch.cat([x for x, _ in whole]).mul(255).round().byte()
    assert sorted(map(bytes, seen.flatten(1).numpy())) == sorted(map(bytes, train.images.flatten(1).numpy()))
    assert_same(list(loader.epoch(3, 2)), whole[2:])
    before = torch.get_rng_state()
    list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_are_whole_parts_of_the_image_of_usual_areas_and_ratios() -> None:
    random = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(2000):
        left, top, right, bottom = window(torch.rand(10, 4, generator=random), (300, 400), 0.25)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        assert 0.74 <= (right - left) / (bottom - top) <= 1.35
        shares.append((right - left) * (bottom - top) / (300 * 400))
    assert 0.24 <= min(shares) < 0.3
    assert 0.9 < max(shares) <= 1
    # None fits into a ribbon: the middle of it is taken.
    assert window(torch.rand(10, 4, generator=random).clamp_min(0.5), (10, 1000), 0.9) == (493, 0, 506, 10)


def test_a_stream_of_several_sizes_is_resized_as_prepare_does(image_folder: Path, picture: Picture) -> None:
    uneven(image_folder, picture)
    with pytest.raises(ValueError, match=r"is \d+ x \d+, not \d+ x \d+: .*--size N"):
        data.load(f"folder:{image_folder}")
    data.prepare(f"folder:{image_folder}", size=8)
    data.prepare("insects", image_folder, size=8)
    stream, prepared = data.load(f"folder:{image_folder}"), data.load("insects")
    assert torch.equal(stream.test.images, prepared.test.images)
    assert Augmentation.base(stream.spec) == Augmentation(0, True, resized_crop=0.08)
    with pytest.raises(ValueError, match="resized_crop needs images that are decoded as they come"):
        Batches(prepared.train, 8, seed=0, augment=Augmentation.base(stream.spec))


def test_fingerprints_tell_streams_apart(shards: Path, image_folder: Path, cache: Path) -> None:
    name = f"wds:{shards}"
    status = data.prepare(name)
    assert status.sizes == {"train": 36, "validation": 4, "test": 10}
    assert status.classes == 2
    assert data.verify(name).fingerprint == status.fingerprint == data.load(name).fingerprint
    assert data.load(name, samples=20).fingerprint != data.load(name, samples=21).fingerprint != status.fingerprint
    assert data.list_datasets()[-1].name == name
    # A run's config.yaml has the number as 20.0.
    held_out = [data.load(name, held_out=number).fingerprint for number in (20, 20.0, 21)]
    assert held_out[0] == held_out[1] != held_out[2]
    moved = shutil.copytree(shards, shards.with_name("moved"))
    assert data.prepare(f"wds:{moved}").fingerprint == status.fingerprint
    path = shards / "insects-train-001.tar"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"insects-train-001\.tar has changed or gone since"):
        data.load(name)
    with pytest.raises(ValueError, match="has changed since it was prepared"):
        data.verify(name)
    with pytest.raises(ValueError, match=r"prepared already, with other images"):
        data.prepare(name, name)


def test_a_changed_image_of_a_streamed_folder_is_found_by_verify(image_folder: Path) -> None:
    name = f"folder:{image_folder}"
    data.prepare(name)
    file = image_folder / "train" / "ant" / "00.png"
    Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
    with pytest.raises(ValueError, match="has changed since it was prepared"):
        data.verify(name)


def test_shards_are_found_by_pattern_and_divided_by_name(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.prepare(f"wds:{shards}")
    braces = f"wds:{shards}/insects-train-{{000..002}}.tar::{shards}/insects-test-*.tar"
    assert data.prepare(braces).fingerprint != ""
    assert data.load(braces).test.ids.tolist() == data.load(f"wds:{shards}").test.ids.tolist()
    only = data.prepare(f"wds:{shards}/insects-train-{{000..002}}.tar")
    assert only.sizes == {"train": 33, "validation": 3, "test": 4}
    assert "a fixed tenth of train is the test" in only.notice
    monkeypatch.chdir(shards.parent)
    assert data.prepare("wds:shards") == data.list_datasets()[-1] or whole.prepared


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"a.png": b"", "b.png": b"", "b.cls": b"0"}, r"sample /a has no \.cls with its label"),
        ({"a.cls": b"0"}, "sample /a has no image"),
        ({"a.png": b"", "a.cls": b"dog"}, r"a\.cls holds b'dog', not the number of a class"),
        ({"a.png": b"", "a.jpg": b"", "a.cls": b"0"}, r"sample /a has 2 images: \.png, \.jpg; leave one"),
        ({"a.png": b"no", "a.cls": b"2"}, r"label 2 is outside \[0, 1\]"),
        ({"a.png": b"no", "a.cls": b"1"}, r"the image at byte 512 is not a PNG"),
    ],
)
def test_what_is_wrong_with_a_shard_is_named(
    samples: Mapping[str, bytes], message: str, shards: Path, cache: Path
) -> None:
    shard(shards / "insects-train-003.tar", samples)
    with pytest.raises(ValueError, match=message):
        data.load(f"wds:{shards}")
    assert not list(cache.glob("*.safetensors"))


def test_the_image_of_a_sample_is_not_its_mask(shards: Path, picture: Picture) -> None:
    samples = {"./a.mask.png": b"no", "./a.png": picture(1), "./a.depth.png": b"no", "./a.cls": b"1"}
    shard(shards / "insects-train-003.tar", samples)
    prepared = data.prepare(f"wds:{shards}")
    assert "left out of shards: 1 .mask.png, 1 .depth.png" in prepared.notice
    found = data.load(f"wds:{shards}")
    expected = np.asarray(Image.open(io.BytesIO(picture(1))).convert("RGB")).transpose(2, 0, 1)
    everything = torch.cat([found.train.images, found.validation.images])
    assert sum(np.array_equal(image, expected) for image in everything) == 1


def test_classes_of_a_stream_are_numbered_as_those_of_its_data_set(shards: Path, picture: Picture) -> None:
    (spec,) = (spec for spec in data.SPECS.values() if spec.name == "fashion-mnist")
    shutil.rmtree(shards)
    shards.mkdir()
    for part in ("train", "test"):
        grey = Image.open(io.BytesIO(picture(1))).convert("L").resize((28, 28))
        buffer = io.BytesIO()
        grey.save(buffer, "PNG")
        samples = {f"{n}.png": buffer.getvalue() for n in range(40)}
        samples |= {f"{n}.cls": str(n % 10).encode() for n in range(40)}
        samples = dict(sorted(samples.items()))
        shard(shards / f"{part}-000.tar", samples)
    assert spec.classes is not None
    (shards / "classes.txt").write_text("\n".join(sorted(spec.classes)))
    with pytest.raises(ValueError, match=r"class 1 is ankle boot, of Fashion-MNIST it is trouser: number the classes"):
        data.prepare("fashion-mnist", f"wds:{shards}")
    (shards / "classes.txt").write_text("\n".join(name.upper() for name in spec.classes))
    assert "numbered as there" not in data.prepare("fashion-mnist", f"wds:{shards}").notice
    (shards / "classes.txt").write_text("")
    assert "numbered as there" not in data.prepare("fashion-mnist", f"wds:{shards}", replace=True).notice
    (shards / "classes.txt").write_text("\n".join(f"kind {n}" for n in range(10)))
    assert "classes are numbered as there" in data.prepare("fashion-mnist", f"wds:{shards}", replace=True).notice


def test_a_stream_is_prepared_again_where_that_is_asked(shards: Path, picture: Picture) -> None:
    name = f"wds:{shards}"
    before = data.prepare(name)
    assert data.prepare(name) == before
    shard(shards / "insects-train-000.tar", {"a.png": picture(1), "a.cls": b"1"})
    with pytest.raises(ValueError, match="prepare it again, with --from and --replace"):
        data.load(name)
    after = data.prepare(name, replace=True)
    assert after.fingerprint != before.fingerprint
    assert len(data.load(name).train) == after.sizes["train"] < before.sizes["train"]


def test_shards_that_cannot_be_read_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such shards \(wds: reads local files"):
        data.load("wds:https://example.org/train-{000..010}.tar")
    with pytest.raises(FileNotFoundError, match=r"none\.tar: there are no such shards"):
        data.load(f"wds:{tmp_path}/none.tar")
    with pytest.raises(ValueError, match=r"insects-train-000\.tar is named 2 times: name it once"):
        data.load(f"wds:{shards}::{shards}/../{shards.name}/insects-train-000.tar")
    shutil.copy(shards / "insects-train-000.tar", shards / "other.tar")
    with pytest.raises(ValueError, match=r"other\.tar: the name says neither train nor val nor test"):
        data.load(f"wds:{shards}")
    (shards / "other.tar").unlink()
    path = shards / "insects-train-001.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"insects-train-001\.tar"):
        data.load(f"wds:{shards}")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_damaged_later_is_named_in_one_line(workers: int, image_folder: Path) -> None:
    data.prepare("insects", f"folder:{image_folder}")
    for file in (image_folder / "train" / "ant").iterdir():
        file.write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"train/ant/\d\d\.png is not a PNG") as caught:
        epoch(data.load("insects").train, workers=workers)
    assert "\n" not in str(caught.value)


def test_a_dead_worker_is_one_line(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.prepare("insects", f"folder:{image_folder}")
    monkeypatch.setattr(Encoded, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match="a process that decodes images has died"):
        epoch(data.load("insects").train, workers=1)


def test_workers_leave_interruptions_to_the_training(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.prepare("insects", f"folder:{image_folder}")
    original = Encoded.read

    def interrupted(self: Encoded, rows: torch.Tensor) -> torch.Tensor:
        for signum in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        return original(self, rows)

    source = data.load("insects").train
    expected = epoch(source)
    monkeypatch.setattr(Encoded, "read", interrupted)
    assert_same(epoch(source, workers=2), expected)


def test_test_images_can_be_given_by_a_list(image_folder: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for file in (image_folder / part).rglob("*.png"):
            file.rename(file.with_name(f"{part}_{file.parent.name}_{file.name}"))
    (tmp_path / "list.txt").write_text("x/test_ant_01.png\nx/test_bee_03.png\n")
    status = data.prepare("insects", f"folder:{image_folder}", test_images=tmp_path / "list.txt")
    assert status.sizes["test"] == 2
    assert "the 2 test images that list.txt names" in status.notice
    assert data.load("insects").test.labels.tolist() == [0, 1]
    (tmp_path / "list.txt").write_text("test_ant_99.png\n")
    with pytest.raises(ValueError, match=r"names test_ant_99\.png, which is not among the test images"):
        data.prepare("insects", f"folder:{image_folder}", test_images=tmp_path / "list.txt")


def test_an_archive_of_what_is_decoded_as_it_comes_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "imagenet.zip").touch()
    with pytest.raises(ValueError, match=r"imagenet\.zip is not a folder: ImageNet is decoded as it comes: unpack it"):
        data.prepare("imagenet", tmp_path / "imagenet.zip")


def test_a_list_of_test_images_must_tell_them_apart(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("ant/01.png\n")
    with pytest.raises(ValueError, match=r"list\.txt names 01\.png, as 2 test images are called"):
        data.prepare("insects", f"folder:{image_folder}", test_images=tmp_path / "list.txt")


def test_files_on_a_cpu_are_read_as_they_are_needed(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.prepare("insects", image_folder)
    train = data.load("insects").train
    resident = epoch(train)
    monkeypatch.setattr(batches, "HOST_BYTES", 0)
    assert Batches(train, 8, seed=0, augment=None).streams
    assert_same(epoch(train), resident)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # that library's own
def test_shards_of_webdataset_are_read_as_it_reads_them(tmp_path: Path, picture: Picture) -> None:
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "w").mkdir()
    for part, count in (("train", 30), ("val", 10)):
        with webdataset.ShardWriter(f"{tmp_path}/w/{part}-%04d.tar", maxcount=8, verbose=0) as writer:
            for number in range(count):
                content = picture(number + 100 * count)
                writer.write({"__key__": f"{number:05d}", "png": content, "cls": number % 3, "json": {"a": 1}})
    stream = data.load(f"wds:{tmp_path}/w")
    assert "left out of shards: 40 .json" in data.prepare(f"wds:{tmp_path}/w").notice
    theirs = list(webdataset.WebDataset(sorted(map(str, (tmp_path / "w").glob("val*"))), shardshuffle=False))
    assert [int(sample["cls"]) for sample in theirs] == stream.test.labels.tolist()
    for sample, image in zip(theirs, stream.test.images, strict=True):
        expected = np.asarray(Image.open(io.BytesIO(sample["png"]))).transpose(2, 0, 1)
        np.testing.assert_array_equal(image.numpy(), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # that library's own
def test_a_hugging_face_data_set_is_streamed(image_folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(str(image_folder), cache_dir=str(tmp_path / "cache"))
    found.save_to_disk(str(tmp_path / "saved"))
    stream, folder = data.load(f"hf:{tmp_path}/saved"), data.load(f"folder:{image_folder}")
    assert stream.classes == folder.classes
    assert_same(epoch(stream.train, workers=2), epoch(folder.train))
    assert torch.equal(stream.test.images, folder.test.images)
    assert data.verify(f"hf:{tmp_path}/saved").fingerprint == stream.fingerprint
    with pytest.raises(ValueError, match=r"hf:.*none cannot be loaded"):
        data.load(f"hf:{tmp_path}/none")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # that library's own
def test_splits_that_may_hold_the_test_images_are_left_out(image_folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(str(image_folder), cache_dir=str(tmp_path / "cache"))
    found["all"] = datasets.concatenate_datasets([found["train"], found["test"]])
    found.save_to_disk(str(tmp_path / "saved"))
    prepared = data.prepare(f"hf:{tmp_path}/saved")
    assert prepared.sizes == data.prepare(f"folder:{image_folder}").sizes
    assert "left out, as neither train nor validation nor test: all" in prepared.notice
    unnamed = datasets.DatasetDict({"training": found["train"], "testing": found["test"]})
    unnamed.save_to_disk(str(tmp_path / "unnamed"))
    with pytest.raises(ValueError, match=r"call its splits train, validation and test: it has training, testing"):
        data.prepare(f"hf:{tmp_path}/unnamed")


def test_hugging_face_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install .*\[hf\]'"):
        data.load("hf:mnist")


def test_shared_memory_that_is_too_small_is_one_line_and_not_needed_without_workers(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    train = data.load(f"wds:{shards}").train
    with pytest.raises(
        OSError, match=r"no room for [\d,]+ bytes in shared memory: try --data\.workers 0, or give /dev"
    ):
        list(Batches(train, 8, seed=0, augment=None, workers=1).epoch(0))
    assert len(list(Batches(train, 8, seed=0, augment=None, workers=0).epoch(0))) > 1
