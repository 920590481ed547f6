import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from ducat.data import decode
from ducat.data.decode import FORMATS, array, fit, outline

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def test_each_orientation_is_shown_upright() -> None:
    upright = Image.fromarray(PIXELS)
    turned = {  # how a camera that was held so stores the scene (EXIF 2.3, tag 274)
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(-90, expand=True),
    }
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[274] = orientation
        content = encoded(stored, exif=exif)
        np.testing.assert_array_equal(np.asarray(decode.decode(content)), PIXELS)
        assert outline(content).size == PIXELS.shape[:2]


def test_transparent_pixels_are_laid_over_white() -> None:
    alpha = np.full((6, 9, 1), 128, np.uint8)
    alpha[:3] = 0
    alpha[5] = 255
    blended = (PIXELS * (alpha / 255.0) + 255 * (1 - alpha / 255.0)).round()
    content = encoded(Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)))
    np.testing.assert_allclose(np.asarray(decode.decode(content)), blended, atol=1)
    assert outline(content).remarks == ("transparent, laid over white",)
    grey = encoded(Image.fromarray(np.concatenate([PIXELS[..., :1], alpha], axis=2)))
    assert decode.decode(grey).mode == "L"
    np.testing.assert_allclose(np.asarray(decode.decode(grey)), blended[..., 0], atol=1)
    palette = Image.fromarray(PIXELS).quantize(8)
    flags = encoded(palette, transparency=0)
    shown = np.asarray(decode.decode(flags))
    np.testing.assert_array_equal(shown[np.asarray(palette) == 0], 255)
    np.testing.assert_array_equal(
        shown[np.asarray(palette) > 0], np.asarray(palette.convert("RGB"))[np.asarray(palette) > 0]
    )


def test_other_kinds_of_pixels_have_one_reading() -> None:
    colour, deep = Image.fromarray(PIXELS), np.arange(0, 65536, 1213, np.uint16)[:54].reshape(6, 9)
    for image, mode, expected in (
        (colour.convert("1"), "L", np.asarray(colour.convert("1").convert("L"))),
        (colour.quantize(4), "RGB", np.asarray(colour.quantize(4).convert("RGB"))),
        (Image.fromarray(deep), "L", deep >> 8),
    ):
        shown = decode.decode(encoded(image))
        assert shown.mode == mode
        assert outline(encoded(image)).grey == (mode == "L")
        np.testing.assert_array_equal(np.asarray(shown), expected)
    assert outline(encoded(Image.fromarray(deep))).remarks[0].startswith("16 bits")
    assert outline(encoded(colour.convert("CMYK"), "TIFF")).remarks[0].startswith("CMYK")
    np.testing.assert_array_equal(np.asarray(decode.decode(encoded(colour.convert("CMYK"), "TIFF"))), PIXELS)
    for numbers in (np.zeros((6, 9), np.float32), np.zeros((6, 9), np.int32)):
        with pytest.raises(ValueError, match="32 bits: save it with 8 bits"):
            decode.decode(encoded(Image.fromarray(numbers), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_pictures_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (9, 6), "white"), Image.new("RGB", (9, 6), "black")
    content = encoded(
        first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {})
    )
    np.testing.assert_array_equal(array(decode.decode(content), 3), 255)
    assert outline(content).remarks[0].startswith("animated")


@pytest.mark.filterwarnings("ignore:.*EXIF.*", "ignore:Truncated.*", "ignore:Tag data.*")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("lenient", [False, True])
def test_a_file_cut_short_is_refused(kind: str, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    for pixels in (PIXELS, np.full((40, 40, 3), np.arange(40, dtype=np.uint8)[:, None, None])):
        content = encoded(Image.fromarray(pixels), kind)
        whole = np.asarray(decode.decode(content))
        for length in [*range(len(content) - 1, len(content) - 40, -1), *range(0, len(content) - 40, 13)]:
            try:
                shown = decode.decode(content[:length])
            except ValueError:
                continue
            # What is missing was only the end of file marker.
            np.testing.assert_array_equal(np.asarray(shown), whole)
            assert length >= len(content) - 4
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_flipped_bit_in_a_png_is_refused() -> None:
    content = encoded(Image.fromarray(PIXELS))
    for place in range(8, len(content) - 12):
        damaged = bytearray(content)
        damaged[place] ^= 4
        with pytest.raises(ValueError, match=r"is not a PNG|is cut short or damaged"):
            decode.decode(bytes(damaged))


def test_too_many_pixels_are_not_decoded() -> None:
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    content = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big") + b"\0\0\0\0IDAT"
    for read in (decode.decode, outline):
        with pytest.raises(ValueError, match=r"cut short or damaged|too many"):
            read(content)
    with pytest.raises(ValueError, match="has 9 x 6 pixels: more than 53 are too many"):
        decode.decode(encoded(Image.fromarray(PIXELS)), largest=53)
    with pytest.raises(ValueError, match="is not a JPEG image that can be read"):
        decode.decode(encoded(Image.fromarray(PIXELS)), formats=("JPEG",))


def test_fitting_takes_the_middle() -> None:
    wide = Image.fromarray(np.arange(10 * 40, dtype=np.uint8).reshape(10, 40))
    np.testing.assert_array_equal(np.asarray(fit(wide, (10, 10))), np.asarray(wide)[:, 15:25])
    assert fit(wide, (10, 40)) is wide
    # As ImageNet is evaluated: shorter side to 20, then the middle.
    resized = wide.resize((80, 20), Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[2:18, 32:48]
    np.testing.assert_array_equal(np.asarray(fit(wide, (16, 16), 20, "bilinear")), expected)
