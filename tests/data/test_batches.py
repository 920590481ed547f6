import pytest
import torch

from ducat.data import Augmentation, Batches, batches
from ducat.data.images import Images

STRONG = Augmentation(crop_padding=2, flip=True, autoaugment=True, cutout=3)


def dataset(count: int = 50) -> Images:
    """Images of random pixels whose label can be read off their first one."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 6, 6), generator=random, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count)
    return Images(images, torch.arange(count), torch.arange(count))


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, other_x) and torch.equal(y, other_y)
        for (x, y), (other_x, other_y) in zip(first, second, strict=True)
    )


def test_a_batch_is_a_function_of_seed_and_epoch() -> None:
    def epoch(seed: int, number: int) -> list:
        return list(Batches(dataset(), 8, seed=seed, augment=STRONG).epoch(number))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = epoch(seed=0, number=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, epoch(seed=0, number=3))
    assert not same(first, epoch(seed=1, number=3))
    assert not same(first, epoch(seed=0, number=4))


@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_an_epoch_can_be_entered_at_any_step(start: int) -> None:
    loader = Batches(dataset(), 8, seed=0, augment=STRONG, views=2)
    assert same(list(loader.epoch(1, start)), list(loader.epoch(1))[start:])


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_any_number_of_processes_sees_the_same_batches(processes: int, drop_last: bool) -> None:
    alone = list(Batches(dataset(), 8, seed=0, augment=STRONG, views=2, drop_last=drop_last).epoch(2))
    shared = [
        list(
            Batches(
                dataset(), 8, seed=0, augment=STRONG, views=2, drop_last=drop_last, rank=rank, world_size=processes
            ).epoch(2)
        )
        for rank in range(processes)
    ]
    joined = [
        (torch.cat([x for x, _ in parts], dim=1), torch.cat([y for _, y in parts]))
        for parts in zip(*shared, strict=True)
    ]
    assert same(joined, alone)


@pytest.mark.parametrize(("drop_last", "steps", "seen"), [(True, 6, 48), (False, 7, 50)])
def test_an_epoch_visits_each_image_once_with_its_label(drop_last: bool, steps: int, seen: int) -> None:
    loader = Batches(dataset(), 8, seed=0, augment=None, drop_last=drop_last)
    epoch = list(loader.epoch(0))
    assert len(loader) == len(epoch) == steps
    labels = torch.cat([y for _, y in epoch])
    assert len(labels.unique()) == len(labels) == seen
    for x, y in epoch:
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert x.max() <= 1
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)


def test_views_are_different_augmentations_of_the_same_images() -> None:
    plain = list(Batches(dataset(), 8, seed=0, augment=None, views=2).epoch(0))
    flips = list(Batches(dataset(), 8, seed=0, augment=Augmentation(flip=True), views=2).epoch(0))
    differ = 0
    for (x, _), (flipped, _) in zip(plain, flips, strict=True):
        assert x.shape == (2, 8, 3, 6, 6)
        assert torch.equal(x[0], x[1])
        mirrored = x[0].flip(3)
        for view in flipped:
            for image, original, mirror in zip(view, x[0], mirrored, strict=True):
                assert torch.equal(image, original) or torch.equal(image, mirror)
        differ += int((flipped[0] != flipped[1]).flatten(1).any(1).sum())
    assert 0 < differ < 48


def test_large_sets_are_streamed_as_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = list(Batches(dataset(), 8, seed=0, augment=STRONG, drop_last=False).epoch(0))
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 0)
    loader = Batches(dataset(), 8, seed=0, augment=STRONG, drop_last=False)
    assert loader.streams
    assert same(list(loader.epoch(0)), resident)
    assert same(list(loader.epoch(0, 4)), resident[4:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 51}, "more than the 50 training images"),
        ({"batch_size": 9, "world_size": 2}, "multiple of 2"),
        ({"batch_size": 8, "world_size": 2, "rank": 2}, r"rank=2 is outside \[0, 1\]"),
        ({"batch_size": 8, "views": 0}, "views=0"),
    ],
)
def test_settings_that_cannot_work_are_errors(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(dataset(), seed=0, augment=None, **settings)
