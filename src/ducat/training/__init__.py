"""Training: one step, the loop around it, and what is measured on the way."""

from ducat.training.initial import Initial
from ducat.training.loop import Listener, Plan, Watcher, resume, train
from ducat.training.signals import Interrupted
from ducat.training.step import Step

__all__ = ["Initial", "Interrupted", "Listener", "Plan", "Step", "Watcher", "resume", "train"]
