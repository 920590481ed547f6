"""Where metrics go besides metrics.jsonl: TensorBoard, or another of accelerate's trackers."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ducat.config import TRACKERS
from ducat.installing import install

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "ducat"


class Tracker:
    """Passes the numbers of each line of metrics.jsonl on; made by `start`."""

    def __init__(self, tracker: GeneralTracker) -> None:
        self.tracker = tracker

    @classmethod
    def start(cls, name: str, path: Path, config: Mapping[str, Any], epoch: int) -> Tracker | None:
        """Begin to track a run, or go on with it.

        Args:
            name: a tracker, "auto" for TensorBoard where it is installed, or "none".
            path: the run folder.
            config: the settings by name.
            epoch: the next epoch; what was tracked from it on is replaced, where the tracker can.

        Raises:
            ValueError: if the tracker's package is not installed.
        """
        check(name)
        if name == "none" or (name == "auto" and not _installed("tensorboard")):
            return None
        tracker = _make("tensorboard" if name == "auto" else name, path, epoch)
        tracker.start()
        if tracker.name != "tensorboard":  # TensorBoard's form of settings is a run of its own, of no use here.
            tracker.store_init_configuration(dict(config))
        return cls(tracker)

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass on a line of metrics.jsonl."""
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "epoch"}
        self.tracker.log(numbers, step=row["epoch"])

    def finish(self) -> None:
        """Write what is left, and close."""
        self.tracker.finish()


def check(name: str) -> None:
    """Raise ValueError if a tracker's package is not installed; "auto" and "none" need none."""
    if name in TRACKERS and not _installed(name):
        raise ValueError(f"train.tracker={name} needs a package that is not installed: {install(name)}")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _make(name: str, path: Path, epoch: int) -> GeneralTracker:
    from accelerate import tracking

    if name == "tensorboard":
        return tracking.TensorBoardTracker(name, path, purge_step=epoch)
    # A run that is taken up again has the same id, and so goes on in the same place.
    if name == "wandb":
        id = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        return tracking.WandBTracker(PROJECT, name=path.name, dir=str(path), id=id, resume="allow")
    return tracking.TrackioTracker(PROJECT, name=path.name, resume="allow")
