"""Attacks: functions `(model, x, y, threat, ...)` of images in [0, 1] that return images in the same ball."""

from ducat.attacks.adaptive import adaptive
from ducat.attacks.pgd import pgd

__all__ = ["adaptive", "pgd"]
