"""Dummy classes-based adversarial training (DUCAT), measured against attackers who know about it."""

from ducat import attacks, data, losses, models
from ducat.dummy import RecoveredClassifier, add_dummy_classes, recover, two_hot
from ducat.evaluate import Evaluation, evaluate
from ducat.runs import load
from ducat.threat import ThreatModel

__version__ = "0.1.0"
__all__ = [
    "Evaluation",
    "RecoveredClassifier",
    "ThreatModel",
    "add_dummy_classes",
    "attacks",
    "data",
    "evaluate",
    "load",
    "losses",
    "models",
    "recover",
    "two_hot",
]
