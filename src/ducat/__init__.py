"""Dummy classes-based adversarial training (DUCAT), measured against attackers who know about it."""

from typing import TYPE_CHECKING, Any

from ducat import attacks, data, losses, models
from ducat.dummy import RecoveredClassifier, add_dummy_classes, recover, two_hot
from ducat.evaluation import Evaluation, SelectiveClassifier, evaluate
from ducat.installing import warn_of_the_other
from ducat.methods import objective
from ducat.runs import load
from ducat.threat import ThreatModel

if TYPE_CHECKING:
    from ducat.estimator import RobustClassifier

__version__ = "0.1.0"
__all__ = [
    "Evaluation",
    "RecoveredClassifier",
    "RobustClassifier",
    "SelectiveClassifier",
    "ThreatModel",
    "add_dummy_classes",
    "attacks",
    "data",
    "evaluate",
    "load",
    "losses",
    "models",
    "objective",
    "recover",
    "two_hot",
]

warn_of_the_other()


def __getattr__(name: str) -> Any:
    # scikit-learn takes as long to import as the rest of the package.
    if name == "RobustClassifier":
        from ducat.estimator import RobustClassifier

        return RobustClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
