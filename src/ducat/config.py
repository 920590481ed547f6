"""The settings of a training run: frozen dataclasses, validated when they are made, saved as YAML with the run."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from argparse import ArgumentError
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import numpy as np
import yaml

from ducat import methods
from ducat.architecture import Architecture, describe_foreign
from ducat.data.images import Dataset
from ducat.data.specs import SPECS, DataSpec
from ducat.dummy import TwoHot
from ducat.methods import Kind
from ducat.models import MODELS
from ducat.models.doors import is_foreign
from ducat.schedules import SCHEDULES, epoch_of
from ducat.threat import Norm, ThreatModel

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

TRACKERS = ("tensorboard", "wandb", "trackio")
# What help and completion offer for settings that are names, and those of them that take others too.
CHOICES = {
    "data.name": tuple(SPECS),
    "model.name": tuple(MODELS),
    "method.name": tuple(methods.METHODS),
    "method.attack": tuple(methods.ATTACKS),
    "train.schedule": tuple(SCHEDULES),
    "data": tuple(SPECS),  # this and the next, of a checkpoint
    "model": tuple(MODELS),
    "which": ("best", "last"),
}
OPEN_CHOICES = ("data.name", "model.name", "data", "model", "which")


# What `resolve` writes out where it is left at this; without the data only the last three can be told from a choice.
DERIVED: dict[str, Any] = {
    **{"data.augmentation": "auto", "data.crop_padding": None, "model.name": None, "threat.eps": None},
    **{"method.weight": None, "threat.step_size": None, "name": None},
}
WITHOUT_DATA = ("method.weight", "threat.step_size", "name")

LONGEST_NAME = 200
"""Bytes of a run's name: file systems take 255, and files of the run have longer names."""
WIDEST = 4096  # channels of a first stage: one convolution of so many is 0.6 GB
LARGEST = float(np.finfo(np.float32).max)


def _at_least(name: str, value: float | int | None, low: float | int) -> None:
    if value is not None and not value >= low:
        raise ValueError(f"{name}={value} must be at least {low:g}")
    if isinstance(value, float) and value > LARGEST:
        raise ValueError(f"{name}={value:g} is more than a float32 can hold")


