"""The one training loop: the config says what each epoch minimises, accelerate on which processes and devices.

Everything random is a function of the seed, the epoch and the step, so a run continues from any step as if it had never
stopped.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ducat import checkpoint, data, methods, tracking
from ducat.attacks.pgd import attackable
from ducat.averaging import WeightAverage, perturbed_weights, update_batch_norm
from ducat.config import Config, TrainConfig
from ducat.dummy import dummy_head
from ducat.evaluation import evaluate
from ducat.meter import Meter
from ducat.models.architecture import Architecture
from ducat.models.folded import fold_batch_norm
from ducat.parallel import LocalRows, synchronize_batch_norm
from ducat.runs import RunFolder, environment
from ducat.schedules import epoch_of, learning_rate
from ducat.seeding import generator

AUGMENTATIONS = {"base": data.Augmentation.base, "strong": data.Augmentation.strong}
CHECK_EVERY = 20  # steps between looks at the loss: each look makes a GPU wait
ECHO = 10.0  # seconds within which a launcher passes a signal on
COLLAPSE = 0.05  # a smaller fall of PGD accuracy is noise of the validation split
VALIDATION_CHUNK = 500  # samples that validation attacks at a time, at most
BATCH_NORM_BATCHES = 20  # batches that the statistics of averaged weights are measured on


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after a whole step; `signum` is the signal, and the run is saved."""

    def __init__(self, signum: int, folder: RunFolder, *, finished: bool = False) -> None:
        rest = f"{folder.path} is finished" if finished else f"continue with: ducat train --resume {folder.path}"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {rest}")
        self.signum = signum


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


@dataclass(frozen=True)
class Initial:
    """A trained network to begin with, instead of random weights.

    Attributes:
        build: makes the network and its description from the description that the settings and the data ask for.
        source: what the manifest says of where the weights are from.
    """

    build: Callable[[Architecture], tuple[Architecture, nn.Module]]
    source: Mapping[str, Any]


def train(
    config: Config, root: Path = Path("runs"), listener: Listener | None = None, *, initial: Initial | None = None
) -> RunFolder:
    """Train a network and leave a run folder.

    Args:
        config: the settings.
        root: the folder that the run folder is made in.
        listener: told of each step and epoch.
        initial: where the weights begin; at random by default.

    Raises:
        FileExistsError: if there is a run of that name; nothing is overwritten.
        ValueError: if a setting does not fit the data.
        FloatingPointError: if the loss stops being finite; the last checkpoint is from before.
        Interrupted: if SIGINT or SIGTERM came; the run has been saved and can be resumed.
    """
    dataset = data.load(config.data.name, samples=config.data.samples, root=config.data.root)
    config = config.resolve(dataset.spec)
    assert config.name is not None
    architecture = config.architecture(dataset)
    if initial is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            model = architecture.build()
    else:
        architecture, model = initial.build(architecture)
    loop = _Loop(config, dataset, root / config.name, listener or _Silent(), architecture, model)
    loop.create({} if initial is None else {"initial": dict(initial.source)})
    return loop.run()


def resume(path: Path, listener: Listener | None = None) -> RunFolder:
    """Continue a run from its last whole checkpoint; one that is finished is returned as it is.

    On the same processor and with the same packages, the weights and metrics are bit by bit those of a run that was
    never stopped. The states of Python's, NumPy's and PyTorch's global random generators are put back too.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if no checkpoint can be read, the data have changed, or another process is training the run.
        Interrupted: and the others, as `train` does.
    """
    folder = RunFolder.open(path)
    if folder.manifest["status"] == "finished":
        return folder
    config = folder.config
    dataset = data.load(config.data.name, samples=config.data.samples, root=config.data.root)
    if dataset.fingerprint != folder.manifest["data"]["fingerprint"]:
        raise ValueError(
            f"the data {config.data.name} are not those that {path} was trained on: prepare those again, or point "
            "DUCAT_DATA at their folder"
        )
    tensors, state, notice = checkpoint.read_or_previous(folder.checkpoint_path("last"))
    if notice is not None and listener is not None:
        listener.warning(notice)
    architecture = Architecture(**state["model"])
    with torch.random.fork_rng(devices=[]):
        model = architecture.build()
    loop = _Loop(config, dataset, path, listener or _Silent(), architecture, model)
    loop.restore(tensors, state)
    return loop.run()


