"""The pickles of the CIFAR archives, Python 2's or Python 3's, without running what a pickle may ask for."""

import io
import pickle
import pickletools
from typing import Any

import numpy as np


def unpickle(data: bytes, source: str) -> dict[bytes, Any]:
    """Read the dictionary that an official CIFAR file holds.

    Only plain containers, strings, numbers and arrays of uint8 or int64 are built, the arrays by our own code: of all
    that the pickle may name, nothing in numpy or elsewhere is imported or called. So it reads alike under any numpy.
    Strings come as bytes, as Python 2 wrote them, and arrays of int64 as lists.

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
        return {_as_python2(key): _as_python2(value) for key, value in content.items()}
    except _RefusedError as error:
        raise ValueError(
            f"{source} asks for {error}, which no CIFAR file does: it may be malicious; nothing was run"
        ) from error
    except Exception as error:  # what a damaged pickle raises is not specified
        raise ValueError(f"{source} is truncated or corrupt ({' '.join(str(error).split())})") from error


class _RefusedError(Exception):
    pass


def _as_python2(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return [_as_python2(item) if isinstance(item, str) else item for item in value]
    if isinstance(value, _Array):
        return value.array if value.array.dtype == np.uint8 else value.array.tolist()
    return value


class _Array:
    """Stands in for numpy.ndarray: takes its state, and believes it only if it is a whole array of plain numbers."""

    array: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], "_Dtype", bool, bytes | bytearray]) -> None:
        _, shape, dtype, fortran, content = state
        self.array = np.frombuffer(content, dtype.plain()).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands in for numpy.dtype."""

    order: object = b"|"

    def __init__(self, name: bytes | str, *_: object) -> None:
        self.name = name.encode() if isinstance(name, str) else name

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.order = state[1]

    def plain(self) -> str:
        """Return the dtype's name for numpy, if it is one that an honest file has."""
        if self.name == b"u1":
            return "u1"
        if self.name == b"i8" and self.order in ("<", b"<"):
            return "<i8"
        raise _RefusedError(f"an array of {self.name!r}")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(content: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def _encode(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise _RefusedError(f"the codec {codec!r}")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
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
