"""The run folder: where a training run keeps its config, manifest, metrics, checkpoints and evaluation."""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ducat import checkpoint, records, zoo
from ducat.architecture import Architecture
from ducat.config import Config
from ducat.data import Dataset
from ducat.data import load as load_data
from ducat.data.streams import parse
from ducat.dummy import RecoveredClassifier, dummy_head

HOLDS = ("model", "position", "optimizer", "averaged", "random", "spent")  # what a checkpoint's state always has
Which = str  # "best", "last", or "epoch-N" of a run that keeps the checkpoints of its epochs


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
                f"{path} exists, and a run is never overwritten: give another --name, or --resume {cls(path).quoted}"
            ) from None
        (path / "checkpoints").mkdir()
        return cls(path)

    @classmethod
    @contextlib.contextmanager
    def making(cls, path: Path) -> Iterator["RunFolder"]:
        """Make a new run folder that appears at `path` when the block has filled it, and not at all if it fails.

        Raises:
            FileExistsError: if something is there already; nothing is overwritten.
        """
        taken = f"{path} exists, and a run is never overwritten: give another --name, or --resume {cls(path).quoted}"
        if path.exists():
            raise FileExistsError(taken)
        hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            yield cls.create(hidden)
            try:
                hidden.rename(path)
            except OSError:
                raise FileExistsError(taken) from None
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """Return the run folder at `path`, or of a network of the zoo by its name, such as "zoo:digits-pgd-at".

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the zoo has no such network.
        """
        folder = cls(zoo.place(path))
        if not folder.config_path.is_file():
            raise FileNotFoundError(f"{path} is not a run folder: it has no config.yaml")
        return folder

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def quoted(self) -> str:
        """The path as a shell takes it, for commands that a message names."""
        return shlex.quote(str(self.path))

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def evaluation_path(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def evaluations_path(self) -> Path:
        return self.path / "evaluations"

    @property
    def rejection_path(self) -> Path:
        return self.path / "rejection.json"

    @property
    def config(self) -> Config:
        return Config.from_yaml(self.config_path, whole=True)

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of manifest.json, checked."""
        return records.read(self.path / "manifest.json", records.Manifest)

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints there are: "best" and "last", then epochs from the newest on."""
        found = [path.parent.name for path in self.path.glob("checkpoints/*/checkpoint.safetensors")]
        return sorted(found, key=lambda name: (_epochs(name) is not None, -(_epochs(name) or 0), name))

    def checkpoint_path(self, which: Which) -> Path:
        return self.path / "checkpoints" / which / "checkpoint.safetensors"

    def save(self, which: Which, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint atomically; the `last` one before stays beside it.

        Raises:
            OSError: if it cannot be written.
        """
        path = self.checkpoint_path(which)
        path.parent.mkdir(exist_ok=True)
        checkpoint.save(path, tensors, state, keep_previous=which == "last")

    def drop_checkpoints(self, keep: int) -> None:
        """Delete the checkpoints of epochs other than the newest `keep`."""
        for which in [name for name in self.checkpoints if _epochs(name) is not None][keep:]:
            shutil.rmtree(self.checkpoint_path(which).parent)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training this run; the system lets go of the lock when the process dies.

        Raises:
            ValueError: if another process holds it.
        """
        taken = f"{self.path} is being trained by another process: wait for it, or stop it"
        with checkpoint.locked(self.path / ".lock", taken):
            yield

    def clean(self, from_epoch: int) -> None:
        """Remove what a killed process left: temporary files, and the metrics of epochs that will be run again."""
        for folder in [self.path, *self.path.glob("checkpoints/*/")]:
            for name in ("checkpoint.safetensors", "manifest.json", "metrics.jsonl"):
                checkpoint.remove_leftovers(folder, name)
        if (self.path / "metrics.jsonl").is_file():
            self.drop_metrics(from_epoch)

    def write_config(self, config: Config) -> None:
        checkpoint.write_text(self.config_path, config.to_yaml())

    def write_ids(self, ids: Sequence[int]) -> None:
        """Record which images of its publisher's training split a subset holds."""
        checkpoint.write_text(self.path / "train_ids.json", json.dumps(list(ids)) + "\n")

    def update_manifest(self, values: dict[str, Any]) -> None:
        """Write the manifest, or add to it."""
        path = self.path / "manifest.json"
        old = self.manifest if path.is_file() else {}
        checkpoint.write_text(path, json.dumps({**old, **values}, indent=2) + "\n")

    def dataset(self) -> Dataset:
        """Load the data that the run was trained on.

        Raises:
            FileNotFoundError: if they are not prepared here.
            ValueError: if other images are prepared under their name.
        """
        settings = self.config.data
        try:
            dataset = load_data(settings.name, samples=settings.samples, root=settings.root, held_out=settings.held_out)
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{error}{self._where_data_count_from()}") from error
        self.check_data(dataset)
        return dataset

    def _where_data_count_from(self) -> str:
        """Say of a place of the data that it is another one in another folder; nothing if it is not."""
        settings = self.config.data
        kind, place = parse(settings.name) or ("", "")
        places = {"data.root": settings.root, "data.name": Path(place) if kind in ("folder", "wds") else None}
        for name, path in places.items():
            if path is not None and not path.expanduser().is_absolute():
                return (
                    f"; {name} in {self.config_path} is {path}, which counts from the folder that training began in: "
                    "go there, or write the whole path"
                )
        return ""

    def check_data(self, dataset: Dataset) -> None:
        """Refuse data other than those that the run was trained on.

        Raises:
            ValueError: if they are others.
        """
        name = self.config.data.name
        if dataset.fingerprint != self.manifest.get("data", {}).get("fingerprint"):
            raise ValueError(
                f"the data {name} are not those that {self.path} was trained on: prepare those again, point "
                f"DUCAT_DATA at their folder, or undo what was changed under `data` in {self.config_path}"
            )

    def note_resumption(self, epoch: int, step: int, time: str) -> None:
        """Add to the manifest when and where the run was taken up again, and what differs from where it began."""
        first = self.manifest
        different = {key: value for key, value in environment().items() if first.get(key) != value}
        resumed = [*first.get("resumed", []), {"time": time, "epoch": epoch, "step": step, **different}]
        self.update_manifest({"status": "running", "resumed": resumed})

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one epoch's line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, checked; a last one that an interrupt cut short is left out."""
        path = self.path / "metrics.jsonl"
        *whole, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        rows = []
        for number, line in enumerate(whole):
            try:
                rows.append(records.epoch(line))
            except ValueError as error:
                raise ValueError(f"{path} is damaged in line {number + 1} ({error})") from error
        if last:
            with contextlib.suppress(ValueError):
                rows.append(records.epoch(last))
        return rows

    def drop_metrics(self, from_epoch: int) -> None:
        """Take back the lines of epochs that will be run again."""
        kept = [json.dumps(row) + "\n" for row in self.metrics if row["epoch"] < from_epoch]
        checkpoint.write_text(self.path / "metrics.jsonl", "".join(kept))

    def read(self, which: Which = "best") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the state of a checkpoint, as `checkpoint.read` does.

        If the `last` one cannot be read, the one before it is taken, with a warning.

        Raises:
            FileNotFoundError: if the run has no such checkpoint.
            ValueError: if there is no checkpoint of that name, or it is damaged or foreign.
        """
        path = self.checkpoint_path(which)
        if which not in ("best", "last") and _epochs(which) is None:
            raise ValueError(f"which={which!r} is unknown: {self.path} has {', '.join(self.checkpoints)}")
        if which == "last":
            tensors, state, notice = checkpoint.read_or_previous(path, holds=HOLDS)
            if notice is not None:
                warnings.warn(notice, stacklevel=3)
            return tensors, state
        if not path.is_file():
            why = ""
            if which == "best":
                held_out = self.manifest["data"]["validation"]
                why = "it is chosen by validation once dummy classes are in use, "
                why = why if held_out else "no images were held out to choose it by, "
            raise FileNotFoundError(
                f"{self.path} has no checkpoint {which} ({why}status: {self.manifest['status']}): "
                f"choose from {', '.join(self.checkpoints)}"
            )
        return checkpoint.read(path, holds=("model",))  # of the zoo no more is needed

    def load(self, which: Which = "best") -> nn.Module:
        """Return the trained network as it is, with 2C outputs if it has dummy classes, in evaluation mode.

        Raises:
            FileNotFoundError: as `read`.
            ValueError: as `read`.
        """
        return self.load_with_digest(which)[0]

    def load_with_digest(self, which: Which = "best") -> tuple[nn.Module, str]:
        """Return the trained network as `load`, and the digest of the checkpoint that it is of.

        The file may be another one a moment later, while the run is trained.

        Raises:
            FileNotFoundError: as `read`.
            ValueError: as `read`.
        """
        tensors, state = self.read(which)
        with torch.random.fork_rng(devices=[]):
            model = Architecture(**state["model"]).build()
        checkpoint.load_weights(model, checkpoint.part("model", tensors), self.checkpoint_path(which))
        return model.eval(), checkpoint.digest(tensors)


def _epochs(which: Which) -> int | None:
    """Return N of "epoch-N", the number of epochs a checkpoint had been trained for; None for other names."""
    found = re.fullmatch(r"epoch-(\d+)", which)
    return int(found[1]) if found else None


def load(run_folder: Path | str, which: Which = "best") -> nn.Module:
    """Return a run's deployed model: images in [0, 1], shape (B, channels, H, W), to C logits, in evaluation mode.

    A network with dummy classes comes behind `RecoveredClassifier`.

    Args:
        run_folder: the folder of the run, or a network of the zoo, such as "zoo:digits-recovery-aware".
        which: "best", by robust accuracy on the validation split, "last", or "epoch-N" where epochs are kept.

    Raises:
        FileNotFoundError: if there is no such run or checkpoint.
        ValueError: if the checkpoint is damaged or foreign.
    """
    model = RunFolder.open(run_folder).load(which)
    return RecoveredClassifier(model).eval() if dummy_head(model) is not None else model


def environment() -> dict[str, Any]:
    """Return what a manifest says of the machine and the software: versions, processor, threads, git commit."""
    import ducat

    packages = ("torch", "numpy", "accelerate", "safetensors", "scikit-learn", "pyautoattack", "foolbox")
    return {
        "ducat": ducat.__version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "git": _git(),
        "command": sys.argv,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if name:
            return name[1]
    return platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    """Return the commit of the checkout that this code runs from, and whether its code has uncommitted changes."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *command], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        # An installed copy may lie in a checkout of something else, which does not track it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "."))}
    except (OSError, subprocess.SubprocessError):
        return None
