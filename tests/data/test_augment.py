import numpy as np
import pytest
import torch

from ducat.data import SPECS, Augmentation
from ducat.data.augment import crop_and_flip, cutout


def pictures(count: int, channels: int = 3, height: int = 6, width: int = 8) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, channels, height, width), generator=random, dtype=torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_crop_and_flip_is_slicing_of_the_padded_image(padding: int) -> None:
    images = pictures(12)
    offsets = torch.randint(2 * padding + 1, (12, 2), generator=generator())
    flipped = torch.arange(12) % 2 == 0
    result = crop_and_flip(images, offsets, flipped, padding).numpy()
    for image, (down, right), mirror, output in zip(images.numpy(), offsets, flipped, result, strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        window = padded[:, down : down + 6, right : right + 8]
        np.testing.assert_array_equal(output, window[:, :, ::-1] if mirror else window)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_cutout_blacks_out_a_square_as_far_as_it_is_inside(size: int) -> None:
    centres = torch.cartesian_prod(torch.arange(6), torch.arange(8))
    images = pictures(len(centres))
    result = cutout(images, centres, size).numpy()
    for image, (row, column), output in zip(images.numpy(), centres.tolist(), result, strict=True):
        expected = image.copy()
        top, left = row - size // 2, column - size // 2
        expected[:, max(0, top) : top + size, max(0, left) : left + size] = 0
        np.testing.assert_array_equal(output, expected)


def test_every_crop_and_both_sides_occur_equally_often() -> None:
    # One bright pixel in the middle tells where each image went.
    images = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 255
    moved = Augmentation(crop_padding=1)(images, generator()).float().mean(0)[0] / 255
    torch.testing.assert_close(moved[1:4, 1:4], torch.full((3, 3), 1 / 9), rtol=0, atol=0.015)
    images = torch.zeros(4000, 1, 1, 2, dtype=torch.uint8)
    images[..., 0] = 255
    assert Augmentation(flip=True)(images, generator())[..., 0].float().mean() / 255 == pytest.approx(0.5, abs=0.03)


def test_no_augmentation_leaves_images_alone() -> None:
    torch.testing.assert_close(Augmentation()(pictures(4), generator()), pictures(4))


def test_a_part_of_a_batch_is_augmented_as_in_the_whole() -> None:
    augment = Augmentation(crop_padding=2, flip=True, autoaugment=True, cutout=3)
    images = pictures(30)
    whole = augment(images, generator())
    part = augment(images[10:17], generator(), start=10, total=30)
    torch.testing.assert_close(part, whole[10:17])


def test_the_input_is_not_changed() -> None:
    images = pictures(30)
    Augmentation(crop_padding=2, flip=True, autoaugment=True, cutout=3)(images, generator())
    torch.testing.assert_close(images, pictures(30))


@pytest.mark.parametrize("name", ["crop_padding", "cutout"])
def test_negative_settings_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1"):
        Augmentation(**{name: -1})


def test_the_usual_augmentations_fit_the_data_set() -> None:
    assert Augmentation.base(SPECS["cifar10"]) == Augmentation(4, True)
    assert Augmentation.base(SPECS["digits"]) == Augmentation()
    assert Augmentation.strong(SPECS["tiny-imagenet"]) == Augmentation(8, True, autoaugment=True, cutout=32)
