"""A scikit-learn estimator: arrays in, predictions out, and the ordinary training loop between."""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ducat.config import Config, DataConfig, DummyConfig, MethodConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.data import DataSpec, Images, cache
from ducat.data.images import fingerprint, hold_out, named_tensors
from ducat.data.own import check_channels
from ducat.dummy import RecoveredClassifier
from ducat.evaluation import Evaluation, SelectiveClassifier, evaluate
from ducat.evaluation.rejection import calibrate, check_shares
from ducat.runs import load
from ducat.training import train

CHUNK = 500  # images in one pass


class RobustClassifier(ClassifierMixin, BaseEstimator):
    """Adversarially trained image classifier with dummy classes, in the manner of scikit-learn.

    `X` holds images in [0, 1], as (n, channels, height, width), (n, height, width), or (n, features). Rows of features
    are reshaped to `image_shape`; without one, each feature is a channel of an image of one pixel, which makes the
    network a plain one of dense layers. For training, images are rounded to 8 bits.

    A tenth of `X` is held out of training: it is validated on at the end, and is the test set of the run folder.

    Args:
        dummy: "off", "published" or "recovery-aware", see `ducat.config.DummyConfig`.
        method: "pgd-at", "trades", "mart", "consistency" or "natural" (which needs dummy="off").
        norm: of the attacker's ball, "linf", "l2" or "l1".
        eps: its radius, on images in [0, 1]; a number or a fraction such as "8/255".
        steps: attack steps in training.
        model: name of the network, a key of `ducat.models.MODELS`.
        epochs: passes over the images.
        batch_size: images a step; all of them if there are fewer.
        learning_rate: highest learning rate of SGD, on a one-cycle schedule.
        image_shape: (channels, height, width), (height, width), or None.
        run_folder: where to leave the run folder, which must not exist; with None it is temporary. The images are kept
            beside it, in a folder of the same name and "-data", so that `ducat evaluate` works on it.
        reject: share of correctly classified benign images that may be refused, in [0, 1), set on the images held out;
            None refuses nothing. `accept` tells which images are not refused; `predict` gives a class to all.
        random_state: an integer makes `fit` repeatable.

    Attributes:
        classes_: the labels, in the order of the columns of `predict_proba`.
        network_: the trained network in evaluation mode: images (n, channels, height, width) to logits, 2C of them with
            dummy classes.
        threshold_: the lowest log-odds of the recovered class that `accept` takes; minus infinity without `reject`.
        metrics_: the last line of the run's metrics.jsonl, among it "clean", "blind" and "robust" on the images held
            out, which a quick attack gives.
        n_features_in_: size of the second dimension of `X`.
    """

    dummy: Any
    method: Any
    norm: Any
    eps: Any
    steps: Any
    model: Any
    epochs: Any
    batch_size: Any
    learning_rate: Any
    image_shape: Any
    run_folder: Any
    reject: Any
    random_state: Any

    @no_type_check  # scikit-learn sets parameters to anything, and expects to hear of it from `fit`
    def __init__(
        self,
        *,
        dummy: str = "recovery-aware",
        method: str = "pgd-at",
        norm: str = "linf",
        eps: float | int | str = "8/255",
        steps: int = 10,
        model: str = "small",
        epochs: int = 60,
        batch_size: int = 128,
        learning_rate: float | int = 0.1,
        image_shape: Sequence[int] | None = None,
        run_folder: str | os.PathLike[str] | None = None,
        reject: float | int | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.dummy = dummy
        self.method = method
        self.norm = norm
        self.eps = eps
        self.steps = steps
        self.model = model
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.image_shape = image_shape
        self.run_folder = run_folder
        self.reject = reject
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "RobustClassifier":  # noqa: N803 - scikit-learn's name
        """Train on images `X` and labels `y` of shape (n,), of at least 2 classes.

        Raises:
            ValueError: if they cannot be used, a pixel is outside [0, 1], or a setting is out of its range.
            FileExistsError: if there is something at `run_folder`, or images of another run beside it.
        """
        X, y = validate_data(self, X, y, dtype=np.float32, allow_nd=True, ensure_min_samples=2)  # noqa: N806
        check_classification_targets(y)
        check_shares([] if self.reject is None else [_plain(self.reject)])
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            only = self.classes_[:1].tolist()
            raise ValueError(f"y holds 1 class, {only}: a classifier needs at least 2 classes")
        images = self._images(X)
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(np.iinfo(np.int32).max)
        with tempfile.TemporaryDirectory(prefix="ducat-") as temporary:
            path = Path(temporary) / "run" if self.run_folder is None else Path(self.run_folder)
            if path.exists():
                raise FileExistsError(f"run_folder: {path} exists, and a run is never overwritten")
            held_out = max(1, len(images) // 10)
            config = self._config(path, int(seed), len(images) - held_out)
            unseen = self._prepare(images, torch.from_numpy(labels).long(), held_out, config.data)
            folder = train(config, path.parent)
            deployed, self.metrics_ = load(folder.path, "last"), folder.metrics[-1]
        self.network_ = deployed.model if isinstance(deployed, RecoveredClassifier) else deployed
        self.deployed_ = deployed
        self.threshold_ = -math.inf
        if self.reject is not None:
            self.threshold_ = calibrate(deployed, unseen.floats(), unseen.labels, _plain(self.reject))
        self._held_out = unseen.floats(), unseen.labels
        return self

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return the label of each image: recovered, if there are dummy classes."""
        check_is_fitted(self)
        return self.classes_[self._logits(X).argmax(1).numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return probabilities of shape (n, number of classes): the softmax of the deployed network's logits."""
        check_is_fitted(self)
        return self._logits(X).double().softmax(1).numpy()

    def accept(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return which images are not refused, bool: whose recovered class is likely enough, see `reject`."""
        check_is_fitted(self)
        images, classifier = self._checked(X), SelectiveClassifier(self.deployed_, threshold=self.threshold_)
        with torch.no_grad():
            return torch.cat([classifier(chunk)[1] for chunk in images.split(CHUNK)]).numpy()

    def evaluate(self, X: Any, y: Any, suite: str = "standard", seed: int = 0) -> Evaluation:  # noqa: N803
        """Attack the classifier on images it was not trained on, blind and recovery-aware; see `ducat.evaluate`.

        With `reject` it has a `rejection` too, at the threshold of `accept`. `score` is the clean accuracy only.

        Raises:
            ValueError: if a label is not among `classes_`, or as `ducat.evaluate`.
        """
        check_is_fitted(self)
        images, labels = self._checked(X), np.asarray(y)
        unknown = np.setdiff1d(labels, self.classes_)
        if len(unknown):
            raise ValueError(f"y holds {unknown[0].item()!r}, which is not among the classes that fit saw")
        numbers = torch.from_numpy(np.searchsorted(self.classes_, labels)).long()
        threat = ThreatConfig(_plain(self.norm), _plain(self.eps), steps=_plain(self.steps)).build(None)
        reject = () if self.reject is None else (_plain(self.reject),)
        return evaluate(
            self.network_,
            images,
            numbers,
            threat,
            suite,
            num_classes=len(self.classes_),
            seed=seed,
            reject=reject,
            held_out=self._held_out if reject else None,
        )

    def _images(self, X: Any) -> Tensor:  # noqa: N803
        """Return images in [0, 1], shape (n, channels, height, width)."""
        if X.ndim == 2:
            given = (X.shape[1], 1, 1) if self.image_shape is None else self.image_shape
            shape = tuple(int(side) for side in given)
            shape = (1, *shape) if len(shape) == 2 else shape
            if len(shape) != 3 or np.prod(shape) != X.shape[1]:
                raise ValueError(f"image_shape={self.image_shape} does not fit the {X.shape[1]} features of X")
            X = X.reshape(len(X), *shape)  # noqa: N806
        elif X.ndim == 3:
            X = X[:, None]  # noqa: N806
        elif X.ndim != 4:
            raise ValueError(f"Found array with dim {X.ndim}: images have 2, 3 or 4 dimensions")
        check_channels(X.shape, "X: images")
        low, high = float(X.min()), float(X.max())
        if low < 0:
            raise ValueError(f"Negative values in data passed to {type(self).__name__}: images are in [0, 1]")
        if high > 1:
            raise ValueError(f"X goes up to {high:g}, outside [0, 1]: scale it, with 8-bit images X / 255")
        return torch.from_numpy(np.ascontiguousarray(X))

    def _checked(self, X: Any) -> Tensor:  # noqa: N803
        return self._images(validate_data(self, X, dtype=np.float32, allow_nd=True, reset=False))

    def _logits(self, X: Any) -> Tensor:  # noqa: N803
        images = self._checked(X)
        with torch.no_grad():
            return torch.cat([self.deployed_(chunk) for chunk in images.split(CHUNK)])

    def _config(self, path: Path, seed: int, training: int) -> Config:
        return Config(
            name=path.name,
            data=DataConfig("arrays", root=path.with_name(f"{path.name}-data")),
            model=ModelConfig(_plain(self.model)),
            method=MethodConfig(_plain(self.method)),
            dummy=DummyConfig(_plain(self.dummy), start_epoch=0.75),
            threat=ThreatConfig(_plain(self.norm), _plain(self.eps), steps=_plain(self.steps)),
            train=TrainConfig(
                epochs=_plain(self.epochs),
                batch_size=min(_plain(self.batch_size), max(2, training)),
                learning_rate=_plain(self.learning_rate),
                schedule="one-cycle",
                seed=seed,
                # One look, at the end: with few images held out, the best of many looks is the luckiest.
                validate_every=_plain(self.epochs),
                # PyTorch 2.13's bf16 convolutions on a CPU make up gradients of weights that only ever meet padding, as
                # those of one-pixel images do.
                precision="float32",
                tracker="none",
            ),
        )

    def _prepare(self, images: Tensor, labels: Tensor, count: int, settings: DataConfig) -> Images:
        """Write the images as a prepared data set, which is what training reads, and return those held out."""
        pixels = images.mul(255).round().to(torch.uint8)
        everything = Images(pixels, labels, torch.arange(len(labels)))
        training, held_out = hold_out(everything, count)
        floats = training.floats().double()
        deviation = floats.std((0, 2, 3), correction=0)
        spec = DataSpec(
            name=settings.name,
            title="arrays",
            layout="folder",
            shape=(images.shape[1], images.shape[2], images.shape[3]),
            mean=tuple(floats.mean((0, 2, 3)).tolist()),
            # A constant channel says nothing, at any scale.
            std=tuple(deviation.where(deviation > 0, 1).tolist()),
            crop_padding=0,
            flip=False,
        )
        # As two splits, since a file of tensors does not hold one twice.
        test = held_out.select(torch.arange(len(held_out)))
        tensors = named_tensors(training, held_out, test)
        header = cache.Header(spec, tuple(map(str, self.classes_)), fingerprint(tensors), "arrays", "")
        entry = cache.entry(settings.name, settings.root)
        try:
            cache.write(entry, tensors, header, replace=False)
        except ValueError as error:
            raise FileExistsError(
                f"run_folder: {entry} holds the images of another run, which are never overwritten: give another "
                "run_folder"
            ) from error
        return test

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.positive_only = True
        tags.non_deterministic = self.random_state is None
        return tags


def _plain(value: Any) -> Any:
    """Return a setting as Python's own number or text: scikit-learn's searches hand over NumPy's."""
    return value.item() if isinstance(value, np.generic) else value
