"""The names of `ducat.training.adapt` where they were before."""

from ducat.training.adapt import adapt, settings

__all__ = ["adapt", "settings"]
