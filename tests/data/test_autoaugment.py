from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from ducat.data.autoaugment import OPERATIONS, POLICY, apply, draw

AFFINE = Image.Transform.AFFINE


def affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, AFFINE, matrix, fillcolor=(128, 128, 128))


# Pillow's own operations, by the names of ours.
PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "shear-x": lambda image, slope: affine(image, (1, slope, 0, 0, 1, 0)),
    "shear-y": lambda image, slope: affine(image, (1, 0, 0, slope, 1, 0)),
    "translate-x": lambda image, share: affine(image, (1, 0, share * image.width, 0, 1, 0)),
    "translate-y": lambda image, share: affine(image, (1, 0, 0, 0, 1, share * image.height)),
    "rotate": lambda image, degrees: image.rotate(degrees, fillcolor=(128, 128, 128)),
    "brightness": lambda image, change: ImageEnhance.Brightness(image).enhance(1 + change),
    "color": lambda image, change: ImageEnhance.Color(image).enhance(1 + change),
    "contrast": lambda image, change: ImageEnhance.Contrast(image).enhance(1 + change),
    "sharpness": lambda image, change: ImageEnhance.Sharpness(image).enhance(1 + change),
    "posterize": lambda image, bits: ImageOps.posterize(image, round(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, threshold),
    "invert": lambda image, _: ImageOps.invert(image),
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}


def pictures() -> torch.Tensor:
    """Noise, a smooth gradient, low contrast, and one flat colour, 16 high and 20 wide."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (6, 3, 16, 20), generator=random, dtype=torch.uint8)
    smooth = torch.arange(3 * 16 * 20).view(1, 3, 16, 20).remainder(251).to(torch.uint8)
    faint = torch.randint(100, 104, (3, 3, 16, 20), generator=random, dtype=torch.uint8)
    return torch.cat([noise, smooth, faint, torch.full((1, 3, 16, 20), 7, dtype=torch.uint8)])


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows_to_the_bit(name: str) -> None:
    operation, images = OPERATIONS[name], pictures()
    for level in range(10):
        for sign in (1, -1) if operation.signed else (1,):
            magnitude = sign * (operation.low + (operation.high - operation.low) * level / 9)
            result = operation.apply(images, torch.full((len(images),), magnitude, dtype=torch.float64))
            for image, output in zip(images, result, strict=True):
                expected = PILLOW[name](Image.fromarray(image.permute(1, 2, 0).numpy()), magnitude)
                np.testing.assert_array_equal(output.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_grey_images_take_every_operation() -> None:
    images = pictures()[:, :1]
    operations = torch.arange(14)[:, None].expand(-1, 2)[: len(images)]
    result = apply(images, operations, torch.zeros(len(images), 2, dtype=torch.float64))
    assert result.shape == images.shape


def test_each_image_goes_through_its_own_two_operations_in_turn() -> None:
    names = list(OPERATIONS)
    images = pictures()[:3]
    operations = torch.tensor(
        [[-1, -1], [names.index("invert"), -1], [names.index("solarize"), names.index("shear-x")]]
    )
    magnitudes = torch.tensor([[0, 0], [0, 0], [128, 0.3]], dtype=torch.float64)
    result = apply(images, operations, magnitudes)
    torch.testing.assert_close(result[0], images[0])
    torch.testing.assert_close(result[1], 255 - images[1])
    source = Image.fromarray(images[2].permute(1, 2, 0).numpy())
    expected = PILLOW["shear-x"](PILLOW["solarize"](source, 128), 0.3)
    np.testing.assert_array_equal(result[2].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_operations_are_drawn_as_often_as_the_policy_says() -> None:
    count = 50_000
    operations, magnitudes = draw(count, torch.Generator().manual_seed(0))
    for turn in range(2):
        for number, name in enumerate(OPERATIONS):
            expected = sum(pair[turn][1] for pair in POLICY if pair[turn][0] == name) / len(POLICY)
            assert (operations[:, turn] == number).float().mean() == pytest.approx(expected, abs=0.005)
    turned = magnitudes[operations == list(OPERATIONS).index("rotate")]
    assert set(turned.unique().tolist()) == {-20 / 3, 20 / 3}
    assert (turned > 0).float().mean() == pytest.approx(0.5, abs=0.05)
