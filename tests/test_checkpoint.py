import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ducat import checkpoint

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "none": torch.zeros(0, 3),
}
STATE = {"position": {"epoch": 3, "losses": [0.1, 1e-30]}, "text": "λ"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, TENSORS, STATE)
    return path


def assert_is(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_is_saved_is_read_back_exactly(saved: Path) -> None:
    tensors, state = checkpoint.read(saved)
    assert_is(tensors, TENSORS)
    assert state == STATE
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_shared_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"one": base, "same": base, "transposed": base.T, "row": base[1]}
    checkpoint.save(tmp_path / "c", tensors, {})
    assert_is(checkpoint.read(tmp_path / "c")[0], tensors)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit_of_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def pickle(path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, path)


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def newer(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"ducat": json.dumps({"schema": 99, "digest": ""})})


def headless(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"ducat": "{"})


def gone(path: Path) -> None:
    path.unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut, "not a whole checkpoint"),
    (cut_in_the_header, "not a whole checkpoint"),
    (empty, "not a whole checkpoint"),
    (flip_a_bit_of_a_weight, "is damaged"),
    (pickle, "not a whole checkpoint"),
    (foreign, "not a checkpoint of ducat"),
    (newer, "schema 99, this version of ducat reads 1"),
    (headless, "header is damaged"),
    (gone, "does not exist"),
]
damages = pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])


@damages
def test_a_damaged_or_foreign_file_is_named_in_one_line(saved: Path, damage: Callable, words: str) -> None:
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
        checkpoint.read(saved)
    assert str(saved) in str(raised.value)
    assert "\n" not in str(raised.value)


@damages
def test_the_checkpoint_before_a_damaged_one_is_read_with_a_notice(saved: Path, damage: Callable, words: str) -> None:
    checkpoint.save(saved, {"weight": torch.ones(1)}, {"epoch": 4}, keep_previous=True)
    assert checkpoint.read_or_previous(saved)[1:] == ({"epoch": 4}, None)
    damage(saved)
    tensors, state, notice = checkpoint.read_or_previous(saved)
    assert_is(tensors, TENSORS)
    assert state == STATE
    assert notice is not None
    assert words in notice
    assert "previous.safetensors" in notice


def test_if_both_are_damaged_both_are_named(saved: Path) -> None:
    checkpoint.save(saved, TENSORS, STATE, keep_previous=True)
    cut(saved)
    empty(checkpoint.previous_of(saved))
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is not .*previous\.safetensors is not"):
        checkpoint.read_or_previous(saved)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_: Any, **__: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("where", "failure", "words"),
    [
        ("ducat.checkpoint.save_file", full_disk, "No space left on device"),
        ("os.fsync", full_disk, "No space left on device"),
        ("ducat.checkpoint.save_file", read_only, "Read-only file system"),
    ],
)
def test_a_failed_write_names_the_file_and_leaves_the_old_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch, where: str, failure: Callable, words: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, failure)
        with pytest.raises(OSError, match=words) as raised:
            checkpoint.save(saved, {"weight": torch.ones(1)}, {}, keep_previous=True)
    assert str(saved) in str(raised.value)
    assert_is(checkpoint.read(saved)[0], TENSORS)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name], "the half-written file is left"


def test_a_real_device_without_space_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*manifest.json: No space left on device"):
        checkpoint.write_atomically(tmp_path / "manifest.json", lambda _: Path("/dev/full").write_text("{}"))
    assert not list(tmp_path.iterdir())


def test_optimiser_state_survives(tmp_path: Path) -> None:
    def stepped(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
        parameter.grad = torch.tensor([1.0, -2.0])
        optimizer.step()
        return parameter.detach().clone()

    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    stepped(optimizer, parameter)
    tensors, rest = checkpoint.split_optimizer(optimizer)
    checkpoint.save(tmp_path / "c", tensors, {"optimizer": rest})
    start = parameter.detach().clone()
    expected = stepped(optimizer, parameter)

    again = torch.nn.Parameter(start)
    other = torch.optim.SGD([again], lr=5.0)
    tensors, state = checkpoint.read(tmp_path / "c")
    checkpoint.join_optimizer(other, tensors, state["optimizer"])
    assert torch.equal(stepped(other, again), expected)


def test_global_random_states_survive(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(), *np.random.rand(2), np.random.randn(), *torch.rand(2).tolist()]

    draw()  # An odd number of normal draws leaves one cached.
    tensors, rest = checkpoint.random_state()
    checkpoint.save(tmp_path / "c", tensors, {"random": rest})
    expected = draw()
    assert draw() != expected
    tensors, state = checkpoint.read(tmp_path / "c")
    checkpoint.set_random_state(tensors, state["random"])
    assert draw() == expected
