"""What runs say beyond one evaluation: samples that always fail, transfer, corrupted images, a class that is wanted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ducat.attacks.pgd import pgd
from ducat.data import SPECS, load_corruptions, load_test
from ducat.dummy import dummy_head, recover
from ducat.evaluation import kept
from ducat.evaluation.result import Evaluation
from ducat.runs import RunFolder, Which, load
from ducat.seeding import generator

Flags = Bool[Tensor, " samples"]
Progress = Callable[[str], None]


class Sheet(NamedTuple):
    """A study's numbers as text: a title, the names of the columns, and the rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class AlwaysFailed:
    """The paper's study (arXiv 2410.12671, section 3): which samples fail on every model, each under its own attack.

    Attributes:
        runs: names of the models, at least two.
        classes: names of the classes.
        labels: of the samples, shape (samples,).
        failed: whether a sample fails on a model: whether its benign or its adversarial image is misclassified there,
            shape (models, samples).
        bounds: names of those whose robust accuracy is an upper bound only: attacks may have missed failures.
    """

    runs: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Int[Tensor, " samples"]
    failed: Bool[Tensor, "models samples"]
    bounds: tuple[str, ...] = ()

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
            "bounds": list(self.bounds),
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

    def sheet(self) -> Sheet:
        """Return a row for each class."""
        numbers = self.to_dict()
        title = (
            f"{numbers['failed_on_every']} of {numbers['samples']} test images fail on every model, each under its own "
            f"attack: {100 * numbers['share_of_samples']:.1f} % of the test images, "
            f"{100 * numbers['share_of_failures']:.1f} % of those that fail on some model"
        )
        if self.bounds:
            title += f"; at least as many, as robust accuracy is an upper bound only of {', '.join(self.bounds)}"
        counts = {"images": "samples", "fail on some": "failed_on_some", "fail on every": "failed_on_every"}
        rows = [[name, *(str(row[key]) for key in counts.values())] for name, row in numbers["classes"].items()]
        return Sheet(title, ["class", *counts], rows)


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
        bounds=tuple(name for name, one in evaluations.items() if one.at_most),
    )


@dataclass(frozen=True)
class Transfer:
    """How far the adversarial images made for one model fool the others.

    Only samples whose benign image both classify correctly count: what the target gets wrong needs no attack, and of
    what the source gets wrong nobody made an adversarial image. A cell is the share of these that the source's
    adversarial images make the target misclassify.

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

    def sheet(self) -> Sheet:
        """Return a row for each source."""
        title = (
            "Of the images that the target (column) classifies correctly, the share in % that the source's (row) "
            "adversarial images make it lose: all of what the source classifies correctly / effective on it / "
            "ineffective on it"
        )
        numbers = [str(number) for number in range(1, len(self.runs) + 1)]
        layers = torch.stack([self.success, self.effective, self.ineffective], dim=-1).tolist()
        rows = [
            [number, name, *(" / ".join("-" if x != x else f"{100 * x:.1f}" for x in cell) for cell in row)]
            for number, name, row in zip(numbers, self.runs, layers, strict=True)
        ]
        return Sheet(title, ["", "source", *(f"on {number}" for number in numbers)], rows)


def transfer(runs: Sequence[Path], which: Which | None = None, progress: Progress = lambda target: None) -> Transfer:
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
            # Of what the source gets wrong anyway nobody made an adversarial image.
            groups = source.clean, source.clean & ~source.robust, source.robust
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

    def sheet(self) -> Sheet:
        """Return a row for each corruption."""
        title = f"Accuracy in % by severity; mean error {100 * self.mean_error:.1f} %"
        rows = [[name, *(f"{100 * value:.1f}" for value in values)] for name, values in self.accuracy.items()]
        return Sheet(title, ["corruption", *"12345"], rows)


def corruption(
    run: Path,
    name: str | None = None,
    *,
    samples: int | None = None,
    which: Which = "best",
    progress: Progress = lambda corruption: None,
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


@dataclass(frozen=True)
class Targeted:
    """How often an attacker who wants one particular wrong class gets it, for attackers blind and aware of recovery.

    The targeted protocol of the paper (arXiv 2410.12671) counts a sample as robust unless the class that was wanted
    wins; untargeted accuracy under the same images stands beside it.

    Attributes:
        run: name of the model.
        samples: test images, of all classes.
        steps: of PGD.
        withstood: by attacker, the share of samples on which the wanted class does not win.
        correct: by attacker, the share of samples on which the true class still wins.
    """

    run: str
    samples: int
    steps: int
    withstood: Mapping[str, float]
    correct: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        return {
            "run": self.run,
            "samples": self.samples,
            "steps": self.steps,
            "withstood": dict(self.withstood),
            "correct": dict(self.correct),
        }

    def sheet(self) -> Sheet:
        """Return a row for each attacker."""
        title = (
            f"PGD-{self.steps} towards a class that is drawn for each of {self.samples} test images, in %: withstood "
            "is where that class does not win, correct where the true one still does"
        )
        rows = [
            [attacker, f"{100 * share:.1f}", f"{100 * self.correct[attacker]:.1f}"]
            for attacker, share in self.withstood.items()
        ]
        return Sheet(title, ["attacker", "withstood", "correct"], rows)


def targeted(
    run: Path,
    *,
    steps: int = 20,
    samples: int | None = None,
    seed: int = 0,
    which: Which = "best",
    batch_size: int = 500,
    progress: Callable[[str], None] = lambda attacker: None,
) -> Targeted:
    """Attack a run with PGD towards a wrong real class that is drawn for each sample, in the ball of its training.

    Args:
        run: a run folder.
        steps: of PGD, from one random start.
        samples: test images, a fixed stratified subset; all by default.
        seed: of the wanted classes and the starts.
        which: the checkpoint, "best" or "last".
        batch_size: samples attacked at a time.
        progress: told of each attacker as its turn comes.
    """
    folder = RunFolder.open(run)
    config = folder.config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = folder.load(which).to(device)
    paired = dummy_head(network) is not None
    x, y = load_test(config.data.name, samples, config.data.root)
    classes = len(_classes(run))
    wanted = (y + torch.randint(1, classes, y.shape, generator=generator(seed, "wanted"))) % classes
    threat = replace(config.threat.ball, steps=steps)
    withstood, correct = {}, {}
    for attacker, objective in {"blind": "targeted-cross-entropy", "aware": "recovered-targeted-cross-entropy"}.items():
        if attacker == "aware" and not paired:
            continue  # without dummy classes there is nothing to know
        progress(attacker)
        predicted = []
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            images, goal = x[rows].to(device), wanted[rows].to(device)
            found = pgd(network, images, goal, threat, objective, generator=generator(seed, attacker, start))
            with torch.no_grad():
                logits = network(found)
            predicted.append(_prediction(recover(logits) if paired else logits))
        prediction = torch.cat(predicted)
        withstood[attacker] = float((prediction != wanted).float().mean())
        correct[attacker] = float((prediction == y).float().mean())
    return Targeted(run.name, len(y), steps, withstood, correct)


# By name: what is found in run folders, of a checkpoint, on a number of samples.
Finding = AlwaysFailed | Transfer | Corruption | Targeted
Study = Callable[[Sequence[Path], Which | None, int | None, Progress], Finding]
STUDIES: dict[str, Study] = {
    "always-failed": lambda runs, which, samples, progress: always_failed(_unasked(runs, which=which, samples=samples)),
    "transfer": lambda runs, which, samples, progress: transfer(_unasked(runs, samples=samples), which, progress),
    "corruption": lambda runs, which, samples, progress: corruption(
        _only(runs), samples=samples, which=which or "best", progress=progress
    ),
    "targeted": lambda runs, which, samples, progress: targeted(
        _only(runs), samples=samples, which=which or "best", progress=progress
    ),
}


def _unasked(runs: Sequence[Path], **options: object) -> Sequence[Path]:
    """Return the runs, and refuse options that do not apply to a study of what was evaluated."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise ValueError(f"--{given} does not fit: the study is of the images and checkpoints that were evaluated")
    return runs


