"""Files of tensors in the safetensors format, written and read a part at a time.

`safetensors` itself wants all tensors in memory to write them, and maps whole files to read them, whose pages then
count as the process's own. The format: 8 bytes of length, a JSON header of so many bytes, then each
tensor's bytes in a row.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ducat.data.images import Lazy, Source

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}
_SPARE = 4096
"""Bytes of a header left for what is known only in the end."""


class Stored:
    """Rows of a tensor of bytes in a file, fetched as they are asked for.

    Args:
        path: the file; it may be replaced afterwards, the rows stay those of the one that was opened.
        offset: where in the file the tensor begins.
        shape: of one row: channels, height and width.
        count: how many rows there are.
    """

    decodes = False

    def __init__(self, path: Path, offset: int, shape: tuple[int, int, int], count: int) -> None:
        self.offset, self.shape, self.count = offset, shape, count
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self.count

    def source(self) -> Lazy:
        """Return the rows as images without labels."""
        return Lazy(self, torch.zeros(self.count, dtype=torch.int64), torch.arange(self.count))

    def read(self, rows: Int64[Tensor, m]) -> UInt8[Tensor, "m channels height width"]:
        """Fetch these rows."""
        fetched = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        size = math.prod(self.shape)
        memory = fetched.numpy().data.cast("B") if len(rows) else memoryview(b"")
        # Rows that lie side by side come in one piece.
        breaks = (rows[1:] != rows[:-1] + 1).nonzero().flatten() + 1
        edges = [0, *breaks.tolist(), len(rows)] if len(rows) else [0]
        firsts = rows[edges[:-1]].tolist()
        for first, start, stop in zip(firsts, edges[:-1], edges[1:], strict=True):
            self._fill(memory[start * size : stop * size], self.offset + first * size)
        return fetched

    def _fill(self, memory: memoryview, offset: int) -> None:
        while len(memory):
            count = os.preadv(self._file, [memory], offset)
            if not count:
                raise OSError("a prepared data set ends before its last image: prepare it again")
            memory, offset = memory[count:], offset + count


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a file lies.

    Attributes:
        entries: by name: dtype, shape and offset from the file's beginning.
        size: of the whole file, in bytes.
        header_size: of the JSON header, in bytes.
    """

    entries: dict[str, tuple[torch.dtype, tuple[int, ...], int]]
    size: int
    header_size: int

    @classmethod
    def plan(cls, tensors: Mapping[str, Tensor | Source], metadata: Mapping[str, str]) -> Layout:
        """Lay out a file of these tensors, with room for metadata that grow a little."""
        header_size = -(-(len(cls({}, 0, 0).header(metadata)) + 200 * len(tensors) + _SPARE) // 8) * 8
        entries, offset = {}, 8 + header_size
        # The longest numbers first, so that each begins at a multiple of its size.
        for name, tensor in sorted(tensors.items(), key=lambda item: (-_dtype(item[1]).itemsize, item[0])):
            shape = (len(tensor), *tensor.shape) if isinstance(tensor, Source) else tuple(tensor.shape)
            entries[name] = _dtype(tensor), shape, offset
            offset += math.prod(shape) * _dtype(tensor).itemsize
        return cls(entries, offset, header_size)

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Return the file's beginning, up to the first tensor.

        Raises:
            ValueError: the metadata take more room than there is.
        """
        names = {dtype: name for name, dtype in _DTYPES.items()}
        content: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, (dtype, shape, offset) in self.entries.items():
            start = offset - 8 - self.header_size
            place = [start, start + math.prod(shape) * dtype.itemsize]
            content[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": place}
        text = json.dumps(content).encode()
        if self.header_size and len(text) > self.header_size:
            raise ValueError(f"the description of the data set takes {len(text)} bytes: use shorter class names")
        return len(text.ljust(self.header_size)).to_bytes(8, "little") + text.ljust(self.header_size)

    @classmethod
    def read(cls, path: Path) -> Layout:
        """Read the layout of a file that `safetensors` has found to be whole."""
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(header_size))
        content.pop("__metadata__", None)
        entries = {
            name: (_DTYPES[value["dtype"]], tuple(value["shape"]), 8 + header_size + value["data_offsets"][0])
            for name, value in content.items()
        }
        return cls(entries, path.stat().st_size, header_size)

    def open(self, path: Path) -> dict[str, Tensor | Stored]:
        """Return the file's tensors: images as `Stored`, and labels and the like in memory."""
        opened: dict[str, Tensor | Stored] = {}
        for name, (dtype, shape, offset) in self.entries.items():
            if dtype is torch.uint8 and len(shape) == 4:
                opened[name] = Stored(path, offset, (shape[1], shape[2], shape[3]), shape[0])
            else:
                with path.open("rb") as file:
                    file.seek(offset)
                    content = bytearray(file.read(math.prod(shape) * dtype.itemsize))
                empty = torch.empty(shape, dtype=dtype)
                opened[name] = torch.frombuffer(content, dtype=dtype).view(shape) if content else empty
        return opened


def _dtype(tensor: Tensor | Source) -> torch.dtype:
    return torch.uint8 if isinstance(tensor, Source) else tensor.dtype
