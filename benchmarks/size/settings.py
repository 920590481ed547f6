"""At which size the table is made: data, network, the two phases of training, and how much of it is attacked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.cure.settings import Phases


@dataclass(frozen=True, kw_only=True)
class Setting(Phases):
    """One budget for all rows.

    Attributes:
        light: test images of the suite `light`.
        standard: those of the suite `standard`, AutoAttack blind and knowing recovery.
        l2: those of `light` within an L2 ball of 128/255.
        longer: options with which the base is trained longer before rows begin at it; not at all by default.
    """

    light: int
    standard: int
    l2: int
    longer: Mapping[str, Any] = field(default_factory=dict)


_CPU = Setting(
    about="CIFAR-10 (JPEG), 49,000 training images, PreAct-ResNet-18 of width 16, L-inf 8/255; 24 epochs of PGD-AT by "
    "n-fgsm, then 2 of each by pgd-cosine",
    common={
        "data.name": "cifar10-jpeg",
        "model.name": "preact-resnet18",
        "model.width": 16,
        "train.checkpoint_minutes": 4,
        "train.tracker": "none",
    },
    base={
        "method.attack": "n-fgsm",
        "train.epochs": 24,
        "train.schedule": "one-cycle",
        "train.learning_rate": 0.2,
        "train.averaging": "ema",
        "train.validate_every": 4,
    },
    branch={
        "method.attack": "pgd-cosine",
        "train.epochs": 2,
        "train.schedule": "cosine",
        "train.learning_rate": 0.05,
        "train.warmup_epochs": 0.25,
        "train.averaging": "off",  # over so few steps an average would mostly be the base
        "train.validate_every": 2,
    },
    light=1000,
    standard=1000,
    l2=200,
)

_LONGER = {**_CPU.base, "train.schedule": "cosine", "train.learning_rate": 0.1, "train.warmup_epochs": 0.25}

_GPU = replace(
    _CPU,
    about="CIFAR-10 (JPEG), 49,000 training images, ResNet-18, L-inf 8/255; 30 epochs of PGD-AT, then 3 of each",
    common={
        "data.name": "cifar10-jpeg",
        "model.name": "resnet18",
        "train.batch_size": 256,
        "train.checkpoint_minutes": 2,
        "train.tracker": "none",
    },
    base={**_CPU.base, "method.attack": "pgd-cosine", "train.epochs": 30, "train.validate_every": 5},
    branch={**_CPU.branch, "train.epochs": 3, "train.validate_every": 3},
    light=8000,
    standard=1000,
    l2=1000,
)

SETTINGS: dict[str, Setting] = {
    # For two cores of a CPU.
    "cpu": _CPU,
    # The same for those who wait longer: a stronger base, of which less is attacked.
    "wide": replace(
        _CPU,
        about="CIFAR-10 (JPEG), 49,000 training images, PreAct-ResNet-18 of width 32, L-inf 8/255; 16 epochs of PGD-AT "
        "by n-fgsm and 10 more, then 1 of each by pgd-cosine",
        common={**_CPU.common, "model.width": 32},
        base={**_CPU.base, "train.epochs": 16},
        longer={**_LONGER, "train.epochs": 10, "train.validate_every": 10},
        branch={**_CPU.branch, "train.epochs": 1, "train.validate_every": 1},
        light=1000,
        standard=100,
        l2=100,
    ),
    # 200 classes at 64 x 64 pixels, few images of each: a network that begins by halving them, as ours do at that size.
    "tiny": replace(
        _CPU,
        about="Tiny-ImageNet (subset), 9,000 training images of 200 classes, PreAct-ResNet-18 of width 16, "
        "L-inf 8/255; 40 epochs of PGD-AT by n-fgsm and 40 more, then 4 of each by pgd-cosine",
        common={**_CPU.common, "data.name": "tiny-imagenet"},
        base={**_CPU.base, "train.epochs": 40, "train.validate_every": 20},
        longer={**_LONGER, "train.epochs": 40, "train.validate_every": 20},
        branch={**_CPU.branch, "train.epochs": 4, "train.validate_every": 4},
        light=1000,
        standard=200,
        l2=200,
    ),
    # For one GPU. Not run yet: there was none.
    "resnet18": _GPU,
    "wrn": replace(
        _GPU,
        about="CIFAR-10 (JPEG), 49,000 training images, WRN-28-10, L-inf 8/255; 30 epochs of PGD-AT, then 3 of each",
        common={**_GPU.common, "model.name": "wrn-28-10"},
        light=1000,
        standard=1000,
        l2=1000,
    ),
    # The numbers mean nothing: to see that it runs. The ball is so large that no attack has to search.
    "toy": replace(
        _CPU,
        about="toy sizes, whose numbers mean nothing",
        common={
            **_CPU.common,
            "data.samples": 60,
            "model.name": "resnet8",
            "model.width": 4,
            "train.batch_size": 30,
            "threat.eps": 0.5,
        },
        base={**_CPU.base, "train.epochs": 2},
        longer={**_CPU.base, "train.epochs": 1},
        light=20,
        standard=10,
        l2=10,
    ),
}
