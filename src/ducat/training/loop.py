"""The one training loop: epochs, checkpoints and stopping, around the step and the validation.

Everything random is a function of the seed, the epoch and the step, so a run continues from any step as if it had never
stopped.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ducat import checkpoint, methods, threads
from ducat import data as datasets
from ducat.architecture import Architecture
from ducat.config import Config
from ducat.data.extra import Extra, Mixed
from ducat.runs import HOLDS, RunFolder, environment
from ducat.seeding import seeded
from ducat.training import tracking
from ducat.training.initial import Initial, given
from ducat.training.meter import Meter
from ducat.training.parallel import lost_processes_named
from ducat.training.signals import Interrupted, collected
from ducat.training.step import Step
from ducat.training.validation import Validate, catastrophic_overfitting, validate

AUGMENTATIONS = {"base": datasets.Augmentation.base, "strong": datasets.Augmentation.strong}
# Passes that the attacks of a validation take for each image, and those of a step of PGD-10 for each of its images.
VALIDATION_PASSES, STEP_PASSES = 140, 23
CHECK_EVERY = 20  # steps between looks at the loss: each look makes a GPU wait
BATCH_NORM_BATCHES = 20  # batches that the statistics of averaged weights are measured on


@runtime_checkable
class Listener(Protocol):
    """What wants to know of a run's progress."""

    def step(self, done: int, total: int) -> None:
        """Note that `done` of `total` steps are done."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Note an epoch's line of metrics.jsonl."""

    def warning(self, text: str) -> None:
        """Note what the user must know of before the run is over."""


