"""The run folder: where a training run keeps its config, manifest, metrics, checkpoints and evaluation."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from ducat import checkpoint
from ducat.config import Config
from ducat.dummy import RecoveredClassifier, dummy_head
from ducat.models.architecture import Architecture

Which = Literal["best", "last"]


@dataclass(frozen=True)
class RunFolder:
    """A run folder by its path; `create` makes one, `open` checks one that is there."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """Make a new run folder.

        Raises:
            FileExistsError: if something is there already; nothing is overwritten.
        """
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise FileExistsError(
                f"{path} exists, and a run is never overwritten: give another --name, or --resume {path}"
            ) from None
        (path / "checkpoints").mkdir()
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """Return the run folder at `path`.

        Raises:
            FileNotFoundError: if there is none.
        """
        folder = cls(Path(path))
        if not folder.config_path.is_file():
            raise FileNotFoundError(f"{path} is not a run folder: it has no config.yaml")
        return folder

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def evaluation_path(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def config(self) -> Config:
        return Config.from_yaml(self.config_path)

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "manifest.json").read_text())

    def checkpoint_path(self, which: Which) -> Path:
        return self.path / "checkpoints" / which / "checkpoint.safetensors"

    def write_config(self, config: Config) -> None:
        checkpoint.write_text(self.config_path, config.to_yaml())

    def update_manifest(self, values: dict[str, Any]) -> None:
        """Write the manifest, or add to it."""
        path = self.path / "manifest.json"
        old = self.manifest if path.is_file() else {}
        checkpoint.write_text(path, json.dumps({**old, **values}, indent=2) + "\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one epoch's line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last one that an interrupt cut short is left out."""
        path = self.path / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def drop_metrics(self, from_epoch: int) -> None:
        """Take back the lines of epochs that will be run again."""
        kept = [json.dumps(row) + "\n" for row in self.metrics if row["epoch"] < from_epoch]
        checkpoint.write_text(self.path / "metrics.jsonl", "".join(kept))

    def load(self, which: Which = "best") -> nn.Module:
        """Return the trained network as it is, with 2C outputs if it has dummy classes, in evaluation mode.

        Raises:
            FileNotFoundError: if the run has no such checkpoint.
            ValueError: if the checkpoint is damaged or foreign.
        """
        if which not in get_args(Which):
            raise ValueError(f"which={which!r} is unknown: choose from {', '.join(get_args(Which))}")
        tensors, state = checkpoint.read(self.checkpoint_path(which))
        with torch.random.fork_rng(devices=[]):
            model = Architecture(**state["model"]).build()
        model.load_state_dict(checkpoint.part("model", tensors))
        return model.eval()


def load(run_folder: Path | str, which: Which = "best") -> nn.Module:
    """Return a run's deployed model: images in [0, 1], shape (B, channels, H, W), to C logits, in evaluation mode.

    A network with dummy classes comes behind `RecoveredClassifier`.

    Args:
        run_folder: the folder of the run.
        which: "best", by robust accuracy on the validation split, or "last".

    Raises:
        FileNotFoundError: if there is no such run or checkpoint.
        ValueError: if the checkpoint is damaged or foreign.
    """
    model = RunFolder.open(run_folder).load(which)
    return RecoveredClassifier(model).eval() if dummy_head(model) is not None else model


def environment() -> dict[str, Any]:
    """Return what a manifest says of the machine and the software: versions, processor, threads, git commit."""
    packages = ("torch", "numpy", "accelerate", "safetensors", "pyautoattack", "foolbox")
    return {
        "ducat": metadata.version("ducat"),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "git": _git(),
        "command": sys.argv,
    }


def _git() -> dict[str, Any] | None:
    """Return the commit of the checkout that this code runs from, and whether it has uncommitted changes."""
    command = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}
