"""What evaluated runs say together: samples that always fail, attacks that transfer, and corrupted images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ducat.data import SPECS, load_corruptions
from ducat.data import load as load_data
from ducat.evaluation.result import Evaluation
from ducat.runs import RunFolder, Which, load

Flags = Bool[Tensor, " samples"]


@dataclass(frozen=True)
class AlwaysFailed:
    """The paper's study (arXiv 2410.12671, section 3): which samples fail on every model, each under its own attack.

    Attributes:
        runs: names of the models, at least two.
        classes: names of the classes.
        labels: of the samples, shape (samples,).
        failed: whether a sample fails on a model: whether its benign or its adversarial image is misclassified there,
            shape (models, samples).
    """

    runs: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Int[Tensor, " samples"]
    failed: Bool[Tensor, "models samples"]

    @property
    def always(self) -> Flags:
        """Whether a sample fails on every model."""
        return self.failed.all(0)

    @property
    def ever(self) -> Flags:
        """Whether a sample fails on some model: the union of the models' failures."""
        return self.failed.any(0)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers: shares of the test set and of the union of failures, and counts per class."""
        always, ever, total = int(self.always.sum()), int(self.ever.sum()), len(self.labels)
        return {
            "runs": list(self.runs),
            "samples": total,
            "failed": {name: int(flags.sum()) for name, flags in zip(self.runs, self.failed, strict=True)},
            "failed_on_some": ever,
            "failed_on_every": always,
            "share_of_samples": always / total,
            "share_of_failures": always / ever if ever else 0.0,
            "classes": {
                name: {
                    "samples": int((self.labels == index).sum()),
                    "failed_on_some": int(self.ever[self.labels == index].sum()),
                    "failed_on_every": int(self.always[self.labels == index].sum()),
                }
                for index, name in enumerate(self.classes)
            },
        }


def always_failed(runs: Sequence[Path]) -> AlwaysFailed:
    """Find the samples whose own adversarial images fail on every one of several evaluated runs.

    Raises:
        FileNotFoundError: if a run has not been evaluated.
        ValueError: if there are fewer than two runs, or they were not evaluated on the same samples in the same ball.
    """
    evaluations = _evaluations(runs)
    first = next(iter(evaluations.values()))
    return AlwaysFailed(
        runs=tuple(evaluations),
        classes=_classes(runs[0]),
        labels=first.labels,
        failed=torch.stack([~one.robust for one in evaluations.values()]),
    )


@dataclass(frozen=True)
class Transfer:
    """How far the adversarial images made for one model fool the others.

    Only samples whose benign image the target classifies correctly count: the others need no attack. A cell is the
    share of these that the source's adversarial images make the target misclassify.

    Attributes:
        runs: names of the models, in the order of rows (source) and columns (target).
        success: shape (models, models).
        effective: the same among samples that the source itself misclassifies under attack; NaN where there are none.
        ineffective: the same among samples that withstood the attack on the source; NaN where there are none.
    """

    runs: tuple[str, ...]
    success: Float[Tensor, "models models"]
    effective: Float[Tensor, "models models"]
    ineffective: Float[Tensor, "models models"]

    def to_dict(self) -> dict[str, Any]:
        """Return the matrices as lists of rows, one row a source; null where there are no samples."""
        return {
            "runs": list(self.runs),
            **{
                name: [[None if cell != cell else cell for cell in row] for row in getattr(self, name).tolist()]
                for name in ("success", "effective", "ineffective")
            },
        }


def transfer(
    runs: Sequence[Path], which: Which | None = None, progress: Callable[[str], None] = lambda target: None
) -> Transfer:
    """Show every evaluated run the adversarial images of every other.

    Args:
        runs: run folders, each evaluated on the same samples in the same ball.
        which: the checkpoint of the runs, which must be the one that was evaluated; None is that one.
        progress: told of each target as its turn comes.

    Raises:
        FileNotFoundError: if a run has not been evaluated.
        ValueError: as for `always_failed`; and if a run's model does not reproduce its own evaluation.
    """
    evaluations = _evaluations(runs)
    cells = torch.full((3, len(runs), len(runs)), torch.nan)
    for column, (path, target) in enumerate(zip(runs, evaluations.values(), strict=True)):
        progress(path.name)
        shown = which or target.checkpoint or "best"
        model = _deployed(path, shown)
        for row, source in enumerate(evaluations.values()):
            fooled = _predict(model, source.adversarial) != source.labels
            # Another device may round a few samples to the other side.
            if row == column and float((fooled == target.robust).float().mean()) > 0.01:
                raise ValueError(f"{path}: its {shown} checkpoint is not the one that was evaluated: evaluate it again")
            groups = torch.ones_like(source.clean), source.clean & ~source.robust, source.robust
            for layer, group in enumerate(groups):
                counted = target.clean & group
                if counted.any():
                    cells[layer, row, column] = fooled[counted].float().mean()
    return Transfer(tuple(evaluations), *cells)


@dataclass(frozen=True)
class Corruption:
    """Accuracy on corrupted images (Hendrycks & Dietterich 2019, arXiv 1903.12261).

    Attributes:
        run: name of the model.
        data: name of the data set of corrupted images.
        accuracy: by corruption, the accuracy at severities 1 to 5.
    """

    run: str
    data: str
    accuracy: Mapping[str, tuple[float, ...]]

    @property
    def mean_error(self) -> float:
        """Mean error over all corruptions and severities; it is not divided by that of a reference network."""
        errors = [1 - value for values in self.accuracy.values() for value in values]
        return sum(errors) / len(errors)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        return {
            "run": self.run,
            "data": self.data,
            "accuracy": {name: list(values) for name, values in self.accuracy.items()},
            "mean_error": self.mean_error,
        }


def corruption(
    run: Path,
    name: str | None = None,
    *,
    samples: int | None = None,
    which: Which = "best",
    progress: Callable[[str], None] = lambda corruption: None,
) -> Corruption:
    """Measure a run on corrupted images, with the recovered classifier.

    Args:
        run: a run folder.
        name: the data set of corrupted images; by default the one that belongs to the run's data, such as cifar10-c.
        samples: images of each corruption and severity, a fixed stratified subset; all by default.
        which: "best" or "last" checkpoint.
        progress: told of each corruption and severity as its turn comes.

    Raises:
        FileNotFoundError: if the corrupted images are not prepared.
        ValueError: if there are none for the run's data.
    """
    config = RunFolder.open(run).config
    names = [spec.name for spec in SPECS.values() if spec.corruption_of == config.data.name]
    if name is None and not names:
        raise ValueError(f"there are no corrupted images of {config.data.name} among the data sets")
    name = name or names[0]
    model = _deployed(run, which)
    accuracy: dict[str, list[float]] = {}
    for kind, severity, x, y in load_corruptions(name, samples, config.data.root):
        progress(f"{kind} {severity}")
        accuracy.setdefault(kind, []).append(float((_predict(model, x) == y).float().mean()))
    return Corruption(run.name, name, {kind: tuple(values) for kind, values in accuracy.items()})


def _evaluations(runs: Sequence[Path]) -> dict[str, Evaluation]:
    """Return the evaluations of several runs by name, all of the same samples in the same ball."""
    if len(runs) < 2:
        raise ValueError("give at least two evaluated runs: the study compares models")
    evaluations = [Evaluation.load(RunFolder.open(run).path) for run in runs]
    settings = [(one.fingerprint, one.threat.norm, one.threat.radius) for one in evaluations]
    for run, setting in zip(runs, settings, strict=True):
        if setting != settings[0]:
            raise ValueError(
                f"{run} was not evaluated on the same samples in the same ball as {runs[0]}: "
                "evaluate both with the same --samples, --norm and --eps"
            )
    names = [run.name for run in runs]
    repeated = len(set(names)) < len(names)
    return {str(run) if repeated else run.name: one for run, one in zip(runs, evaluations, strict=True)}


def _classes(run: Path) -> tuple[str, ...]:
    config = RunFolder.open(run).config.data
    return load_data(config.name, root=config.root).classes


def _deployed(run: Path, which: Which) -> nn.Module:
    return load(run, which).to("cuda" if torch.cuda.is_available() else "cpu")


def _predict(model: nn.Module, x: Tensor, batch_size: int = 500) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in x.split(batch_size)])
