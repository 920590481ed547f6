import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ducat.data.unpickle import unpickle

Pickle = Callable[[object], bytes]


def test_reads_what_the_cifar_archives_hold(python2_pickle: Pickle) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(4, 6)
    content = unpickle(python2_pickle({b"data": array, b"labels": [3, 1], b"name": b"x" * 300}), "batch")
    np.testing.assert_array_equal(content.pop(b"data"), array)
    assert content == {b"labels": [3, 1], b"name": b"x" * 300}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("labels", [[3, 1], np.array([3, 1])], ids=["list", "array"])
@pytest.mark.parametrize("key", [bytes, str])
def test_a_subset_that_python_3_wrote_reads_alike(protocol: int, labels: object, key: type) -> None:
    array = np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    written = {
        b"data": array,
        b"labels": labels,
        b"batch_label": "testing batch 1 of 1",
        b"label_names": ["cat", "dog"],
    }
    data = pickle.dumps({name if key is bytes else name.decode(): value for name, value in written.items()}, protocol)
    content = unpickle(data, "batch")
    np.testing.assert_array_equal(content.pop(b"data"), array)
    assert content == {
        b"labels": [3, 1],
        b"batch_label": b"testing batch 1 of 1",
        b"label_names": [b"cat", b"dog"],
    }


def test_fortran_order_is_kept(python2_pickle: Pickle) -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    data = python2_pickle({b"data": array}).replace(pickle.NEWFALSE, pickle.NEWTRUE)
    np.testing.assert_array_equal(unpickle(data, "batch")[b"data"], np.arange(6).reshape((2, 3), order="F"))


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_runs_nothing(protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "attacked"
    data = pickle.dumps({"data": Attack(target)}, protocol)
    with pytest.raises(ValueError, match=r"^batch asks for posix\.mkdir, which no CIFAR file does"):
        unpickle(data, "batch")
    assert not target.exists()
    pickle.loads(data)  # noqa: S301 (the attack works where it is let)
    assert target.exists()


@pytest.mark.parametrize("function", ["builtins eval", "os system", "numpy load", "numpy.core.multiarray scalar"])
def test_only_the_arrays_own_names_are_known(function: str) -> None:
    module, name = function.split()
    data = b"\x80\x02}U\x01ac" + f"{module}\n{name}\n".encode() + b"s."
    with pytest.raises(ValueError, match=f"asks for {module}.{name}"):
        unpickle(data, "batch")


def test_other_arrays_and_objects_from_elsewhere_are_refused(python2_pickle: Pickle) -> None:
    with pytest.raises(ValueError, match=r"asks for an array of b'O8'"):
        unpickle(python2_pickle({b"data": np.zeros(1, np.uint8)}).replace(b"u1", b"O8"), "batch")
    with pytest.raises(ValueError, match="asks for an object from elsewhere"):
        unpickle(b"\x80\x02}U\x01aU\x01bQs.", "batch")


def test_a_memo_of_gigabytes_is_refused() -> None:
    with pytest.raises(ValueError, match="asks for memo entry 2147483647"):
        unpickle(b"\x80\x02}" + pickle.LONG_BINPUT + struct.pack("<I", 2**31 - 1) + b".", "batch")


@pytest.mark.parametrize("keep", [0, 1, 10, -1, -60])
def test_a_truncated_pickle_is_named(keep: int, python2_pickle: Pickle) -> None:
    data = python2_pickle({b"data": np.zeros((4, 6), np.uint8)})
    with pytest.raises(ValueError, match=r"^batch is truncated or corrupt"):
        unpickle(data[:keep], "batch")


def test_a_pickle_of_something_else_is_named(python2_pickle: Pickle) -> None:
    with pytest.raises(ValueError, match=r"^batch is truncated or corrupt .*list"):
        unpickle(python2_pickle([1, 2]), "batch")
