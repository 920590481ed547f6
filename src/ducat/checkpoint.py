"""Checkpoints: one safetensors file each, with everything that is not a tensor as JSON in its header. No pickle.

A file is written beside its place, flushed to the disk and renamed, so that at any moment the place holds either the
whole old checkpoint or the whole new one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA = 1


def write_atomically(path: Path, write: Any) -> None:
    """Let `write(temporary_path)` make a file, then put it in the place of `path` in one step.

    A failure (a full disk, an interrupt) leaves `path` as it was, and no temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as `write_atomically` does."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file; its folder must exist. An older checkpoint there is replaced.
        tensors: tensors by name.
        state: everything else, as values that JSON can hold.
    """
    metadata = {"ducat": json.dumps({"schema": SCHEMA, **state})}
    # safetensors wants dense, unshared storage: averaged and plain weights may share a buffer.
    dense = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(dense, temporary, metadata))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: tensors by name, on the CPU, and the state.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a whole checkpoint of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}") from error
    if "ducat" not in metadata:
        raise ValueError(f"{path} is not a checkpoint of ducat; `ducat adapt` takes other people's weights")
    state = json.loads(metadata["ducat"])
    if state["schema"] != SCHEMA:
        raise ValueError(f"{path} is of checkpoint schema {state['schema']}, this version of ducat reads {SCHEMA}")
    return tensors, state


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
