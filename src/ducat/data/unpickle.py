"""The Python 2 pickles of the CIFAR archives, without running what a pickle may ask for."""

import io
import pickle
import pickletools
from typing import Any

import numpy as np


def unpickle(data: bytes, source: str) -> dict[bytes, Any]:
    """Read the dictionary that an official CIFAR file holds.

    Only plain containers, byte strings, numbers and uint8 arrays are built, the arrays by our own code: of all that
    the pickle may name, nothing in numpy or elsewhere is imported or called. So it reads alike under any numpy.

    Args:
        data: the file's content.
        source: what to call it in messages.

    Raises:
        ValueError: it asks for anything else, or is damaged.
    """
    try:
        _check_memo(data)
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(content, dict):
            raise TypeError(f"it is a {type(content).__name__}, not a dictionary")
        return {key: value.array if isinstance(value, _Array) else value for key, value in content.items()}
    except _RefusedError as error:
        raise ValueError(
            f"{source} asks for {error}, which no CIFAR file does: it may be malicious; nothing was run"
        ) from error
    except Exception as error:  # what a damaged pickle raises is not specified
        raise ValueError(f"{source} is truncated or corrupt ({' '.join(str(error).split())})") from error


class _RefusedError(Exception):
    pass


class _Array:
    """Stands in for numpy.ndarray: takes its state, and believes it only if it is a whole array of bytes."""

    array: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], "_Dtype", bool, bytes]) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.name != b"u1":
            raise _RefusedError(f"an array of {dtype.name!r}")
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, name: bytes, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


def _reconstruct(*_: object) -> _Array:
    return _Array()


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise _RefusedError("an object from elsewhere")


def _check_memo(data: bytes) -> None:
    # A few bytes can make the unpickler reserve a memo of gigabytes; honest pickles number their entries in order.
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count + 1:
            raise _RefusedError(f"memo entry {argument}")
