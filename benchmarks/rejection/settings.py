"""Where the question is asked: data, network, and the two phases of training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One budget for all rows.

    Attributes:
        about: what a reader of the table has to know of it.
        common: options of `ducat train` in both phases.
        base: those of the first phase, PGD-AT from random weights.
        branch: those of the second, which each row trains in its own way.
        test: number of test images.
        rows: the rows that are made unless told otherwise; all where it is empty.
    """

    about: str
    common: Mapping[str, Any]
    base: Mapping[str, Any]
    branch: Mapping[str, Any]
    test: int
    rows: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """Name of the data set."""
        name: str = self.common["data.name"]
        return name


SETTINGS: dict[str, Setting] = {
    "digits": Setting(
        about="digits, 1,097 training images, small, L-inf 0.2; 40 epochs of PGD-AT, then 20",
        common={
            "data.name": "digits",
            "threat.eps": 0.2,
            "method.attack": "pgd-cosine",
            "train.learning_rate": 0.1,
        },
        base={
            "train.epochs": 40,
            "train.schedule": "constant",
            "train.warmup_epochs": 1,
            "train.validate_every": 40,
        },
        branch={"train.epochs": 20, "train.schedule": "cosine", "train.validate_every": 20},
        test=500,
    ),
    "cifar10-jpeg": Setting(
        about="CIFAR-10 (JPEG), 20,000 training images, resnet8 of width 16, L-inf 8/255; 12 epochs of PGD-AT, then 3",
        common={
            "data.name": "cifar10-jpeg",
            "data.samples": 20_000,
            "model.name": "resnet8",
            "method.attack": "pgd-cosine",
            "train.learning_rate": 0.1,
        },
        base={
            "train.epochs": 12,
            "train.schedule": "constant",
            "train.warmup_epochs": 1,
            "train.validate_every": 4,
        },
        branch={"train.epochs": 3, "train.schedule": "cosine", "train.validate_every": 3},
        test=500,
        rows=(
            "pgd-at",
            "mixed",
            "aware",
            "mixed-lowered",
            "lowered",
            "accepted",
            "mixed-accepted",
            "trades",
            "ccat",
            "abstain-classes",
            "cpr-pgd-at",
        ),
    ),
}
