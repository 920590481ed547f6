"""Data sets, read safely and fed fast.

Images are uint8 in this package and float32 in [0, 1] everywhere else; normalisation is a layer of the model.
"""

from ducat.data.augment import Augmentation
from ducat.data.batches import Batches
from ducat.data.images import Dataset, Images, Source
from ducat.data.loading import load, load_corruptions, load_test
from ducat.data.own import own
from ducat.data.prepare import Status, list_datasets, prepare, verify
from ducat.data.specs import SPECS, DataSpec

__all__ = [
    "SPECS",
    "Augmentation",
    "Batches",
    "DataSpec",
    "Dataset",
    "Images",
    "Source",
    "Status",
    "list_datasets",
    "load",
    "load_corruptions",
    "load_test",
    "own",
    "prepare",
    "verify",
]