def _only(runs: Sequence[Path]) -> Path:
    if len(runs) != 1:
        raise ValueError(f"give one run, not {len(runs)}: this study is of a single model")
    return runs[0]


def _evaluations(runs: Sequence[Path]) -> dict[str, Evaluation]:
    """Return the evaluations of several runs by name, all of the same samples in the same ball."""
    if len(runs) < 2:
        raise ValueError("give at least two evaluated runs: the study compares models")
    folders = [RunFolder.open(run) for run in runs]
    places = [folder.path.resolve() for folder in folders]
    twice = next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice: the study compares models")
    evaluations = [Evaluation.load(folder.path) for folder in folders]
    settings = [(one.fingerprint, one.threat.norm, one.threat.eps, one.suite) for one in evaluations]
    for run, setting in zip(runs, settings, strict=True):
        if setting != settings[0]:
            raise ValueError(
                f"{run} was not evaluated on the same samples in the same ball by the same suite as {runs[0]}: "
                "evaluate both with the same --samples, --norm, --eps and --suite"
            )
    for folder, evaluation in zip(folders, evaluations, strict=True):
        if not kept.is_current(folder, evaluation.to_dict()):
            raise ValueError(
                f"{folder.path} has been trained on since it was evaluated: run `ducat evaluate {folder.quoted}` again"
            )
    names = [run.name for run in runs]
    repeated = len(set(names)) < len(names)
    return {str(run) if repeated else run.name: one for run, one in zip(runs, evaluations, strict=True)}


def _classes(run: Path) -> tuple[str, ...]:
    return RunFolder.open(run).dataset().classes


def _deployed(run: Path, which: Which) -> nn.Module:
    return load(run, which).to("cuda" if torch.cuda.is_available() else "cpu")


def _predict(model: nn.Module, x: Tensor, batch_size: int = 500) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([_prediction(model(batch.to(device))) for batch in x.split(batch_size)])


def _prediction(logits: Tensor) -> Tensor:
    """Return the class, or -1 where outputs are not finite: these are no prediction."""
    return logits.argmax(1).masked_fill(~logits.isfinite().all(1), -1).cpu()
