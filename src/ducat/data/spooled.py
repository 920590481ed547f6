"""Tensors too large for memory: mapped from a file, of which only what was touched last is in memory.

They are ordinary tensors, and vanish with the last reference. Whoever goes through one in `chunks` holds no more of it
than a chunk at a time.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

LARGE = 2**28
"""Bytes from which on a tensor goes to disk."""

SLICE = 2**24
"""Bytes of a tensor that are looked at at once where its rows do not matter."""

_maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by the address of the tensor


def is_large(tensor: Tensor) -> bool:
    """Tell whether a tensor in the CPU's memory would rather be on disk."""
    return tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() >= LARGE


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Tensor:
    """Return a tensor for writing into, on disk if it is large.

    Args:
        shape: its shape.
        dtype: its type.
        folder: where its file, which has no name, takes its room; by default where temporary files go (TMPDIR).

    Raises:
        OSError: there is no room; the message says for how much and where.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not size:
        return torch.empty(tuple(shape), dtype=dtype)
    place = folder if folder is not None and folder.is_dir() else Path(tempfile.gettempdir())
    with tempfile.TemporaryFile(dir=place) as file:
        try:
            # A file without its room would fail where it is written to, by a signal.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            hint = "" if place == folder else "; TMPDIR names another folder"
            raise OSError(
                error.errno, f"{error.strerror}: {size / 1e9:.1f} GB for images are needed in {place}{hint}"
            ) from error
        mapped = mmap.mmap(file.fileno(), size)
    tensor = torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))
    _maps[tensor.data_ptr()] = mapped
    return tensor


def is_on_disk(tensor: Tensor) -> bool:
    """Tell whether `empty` put this tensor, whole, on disk."""
    mapped = _maps.get(tensor.data_ptr())
    return mapped is not None and tensor.is_contiguous() and len(mapped) == tensor.numel() * tensor.element_size()


def release(*tensors: Tensor) -> None:
    """Give back the memory of tensors that are on disk, and what was used for their chunks; their values stay."""
    mapped = [one for tensor in tensors if (one := _maps.get(tensor.data_ptr())) is not None]
    for one in mapped:
        if hasattr(one, "madvise"):
            one.madvise(mmap.MADV_DONTNEED)
    if mapped:
        _trim()


@cache
def _trimmer() -> Callable[[int], int] | None:
    """Return glibc's `malloc_trim`, None where there is none."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return trim


def _trim() -> None:
    # glibc keeps what was freed between allocations that live on: with each chunk that would be a little more.
    trim = _trimmer()
    if trim is not None:
        trim(0)


def chunks(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Yield `size` rows at a time, each to be used before the next."""
    for part in tensor.split(size):
        yield part
        release(tensor)


def slices(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the values of a contiguous tensor in their order, `SLICE` bytes at a time."""
    yield from chunks(tensor.reshape(-1), max(1, SLICE // tensor.element_size()))


def take(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of these rows."""
    taken = tensor[rows]
    release(tensor)
    return taken