def _among(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        close = get_close_matches(value, choices, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"{name}={value} is unknown: {hint}choose from {', '.join(choices)}")


def _within(name: str, value: float | int, low: float | int, high: float | int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is outside [{low:g}, {high:g}]")


def _fraction(name: str, value: float | int) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} is outside [0, 1)")


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    name: str = "cifar10"
    """Name of a data set, as `ducat data list` shows them, or a stream: wds:SHARDS, hf:NAME or folder:PATH."""
    samples: int | None = None
    """Number of training images, a fixed stratified subset; all of them by default."""
    root: Path | None = None
    """Folder of the prepared data sets; DUCAT_DATA or the user's cache by default."""
    augmentation: Literal["auto", "base", "strong"] = "auto"
    """base is random crop and flip as fits the data, strong AutoAugment and cutout as well; auto is strong for
    photographs where the method's paper says so (consistency), else base."""
    workers: int | None = None
    """Processes that decode the images of a stream, for each process that trains; 0 is none besides it, by default the
    cores there are, 8 at most. The batches are the same for any number."""
    crop_padding: int | None = None
    """Pixels of black added on each side before the random crop; 0 is no crop. By default what fits the data."""
    extra: Path | None = None
    """Generated images to train on as well: an .npz file with image (uint8, channels last) and label. It is read where
    it lies, and never validated on."""
    extra_share: float | int = 0.7
    """Share of each batch that is drawn from data.extra, in (0, 1)."""
    held_out: float | int | None = None
    """Training images held out to choose the best checkpoint: a number, or a share below 1. 0 trains on all of them,
    and leaves no best checkpoint. By default those that were held out when the data were prepared."""

    def __post_init__(self) -> None:
        _among("data.augmentation", self.augmentation, ("auto", "base", "strong"))
        _at_least("data.samples", self.samples, 1)
        _at_least("data.workers", self.workers, 0)
        _at_least("data.crop_padding", self.crop_padding, 0)
        _at_least("data.held_out", self.held_out, 0)
        if not 0 < self.extra_share < 1:
            raise ValueError(f"data.extra_share={self.extra_share} is outside (0, 1)")


@dataclass(frozen=True)
class ModelConfig:
    """Which network to train."""

    name: str | None = None
    """Name of a network, for example small, resnet20, resnet18, wrn-28-10; by default the one usual for the data.
    Networks of others are timm/NAME, hf:REPO_OR_FOLDER, path/to/nets.py:function and package.module:function; a
    function is called with the number of outputs."""
    width: int | None = None
    """Channels of the first stage, instead of the network's own."""
    normalization: Literal["auto", "data", "none"] = "auto"
    """What the network does to its images first: data subtracts the data's mean and divides by its standard deviation,
    per channel; none takes images in [0, 1] as they are, as many published robust networks do; auto is what a network
    of others says of itself, else data."""
    options: dict[str, Any] | None = None
    """What else a network of others is made with, for example {"img_size": 32}."""
    weights: str | None = None
    """Weights to begin with: a file or run folder, or pretrained for those that the network's publisher trained. A
    head for another number of classes is new."""
    input_size: int | None = None
    """Pixels a side that a network of others is given: images are resized inside of the model. By default they are
    not, unless it only takes another size."""

    init: Literal["he", "torch"] = "he"
    """How convolutions begin: he draws from a normal distribution with deviation sqrt(2 / fan out); torch as
    torch.nn.Conv2d does, uniformly with deviation sqrt(1 / (3 fan in)), as code without an initialisation does."""

    def __post_init__(self) -> None:
        _among("model.init", self.init, ("he", "torch"))
        _among("model.normalization", self.normalization, ("auto", "data", "none"))
        _within("model.width", self.width or 1, 1, WIDEST)
        _at_least("model.input_size", self.input_size, 1)


@dataclass(frozen=True)
class MethodConfig:
    """How to train it."""

    name: str = "pgd-at"
    """natural, or a method of adversarial training: pgd-at, trades, mart, consistency, mixed."""
    weight: float | int | None = None
    """Weight of the method's regulariser (beta or lambda of its paper); the paper's value by default."""
    attack: str = "pgd"
    """How training finds adversarial images: pgd takes threat.steps steps; pgd-cosine 5 that become shorter, about as
    strong as 10 equal ones of eps / 4; fgsm-rs and n-fgsm take one, which is cheap and risks catastrophic overfitting:
    validation then looks out for it."""
    label_smoothing: float | int = 0.0
    """Share of the target that is spread evenly over all classes, in [0, 1)."""
    cross_entropy: Literal["auto", "benign", "adversarial"] = "auto"
    """For trades and mart: the images that the cross-entropy is on while no dummy classes are in use; auto is as in
    the method's paper. With adversarial for trades, the released code of dummy classes warms up."""
    clip_start: bool = True
    """Whether the noise that the attacks of trades and mart begin with is cut to [0, 1]; in their papers' code it is
    not."""

    def __post_init__(self) -> None:
        row = methods.find(self.name)
        row.check_weight(self.weight)
        if self.weight == 0 and not row.reads_weight:
            # Runs of earlier versions have written it so, and it is nobody's choice for another method.
            object.__setattr__(self, "weight", None)
        _among("method.cross_entropy", self.cross_entropy, ("auto", "benign", "adversarial"))
        if self.cross_entropy != "auto" and not row.reads_benign:
            raise ValueError(
                f"method.cross_entropy={self.cross_entropy} does not fit method.name={self.name}: leave it at auto, or "
                "choose trades or mart"
            )
        _among("method.attack", self.attack, methods.ATTACKS)
        _fraction("method.label_smoothing", self.label_smoothing)


@dataclass(frozen=True)
class DummyConfig(TwoHot):
    """Whether and how to use dummy classes."""

    kind: Kind = "off"
    """off; published: as in the paper, the inner attack is blind to recovery; recovery-aware: it knows recovery."""
    start_epoch: float | int = 0.81
    """First epoch with two-hot targets, counted from 0; between 0 and 1 a fraction of all epochs."""

    def __post_init__(self) -> None:
        _among("dummy.kind", self.kind, methods.PHASES)
        _at_least("dummy.start_epoch", self.start_epoch, 0)
        super().__post_init__()


@dataclass(frozen=True)
class ThreatConfig:
    """What the attacker may do, in training and evaluation."""

    norm: Norm = "linf"
    """linf, l2 or l1."""
    eps: float | int | str | None = None
    """Radius of the ball, on images in [0, 1]: a number or a fraction such as 8/255. By default usual for the data."""
    step_size: float | int | str | None = None
    """Length of an attack step in training, in the units of eps; by default eps / 4, for l2 15/128 of eps."""
    steps: int = 10
    """Attack steps in training."""

    def __post_init__(self) -> None:
        self.build(None)

    def build(self, spec: DataSpec | None) -> ThreatModel:
        """Return the threat model, with the data set's usual eps where none was given for linf."""
        eps = self.eps
        if eps is None and spec is not None and self.norm == "linf":
            eps = spec.eps
        return ThreatModel(self.norm, eps, self.step_size, self.steps)

    @property
    def ball(self) -> ThreatModel:
        """What networks are measured in: norm and eps, with the usual step; training's may be too short or too long."""
        return ThreatModel(self.norm, self.eps)


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    epochs: int = 130
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step, over all processes."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum, as convolutional networks are trained; or adamw, for transformers: its weight decay leaves out
    norms, biases and other vectors."""
    drop_last: bool = True
    """Whether images that do not fill an epoch's last batch are left out of that epoch."""
    learning_rate: float | int = 0.1
    """Highest learning rate; for adamw about a hundredth of sgd's."""
    momentum: float | int = 0.9
    """Momentum of sgd, in [0, 1)."""
    weight_decay: float | int = 5e-4
    """Weight decay; for adamw usually 0.05."""
    clip_norm: float | int = 0.0
    """Largest norm of the gradient over all weights, to which a longer one is shortened; 0 is none."""
    accumulate: int = 1
    """Parts that a batch is attacked and forwarded in, one after the other, to need less memory. Without batch norm the
    result is that of the whole batch."""
    eps_ramp_epochs: float | int = 0.0
    """Epochs over which eps of the training attack grows linearly from 0 to its value, its step with it."""
    schedule: str = "multi-step"
    """Learning rate over time: multi-step, cosine, one-cycle or constant."""
    milestones: tuple[float | int, ...] = (0.77, 0.81)
    """For multi-step: epochs at which the learning rate falls to a tenth; between 0 and 1 fractions of all epochs."""
    warmup_epochs: float | int = 0.0
    """Epochs of linear warm-up, by which the schedule is multiplied."""
    averaging: Literal["off", "ema", "swa"] = "off"
    """Average of the weights that is validated, saved and deployed in their place: ema is exponential, a step at a
    time; swa is the plain mean over epochs, with batch-norm statistics measured anew."""
    averaging_decay: float | int = 0.999
    """Weight of the past in an ema, in [0, 1)."""
    averaging_start_epoch: float | int = 0.5
    """First epoch whose weights are averaged, counted from 0; between 0 and 1 a fraction of all epochs."""
    awp: float | int = 0.0
    """Size gamma of adversarial weight perturbation, relative to each weight's norm, for example 0.005; 0 is none."""
    awp_start_epoch: float | int = 0.0
    """First epoch with adversarial weight perturbation, counted from 0; between 0 and 1 a fraction of all epochs."""
    seed: int = 0
    """Seed of everything random in the run."""
    batch_norm: Literal["auto", "joint", "separate"] = "auto"
    """Whether the regulariser's benign and adversarial images go through the network as one batch, with joint
    batch-norm statistics, or separately, as in the papers of trades and mart; auto is as in the method's paper."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    """Number format of the network's passes; auto is bf16 where the processor computes in it, else float32. fp16 is for
    GPUs without bf16: the loss is scaled so that small gradients are not lost."""
    compile: bool = False
    """Whether torch.compile compiles the passes of the network. Where it fails on a first forward pass, for example
    without a C compiler, training goes on without it and says so."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto is a GPU if there is one."""
    threads: int | None = None
    """Threads of a CPU; by default as many as a batch is worth, no more than there are cores or OMP_NUM_THREADS says:
    for digits one, which is faster than two where other programs run."""
    validate_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    checkpoint_minutes: float | int = 10.0
    """Minutes after which a checkpoint is written within an epoch, besides those at its end; 0 is never."""
    keep: int = 0
    """How many of the newest epochs' checkpoints to keep as checkpoints/epoch-N, besides last and best."""
    tracker: Literal["auto", "none", "tensorboard", "wandb", "trackio"] = "auto"
    """Where metrics go besides metrics.jsonl; auto is TensorBoard where it is installed."""

    def __post_init__(self) -> None:
        _at_least("train.epochs", self.epochs, 1)
        _at_least("train.batch_size", self.batch_size, 2)
        _among("train.optimizer", self.optimizer, ("sgd", "adamw"))
        _at_least("train.learning_rate", self.learning_rate, 0)
        _at_least("train.clip_norm", self.clip_norm, 0)
        _at_least("train.accumulate", self.accumulate, 1)
        _at_least("train.eps_ramp_epochs", self.eps_ramp_epochs, 0)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.accumulate={self.accumulate} does not divide train.batch_size={self.batch_size} evenly"
            )
        if self.accumulate > 1 and not self.drop_last:
            raise ValueError(f"train.accumulate={self.accumulate} needs full batches: choose train.drop_last=true")
        if self.accumulate > 1 and self.awp:
            raise ValueError(f"train.awp={self.awp} needs whole batches: choose train.accumulate=1")
        _fraction("train.momentum", self.momentum)
        _at_least("train.weight_decay", self.weight_decay, 0)
        _at_least("train.seed", self.seed, 0)
        _among("train.batch_norm", self.batch_norm, ("auto", "joint", "separate"))
        _among("train.schedule", self.schedule, SCHEDULES)
        _at_least("train.warmup_epochs", self.warmup_epochs, 0)
        _among("train.averaging", self.averaging, ("off", "ema", "swa"))
        _fraction("train.averaging_decay", self.averaging_decay)
        _at_least("train.awp", self.awp, 0)
        for milestone in self.milestones if self.schedule == "multi-step" else ():
            epoch_of(milestone, self.epochs, "train.milestones")
        for option in ("averaging_start_epoch", "awp_start_epoch"):
            epoch_of(getattr(self, option), self.epochs, f"train.{option}")
        _at_least("train.threads", self.threads, 1)
        _at_least("train.validate_every", self.validate_every, 1)
        _at_least("train.checkpoint_minutes", self.checkpoint_minutes, 0)
        _at_least("train.keep", self.keep, 0)
        _among("train.tracker", self.tracker, ("auto", "none", *TRACKERS))


