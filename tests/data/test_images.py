import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ducat import data
from ducat.data.images import Images, Memory, floats, hold_out, stratified_order, stratified_subset


def labelled(labels: list[int]) -> Images:
    count = len(labels)
    return Images(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.tensor(labels), torch.arange(count))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.data())
def test_every_prefix_of_the_order_holds_each_class_in_its_share(labels: list[int], draw: st.DataObject) -> None:
    order = stratified_order(torch.tensor(labels))
    assert sorted(order.tolist()) == list(range(len(labels)))
    size = draw.draw(st.integers(1, len(labels)))
    prefix = [labels[position] for position in order[:size]]
    for label in set(labels):
        assert abs(prefix.count(label) - size * labels.count(label) / len(labels)) <= 2


def test_balanced_classes_stay_balanced_and_subsets_are_nested() -> None:
    images = labelled([number % 5 for number in range(100)])
    small, large = stratified_subset(images, 10), stratified_subset(images, 35)
    assert small.labels.bincount().tolist() == [2] * 5
    assert large.labels.bincount().tolist() == [7] * 5
    assert set(small.ids.tolist()) < set(large.ids.tolist())


def test_images_held_out_leave_the_rest() -> None:
    rest, part = hold_out(labelled([0, 1] * 20), 10)
    assert part.labels.bincount().tolist() == [5, 5]
    assert sorted([*rest.ids.tolist(), *part.ids.tolist()]) == list(range(40))


@pytest.mark.parametrize("count", [0, 4])
def test_nothing_to_hold_out_or_to_keep_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match=f"hold {count} images out of 4"):
        hold_out(labelled([0, 1, 0, 1]), count)


def test_digits_are_scikit_learns_in_three_disjoint_parts() -> None:
    dataset, digits = data.load("digits"), load_digits()
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [len(part) for part in parts] == [1097, 200, 500]
    assert sorted(torch.cat([part.ids for part in parts]).tolist()) == list(range(1797))
    for part in parts:
        assert part.labels.numpy() == pytest.approx(digits.target[part.ids])
        np.testing.assert_allclose(part.floats()[:, 0].numpy(), digits.images[part.ids] / 16, atol=0.5 / 255)
    assert dataset.spec.mean[0] == pytest.approx(float(dataset.train.floats().mean()), abs=0.005)
    assert dataset.spec.std[0] == pytest.approx(float(dataset.train.floats().std()), abs=0.005)


def test_digits_never_change() -> None:
    # Results are compared over versions by this fingerprint: a change of it is a change of the data set.
    expected = "sha256:51e89ac7196947dd7d3c28928febe63bcd16666c775cb6d4be70e0f7ea5373c1"
    assert data.load("digits").fingerprint == expected


def test_a_subset_of_the_training_images_has_its_own_fingerprint() -> None:
    whole, subset = data.load("digits"), data.load("digits", samples=100)
    assert len(subset.train) == 100
    assert subset.train.labels.bincount(minlength=10).min() >= 9
    assert subset.fingerprint != whole.fingerprint
    assert subset.fingerprint == data.load("digits", samples=100).fingerprint
    torch.testing.assert_close(subset.test.images, whole.test.images)
    whole_ids = {int(position): image for position, image in zip(whole.train.ids, whole.train.images, strict=True)}
    for position, image in zip(subset.train.ids, subset.train.images, strict=True):
        torch.testing.assert_close(image, whole_ids[int(position)])


@pytest.mark.parametrize("samples", [0, 1098])
def test_more_samples_than_images_is_an_error(samples: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.samples={samples} is outside \[1, 1097\]"):
        data.load("digits", samples=samples)


def test_load_test_takes_a_fixed_part_of_the_test_images() -> None:
    images, labels = data.load_test("digits", 50)
    again, _ = data.load_test("digits", 50)
    torch.testing.assert_close(images, again, rtol=0, atol=0)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert labels.bincount(minlength=10).min() >= 4
    everything = {image.numpy().tobytes() for image in data.load_test("digits")[0]}
    assert {image.numpy().tobytes() for image in images} <= everything
    with pytest.raises(ValueError, match="samples=501"):
        data.load_test("digits", 501)


def test_floats_are_exactly_a_255th_of_the_bytes() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = Images(levels, torch.tensor([0]), torch.tensor([0]))
    expected = (np.arange(256) / np.float64(255)).astype(np.float32)
    np.testing.assert_array_equal(images.floats().flatten().numpy(), expected)


def test_another_part_is_held_out_or_none() -> None:
    prepared = data.load("digits")
    total = len(prepared.train) + len(prepared.validation)
    none, some, share = (data.load("digits", held_out=held_out) for held_out in (0, 50, 0.1))
    assert [len(part) for part in (none.train, none.validation, none.test)] == [total, 0, len(prepared.test)]
    assert (len(some.train), len(some.validation)) == (total - 50, 50)
    assert len(share.validation) == round(0.1 * total)
    assert len({one.fingerprint for one in (prepared, none, some, share)}) == 4
    assert torch.equal(
        none.train.labels.bincount(), (prepared.train.labels.bincount() + prepared.validation.labels.bincount())
    )
    assert len(data.load("digits", held_out=0, samples=64).train) == 64
    assert data.load("digits", held_out=50).fingerprint == some.fingerprint
    for held_out, message in ((total, "is outside"), (1.5, "is neither a number of images nor a share below 1")):
        with pytest.raises(ValueError, match=f"data.held_out={held_out} {message}"):
            data.load("digits", held_out=held_out)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (5, 1, 7, 3), (2, 40, 3, 64, 64), (7,), ()])
def test_floats_are_the_bytes_divided_by_255_in_aligned_memory(shape: tuple[int, ...]) -> None:
    images = torch.randint(256, shape, dtype=torch.uint8)
    made = floats(images)
    np.testing.assert_array_equal(made.numpy(), images.numpy().astype(np.float32) / np.float32(255))
    assert made.is_contiguous()
    assert made.data_ptr() % 64 == 0


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    memory, images = Memory(), torch.full((4, 3, 8, 8), 51, dtype=torch.uint8)
    first = floats(images, memory)
    place, part = first.data_ptr(), first[1:].flatten()
    assert floats(images, memory).data_ptr() != place
    del first
    assert floats(torch.zeros_like(images), memory).data_ptr() != place, "a part of it is still at hand"
    assert (part == 0.2).all()
    del part
    kept = floats(images[:2], memory), floats(images, memory)
    assert place in [each.data_ptr() for each in kept]
    assert all((each == 0.2).all() for each in kept)
    del kept
    assert len(pickle.dumps(memory)) < 200, "other processes have no use for it"
