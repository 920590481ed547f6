"""Checkpoints: one safetensors file each, with everything that is not a tensor as JSON in its header. No pickle.

A file is written beside its place, flushed to the disk and renamed, so that at any moment the place holds either the
whole old checkpoint or the whole new one. A digest over every tensor tells a damaged file from a whole one.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ducat.data import spooled
from ducat.data.stored import Layout

SCHEMA = 1


def write_atomically(path: Path, write: Callable[[Path], Any], previous: Path | None = None) -> None:
    """Let `write(temporary_path)` make a file, then put it in the place of `path`.

    A failure (a full disk, an interrupt) leaves `path` as it was, and no temporary file.

    Args:
        path: the file to make or replace.
        write: writes all of it to the path it is given.
        previous: where the file that is at `path` now goes; by default it is deleted. A kill between the two renames
            leaves it at `previous` alone.

    Raises:
        OSError: if it cannot be written; the message names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # A read-only folder: nothing was made there.
            temporary.unlink(missing_ok=True)


def _flush_folder(path: Path) -> None:
    if os.name != "posix":  # Elsewhere a folder cannot be opened, and a rename is durable by itself.
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete the temporary files that killed processes left of writing `name` into `folder`.

    No other process may be writing such a file.
    """
    for leftover in folder.glob(f".{name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as `write_atomically` does."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def locked(lock: Path, taken: str) -> Iterator[None]:
    """Keep other processes from what a file stands for; the system lets go of the lock when the process dies.

    Raises:
        ValueError: if it is held already, with the message `taken`.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock, blocking=False)
    try:
        held.acquire()
    except Timeout:
        raise ValueError(taken) from None
    try:
        yield
    finally:
        held.release()


def previous_of(path: Path) -> Path:
    """Return where `save` keeps the checkpoint that was at `path` before."""
    return path.with_name("previous.safetensors")


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep_previous: bool = False) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file; its folder must exist. An older checkpoint there is replaced.
        tensors: tensors by name.
        state: everything else, as values that JSON can hold.
        keep_previous: move the older checkpoint to `previous_of(path)` instead.

    Raises:
        OSError: if it cannot be written; the older checkpoint is whole, at one of its two places.
    """
    # safetensors wants dense, unshared storage: averaged and plain weights may share a buffer.
    dense = {
        name: tensor if spooled.is_on_disk(tensor) else tensor.detach().cpu().contiguous().clone()
        for name, tensor in tensors.items()
    }
    ours = {"schema": SCHEMA, "digest": digest(dense), "state_digest": _state_digest(state)}
    metadata = {"ducat": json.dumps({**ours, **state})}

    def write(temporary: Path) -> None:
        try:
            if any(map(spooled.is_on_disk, dense.values())):
                _write_in_slices(temporary, dense, metadata)
            else:
                save_file(dense, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, write, previous_of(path) if keep_previous else None)


def _write_in_slices(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # safetensors itself has all that it writes in memory.
    layout = Layout.plan(tensors, metadata)
    with path.open("wb") as file:
        file.write(layout.header(metadata))
        for name, (_, _, offset) in layout.entries.items():
            file.seek(offset)
            for part in spooled.slices(tensors[name]):
                file.write(part.view(torch.uint8).numpy().data)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a short digest of dense tensors on the CPU and of their names."""
    made = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        made.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        for part in spooled.slices(tensors[name]):
            made.update(part.view(torch.uint8).numpy().data)
    return made.hexdigest()


def _state_digest(state: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(state))
    return hashlib.blake2b(json.dumps(as_read, sort_keys=True).encode(), digest_size=16).hexdigest()


def read(path: Path, holds: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: tensors by name, on the CPU, and the state.

    Args:
        path: the file.
        holds: keys that the state must have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a whole checkpoint of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: _loaded(path, name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}") from error
    if "ducat" not in metadata:
        raise ValueError(f"{path} is not a checkpoint of ducat; `ducat adapt` takes other people's weights")
    try:
        state = json.loads(metadata["ducat"])
        schema, saved = state.pop("schema"), state.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: its header is damaged") from error
    state_digest = state.pop("state_digest", None)  # checkpoints of earlier versions have none
    if schema != SCHEMA:
        raise ValueError(f"{path} is of checkpoint schema {schema}, this version of ducat reads {SCHEMA}")
    if saved != digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors are not those that were saved")
    if state_digest not in (None, _state_digest(state)):
        raise ValueError(f"{path} is damaged: its header is not the one that was saved")
    missing = next((key for key in holds if key not in state), None)
    if missing is not None:
        raise ValueError(f"{path} is not a checkpoint of a run: {missing} is missing from its header")
    return tensors, state


def _loaded(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a file, copied to a place of its own if it is large: it is mapped, and stays where touched."""
    if not spooled.is_large(tensor):
        return tensor
    copy = spooled.empty(tensor.shape, tensor.dtype, path.parent)
    rows = max(1, spooled.SLICE * len(tensor) // (tensor.numel() * tensor.element_size()))
    for start in range(0, len(tensor), rows):
        with safe_open(path, framework="pt") as file:
            copy[start : start + rows] = file.get_slice(name)[start : start + rows]
        spooled.release(copy)
    return copy


def digest_of(path: Path) -> str:
    """Return the digest that `save` wrote into a checkpoint's header, without reading its tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return str(json.loads((file.metadata() or {})["ducat"])["digest"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of ducat") from error


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load the weights that were read from `path` into a network.

    Raises:
        ValueError: if they do not fit; the message names the file.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights of {path} do not fit the network: {error}") from error


def read_or_previous(path: Path, holds: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Read a checkpoint, or the one before it if it cannot be used; `holds` as for `read`.

    Returns:
        The tensors, the state, and in the second case a sentence that says what happened.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if there is no whole one.
    """
    try:
        return *read(path, holds), None
    except (FileNotFoundError, ValueError) as error:
        previous = previous_of(path)
        if not previous.is_file():
            raise
        try:
            tensors, state = read(previous, holds)
        except ValueError as second:
            raise ValueError(f"{error}; and the one before it: {second}") from second
        return tensors, state, f"{error}; took the checkpoint before it, {previous}"


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix before each name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of that prefix, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors by name and the rest; `join_optimizer` undoes it."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, values in whole["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else rest)[f"{index}.{name}"] = value
    return tensors, {"values": rest, "groups": whole["param_groups"]}


def join_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Load into an optimiser what `split_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**rest["values"], **tensors}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of this process's global random generators, as tensors and the rest; `set_random_state` undoes.

    They are Python's, NumPy's and PyTorch's on the CPU and on the current GPU. Nothing in this package draws from them,
    but a network of the user's may, with dropout for example.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "python": torch.tensor(words),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, gauss], "numpy": [kind, position, has_gauss, cached]}


def set_random_state(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put the global random generators back to where `random_state` found them."""
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, *others = rest["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *others))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