@dataclass(frozen=True)
class Config:
    """Everything that a training run depends on."""

    name: str | None = None
    """Name of the run folder; made from the settings by default."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    dummy: DummyConfig = field(default_factory=DummyConfig)
    threat: ThreatConfig = field(default_factory=ThreatConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.name is not None and (self.name in ("", ".", "..") or Path(self.name).name != self.name):
            raise ValueError(f"name={self.name!r} is not the name of a folder: the place is chosen by --runs")
        if self.name is not None and not (self.name.isprintable() and len(self.name.encode()) <= LONGEST_NAME):
            raise ValueError(
                f"name={self.name[:40]!a} of {len(self.name)} characters cannot name a run: use characters that can be "
                f"shown, at most {LONGEST_NAME} bytes"
            )
        for section in dataclasses.fields(self):
            part = getattr(self, section.name)
            for setting in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
                value = getattr(part, setting.name)
                if isinstance(value, np.generic):  # from searches over settings
                    value = value.item()
                    object.__setattr__(part, setting.name, value)
                if isinstance(value, int) and abs(value) >= 2**63:
                    raise ValueError(f"{section.name}.{setting.name}={value} does not fit: numbers end below 2^63")
        if self.dummy.kind != "off":
            methods.find(self.method.name).check_dummy_classes(self.dummy.kind)
            epoch_of(self.dummy.start_epoch, self.train.epochs, "dummy.start_epoch")

    def resolve(self, spec: DataSpec) -> Config:
        """Return the config with every default that depends on the data set written out."""
        threat = self.threat.build(spec)
        method = methods.find(self.method.name)
        weight = self.method.weight
        if weight is None and method.reads_weight:
            weight = method.weight
        augmentation = self.data.augmentation
        if augmentation == "auto":
            # AutoAugment's policy was found on photographs; grey drawings are not what it fits.
            augmentation = method.augmentation if spec.shape[0] == 3 else "base"
        padding = spec.crop_padding if self.data.crop_padding is None else self.data.crop_padding
        resolved = dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, augmentation=augmentation, crop_padding=padding),
            model=dataclasses.replace(self.model, name=self.model.name or spec.model),
            method=dataclasses.replace(self.method, weight=weight),
            threat=ThreatConfig(self.threat.norm, threat.eps, threat.step_size, threat.steps),
        )
        return dataclasses.replace(resolved, name=self.name or resolved.run_name)

    def check_read(self, spec: DataSpec) -> None:
        """Raise ValueError if a setting was chosen that nothing reads beside the others.

        Runs of earlier versions may hold such settings, so it is asked before a run begins.
        """
        row, method = self.row, f"method.name={self.method.name}"
        inner = methods.ATTACKS[self.method.attack]
        begins = row.gaussian_start and not inner.single_step
        steps = row.objective is not None and inner.step_sizes is None
        attack = f"{method} and method.attack={self.method.attack}"
        threat = self.threat.build(spec)
        usual_step = math.isclose(threat.step_size, ThreatModel(threat.norm, threat.eps).step_size)
        # The setting, what it may be where it is not read, whether it is, and what makes it so.
        table: tuple[tuple[str, Collection[Any], bool, str], ...] = (
            ("method.weight", (None,), row.reads_weight, method),
            ("method.clip_start", (True,), begins, attack),
            ("threat.steps", (ThreatConfig.steps,), steps, attack),
            ("threat.step_size", (None,), steps or usual_step, attack),
            ("train.batch_norm", ("auto", "joint"), row.reads_benign, method),
            ("data.crop_padding", (None, spec.crop_padding), not spec.resized_crop, f"data.name={self.data.name}"),
        )
        settings = self.flat()
        for name, harmless, read, why in table:
            if not read and settings[name] not in harmless:
                usual = next(iter(harmless))
                remedy = "leave it out" if usual is None else f"leave it out, or at {usual}"
                raise ValueError(f"{name}={settings[name]} has no effect with {why}: {remedy}")

    def unresolved(self, spec: DataSpec | None) -> Config:
        """Return the config with what `resolve` has written out left to it again, so that it follows other changes.

        A value that was chosen stays; one that was chosen and is what would be written out cannot be told from that.

        Args:
            spec: of the data; None where that is not known, and what depends on it stays.
        """
        some = SPECS["digits"] if spec is None else spec
        config, resolved = self, self.resolve(some)
        for name, left in DERIVED.items() if spec is not None else [(name, DERIVED[name]) for name in WITHOUT_DATA]:
            changed = _changed(config, name, left)
            if changed.resolve(some) == resolved:
                config = changed
        return config

    def architecture(self, dataset: Dataset) -> Architecture:
        """Return the network that a resolved config asks for on its data, without what only the network can say."""
        spec, channels, model = dataset.spec, dataset.spec.shape[0], self.model
        normalized = model.normalization != "none"
        assert model.name is not None
        ours = not is_foreign(model.name)
        return Architecture(
            name=model.name,
            num_classes=len(dataset.classes),
            dummy_classes=self.dummy.kind != "off",
            channels=channels,
            mean=spec.mean if normalized else (0.0,) * channels,
            std=spec.std if normalized else (1.0,) * channels,
            width=model.width,
            stem_stride=2 if spec.shape[1] >= 64 and ours else 1,
            options=model.options or {},
            image_size=spec.shape[1],
        )

    def described(self, architecture: Architecture) -> Architecture:
        """Fill in what somebody else's network says of itself, which needs its library, file or configuration."""
        if not is_foreign(architecture.name):
            return architecture
        return describe_foreign(
            architecture,
            normalize=self.model.normalization == "auto",
            fit_size=self.model.input_size,
            pretrained=self.model.weights == "pretrained",
        )

    @property
    def run_name(self) -> str:
        """Name made from the settings, for example digits-small-pgd-at-recovery-aware-s0."""
        # The place of a stream is no name of a folder.
        data = re.sub(r"[^\w.-]+", "-", self.data.name)[-60:].strip("-.")
        model = re.sub(r"[^\w.+-]+", "-", self.model.name or "default")
        parts = [data, model, self.method.name]
        if self.dummy.kind != "off":
            parts.append(self.dummy.kind)
        return "-".join([*parts, f"s{self.train.seed}"])

    @property
    def start_epoch(self) -> int:
        """First epoch with two-hot targets; `train.epochs`, which never comes, without dummy classes."""
        if self.dummy.kind == "off":
            return self.train.epochs
        return epoch_of(self.dummy.start_epoch, self.train.epochs, "dummy.start_epoch")

    @property
    def row(self) -> methods.Method:
        """The method of the table, with the changes that the settings ask for."""
        changes: dict[str, Any] = {"clip_start": self.method.clip_start}
        if self.method.cross_entropy != "auto":
            changes["target"] = self.method.cross_entropy
        if self.train.batch_norm != "auto":
            changes["forwards_apart"] = self.train.batch_norm == "separate"
        return dataclasses.replace(methods.find(self.method.name), **changes)

    def objective(self, epoch: int) -> methods.Objective:
        """Return what the given epoch, counted from 0, minimises."""
        weights = {each.name: getattr(self.dummy, each.name) for each in dataclasses.fields(TwoHot)}
        method = self.method
        return methods.objective(
            self.row,
            self.dummy.kind,
            epoch >= self.start_epoch,
            weight=method.weight,
            attack=method.attack,
            label_smoothing=method.label_smoothing,
            **weights,
        )

    def flat(self) -> dict[str, Any]:
        """Return the settings by the names of the command line, for example "train.epochs"."""
        return dict(_flat(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        """Return the config as YAML that `from_yaml` and `ducat train --config` read back."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path | str, *, whole: bool = False) -> Config:
        """Read the config of a run folder, or any YAML that `ducat train --config` takes.

        Args:
            path: the file.
            whole: refuse a file that lacks a key, as a run's must not: a default in its place is another run.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not such a config; the message names the file and the key at fault.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            text = path.read_text(encoding="utf-8")
            if whole:
                return copy.deepcopy(_read_whole(text))
            check_keys(text)
            parser = _reader()
            return cls(**vars(parser.instantiate(parser.parse_path(str(path)))))
        except (ArgumentError, ValueError, TypeError, OverflowError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def config_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
    """Give a parser the settings, for the command line and for YAML files; without one a new parser."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if parser is None:
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Config)
    return parser


@functools.lru_cache
def _read_whole(text: str) -> Config:
    """Read settings of a run, which are asked for again and again: reading them takes a quarter of a second."""
    check_keys(text)
    _check_whole(yaml.safe_load(text))
    parser = _reader()
    return Config(**vars(parser.instantiate(parser.parse_string(text))))


@functools.cache
def _reader() -> ArgumentParser:
    """Return the parser that files are read with, which takes half a second to make."""
    return config_parser()


def check_keys(text: str) -> None:
    """Raise ValueError if a YAML text holds no settings, or one of them twice: its readers keep the last alone."""
    whole = yaml.compose(text)
    if not isinstance(whole, yaml.MappingNode):
        raise ValueError("it holds no settings, such as train: {epochs: 10}")
    for prefix, section in [("", whole), *((f"{key.value}.", value) for key, value in whole.value)]:
        names = [key.value for key, _ in section.value] if isinstance(section, yaml.MappingNode) else []
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{prefix}{twice} is there twice, and the last alone would be read: make them one")


# Keys that configs of earlier versions have not; the defaults are what those versions did, but for TRADES and MART,
# which had `batch_norm: joint`.
LATER = (
    *("crop_padding", "extra", "extra_share", "held_out", "workers"),
    *("init", "input_size", "options", "weights", "clip_start", "cross_entropy", "benign_share", "pair_weight"),
    *("accumulate", "batch_norm", "clip_norm", "compile", "drop_last", "eps_ramp_epochs", "optimizer", "threads"),
)


def _check_whole(values: Any) -> None:
    """Raise ValueError if a key of a run's config is missing, or null where a run has written its value out."""
    usual = Config()
    for section in dataclasses.fields(usual):
        if not isinstance(values, dict) or section.name not in values:
            raise ValueError(f"{section.name} is missing")
        if section.name == "name":
            continue
        hints = get_type_hints(type(getattr(usual, section.name)))
        found = values[section.name]
        if not isinstance(found, dict):
            raise ValueError(f"{section.name} is {found!r}, not settings")
        for key, hint in hints.items():
            name = f"{section.name}.{key}"
            if key not in found and key not in LATER:
                raise ValueError(f"{name} is missing")
            if found.get(key, 0) is None and (name == "threat.eps" or type(None) not in get_args(hint)):
                raise ValueError(f"{name} is null")


def _changed(config: Config, name: str, value: Any) -> Config:
    section, _, setting = name.rpartition(".")
    part = {section: dataclasses.replace(getattr(config, section), **{setting: value})} if section else {setting: value}
    return dataclasses.replace(config, **part)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):  # from searches over settings
        return value.item()
    return str(value) if isinstance(value, Path) else value
