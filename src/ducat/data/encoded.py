"""Images that stay encoded, and are decoded as they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL.Image import Image
from torch import Tensor

from ducat.data import decode
from ducat.data.augment import window


class Encoded:
    """Rows of image files.

    Args:
        read: returns a row's file.
        name: returns what messages call a row.
        shape: channels, height and width that the images come in.
        resize: whether images of other sizes are brought to that; else they are an error.
        shorter: as for `ducat.data.decode.fit`.
        resample: likewise.
    """

    decodes = True

    def __init__(
        self,
        read: Callable[[int], bytes],
        name: Callable[[int], str],
        shape: tuple[int, int, int],
        *,
        resize: bool = False,
        shorter: int | None = None,
        resample: str = "bicubic",
    ) -> None:
        self._read, self._name = read, name
        self.shape, self.resize, self.shorter, self.resample = shape, resize, shorter, resample

    def picture(self, row: int) -> Image:
        """Decode a row at its own size.

        Raises:
            ValueError: it is not a whole image; the message names it.
        """
        content = self._read(row)
        try:
            return decode.decode(content)
        except ValueError as error:
            raise ValueError(f"{self._name(row)} {error}") from error

    def read(self, rows: Int64[Tensor, m]) -> UInt8[Tensor, "m channels height width"]:
        """Decode these rows, each brought to the one size.

        Raises:
            ValueError: one is not a whole image, or of another size; the message names it.
        """
        pixels = np.empty((len(rows), *self.shape), np.uint8)
        for place, row in zip(pixels, rows.tolist(), strict=True):
            picture = self.picture(row)
            if not self.resize and picture.size[::-1] != self.shape[1:]:
                raise ValueError(
                    f"{self._name(row)} is {picture.height} x {picture.width}, not {self.shape[1]} x {self.shape[2]}: "
                    "all images need one size; --size N brings an image folder to N x N"
                )
            fitted = decode.fit(picture, self.shape[1:], self.shorter, self.resample)
            place[:] = decode.array(fitted, self.shape[0])
        return torch.from_numpy(pixels)

    def crops(
        self,
        rows: Int64[Tensor, m],
        draws: Float[Tensor, "views m tries 4"],
        smallest: float,
        out: UInt8[Tensor, "views m channels height width"] | None = None,
    ) -> UInt8[Tensor, "views m channels height width"]:
        """Decode these rows, and cut a random part out of each for each view, brought to the one size.

        Args:
            rows: which.
            draws: uniform numbers in [0, 1), as for `ducat.data.augment.window`.
            smallest: share of an image's area that is kept at least.
            out: where the pixels go, and what is returned; new memory by default.
        """
        pixels = np.empty((*draws.shape[:2], *self.shape), np.uint8) if out is None else out.numpy()
        for place, row in enumerate(rows.tolist()):
            picture = self.picture(row)
            for view, tries in enumerate(draws[:, place]):
                box = window(tries, (picture.height, picture.width), smallest)
                cut = decode.crop(picture, box, self.shape[1:], self.resample)
                pixels[view, place] = decode.array(cut, self.shape[0])
        return torch.from_numpy(pixels) if out is None else out
