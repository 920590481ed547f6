"""The one training loop: the config says what each epoch minimises, accelerate on which processes and devices.

Everything random is a function of the seed, the epoch and the step, so a run continues from any step as if it had never
stopped.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ducat import checkpoint, data, methods
from ducat.config import Config, TrainConfig
from ducat.dummy import dummy_head
from ducat.evaluate import evaluate
from ducat.models.architecture import Architecture
from ducat.runs import RunFolder, environment
from ducat.schedules import learning_rate
from ducat.seeding import generator

if TYPE_CHECKING:
    pass

CHECK_EVERY = 20  # steps between looks at the loss: each look makes a GPU wait


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after a whole step; `signum` is the signal, the run can be resumed."""

    def __init__(self, signum: int, folder: RunFolder) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; continue with: ducat train --resume {folder.path}")
        self.signum = signum


class Listener(Protocol):
    """What wants to know of a run's progress."""

    def step(self, done: int, total: int) -> None:
        """Note that `done` of `total` steps are done."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Note an epoch's line of metrics.jsonl."""


class _Silent:
    def step(self, done: int, total: int) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...


@dataclass
class _Position:
    """Where a run stands: the next step to do, the losses of its epoch so far, and the best validation so far."""

    epoch: int = 0
    step: int = 0
    losses: list[float] = None  # type: ignore[assignment]
    best: float = -1.0

    def __post_init__(self) -> None:
        self.losses = list(self.losses or [])


def train(config: Config, root: Path = Path("runs"), listener: Listener | None = None) -> RunFolder:
    """Train a network and leave a run folder.

    Args:
        config: the settings.
        root: the folder that the run folder is made in.
        listener: told of each step and epoch.

    Raises:
        FileExistsError: if there is a run of that name; nothing is overwritten.
        ValueError: if a setting does not fit the data.
        FloatingPointError: if the loss stops being finite; the last checkpoint is from before.
        Interrupted: if SIGINT or SIGTERM came; the run has been saved and can be resumed.
    """
    dataset = data.load(config.data.name, samples=config.data.samples, root=config.data.root)
    config = config.resolve(dataset.spec)
    assert config.name is not None
    loop = _Loop(config, dataset, root / config.name, listener or _Silent())
    loop.create()
    return loop.run()


def resume(path: Path, listener: Listener | None = None) -> RunFolder:
    """Continue a run from its last checkpoint; raises as `train` does, and ValueError if the data have changed."""
    folder = RunFolder.open(path)
    config = folder.config
    dataset = data.load(config.data.name, samples=config.data.samples, root=config.data.root)
    if dataset.fingerprint != folder.manifest["data"]["fingerprint"]:
        raise ValueError(f"the data {config.data.name} are not those that {path} was trained on")
    loop = _Loop(config, dataset, path, listener or _Silent())
    loop.restore()
    return loop.run()


