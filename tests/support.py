"""What several tests train with: a tiny config, a listener, and a validation that costs nothing."""

import signal
from typing import Any

from torch import nn

from ducat.config import Config, DataConfig, ThreatConfig, TrainConfig
from ducat.data import Images

TINY = Config(
    name="run",
    data=DataConfig("digits", samples=64),
    threat=ThreatConfig(steps=2),
    train=TrainConfig(epochs=3, batch_size=32, learning_rate=0.05, schedule="constant", precision="float32"),
)


def unvalidated(model: nn.Module, split: Images) -> dict[str, float]:
    """Stand in for the attacks of validation, where a test does not look at them."""
    return {"clean": 1.0, "blind": 1.0, "robust": 0.5}


class Watcher:
    """A listener that keeps what it is told, and can end the run.

    Args:
        signal_after: steps after which the process gets a signal.
        signum: the signal.
        leave_after: epochs after which the run ends as by a second Ctrl-C.
    """

    def __init__(
        self,
        *,
        signal_after: int | None = None,
        signum: signal.Signals = signal.SIGINT,
        leave_after: int | None = None,
    ) -> None:
        self.signal_after, self.signum, self.leave_after = signal_after, signum, leave_after
        self.rows: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def step(self, done: int, total: int) -> None:
        if done == self.signal_after:
            signal.raise_signal(self.signum)

    def epoch(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if row["epoch"] + 1 == self.leave_after:
            raise KeyboardInterrupt

    def warning(self, text: str) -> None:
        self.warnings.append(text)