class _Loop:
    """A run in memory."""

    def __init__(
        self,
        config: Config,
        dataset: data.Dataset,
        path: Path,
        listener: Listener,
        architecture: Architecture,
        model: nn.Module,
    ) -> None:
        from accelerate import Accelerator

        self.config, self.dataset, self.listener = config, dataset, listener
        self.architecture, self.model = architecture, model
        settings = config.train
        tracking.check(settings.tracker)
        self.folder = RunFolder(path)
        self.threat = config.threat.build(dataset.spec)
        # Launched processes without an accelerator would each train alone, unless told that they are CPUs.
        only_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
        self.accelerator: Accelerator = Accelerator(cpu=settings.device == "cpu" or only_cpus)
        device = self.accelerator.device
        if settings.device == "cuda" and device.type != "cuda":
            raise ValueError("train.device=cuda: PyTorch finds no GPU here; choose cpu or auto")
        self.precision = _precision(settings, device)
        # float32 convolutions on a CPU are no faster in channels_last, bf16 ones are.
        layout = torch.channels_last if self.precision is torch.bfloat16 else torch.contiguous_format
        self.model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        example = dataset.train.select(torch.arange(2)).floats().to(device)
        self.folded = fold_batch_norm(self.model, example)
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        views = methods.find(config.method.name).views
        if world_size > 1:
            synchronize_batch_norm(self.model)  # after folding, which compares outputs that need no other process
        self.draws = LocalRows(rank, world_size, views) if world_size > 1 else contextlib.nullcontext()
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.attacked: nn.Module = self.model if self.folded is None else self.folded
        if settings.compile:
            self.wrapped, self.attacked = self._compiled(example, self.wrapped, self.attacked)
        self.batches = data.Batches(
            dataset.train,
            settings.batch_size,
            seed=settings.seed,
            augment=AUGMENTATIONS[config.data.augmentation](dataset.spec),
            device=device,
            views=views,
            rank=rank,
            world_size=world_size,
        )
        self.head = dummy_head(self.model)
        self.awp_start = epoch_of(settings.awp_start_epoch, settings.epochs)
        self.averaging_start = epoch_of(settings.averaging_start_epoch, settings.epochs)
        self.average: WeightAverage | None = None
        if settings.averaging != "off":
            self.average = WeightAverage(self.model, settings.averaging_decay if settings.averaging == "ema" else None)
        self.position, self.resumed = _Position(), False
        self.received: list[int] = []
        self.meter = Meter(device)
        self.saved_at = time.monotonic()

    @property
    def deployed(self) -> nn.Module:
        """The weights that are validated, and saved to be used: the average, once it has begun."""
        return self.average.module if self.average is not None and self.average.updates else self.model

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
                        "precision": str(self.precision).removeprefix("torch."),
                        "device": str(self.accelerator.device),
                        "processes": self.accelerator.num_processes,
                        "data": {
                            "name": self.config.data.name,
                            "title": self.dataset.spec.title,
                            "fingerprint": self.dataset.fingerprint,
                            "train": len(self.dataset.train),
                            "validation": len(self.dataset.validation),
                            "test": len(self.dataset.test),
                        },
                        **manifest,
                    }
                )
                if self.config.data.samples is not None:
                    folder.write_ids(self.dataset.train.ids.tolist())
                folder.save("last", tensors, state)
        self.accelerator.wait_for_everyone()

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint.part("raw" if state["averaged"] else "model", tensors))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.part("model", tensors))
            self.average.updates.fill_(state["averaged"])
        checkpoint.join_optimizer(self.optimizer.optimizer, checkpoint.part("optimizer", tensors), state["optimizer"])
        self.position, self.resumed = _Position(**state["position"]), True
        rank = self.accelerator.process_index
        if rank < len(state["random"]):
            checkpoint.set_random_state(checkpoint.part(f"random.{rank}", tensors), state["random"][rank])
        self.meter = Meter(self.accelerator.device, earlier=state["spent"])

    def run(self) -> RunFolder:
        main, settings = self.accelerator.is_main_process, self.config.train
        tracker: tracking.Tracker | None = None
        status = "failed"
        with self.folder.locked() if main else contextlib.nullcontext():
            try:
                if main:
                    self.folder.clean(from_epoch=self.position.epoch)
                    if self.resumed:
                        self.folder.note_resumption(self.position.epoch, self.position.step, _now())
                    tracker = tracking.Tracker.start(
                        settings.tracker, self.folder.path, self.config.flat(), self.position.epoch
                    )
                with _signals(launched=self.accelerator.num_processes > 1) as self.received:
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

    def _close(self, status: str) -> None:
        try:
            self.folder.update_manifest({"status": status, "ended": _now(), **self.meter.read()})
        except OSError:
            # A full disk has stopped the run already: that error is the one to report.
            if status != "failed":
                raise

    def _epoch(self, tracker: tracking.Tracker | None) -> None:
        at, settings = self.position, self.config.train
        objective = self.config.objective(at.epoch)
        earlier, began = at.seconds, time.perf_counter()
        pending: list[torch.Tensor] = []
        self.model.train()
        for x, y in self._batches(at.epoch, at.step):
            self._set_learning_rate(at.epoch + (at.step + 0.5) / len(self.batches))
            adversarial = self._attack(objective, x, y, "attack", at.epoch, at.step)
            outer = partial(self._loss, objective, x=x, adversarial=adversarial, y=y)
            with self._perturbation(at.epoch, partial(outer, self.model)):
                loss = outer(self.wrapped)
                self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if objective.reading == "real" and self.head is not None:
                # Until the switch the dummy half follows the real one, so that what is saved deploys the base method.
                self.head.copy_real_rows()
            if self.average is not None and settings.averaging == "ema" and at.epoch >= self.averaging_start:
                self.average.update(self.model)
            pending.append(loss.detach())
            at.step += 1
            done = at.step == len(self.batches)
            if done and self.average is not None and settings.averaging == "swa" and at.epoch >= self.averaging_start:
                # Part of the last step, so that a checkpoint after it says whether it has been done.
                self.average.update(self.model)
                with self._autocast():
                    update_batch_norm(self.average.module, self._forwarded(objective))
            at.seconds = earlier + time.perf_counter() - began
            self.listener.step(at.epoch * len(self.batches) + at.step, settings.epochs * len(self.batches))
            alone = self.accelerator.num_processes == 1
            if len(pending) == CHECK_EVERY or done or (alone and (self.received or self._save_is_due())):
                self._take(pending)
                self.meter.sample()
                if self._agreed(bool(self.received)):
                    self._stop()
                if not done and self._agreed(self._save_is_due()):
                    self._save("last")
        self._finish_epoch(tracker)

    def _agreed(self, flag: bool) -> bool:
        """Return whether any process says so; all have to ask at the same point."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def _save_is_due(self) -> bool:
        minutes = self.config.train.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def _stop(self, *_: object) -> None:
        """Save, and leave by the signal that asked for it."""
        self._save("last")
        # Another process may have had the signal.
        raise Interrupted(self.received[0] if self.received else signal.SIGTERM, self.folder)

    def _batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch in the form that networks take, the views of a batch one after the other."""
        layout = torch.channels_last if self.precision is torch.bfloat16 else torch.contiguous_format
        for x, y in self.batches.epoch(epoch, start_step=start_step):
            images = x.reshape(-1, *x.shape[-3:]).to(memory_format=layout)
            yield images, y.repeat(self.batches.views)

    def _compiled(self, example: Tensor, *networks: nn.Module) -> Sequence[nn.Module]:
        """Return the networks compiled, or as they are with a notice where the compiler fails on a forward pass."""
        compiled: list[Any] = [torch.compile(network) for network in networks]
        try:
            for network in compiled:
                with attackable(network), torch.no_grad(), self._autocast():
                    network(example)
        # No C compiler, an operation that it does not know: whatever it is, training can do without.
        except Exception as error:
            self.listener.warning(f"torch.compile does not work here ({type(error).__name__}): training without it")
            return networks
        return compiled

    def _autocast(self) -> torch.autocast:
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision is torch.bfloat16)

    def _attack(self, objective: methods.Objective, x: Tensor, y: Tensor, *key: int | str) -> Tensor:
        # The 0 is what one process has always drawn with: the runs of earlier versions can be made again.
        noise = generator(self.config.train.seed, *key, 0)
        if self.folded is not None and objective.method.objective is not None:
            self.folded.refresh()
        with self._autocast(), self.draws:
            return objective.attack(self.attacked, x, y, self.threat, noise)

    def _loss(
        self, objective: methods.Objective, model: nn.Module, *, x: Tensor, adversarial: Tensor, y: Tensor
    ) -> Tensor:
        with self._autocast():
            return objective.loss(model, x, adversarial, y)

    def _perturbation(self, epoch: int, loss: Callable[[], Tensor]) -> contextlib.AbstractContextManager[None]:
        gamma = self.config.train.awp
        if gamma and epoch >= self.awp_start:
            return perturbed_weights(self.model, loss, gamma, self._mean)
        return contextlib.nullcontext()

    def _mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes: of a mean over local rows, the mean over the global batch."""
        return self.accelerator.reduce(values, "mean")

    def _forwarded(self, objective: methods.Objective) -> Iterator[Tensor]:
        """Yield images as this epoch's steps forwarded them, for the batch-norm statistics of averaged weights."""
        epoch = self.position.epoch
        for step, (x, y) in enumerate(islice(self._batches(epoch), BATCH_NORM_BATCHES)):
            adversarial = self._attack(objective, x, y, "batch-norm", epoch, step)
            yield objective.forwarded(x, adversarial)

    def _take(self, pending: list[torch.Tensor]) -> None:
        """Move losses from the device to the record, and stop at the first that is not finite."""
        at = self.position
        values = self._mean(torch.stack(pending)).tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                last = self.folder.checkpoint_path("last")
                kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
                step = at.step - len(values) + offset
                raise FloatingPointError(f"the loss is {value} at epoch {at.epoch}, step {step}; {kept}")
        at.losses.extend(values)
        pending.clear()

    def _finish_epoch(self, tracker: tracking.Tracker | None) -> None:
        at, settings = self.position, self.config.train
        row: dict[str, Any] = {
            "epoch": at.epoch,
            "dummy_classes": self.config.dummy.kind if at.epoch >= self.config.start_epoch else "off",
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": sum(at.losses) / max(1, len(at.losses)),
            "seconds": round(at.seconds, 3),
            "images_per_s": round(at.step * settings.batch_size / at.seconds, 1) if at.seconds else None,
        }
        improved = False
        if (at.epoch + 1) % settings.validate_every == 0 or at.epoch + 1 == settings.epochs:
            row.update(self._validate())
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
        self._save("last")
        if settings.keep:
            self._save(f"epoch-{at.epoch}")
            if self.accelerator.is_main_process:
                self.folder.drop_checkpoints(keep=settings.keep)
        self.listener.epoch(row)

    def _validate(self) -> dict[str, float]:
        """Measure the deployed network on the validation split, of which each process attacks its share."""
        split, processes = self.dataset.validation, self.accelerator.num_processes
        mine = split.select(torch.arange(self.accelerator.process_index, len(split), processes))
        mine = mine.to(self.accelerator.device)
        # As many chunks in every process, since all agree on stopping before each.
        share = -(-len(split) // processes)
        chunk = -(-share // -(-share // VALIDATION_CHUNK))
        single_step = methods.ATTACKS[self.config.method.attack].single_step
        measured = evaluate(
            self.deployed,
            mine.floats(),
            mine.labels,
            self.threat,
            "single-step" if single_step else "quick",
            num_classes=len(self.dataset.classes),
            seed=self.config.train.seed,
            batch_size=chunk,
            progress=lambda attack: self._stop() if self._agreed(bool(self.received)) else None,
        )
        standing = {"clean": measured.clean, "blind": measured.blind, "robust": measured.robust}
        if single_step:
            attacks = {attack.name: attack.correct for attack in measured.attacks}
            standing.update(fgsm=attacks["fgsm-recovered"], pgd=attacks["pgd-10-recovered"])
        counts = torch.stack([flags.sum() for flags in standing.values()]).to(self.accelerator.device)
        everyones = self.accelerator.reduce(counts, "sum").tolist()
        return {name: count / len(split) for name, count in zip(standing, everyones, strict=True)}

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

    def _set_learning_rate(self, epoch: float) -> None:
        settings = self.config.train
        factor = learning_rate(
            settings.schedule,
            epoch,
            settings.epochs,
            milestones=settings.milestones,
            warm_up=settings.warmup_epochs,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the rest of the run depends on: tensors by name, and the rest for JSON."""
        from accelerate.utils import gather_object

        moments, rest = checkpoint.split_optimizer(self.optimizer.optimizer)
        everyones = gather_object([checkpoint.random_state()])
        # "model" is always what is deployed; where that is an average, "raw" is what training goes on from.
        tensors = {
            **checkpoint.named("model", self.deployed.state_dict()),
            **checkpoint.named("optimizer", moments),
        }
        for rank, (generators, _) in enumerate(everyones):
            tensors.update(checkpoint.named(f"random.{rank}", generators))
        if self.deployed is not self.model:
            tensors.update(checkpoint.named("raw", self.model.state_dict()))
        return tensors, {
            "model": asdict(self.architecture),
            "position": asdict(self.position),
            "optimizer": rest,
            "averaged": int(self.average.updates) if self.average is not None else 0,
            "random": [others for _, others in everyones],
            "spent": self.meter.read(),
        }

    def _save(self, which: str) -> None:
        tensors, state = self._state()
        if self.accelerator.is_main_process:
            try:
                self.folder.save(which, tensors, state)
            except OSError as error:
                resume = f"ducat train --resume {self.folder.path}"
                raise OSError(error.errno, f"{error.strerror}; the checkpoint before it is whole: {resume}") from error
        self.saved_at = time.monotonic()


def catastrophic_overfitting(history: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether training with a single-step attack has collapsed by the last of these lines of metrics.jsonl.

    It has where PGD accuracy is below half of its best, and by no less than `COLLAPSE`, while FGSM accuracy is higher
    than it was then: the network resists the single step by bending the loss around it, and nothing else (Wong et al.
    2020, arXiv 2001.03994). Both accuracies are of the deployed classifier, under attacks that know recovery.

    Args:
        history: lines in order; those without "fgsm" and "pgd", shares in [0, 1], are skipped.
    """
    measured = [row for row in history if "pgd" in row]
    if not measured:
        return False
    last, best = measured[-1], max(measured, key=lambda row: row["pgd"])
    fallen = last["pgd"] < best["pgd"] / 2 and best["pgd"] - last["pgd"] >= COLLAPSE
    return fallen and last["fgsm"] > best["fgsm"]


def _precision(settings: TrainConfig, device: torch.device) -> torch.dtype:
    if settings.precision != "auto":
        return {"float32": torch.float32, "bf16": torch.bfloat16}[settings.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@contextlib.contextmanager
def _signals(launched: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying in the middle of a step; a second one acts at once.

    Of several processes, each may get one signal twice, from the cluster and from the launcher that passes it on. So
    there a second one within `ECHO` seconds counts as the first.
    """
    received: list[int] = []
    first: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: FrameType | None) -> None:
        if not received:
            received.append(signum)
            first.append(time.monotonic())
            if not launched:
                restore()
        elif time.monotonic() - first[0] > ECHO:
            restore()
            signal.raise_signal(signum)

    for signum in handlers:
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        restore()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
