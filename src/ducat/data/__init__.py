"""Data sets, read safely and fed fast.

Images are uint8 in this package and float32 in [0, 1] everywhere else; normalisation is a layer of the model.
"""

from pathlib import Path

from jaxtyping import Float, Int64
from torch import Tensor

from ducat.data.augment import Augmentation
from ducat.data.batches import Batches
from ducat.data.images import Dataset, Images, fingerprint, hold_out, stratified_subset
from ducat.data.readers import read_digits
from ducat.data.specs import SPECS, DataSpec

__all__ = ["SPECS", "Augmentation", "Batches", "DataSpec", "Dataset", "Images", "load", "load_test"]


def load(name: str, *, samples: int | None = None, root: Path | None = None) -> Dataset:
    """Load a data set, whole or with a fixed stratified subset of its training images.

    Args:
        name: a row of `ducat data list`.
        samples: how many training images to keep; validation and test images stay as they are.
        root: the cache folder; None is `DUCAT_DATA`, or the user's cache folder.

    Raises:
        ValueError: the name is unknown, or there are fewer training images than `samples`.
    """
    if name not in SPECS:
        raise ValueError(f"data.name={name} is unknown; known are {', '.join(SPECS)}")
    spec = SPECS[name]
    train, test = read_digits()
    train, validation = hold_out(train, spec.validation)
    if samples is not None:
        train = stratified_subset(train, samples)
    return Dataset(spec, spec.classes, train, validation, test, fingerprint(train, validation, test))


def load_test(
    name: str, samples: int | None = None, root: Path | None = None
) -> tuple[Float[Tensor, "n channels height width"], Int64[Tensor, "n"]]:
    """Load test images as float32 in [0, 1], and their labels.

    Args:
        name: a row of `ducat data list`.
        samples: how many, a fixed stratified subset: the very images that `evaluate` uses for that many samples.
        root: the cache folder; None is `DUCAT_DATA`, or the user's cache folder.
    """
    test = load(name, root=root).test
    if samples is not None:
        test = stratified_subset(test, samples, option="samples")
    return test.floats(), test.labels
