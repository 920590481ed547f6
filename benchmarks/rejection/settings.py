"""Where the question is asked: data, network, and the two phases of training."""

from dataclasses import dataclass

from benchmarks.cure.settings import Phases


@dataclass(frozen=True, kw_only=True)
class Setting(Phases):
    """One budget for all rows.

    Attributes:
        test: number of test images.
        rows: the rows that are made unless told otherwise; all where it is empty.
    """

    test: int
    rows: tuple[str, ...] = ()


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
