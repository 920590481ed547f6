"""Generated images: the share of each batch, what is read, what is refused, and a run that goes on bit by bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ducat
from ducat import weights
from ducat.config import Config, DataConfig
from ducat.data import Augmentation, Batches
from ducat.data.extra import Extra, Mixed
from ducat.training import resume, train
from tests.support import TINY, Watcher, unvalidated

SHAPE = (1, 8, 8)


def written(path: Path, count: int = 50, **changes: Any) -> Path:
    """A file whose images say which they are: all pixels of image i are i, and its label is i % 10."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 1)).copy()
    arrays: dict[str, Any] = {"image": images, "label": np.arange(count) % 10, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def mixed(path: Path, rank: int = 0, world_size: int = 1, views: int = 1, augment: Any = None) -> Mixed:
    train_images = ducat.data.load("digits", samples=64).train
    real = Batches(train_images, 12, seed=3, augment=augment, views=views, rank=rank, world_size=world_size)
    return Mixed(real, Extra.open(path, SHAPE, 10), rows=20, steps=2)


def test_rows_are_the_files_and_nothing_else_is_read(tmp_path: Path) -> None:
    extra = Extra.open(written(tmp_path / "e.npz"), SHAPE, 10)
    assert isinstance(extra.images, np.memmap)
    images, labels = extra.select(torch.tensor([7, 3, 3, 49]))
    assert images[:, 0, 0, 0].tolist() == [7, 3, 3, 49]
    assert images.shape == (4, 1, 8, 8)
    assert labels.tolist() == [7, 3, 3, 9]


@pytest.mark.parametrize("names", [("images", "labels"), ("data", "targets")])
def test_names_and_grey_images_without_channels(tmp_path: Path, names: tuple[str, str]) -> None:
    plain = np.arange(3, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    arrays = {"image": None, "label": None, names[0]: plain, names[1]: np.array([1, 2, 3], np.uint8)}
    extra = Extra.open(written(tmp_path / "e.npz", **arrays), SHAPE, 10)
    assert extra.select(torch.tensor([2]))[0].shape == (1, 1, 8, 8)


def test_a_batch_holds_its_share_and_the_epoch_its_steps(tmp_path: Path) -> None:
    batches = mixed(written(tmp_path / "e.npz"))
    made = list(batches.epoch(0))
    assert len(made) == len(batches) == 2
    drawn = []
    for x, y in made:
        assert x.shape == (32, 1, 8, 8)
        flat = (x == x[:, :, :1, :1]).flatten(1).all(1)
        assert [int(part.sum()) for part in flat.chunk(4)] == [5, 5, 5, 5], "parts do not have their share"
        drawn.append(x[flat])
        assert torch.equal((255 * x[flat][:, 0, 0, 0]).round().long() % 10, y[flat])
    again = list(batches.epoch(0, start_step=1))
    assert torch.equal(again[0][0], made[1][0])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(next(batches.epoch(1))[0][flat], drawn[0])


def test_processes_share_the_rows_of_one(tmp_path: Path) -> None:
    path = written(tmp_path / "e.npz")
    augment = Augmentation(crop_padding=1, flip=True)
    whole, _ = next(mixed(path, augment=augment, views=2).epoch(0))
    parts = [next(mixed(path, rank, 2, views=2, augment=augment).epoch(0))[0] for rank in range(2)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = Extra.open(written(tmp_path / "a.npz"), SHAPE, 10).fingerprint
    assert Extra.open(written(tmp_path / "b.npz"), SHAPE, 10).fingerprint == first
    changed = np.zeros((50, 8, 8, 1), np.uint8)
    assert Extra.open(written(tmp_path / "c.npz", image=changed), SHAPE, 10).fingerprint != first
    assert Extra.open(written(tmp_path / "d.npz", label=np.zeros(50, int)), SHAPE, 10).fingerprint != first


def compressed(path: Path) -> None:
    np.savez_compressed(path, image=np.zeros((2, 8, 8, 1), np.uint8), label=np.zeros(2, int))


def cut(path: Path) -> None:
    written(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: written(path, image=np.zeros((50, 1, 8, 8), np.uint8)), r"channels last"),
        (lambda path: written(path, image=np.zeros((50, 8, 8, 1), np.float32)), "images of float32"),
        (lambda path: written(path, label=np.full(50, 10)), r"labels outside \[0, 10\), or none"),
        (lambda path: written(path, label=np.zeros(49, int)), "for 50 images: give one whole number for each"),
        (lambda path: written(path, label=np.zeros((50, 10))), "give one whole number for each"),
        (lambda path: written(path, image=None), "holds label, not image and label"),
        (lambda path: written(path, image=np.array([None])), "no plain array"),
        (compressed, "is compressed, so it cannot be read in part: write it again with numpy.savez"),
        (cut, "is not a whole .npz file"),
        (lambda path: path.write_bytes(b""), "is not a whole .npz file"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, write: Any, message: str) -> None:
    path = tmp_path / "extra.npz"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        Extra.open(path, SHAPE, 10)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_training_with_generated_images_goes_on_bit_by_bit(tmp_path: Path) -> None:
    path = written(tmp_path / "e.npz")
    config: Config = replace(TINY, data=DataConfig("digits", samples=64, extra=path, extra_share=0.5))
    whole = train(config, tmp_path / "whole", validate=unvalidated)
    plain = train(TINY, tmp_path / "plain", validate=unvalidated)
    assert whole.metrics[0]["loss"] != plain.metrics[0]["loss"]
    described = whole.manifest["data"]["extra"]
    assert (described["file"], described["images"]) == (str(path), 50)
    assert whole.manifest["data"]["validation"] == plain.manifest["data"]["validation"]
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, Watcher(leave_after=1), validate=unvalidated)
    kept = path.read_bytes()
    written(path, label=np.zeros(50, int))
    with pytest.raises(ValueError, match=r"e\.npz holds other images than those that .* was trained on"):
        resume(tmp_path / "run", validate=unvalidated)
    path.write_bytes(kept)
    continued = resume(tmp_path / "run", validate=unvalidated)
    states = [weights.read(folder.checkpoint_path("last")).weights for folder in (whole, continued)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_shares_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"data\.extra_share=1 is outside \(0, 1\)"):
        DataConfig(extra_share=1)