class _Loop:
    """A run in memory."""

    def __init__(self, config: Config, dataset: data.Dataset, path: Path, listener: Listener) -> None:
        from accelerate import Accelerator

        self.config, self.dataset, self.listener = config, dataset, listener
        settings = config.train
        self.folder = RunFolder(path)
        self.threat = config.threat.build(dataset.spec)
        self.accelerator: Accelerator = Accelerator(cpu=settings.device == "cpu")
        device = self.accelerator.device
        if settings.device == "cuda" and device.type != "cuda":
            raise ValueError("train.device=cuda: PyTorch finds no GPU here; choose cpu or auto")
        self.precision = _precision(settings, device)
        spec = dataset.spec
        assert config.model.name is not None
        self.architecture = Architecture(
            name=config.model.name,
            num_classes=len(dataset.classes),
            dummy_classes=config.dummy.kind != "off",
            channels=spec.shape[0],
            mean=spec.mean,
            std=spec.std,
            width=config.model.width,
            stem_stride=2 if spec.shape[1] >= 64 else 1,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = self.architecture.build()
        # float32 convolutions on a CPU are no faster in channels_last, bf16 ones are.
        layout = torch.channels_last if self.precision is torch.bfloat16 else torch.contiguous_format
        self.model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.batches = data.Batches(
            dataset.train,
            settings.batch_size,
            seed=settings.seed,
            augment=data.Augmentation(spec.crop_padding, spec.flip),
            device=device,
            views=methods.find(config.method.name).views,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.position = _Position()

    def create(self) -> None:
        if self.accelerator.is_main_process:
            RunFolder.create(self.folder.path)
            self.folder.write_config(self.config)
            self.folder.update_manifest(
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
                }
            )
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        tensors, state = checkpoint.read(self.folder.checkpoint_path("last"))
        self.model.load_state_dict(checkpoint.part("model", tensors))
        checkpoint.join_optimizer(self.optimizer.optimizer, checkpoint.part("optimizer", tensors), state["optimizer"])
        self.position = _Position(**state["position"])
        if self.accelerator.is_main_process:
            self.folder.drop_metrics(from_epoch=self.position.epoch)

    def run(self) -> RunFolder:
        began, status = time.perf_counter(), "failed"
        try:
            with _signals() as received:
                while self.position.epoch < self.config.train.epochs:
                    self._epoch(received)
            status = "finished"
        except Interrupted:
            status = "interrupted"
            raise
        finally:
            if self.accelerator.is_main_process:
                seconds = round(time.perf_counter() - began + self.folder.manifest.get("seconds", 0), 1)
                self.folder.update_manifest({"status": status, "ended": _now(), "seconds": seconds})
        return self.folder

    def _epoch(self, received: list[int]) -> None:
        at, settings = self.position, self.config.train
        objective = self.config.objective(at.epoch)
        began, first = time.perf_counter(), at.step
        pending: list[torch.Tensor] = []
        self.model.train()
        for x, y in self.batches.epoch(at.epoch, start_step=at.step):
            x, y = x.reshape(-1, *x.shape[-3:]), y.repeat(self.batches.views)
            self._set_learning_rate(at.epoch + (at.step + 0.5) / len(self.batches))
            if self.precision is torch.bfloat16:
                x = x.to(memory_format=torch.channels_last)
            noise = generator(settings.seed, "attack", at.epoch, at.step, self.accelerator.process_index)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision is torch.bfloat16):
                adversarial = objective.attack(self.model, x, y, self.threat, noise)
                loss = objective.loss(self.wrapped, x, adversarial, y)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            pending.append(loss.detach())
            at.step += 1
            if len(pending) == CHECK_EVERY or at.step == len(self.batches) or received:
                self._take(pending)
            self.listener.step(at.epoch * len(self.batches) + at.step, settings.epochs * len(self.batches))
            if received:
                self._save("last")
                raise Interrupted(received[0], self.folder)
        self._finish_epoch(objective.reading, time.perf_counter() - began, at.step - first)

    def _take(self, pending: list[torch.Tensor]) -> None:
        """Move losses from the device to the record, and stop at the first that is not finite."""
        at = self.position
        values = torch.stack(pending).tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                last = self.folder.checkpoint_path("last")
                kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
                step = at.step - len(values) + offset
                raise FloatingPointError(f"the loss is {value} at epoch {at.epoch}, step {step}; {kept}")
        at.losses.extend(values)
        pending.clear()

    def _finish_epoch(self, reading: str, seconds: float, steps: int) -> None:
        at, settings = self.position, self.config.train
        head = dummy_head(self.model)
        if reading == "real" and head is not None:
            # Until the switch the dummy half follows the real one, so that every checkpoint deploys the base method.
            head.copy_real_rows()
        row: dict[str, Any] = {
            "epoch": at.epoch,
            "dummy_classes": self.config.dummy.kind if at.epoch >= self.config.start_epoch else "off",
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": sum(at.losses) / max(1, len(at.losses)),
            "seconds": round(seconds, 3),
            "images_per_s": round(steps * settings.batch_size / seconds, 1) if seconds else None,
        }
        improved = False
        if (at.epoch + 1) % settings.validate_every == 0 or at.epoch + 1 == settings.epochs:
            row.update(self._validate())
            settled = self.config.dummy.kind == "off" or at.epoch >= self.config.start_epoch
            improved = settled and row["robust"] > at.best
            if improved:
                at.best = row["robust"]
        at.epoch, at.step, at.losses = at.epoch + 1, 0, []
        if improved:
            self._save("best")
        if self.accelerator.is_main_process:
            self.folder.append_metrics(row)
        self._save("last")
        self.listener.epoch(row)

    def _validate(self) -> dict[str, float]:
        split = self.dataset.validation.to(self.accelerator.device)
        measured = evaluate(
            self.model,
            split.floats(),
            split.labels,
            self.threat,
            "quick",
            num_classes=len(self.dataset.classes),
            seed=self.config.train.seed,
        )
        return {
            "clean": float(measured.clean.float().mean()),
            "blind": float(measured.blind.float().mean()),
            "robust": float(measured.robust.float().mean()),
        }

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

    def _save(self, which: str) -> None:
        if not self.accelerator.is_main_process:
            return
        path = self.folder.path / "checkpoints" / which / "checkpoint.safetensors"
        path.parent.mkdir(exist_ok=True)
        moments, rest = checkpoint.split_optimizer(self.optimizer.optimizer)
        tensors = {
            **checkpoint.named("model", self.model.state_dict()),
            **checkpoint.named("optimizer", moments),
        }
        state = {"model": asdict(self.architecture), "position": asdict(self.position), "optimizer": rest}
        checkpoint.save(path, tensors, state)


def _precision(settings: TrainConfig, device: torch.device) -> torch.dtype:
    if settings.precision != "auto":
        return {"float32": torch.float32, "bf16": torch.bfloat16}[settings.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying in the middle of a step; a second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore()

    for signum in handlers:
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        restore()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
