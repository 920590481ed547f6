import random
from collections import UserList
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from ducat import data
from ducat.data import Batches
from ducat.data.images import Images

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 3, 6, 5), np.uint8)
LABELS = np.arange(60) % 3


class Pictures(Dataset[tuple[Any, int]]):
    """The same images, in a form of a kind, perhaps with random transforms."""

    def __init__(self, form: str, noisy: bool = False) -> None:
        self.form, self.noisy = form, noisy

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = PIXELS[index]
        if self.noisy:
            pixels = np.roll(pixels, (random.randrange(6), np.random.randint(5)), (1, 2))
            pixels = np.roll(pixels, int(torch.randint(5, ())), 2)
        forms = {
            "array": pixels,
            "tensor": torch.from_numpy(pixels) / 255,
            "picture": Image.fromarray(pixels.transpose(1, 2, 0)),
        }
        return forms[self.form], int(LABELS[index])


class Table(UserList[Any]):
    """Rows of images and labels."""


def epoch(source: Any, **settings: Any) -> list:
    return list(Batches(source, 8, **{"seed": 0, "augment": None, "workers": 0, **settings}).epoch(1))


@pytest.mark.parametrize("form", ["array", "tensor", "picture"])
def test_arrays_and_datasets_of_any_form_are_one_data_set(form: str) -> None:
    arrays = data.own((PIXELS, LABELS), (PIXELS[:9] / 255, LABELS[:9]))
    pictures = data.own(Pictures(form), TensorDataset(torch.from_numpy(PIXELS[:9]), torch.from_numpy(LABELS[:9])))
    assert isinstance(arrays.train, Images)
    assert arrays.classes == pictures.classes == ("0", "1", "2")
    assert arrays.spec == pictures.spec
    for part in ("train", "validation", "test"):
        one, other = getattr(arrays, part), getattr(pictures, part)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.images, PIXELS[one.ids])
    for (x, y), (other_x, other_y) in zip(epoch(arrays.train), epoch(pictures.train, workers=2), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
    again = data.own(Pictures(form), TensorDataset(torch.from_numpy(PIXELS[:9]), torch.from_numpy(LABELS[:9])))
    assert again.fingerprint == pictures.fingerprint != data.own(Pictures(form), Pictures(form)).fingerprint


@pytest.mark.parametrize("told", [True, False])
def test_labels_are_those_that_the_dataset_gives_out(told: bool) -> None:
    class Changed(Pictures):
        """It lists labels that it changes, as torchvision's do with a target_transform."""

        targets = tuple(range(60))
        target_transform = staticmethod(lambda label: label % 3) if told else None

    found = data.own(Changed("array"), (PIXELS[:9], LABELS[:9]))
    assert found.classes == ("0", "1", "2")
    assert torch.equal(found.train.labels, torch.from_numpy(LABELS)[found.train.ids])


def test_labels_of_a_part_of_a_table_go_by_their_places() -> None:
    class Listed(Pictures):
        """Its labels have an index of their own, as those of a pandas Series."""

        class Series:
            def __len__(self) -> int:
                return len(LABELS)

            def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
                return LABELS

            def __getitem__(self, name: int) -> int:
                raise KeyError(name)

        targets = Series()

    found = data.own(Listed("array"), (PIXELS[:9], LABELS[:9]))
    assert torch.equal(found.train.labels, torch.from_numpy(LABELS)[found.train.ids])


def test_fetching_an_image_touches_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker process must not: CUDA cannot be initialised again in what was forked."""

    def touched(*arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("get_rng_state", "set_rng_state", "manual_seed_all", "current_device"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert len(epoch(data.own(Pictures("array"), (PIXELS[:9], LABELS[:9])).train)) > 0


def test_random_transforms_are_functions_of_the_seed() -> None:
    train = data.own(Pictures("array", noisy=True), (PIXELS, LABELS)).train
    # Not Python's own: the type checks of the tests draw from it.
    numpy, pytorch = np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    alone = epoch(train, views=2)
    assert np.random.get_state()[1].tolist() == numpy  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), pytorch)
    for processes in (1, 2):
        shared = [epoch(train, views=2, workers=2, rank=rank, world_size=processes) for rank in range(processes)]
        for whole, parts in zip(alone, zip(*shared, strict=True), strict=True):
            assert torch.equal(torch.cat([x for x, _ in parts], dim=1), whole[0])
    assert not torch.equal(alone[0][0][0], alone[0][0][1])
    assert not torch.equal(epoch(train, seed=1)[0][0], alone[0][0][0])


def test_pictures_of_any_kind_are_read_by_the_rule_for_files() -> None:
    deep = Image.fromarray((np.arange(64).reshape(8, 8) * 1024).astype(np.uint16))
    clear = Image.merge("LA", [Image.new("L", (8, 8), 10), Image.new("L", (8, 8), 0)])
    for picture, level in ((deep, np.arange(64).reshape(1, 8, 8) * 4), (clear, np.full((1, 8, 8), 255))):
        rows = [(picture, number % 2) for number in range(20)]
        train = data.own(Table(rows), Table(rows)).train
        assert np.array_equal(train.select(torch.arange(1)).images[0].numpy(), level), picture.mode


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((PIXELS.transpose(0, 2, 3, 1), LABELS), r"train: images of shape \(60, 6, 5, 3\) have their channels last"),
        ((PIXELS[0], LABELS), r"are not \(n, channels, height, width\)"),
        ((PIXELS, LABELS[:5]), "are not 60 whole numbers"),
        ((PIXELS, LABELS / 2), "are not 60 whole numbers"),
        ((PIXELS, LABELS[:, None]), "are not 60 whole numbers"),
        ((PIXELS, LABELS - 1), "labels run from -1"),
        ((PIXELS, np.zeros(60, int)), "train holds 1 class"),
        ((PIXELS / 127.5 - 1, LABELS), "float64 from -1 to 1: give uint8, or floats in"),
        ((PIXELS.astype(np.int64), LABELS), "int64 from 0 to 255: give uint8"),
        ([1, 2], "not a list"),
        (TensorDataset(torch.from_numpy(PIXELS)), r"item 0 is not \(image, label\)"),
        (TensorDataset(torch.zeros(9, 6, 5, 3), torch.arange(9)), "have their channels last"),
        (TensorDataset(torch.zeros(0, 3, 6, 5), torch.arange(0)), "train is empty"),
        (
            TensorDataset(torch.zeros(9, 3, 6, 6), torch.arange(9) % 2),
            "test: images are 3 x 6 x 5, those of train 3 x 6 x 6",
        ),
    ],
)
def test_what_cannot_be_used_is_named(train: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.own(train, (PIXELS, np.zeros(60, int) if "1 class" in message else LABELS))


def test_a_class_that_would_steer_a_terminal_is_refused() -> None:
    names = ["cat", "do\x1b[31mg", *map(str, range(2, int(LABELS.max()) + 1))]
    with pytest.raises(ValueError, match=r"the class 'do\\x1b\[31mg' has characters that cannot be shown"):
        data.own((PIXELS, LABELS), (PIXELS, LABELS), classes=names)


def test_the_estimator_notices_channels_that_are_last() -> None:
    from ducat import RobustClassifier

    with pytest.raises(ValueError, match=r"X: images of shape \(60, 6, 5, 3\) have their channels last"):
        RobustClassifier().fit(PIXELS.transpose(0, 2, 3, 1) / 255, LABELS)
    with pytest.raises(ValueError, match="have their channels last"):
        RobustClassifier(image_shape=(6, 5, 3)).fit(PIXELS.reshape(60, -1) / 255, LABELS)
