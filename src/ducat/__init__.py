"""Dummy classes-based adversarial training (DUCAT), measured against attackers who know about it."""

from ducat import attacks, losses
from ducat.dummy import RecoveredClassifier, add_dummy_classes, recover, two_hot
from ducat.threat import ThreatModel

__version__ = "0.1.0"
__all__ = ["RecoveredClassifier", "ThreatModel", "add_dummy_classes", "attacks", "losses", "recover", "two_hot"]
