"""From the bytes of an image file to pixels: one rule, for what is prepared, for streams and for what `serve` is sent.

- An orientation in the file's EXIF data is obeyed, as viewers do.
- Transparent pixels are laid over white.
- Grey images (1, 8 or 16 bits, with transparency or not) stay grey; palettes, CMYK and all else become RGB, without
  regard to a colour profile.
- Of 16 bits a channel the upper 8 are kept. Pixels of 32 bits, integers or floats, have no known scale and are refused.
- Of an animation or of several pages, the first is taken.
- A file that is cut short or fails its checksums is refused, never filled up.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of the formats that are read: those that it notices a missing end of, and that run no program."""

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
)
"""Endings of such files' names, in lower case."""

LARGEST_IMAGE = 2**26
"""Pixels of the largest image that is decoded: a small file may unpack to a huge image."""

_GREY = ("1", "L", "LA", "La")


class Outline(NamedTuple):
    """What an image file says of itself before its pixels are decoded.

    Attributes:
        size: (height, width), as it will be shown.
        grey: whether it has one channel by the rule of this module.
        remarks: what the rule changes that a user should hear of, for example "animated".
    """

    size: tuple[int, int]
    grey: bool
    remarks: tuple[str, ...]


def outline(content: bytes) -> Outline:
    """Read an image file's header.

    Raises:
        ValueError: it is no image of a format in `FORMATS`, or too large.
    """
    with _opened(content, FORMATS, LARGEST_IMAGE) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # the orientations that lie on their side
            width, height = height, width
        remarks = {
            "16 bits a channel, of which the upper 8 are kept": _is_deep(image),
            "animated or of several pages, of which the first is taken": getattr(image, "n_frames", 1) > 1
            and image.format != "MPO",
            "transparent, laid over white": image.has_transparency_data,
            "CMYK, converted without a colour profile": image.mode == "CMYK",
        }
        said = tuple(remark for remark, holds in remarks.items() if holds)
        return Outline((height, width), image.mode in _GREY or _is_deep(image), said)


def decode(content: bytes, formats: Sequence[str] = FORMATS, largest: int = LARGEST_IMAGE) -> Image:
    """Decode an image file to 8 bits a channel, by the rule of this module.

    Args:
        content: the file's bytes.
        formats: which of Pillow's formats to take.
        largest: the most pixels to decode.

    Returns:
        A Pillow image of mode "L" or "RGB".

    Raises:
        ValueError: it is no whole image of these formats, or has more pixels; the message says what is the matter, and
            a caller puts the file's name before it.
    """
    from PIL import ImageOps

    if content.startswith(b"\x89PNG"):
        # Pillow itself stops at the last pixel, and takes what is damaged or missing before the end of the file.
        with _opened(content, formats, largest) as image:
            image.verify()
    with _opened(content, formats, largest) as image:
        if _is_deep(image):
            orientation, deep = image.getexif(), plain(image)
            deep.getexif().update(orientation)
            return ImageOps.exif_transpose(deep)
        ImageOps.exif_transpose(image, in_place=True)
        return plain(image)


def plain(image: Image) -> Image:
    """Return an open image with 8 bits a channel, of mode "L" or "RGB", by the rule of this module; never turned.

    Raises:
        ValueError: it has pixels of 32 bits.
    """
    from PIL import Image

    if _is_deep(image):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "F" or image.mode.startswith("I"):
        raise _RefusedError(f"has {image.mode} pixels of 32 bits: save it with 8 bits a channel")
    grey = image.mode in _GREY
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return _as("L" if grey else "RGB", image)


def fit(image: Image, size: tuple[int, int], shorter: int | None = None, resample: str = "bicubic") -> Image:
    """Bring an image to (height, width).

    Args:
        image: of mode "L" or "RGB".
        size: (height, width) in pixels.
        shorter: None resamples the largest part of the wanted shape in the image's middle; a number first brings the
            shorter side to so many pixels and then cuts `size` out of the middle, as ImageNet is usually evaluated.
        resample: "bicubic" or "bilinear"; both smooth an image that becomes smaller.
    """
    from PIL import ImageOps
    from PIL.Image import Resampling

    height, width = size
    method = Resampling[resample.upper()]
    if shorter is None:
        return image if image.size == (width, height) else ImageOps.fit(image, (width, height), method)
    short = min(image.size)
    image = image.resize([int(shorter * side / short) for side in image.size], method)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def crop(image: Image, box: tuple[int, int, int, int], size: tuple[int, int], resample: str = "bicubic") -> Image:
    """Cut (left, top, right, bottom) out of an image and bring it to (height, width)."""
    from PIL.Image import Resampling

    return image.resize(size[::-1], Resampling[resample.upper()], box=box)


def array(image: Image, channels: int) -> UInt8[np.ndarray, "channels height width"]:
    """Return an image's pixels as uint8, one channel or three."""
    pixels = np.asarray(_as("L" if channels == 1 else "RGB", image))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


class _RefusedError(ValueError):
    pass


def _as(mode: str, image: Image) -> Image:
    # Converting copies even where nothing changes, which takes a tenth of what decoding does.
    return image if image.mode == mode else image.convert(mode)


def _is_deep(image: Image) -> bool:
    # Older releases of Pillow open PNG files of 16 bits as "I".
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


@contextmanager
def _opened(content: bytes, formats: Sequence[str], largest: int) -> Iterator[Image]:
    from PIL import Image, ImageFile

    # Some libraries set this for the whole process; an image filled up with grey is worse than none.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(io.BytesIO(content), formats=tuple(formats)) as image:
            if image.width * image.height > largest:
                raise _RefusedError(f"has {image.width} x {image.height} pixels: more than {largest:,} are too many")
            yield image
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except Image.UnidentifiedImageError as error:
        kind = " or ".join([", ".join(formats[:-1]), formats[-1]]) if len(formats) > 1 else formats[0]
        raise ValueError(f"is not a {kind} image that can be read") from error
    except Exception as error:  # what Pillow raises for a damaged image is not specified
        raise ValueError(f"is cut short or damaged ({' '.join(str(error).split()) or type(error).__name__})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