class _Silent:
    def step(self, done: int, total: int) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...

    def warning(self, text: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What a training that begins or goes on has before it.

    Attributes:
        epochs: of the whole run.
        steps: of an epoch.
        epoch: where it begins, counted from 0.
        dummy_from: the first epoch with dummy classes; `epochs` where there are none.
        validated: the epochs that end with a validation.
        validation_steps: how many steps a validation takes as long, roughly, before one has been timed.
    """

    epochs: int
    steps: int
    epoch: int
    dummy_from: int
    validated: frozenset[int]
    validation_steps: float


@runtime_checkable
class Watcher(Listener, Protocol):
    """A listener that is also told what is ahead, and that a validation goes on."""

    def begin(self, plan: Plan) -> None:
        """Note what is ahead."""

    def validating(self, attack: str) -> None:
        """Note that validation begins an attack."""


@dataclass
class _Position:
    """Where a run stands: the next step to do, what is known of its epoch so far, and the best validation so far.

    A step equal to the number of steps means that the epoch only has to be validated and noted.
    """

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best: float = -1.0


def train(
    config: Config,
    root: Path | str = Path("runs"),
    listener: Listener | None = None,
    *,
    model: nn.Module | Initial | None = None,
    data: datasets.Dataset | None = None,
    objective: Callable[[int], methods.Objective] | None = None,
    validate: Validate | None = None,
) -> RunFolder:
    """Train a network and leave a run folder.

    Args:
        config: the settings.
        root: the folder that the run folder is made in.
        listener: told of each step and epoch.
        model: the network to begin with; by default it is made from the settings. Any network that maps images in
            [0, 1] to C logits will do, and gets dummy classes if the settings use any and it has none. It trains as it
            is, and is not copied. What the settings do not describe cannot be built from the run folder alone.
        data: the data set; by default the prepared one that `config.data` names.
        objective: what the epoch of that number, counted from 0, minimises; by default what the settings say.
        validate: measures the network after an epoch; by default clean, blind and robust accuracy under a short suite.

    Raises:
        FileExistsError: if there is a run of that name; nothing is overwritten.
        ValueError: if a setting does not fit the data.
        FloatingPointError: if the loss stops being finite; the last checkpoint is from before.
        Interrupted: if SIGINT or SIGTERM came; the run has been saved and can be resumed.
    """
    for name in ("samples", "held_out") if data is not None else ():
        if getattr(config.data, name) is not None:
            raise ValueError(f"data.{name} has no effect on data that are given: leave it out, and give others")
    dataset = _dataset(config, data)
    config.check_read(dataset.spec)
    config = config.resolve(dataset.spec)
    assert config.name is not None
    manifest: dict[str, Any] = {}
    if model is None:
        initial = Initial.of_settings(config)
    else:
        initial = model if isinstance(model, Initial) else Initial.of(model)
    architecture, network = initial.build(config.architecture(dataset))
    if initial.source:
        manifest["initial"] = dict(initial.source)
        if learnt := initial.learnt(dataset):
            manifest["initial"]["validation_learnt"] = learnt
            (listener or _Silent()).warning(
                f"{learnt} of {len(dataset.validation)} validation images are among those that "
                f"{initial.source['file']} was trained on: validation, the checkpoint best and thresholds overstate; "
                "hold out what that run did (data.held_out, data.samples), or use the checkpoint last"
            )
    if objective is not None:
        manifest["objective"] = "given to train"
    loop = _Loop(
        config, dataset, Path(root) / config.name, listener or _Silent(), architecture, network, objective, validate
    )
    # Some networks draw from the global generators, as dropout does.
    accelerator = loop.accelerator
    with seeded(config.train.seed, "train", accelerator.process_index, device=accelerator.device), loop.threads():
        loop.create(manifest)
        return loop.run()


def resume(
    path: Path | str,
    listener: Listener | None = None,
    *,
    model: nn.Module | None = None,
    data: datasets.Dataset | None = None,
    objective: Callable[[int], methods.Objective] | None = None,
    validate: Validate | None = None,
) -> RunFolder:
    """Continue a run from its last whole checkpoint; one that is finished is returned as it is.

    On the same processor and with the same packages, the weights and metrics are bit by bit those of a run that was
    never stopped. The states of Python's, NumPy's and PyTorch's global random generators are put back too.

    Args:
        path: the run folder.
        listener: told of each step and epoch.
        model: a network like the one that was given to `train`, where the settings do not describe it; its weights
            become the run's.
        data: what was given to `train`, as the next two.
        objective: needed again where it was given.
        validate: measures the network after an epoch.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if no checkpoint can be read, the data have changed, the run minimises an objective that is not
            given, or another process is training the run.
        Interrupted: and the others, as `train` does.
    """
    folder = RunFolder.open(path)
    if folder.manifest["status"] == "finished":
        return folder
    config = folder.config
    if objective is None and "objective" in folder.manifest:
        raise ValueError(f"{path} minimises an objective of its own: give it again, to ducat.training.resume")
    dataset = folder.dataset() if data is None else data
    folder.check_data(dataset)
    read = _written(folder)
    tensors, state, notice = checkpoint.read_or_previous(folder.checkpoint_path("last"), holds=HOLDS)
    if notice is not None and listener is not None:
        listener.warning(notice)
    architecture = Architecture(**state["model"])
    if model is None:
        with torch.random.fork_rng(devices=[]):
            network = architecture.build()
    else:
        network = given(model, architecture)
    loop = _Loop(config, dataset, folder.path, listener or _Silent(), architecture, network, objective, validate)
    loop.restore(tensors, state)
    with loop.threads():
        return loop.run(read=read, damaged=notice is not None)


def _dataset(config: Config, given: datasets.Dataset | None) -> datasets.Dataset:
    if given is not None:
        return given
    wanted = config.data
    return datasets.load(wanted.name, samples=wanted.samples, root=wanted.root, held_out=wanted.held_out)


class _Loop:
    """A run in memory."""

    def __init__(
        self,
        config: Config,
        dataset: datasets.Dataset,
        path: Path,
        listener: Listener,
        architecture: Architecture,
        model: nn.Module,
        objective: Callable[[int], methods.Objective] | None,
        validate: Validate | None,
    ) -> None:
        self.config, self.dataset, self.listener = config, dataset, listener
        self.architecture, self.validate = architecture, validate
        settings = config.train
        tracking.check(settings.tracker)
        self.folder = RunFolder(path)
        example = dataset.train.select(torch.arange(min(2, len(dataset.train)))).floats()
        self.step = Step(config, model, example, objective=objective, notice=listener.warning)
        self.accelerator, self.model = self.step.accelerator, model
        self.extra = None
        if config.data.extra is not None:
            self.extra = Extra.open(config.data.extra, dataset.spec.shape, len(dataset.classes))
        self.batches = self._made_batches(dataset)
        self._check_shares(example)
        self.position, self.resumed = _Position(), False
        self.received: list[int] = []
        self.meter = Meter(self.accelerator.device)
        self.saved_at = time.monotonic()

    def _made_batches(self, dataset: datasets.Dataset) -> datasets.Batches | Mixed:
        settings, data, accelerator, spec = self.config.train, self.config.data, self.accelerator, dataset.spec
        if data.crop_padding is not None:
            spec = replace(spec, crop_padding=data.crop_padding)

        def made(batch_size: int) -> datasets.Batches:
            return datasets.Batches(
                dataset.train,
                batch_size,
                seed=settings.seed,
                augment=AUGMENTATIONS[data.augmentation](spec),
                device=accelerator.device,
                views=self.step.views,
                drop_last=settings.drop_last,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                workers=data.workers,
            )

        if self.extra is None:
            return made(settings.batch_size)
        processes = accelerator.num_processes
        rows = processes * round(data.extra_share * settings.batch_size / processes)
        if not 0 < rows < settings.batch_size:
            raise ValueError(f"data.extra_share={data.extra_share} leaves no real or no generated image in a batch")
        return Mixed(made(settings.batch_size - rows), self.extra, rows, len(made(settings.batch_size)))

    def _check_shares(self, example: Tensor) -> None:
        """Raise ValueError if the processes cannot share the validation images, or an epoch's last batch."""
        held_out, processes = len(self.dataset.validation), self.accelerator.num_processes
        if self.validate is None and 0 < held_out < processes:
            raise ValueError(
                f"{processes} processes cannot share {held_out} validation images: hold out more (data.held_out), or "
                "train in fewer processes"
            )
        drawn, real = (self.batches.rows, self.batches.real) if isinstance(self.batches, Mixed) else (0, self.batches)
        left = min(real.batch_size, len(real.images) - (len(self.batches) - 1) * real.batch_size)
        remedy = f"choose train.drop_last=true or another train.batch_size than {self.config.train.batch_size}"
        if left % processes:
            raise ValueError(
                f"the last batch of an epoch has {left} images, which {processes} processes cannot share evenly: "
                f"{remedy}"
            )
        if left + drawn == processes and self.step.fails_on(example[:1]):
            raise ValueError(
                "the last batch of an epoch has one image in each process, where batch norm needs two values of a "
                f"channel: {remedy}"
            )

    def threads(self) -> contextlib.AbstractContextManager[int]:
        """Compute with as many threads as the settings say, or a batch is worth."""
        settings = self.config.train
        images = self.dataset.train.select(torch.arange(2)).floats().to(self.accelerator.device)
        share = -(-settings.batch_size // (self.accelerator.num_processes * settings.accumulate)) * self.step.views
        return threads.chosen(self.model, images, share, settings.threads, self.listener.warning)

    def create(self, manifest: Mapping[str, Any]) -> None:
        """Make the run folder: it appears whole, with a checkpoint, so that whatever there is can be resumed."""
        tensors, state = self._state()
        if self.accelerator.is_main_process:
            with RunFolder.making(self.folder.path) as folder:
                folder.write_config(self.config)
                folder.update_manifest(
                    {
                        **environment(),
                        "status": "running",
                        "started": _now(),
                        "seed": self.config.train.seed,
                        "precision": str(self.step.precision).removeprefix("torch."),
                        "device": str(self.accelerator.device),
                        "processes": self.accelerator.num_processes,
                        "data": {
                            "name": self.config.data.name,
                            "title": self.dataset.spec.title,
                            "fingerprint": self.dataset.fingerprint,
                            "train": len(self.dataset.train),
                            "validation": len(self.dataset.validation),
                            "test": len(self.dataset.test),
                            **self._said_of_extra(),
                        },
                        **manifest,
                    }
                )
                if self.config.data.samples is not None:
                    folder.write_ids(self.dataset.train.ids.tolist())
                folder.save("last", tensors, state)
        self.accelerator.wait_for_everyone()

    def _said_of_extra(self) -> dict[str, Any]:
        if self.extra is None:
            return {}
        extra = {"file": str(self.extra.path), "images": len(self.extra), "fingerprint": self.extra.fingerprint}
        return {"extra": extra}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        step = self.step
        if self.extra is not None:
            trained_on = self.folder.manifest["data"].get("extra", {}).get("fingerprint")
            if trained_on != self.extra.fingerprint:
                raise ValueError(
                    f"{self.extra.path} holds other images than those that {self.folder.path} was trained on"
                )
        last = self.folder.checkpoint_path("last")
        checkpoint.load_weights(self.model, checkpoint.part("raw" if state["averaged"] else "model", tensors), last)
        if step.average is not None:
            checkpoint.load_weights(step.average.module, checkpoint.part("model", tensors), last)
            step.average.n_averaged.fill_(state["averaged"])
        checkpoint.join_optimizer(step.optimizer.optimizer, checkpoint.part("optimizer", tensors), state["optimizer"])
        if state.get("scaler"):  # checkpoints of earlier versions have none
            step.scaler.load_state_dict(state["scaler"])
        self.position, self.resumed = _Position(**state["position"]), True
        rank = self.accelerator.process_index
        if rank < len(state["random"]):
            checkpoint.set_random_state(checkpoint.part(f"random.{rank}", tensors), state["random"][rank])
        self.meter = Meter(self.accelerator.device, earlier=state["spent"])

    def run(self, read: tuple[int, int] | None = None, damaged: bool = False) -> RunFolder:
        """Train to the end.

        Args:
            read: for a run that is continued, what `_written` said before its checkpoint was read.
            damaged: whether that checkpoint could not be used, so that the one before it was.
        """
        main, settings = self.accelerator.is_main_process, self.config.train
        tracker: tracking.Tracker | None = None
        status = "failed"
        with self.folder.locked() if main else contextlib.nullcontext():
            if main and self.resumed and read != _written(self.folder):
                raise ValueError(
                    f"{self.folder.path} has been trained on by another process meanwhile: look at it, then resume"
                )
            if main:  # reads what may be damaged, before anything is written
                self.folder.clean(from_epoch=self.position.epoch)
            if main and damaged:
                # Else the next one would move it to where the whole one is, and a kill in between leave neither.
                self.folder.checkpoint_path("last").unlink(missing_ok=True)
            try:
                if main:
                    if self.resumed:
                        self.folder.note_resumption(self.position.epoch, self.position.step, _now())
                    tracker = tracking.Tracker.start(
                        settings.tracker, self.folder.path, self.config.flat(), self.position.epoch
                    )
                if isinstance(self.listener, Watcher):
                    self.listener.begin(self._plan())
                with (
                    lost_processes_named(self.folder),
                    collected(launched=self.accelerator.num_processes > 1) as self.received,
                ):
                    while self.position.epoch < settings.epochs:
                        self._epoch(tracker)
                status = "finished"
                if self.received:
                    raise Interrupted(self.received[0], self.folder, finished=True)
            except KeyboardInterrupt:
                status = "finished" if status == "finished" else "interrupted"
                raise
            finally:
                if tracker is not None:
                    tracker.finish()
                if main:
                    self._close(status)
        return self.folder

    def _plan(self) -> Plan:
        settings, held_out = self.config.train, len(self.dataset.validation)
        return Plan(
            epochs=settings.epochs,
            steps=len(self.batches),
            epoch=self.position.epoch,
            dummy_from=self.config.start_epoch,
            validated=frozenset(epoch for epoch in range(settings.epochs) if held_out and self._validates(epoch)),
            validation_steps=VALIDATION_PASSES * held_out / (STEP_PASSES * settings.batch_size),
        )

    def _validates(self, epoch: int) -> bool:
        settings = self.config.train
        return (epoch + 1) % settings.validate_every == 0 or epoch + 1 == settings.epochs

    def _close(self, status: str) -> None:
        try:
            self.folder.update_manifest({"status": status, "ended": _now(), **self.meter.read()})
        except OSError:
            # A full disk has stopped the run already: that error is the one to report.
            if status != "failed":
                raise

    def _epoch(self, tracker: tracking.Tracker | None) -> None:
        at, settings, steps = self.position, self.config.train, len(self.batches)
        earlier, began = at.seconds, time.perf_counter()
        pending: list[torch.Tensor] = []
        for x, y in self._batches(at.epoch, at.step):
            pending.append(self.step(x, y, at.epoch, at.step, steps))
            at.step += 1
            done = at.step == steps
            if done:
                # Part of the last step, so that a checkpoint after it says whether it has been done.
                self.step.end_epoch(islice(self._batches(at.epoch), BATCH_NORM_BATCHES), at.epoch)
            at.seconds = earlier + time.perf_counter() - began
            self.listener.step(at.epoch * steps + at.step, settings.epochs * steps)
            alone = self.accelerator.num_processes == 1
            if len(pending) == CHECK_EVERY or done or (alone and (self.received or self._save_is_due())):
                self._take(pending)
                self.meter.sample()
                if self.step.agreed(bool(self.received)):
                    self._stop()
                if not done and self.step.agreed(self._save_is_due()):
                    self._save("last")
        self._finish_epoch(tracker)

    def _save_is_due(self) -> bool:
        minutes = self.config.train.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def _stop(self) -> None:
        """Save, and leave by the signal that asked for it."""
        self._save("last")
        # Another process may have had the signal.
        raise Interrupted(self.received[0] if self.received else signal.SIGTERM, self.folder)

    def _batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch in the form that networks take, the views of a batch one after the other."""
        for x, y in self.batches.epoch(epoch, start_step=start_step):
            images = x.reshape(-1, *x.shape[-3:]).to(memory_format=self.step.layout)
            yield images, y.repeat(self.batches.views)

    def _take(self, pending: list[torch.Tensor]) -> None:
        """Move losses from the device to the record, and stop at the first that is not finite."""
        at = self.position
        values = self.step.mean(torch.stack(pending)).tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                step = at.step - len(values) + offset
                raise FloatingPointError(f"the loss is {value} at epoch {at.epoch}, step {step}; {self._kept()}")
        at.losses.extend(values)
        pending.clear()

    def _kept(self) -> str:
        last = self.folder.checkpoint_path("last")
        good = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
        return f"{good}: try a smaller train.learning_rate, or train.clip_norm"

    def _finish_epoch(self, tracker: tracking.Tracker | None) -> None:
        at, settings = self.position, self.config.train
        row: dict[str, Any] = {
            "epoch": at.epoch,
            "dummy_classes": self.config.dummy.kind if at.epoch >= self.config.start_epoch else "off",
            "learning_rate": self.step.optimizer.param_groups[0]["lr"],
            "loss": sum(at.losses) / max(1, len(at.losses)),
            "seconds": round(at.seconds, 3),
            "images_per_s": round(at.step * settings.batch_size / at.seconds, 1) if at.seconds else None,
        }
        improved = False
        if self._validates(at.epoch) and len(self.dataset.validation):
            row.update(self._validated())
            settled = self.config.dummy.kind == "off" or at.epoch >= self.config.start_epoch
            improved = settled and row["robust"] > at.best
            if improved:
                at.best = row["robust"]
        at.epoch, at.step, at.losses, at.seconds = at.epoch + 1, 0, [], 0.0
        if improved:
            self._save("best")
        if self.accelerator.is_main_process:
            self._watch(row)
            self.folder.append_metrics(row)
        if tracker is not None:
            tracker.log(row)
        if settings.keep:
            # Before `last`: after a kill between the two the epoch is done again, and both are written.
            self._save(f"epoch-{at.epoch}")
            if self.accelerator.is_main_process:
                self.folder.drop_checkpoints(keep=settings.keep)
        self._save("last")
        self.listener.epoch(row)

    def _validated(self) -> Mapping[str, float]:
        if self.validate is not None:
            measured = self.validate(self.step.deployed, self.dataset.validation.to("cpu"))
            shares = torch.tensor(list(measured.values()), dtype=torch.float64)
            if self.accelerator.num_processes > 1:
                shares = self.step.mean(shares.to(self.accelerator.device))
            return dict(zip(measured, shares.tolist(), strict=True))
        return validate(
            self.step.deployed,
            self.step,
            self.dataset,
            progress=self._validation_goes_on,
        )

    def _validation_goes_on(self, attack: str) -> None:
        if self.step.agreed(bool(self.received)):
            self._stop()
        if isinstance(self.listener, Watcher):
            self.listener.validating(attack)

    def _watch(self, row: dict[str, Any]) -> None:
        """Mark a line of metrics that shows catastrophic overfitting, and warn at the first."""
        earlier = self.folder.metrics
        if "pgd" not in row or not catastrophic_overfitting([*earlier, row]):
            return
        row["catastrophic_overfitting"] = True
        if not any("catastrophic_overfitting" in line for line in earlier):
            self.listener.warning(
                f"catastrophic overfitting at epoch {row['epoch']}: PGD accuracy has fallen to {row['pgd']:.3f} while "
                f"FGSM accuracy is up at {row['fgsm']:.3f}, so training with method.attack={self.config.method.attack} "
                "no longer makes the network robust: try n-fgsm or pgd, or a smaller train.learning_rate"
            )

    def _check_finite(self) -> None:
        """Stop before weights, averages or moments that are not finite are kept as if they were good.

        Buffers may be anything, masks for example, but for what batch norm measures.
        """
        for network in {self.model, self.step.deployed}:
            measured = (row for row in network.named_buffers() if row[0].endswith(("running_mean", "running_var")))
            for name, tensor in [*network.named_parameters(), *measured]:
                if not tensor.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite in epoch {self.position.epoch}; {self._kept()}")
        for index, moments in enumerate(self.step.optimizer.optimizer.state.values()):
            for name, value in moments.items():
                if isinstance(value, Tensor) and not value.isfinite().all():
                    raise FloatingPointError(
                        f"the optimiser's {name} of parameter {index} is not finite in epoch {self.position.epoch}; "
                        f"{self._kept()}"
                    )

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the rest of the run depends on: tensors by name, and the rest for JSON."""
        from accelerate.utils import gather_object

        self._check_finite()
        deployed, average = self.step.deployed, self.step.average
        moments, rest = checkpoint.split_optimizer(self.step.optimizer.optimizer)
        everyones = gather_object([checkpoint.random_state()])
        # "model" is always what is deployed; where that is an average, "raw" is what training goes on from.
        tensors = {
            **checkpoint.named("model", deployed.state_dict()),
            **checkpoint.named("optimizer", moments),
        }
        for rank, (generators, _) in enumerate(everyones):
            tensors.update(checkpoint.named(f"random.{rank}", generators))
        if deployed is not self.model:
            tensors.update(checkpoint.named("raw", self.model.state_dict()))
        return tensors, {
            "model": asdict(self.architecture),
            "position": asdict(self.position),
            "optimizer": rest,
            "averaged": int(average.n_averaged) if average is not None else 0,
            "random": [others for _, others in everyones],
            "scaler": self.step.scaler.state_dict(),
            "spent": self.meter.read(),
        }

    def _save(self, which: str) -> None:
        tensors, state = self._state()
        if self.accelerator.is_main_process:
            try:
                self.folder.save(which, tensors, state)
            except OSError as error:
                resume = f"ducat train --resume {self.folder.quoted}"
                raise OSError(error.errno, f"{error.strerror}; the checkpoint before it is whole: {resume}") from error
        self.saved_at = time.monotonic()


def _written(folder: RunFolder) -> tuple[int, int] | None:
    """Return what tells whether a run's last checkpoint has been written since; None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = folder.checkpoint_path("last").stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
