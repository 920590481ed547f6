"""The names of `ducat.training` where they were before."""

from ducat.training import Initial, Interrupted, Listener, resume, train
from ducat.training.validation import catastrophic_overfitting

__all__ = ["Initial", "Interrupted", "Listener", "catastrophic_overfitting", "resume", "train"]
