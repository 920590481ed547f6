"""Dummy classes-based adversarial training (DUCAT), measured against attackers who know about it."""

from importlib import import_module
from typing import TYPE_CHECKING

from ducat.installing import warn_of_the_other

if TYPE_CHECKING:
    from ducat import attacks, data, losses, models
    from ducat.dummy import RecoveredClassifier, add_dummy_classes, recover, two_hot
    from ducat.estimator import RobustClassifier
    from ducat.evaluation import Evaluation, SelectiveClassifier, evaluate
    from ducat.methods import objective
    from ducat.runs import load
    from ducat.threat import ThreatModel

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

# PyTorch takes seconds to import, which `ducat --version` and whoever needs one name should not wait for (PEP 562).
_ROOMS = {
    "dummy": ("RecoveredClassifier", "add_dummy_classes", "recover", "two_hot"),
    "estimator": ("RobustClassifier",),
    "evaluation": ("Evaluation", "SelectiveClassifier", "evaluate"),
    "methods": ("objective",),
    "runs": ("load",),
    "threat": ("ThreatModel",),
}

warn_of_the_other()

if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name: str) -> object:
        room = next((room for room, names in _ROOMS.items() if name in names), None)
        if room is not None:
            return getattr(import_module(f"{__name__}.{room}"), name)
        missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name.startswith("_"):
            raise missing
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise missing from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
