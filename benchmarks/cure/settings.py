"""Where the search is made: data, network, and the two phases of training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Phases:
    """What all rows of a table have in common: data, network, and two phases of training.

    Attributes:
        about: what a reader of the table has to know of it.
        common: options of `ducat train` in both phases.
        base: those of the first phase, PGD-AT from random weights.
        branch: those of the second, which each row trains in its own way.
    """

    about: str
    common: Mapping[str, Any]
    base: Mapping[str, Any]
    branch: Mapping[str, Any]

    @property
    def data(self) -> str:
        """Name of the data set."""
        name: str = self.common["data.name"]
        return name


@dataclass(frozen=True, kw_only=True)
class Setting(Phases):
    """One budget for all rows.

    Attributes:
        test: number of test images.
        splits: whether the network has a last stage that can be split, which the rows `split-*` need.
    """

    test: int
    splits: bool = True


def _photographs(images: int, base_epochs: int, branch_epochs: int) -> Setting:
    return Setting(
        about=f"CIFAR-10 (JPEG), {images:,} training images, resnet8 of width 16, L-inf 8/255; {base_epochs} epochs of "
        f"PGD-AT, then {branch_epochs}",
        common={
            "data.name": "cifar10-jpeg",
            "data.samples": images,
            "model.name": "resnet8",
            "method.attack": "pgd-cosine",
            "train.learning_rate": 0.1,
        },
        base={
            "train.epochs": base_epochs,
            "train.schedule": "constant",
            "train.warmup_epochs": 1,
            "train.validate_every": base_epochs // 3,
        },
        branch={"train.epochs": branch_epochs, "train.schedule": "cosine", "train.validate_every": branch_epochs},
        test=1000,
    )


SETTINGS: dict[str, Setting] = {
    # The network underfits.
    "cifar10-jpeg": _photographs(20_000, 12, 3),
    # Many passes over few images: the network overfits.
    "cifar10-jpeg-few": _photographs(1_000, 90, 30),
    # A row takes seconds, so that seeds are cheap. The ball is larger than usual: at 0.2 every row is 99 % accurate,
    # and there is nothing to trade.
    "digits": Setting(
        about="digits, 1,097 training images, small, L-inf 0.3; 40 epochs of PGD-AT, then 20",
        common={
            "data.name": "digits",
            "threat.eps": 0.3,
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
        splits=False,
    ),
}
