"""Generated images beside the real ones: read where they lie, a fixed share of every batch, never validated on.

The published sets hold 1 to 50 million images (Rebuffi et al. 2021, arXiv 2103.01946; Wang et al. 2023, arXiv
2302.04638), more than memory does.
"""

from __future__ import annotations

import ast
import hashlib
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ducat.data.augment import Augmentation
from ducat.data.batches import Batches
from ducat.data.images import floats
from ducat.seeding import generator

IMAGES, LABELS = ("image", "images", "data"), ("label", "labels", "targets")
FINGERPRINTED = 10_000  # images that the fingerprint is over, evenly spread, besides all labels


@dataclass(frozen=True)
class Extra:
    """Images and labels in a file, of which only what a batch needs is read.

    Attributes:
        path: the file.
        images: (n, height, width, channels), uint8, mapped from the file.
        labels: (n,), int64.
        fingerprint: "sha256:..." over the shape, all labels and `FINGERPRINTED` images.
    """

    path: Path
    images: np.ndarray = field(repr=False)
    labels: Int64[Tensor, n] = field(repr=False)
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def open(cls, path: Path | str, shape: tuple[int, int, int], num_classes: int) -> Extra:
        """Map a file, and see that it fits.

        Args:
            path: an .npz file as numpy.savez writes it, with images and labels by one of the names `IMAGES` and
                `LABELS`.
            shape: (channels, height, width) of the data that it stands beside.
            num_classes: C; labels are in [0, C).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a file, or does not fit the data; the message says what to change.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"data.extra: {path} does not exist")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"data.extra: {path} is not a whole .npz file, as numpy.savez writes it")
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        found = [next((members[name] for name in names if name in members), None) for names in (IMAGES, LABELS)]
        if found[0] is None or found[1] is None:
            raise ValueError(f"data.extra: {path} holds {', '.join(members) or 'nothing'}, not image and label")
        images, labels = (_mapped(path, info) for info in found if info is not None)
        channels, height, width = shape
        if images.ndim == 3:
            images = images[..., None]
        expected = (height, width, channels)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise ValueError(
                f"data.extra: {path} has images of {images.dtype} and shape {images.shape[1:]}: uint8 is needed and "
                f"{expected}, channels last"
            )
        if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"data.extra: {path} has labels of {labels.dtype} and shape {labels.shape} for {len(images)} images: "
                "give one whole number for each"
            )
        if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"data.extra: {path} has labels outside [0, {num_classes}), or none")
        digest = hashlib.sha256(f"{images.shape}".encode())
        digest.update(labels.astype(np.int64).tobytes())
        rows = np.unique(np.linspace(0, len(images) - 1, min(FINGERPRINTED, len(images))).astype(np.int64))
        for part in np.array_split(rows, -(-len(rows) // 1000)):
            digest.update(images[part].tobytes())
        whole = torch.from_numpy(labels.astype(np.int64))
        return cls(path, images, whole, f"sha256:{digest.hexdigest()}")

    def select(self, rows: Int64[Tensor, m]) -> tuple[Tensor, Tensor]:
        """Return images, (m, channels, height, width) uint8, and labels of these rows."""
        order = rows.argsort()  # a disk reads forwards
        read = torch.from_numpy(self.images[rows[order].numpy()])
        images = torch.empty_like(read)
        images[order] = read
        return images.permute(0, 3, 1, 2).contiguous(), self.labels[rows]


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """Map an array of an .npz file that was written without compression."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"data.extra: {path} is compressed, so it cannot be read in part: write it again with numpy.savez"
        )
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"data.extra: {path} is damaged")
        name, extra = struct.unpack("<HH", header[26:30])
        file.seek(name + extra, 1)
        start = file.tell()
        try:
            version = np.lib.format.read_magic(file)
            length = struct.unpack("<H" if version[0] == 1 else "<I", file.read(2 if version[0] == 1 else 4))[0]
            described = ast.literal_eval(file.read(length).decode("latin1"))
            dtype, order, shape = np.dtype(described["descr"]), described["fortran_order"], described["shape"]
        except (ValueError, KeyError, TypeError, SyntaxError, struct.error) as error:
            raise ValueError(f"data.extra: {path} is damaged: {info.filename} is no array") from error
        offset = file.tell()
    if dtype.hasobject or order or np.prod(shape, dtype=object) * dtype.itemsize > info.file_size - (offset - start):
        raise ValueError(f"data.extra: {path} is damaged, or {info.filename} is no plain array in C order")
    if not all(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape)


class Mixed:
    """Batches of which a fixed number of rows are drawn from a file, with replacement.

    An epoch has as many steps as one of the real images alone has. Every draw depends on the seed, the epoch and the
    step alone, and is made for the global batch, as for `Batches`.

    Args:
        real: batches of the real rows; `real.batch_size` of them a step.
        extra: the file.
        rows: of the global batch that are drawn from the file.
        steps: of an epoch.
    """

    def __init__(self, real: Batches, extra: Extra, rows: int, steps: int) -> None:
        if rows % real.world_size:
            raise ValueError(f"data.extra_share: {rows} rows of a batch are no multiple of {real.world_size} processes")
        self.real, self.extra, self.rows, self.steps = real, extra, rows, steps
        self.views = real.views

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return self.steps

    def epoch(
        self, epoch: int, start_step: int = 0
    ) -> Iterator[tuple[Float[Tensor, "*views batch channels height width"], Int64[Tensor, batch]]]:
        """Yield this process's rows of each batch: images in [0, 1], and labels.

        Real and drawn rows alternate, so that each process and each part of a batch has its share of both.
        """
        batches = self.real.epoch(epoch, start_step)
        for step in range(start_step, self.steps):
            x, y = next(batches)
            others, labels = self._drawn(epoch, step)
            order = _alternating(len(y), len(labels)).to(x.device)
            images = torch.cat([x, others.to(x.device)], dim=-4).index_select(x.ndim - 4, order)
            yield images, torch.cat([y, labels.to(y.device)])[order]

    def _drawn(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        real = self.real
        share = self.rows // real.world_size
        start = real.rank * share
        rows = torch.randint(len(self.extra), (self.rows,), generator=generator(real.seed, "extra", epoch, step))
        images, labels = self.extra.select(rows[start : start + share])
        views = [self._view(images, epoch, step, view, start) for view in range(self.views)]
        return floats(torch.stack(views) if self.views > 1 else views[0]), labels

    def _view(self, images: Tensor, epoch: int, step: int, view: int, start: int) -> Tensor:
        augment: Augmentation | None = self.real.augment
        if augment is None:
            return images
        noise = generator(self.real.seed, "extra augmentation", epoch, step, view)
        return augment(images, noise, start, self.rows)


def _alternating(first: int, second: int) -> Int64[Tensor, m]:
    """Return the order in which rows 0..first and the `second` rows after them are spread evenly among each other."""
    # Whole numbers: a process's rows of a batch have the order that they have in the whole one, ties included.
    places = [(2 * torch.arange(count) + 1) * other for count, other in ((first, second), (second, first))]
    return torch.cat(places).argsort(stable=True)
