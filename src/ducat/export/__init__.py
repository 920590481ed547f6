"""The doors to other tools: a run's deployed classifier, and the formats that it can be written in."""

from ducat.export.classifier import Classifier, Deployed, load
from ducat.export.formats import FORMATS, export

__all__ = ["FORMATS", "Classifier", "Deployed", "export", "load"]
