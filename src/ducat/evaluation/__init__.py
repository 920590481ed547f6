"""Attack a classifier, by attackers who know recovery too, and say how far to trust the number."""

from ducat.evaluation.engine import evaluate
from ducat.evaluation.rejection import SelectiveClassifier
from ducat.evaluation.result import AttackResult, Evaluation, compare

__all__ = ["AttackResult", "Evaluation", "SelectiveClassifier", "compare", "evaluate"]
