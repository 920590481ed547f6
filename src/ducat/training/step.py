"""One training step: attack, loss, gradient, optimiser, and averages of the weights; what benchmarks time is this."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ducat import methods, threads
from ducat.attacks.pgd import attackable
from ducat.config import Config, TrainConfig
from ducat.dummy import dummy_heads
from ducat.models.folded import fold_batch_norm
from ducat.schedules import epoch_of, learning_rate
from ducat.seeding import generator
from ducat.threat import ThreatModel
from ducat.training.averaging import WeightAverage, perturbed_weights, update_batch_norm
from ducat.training.parallel import LocalRows, batch_norms, synchronize_batch_norm

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]


class Step:
    """Everything that a training step works with; calling it does a step.

    Args:
        config: the settings, resolved.
        model: maps images in [0, 1] to logits; it is moved to the device, and trained.
        example: a few images in [0, 1], to compare the folded copy with the network on.
        objective: what the epoch of that number, counted from 0, minimises; the config's by default.
        notice: called with what the user must know of.
        layout: memory format of images and weights; by default the faster one for the precision.
        fold: whether the attack runs on a copy with batch norm folded into the convolutions, where the network has any.
        compile_mode: the `mode` of torch.compile, where the settings ask for it.

    Attributes:
        model: the network under training.
        average: the average of its weights, if the settings ask for one.
        optimizer: as accelerate prepared it.
        scaler: of the loss, for fp16; it does nothing otherwise.
        accelerator: the device, and the processes that train together.
        threat: ball and steps of the attack, and of the validation.
        trained_on: the same for the step that was done last, where eps grows.

    Raises:
        ValueError: if the settings ask for a GPU and there is none.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        example: Batch,
        *,
        objective: Callable[[int], methods.Objective] | None = None,
        notice: Callable[[str], None] = lambda text: None,
        layout: torch.memory_format | None = None,
        fold: bool = True,
        compile_mode: str | None = None,
    ) -> None:
        self.config, self.model = config, model
        self.objective = config.objective if objective is None else objective
        self.threat = self.trained_on = config.threat.build(None)
        settings = config.train
        self.accelerator = _accelerator(settings.device)
        device = self.accelerator.device
        if settings.device == "cuda" and device.type != "cuda":
            raise ValueError("train.device=cuda: PyTorch finds no GPU here; choose cpu or auto")
        self.precision = _precision(settings, device)
        # float32 convolutions on a CPU are no faster in channels_last, bf16 ones are.
        faster = torch.contiguous_format if self.precision is torch.float32 else torch.channels_last
        self.layout = faster if layout is None else layout
        self.model.to(device=device, memory_format=self.layout)  # type: ignore[call-overload]
        example = example.to(device)
        attacked = self.objective(0).method.objective is not None
        _check_gradient(self.model, example.to(memory_format=self.layout), attacked)
        optimizer = _optimizer(settings, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.folded = fold_batch_norm(self.model, example) if fold else None
        self.views = self.objective(0).method.views
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        if world_size > 1:
            synchronize_batch_norm(self.model)  # after folding, which compares outputs that need no other process
            if apart := batch_norms(self.model):
                name, layer = apart[0]
                notice(
                    f"{name}, a {type(layer).__name__}, takes batch statistics over each process's own images, as do "
                    f"{len(apart) - 1} other layers: several processes train another network than one does"
                )
        parts = settings.accumulate
        if settings.batch_size % (parts * world_size):
            raise ValueError(
                f"train.batch_size={settings.batch_size} cannot be divided among {world_size} processes and "
                f"train.accumulate={parts} parts"
            )
        self.draws: list[contextlib.AbstractContextManager[Any]] = [
            LocalRows(rank * parts + part, world_size * parts, self.views)
            if world_size * parts > 1
            else contextlib.nullcontext()
            for part in range(parts)
        ]
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.attacked: nn.Module = self.model if self.folded is None else self.folded
        if settings.compile:
            self.wrapped, self.attacked = self._compiled(example, compile_mode, notice)
        self.heads = dummy_heads(self.model)
        if not self.heads and self.objective(0).reading == "real":
            notice(
                "the network has dummy classes that ducat did not add, which do not follow the real ones until they "
                "come into use: recovered predictions are not the real classes' till then; give a network of as many "
                "outputs as classes"
            )
        self.awp_start = epoch_of(settings.awp_start_epoch, settings.epochs)
        self.averaging_start = epoch_of(settings.averaging_start_epoch, settings.epochs)
        self.average: WeightAverage | None = None
        if settings.averaging != "off":
            self.average = WeightAverage(self.model, settings.averaging_decay if settings.averaging == "ema" else None)

    @property
    def deployed(self) -> nn.Module:
        """The weights that are validated, and saved to be used: the average, once it has begun."""
        return self.average.module if self.average is not None and self.average.n_averaged else self.model

    def __call__(self, x: Batch, y: Labels, epoch: int, step: int, steps: int) -> Float[Tensor, ""]:
        """Do one step, and return its loss.

        Args:
            x: images in [0, 1], with several views all first views, then all second ones; in the layout `self.layout`.
            y: their labels.
            epoch: counted from 0.
            step: of the epoch, counted from 0.
            steps: of an epoch.
        """
        self.model.train()
        if self.config.train.compile and self.accelerator.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs returned can be overwritten
        objective = self.objective(epoch)
        self._set_learning_rate(epoch + (step + 0.5) / steps)
        self.trained_on = self._ramped(epoch + (step + 1) / steps)
        losses = []
        for part, (some, labels) in enumerate(self._parts(x, y)):
            adversarial = self.attack(some, labels, epoch, step, part=part)
            outer = partial(self._loss, objective, x=some, adversarial=adversarial, y=labels)
            with self._perturbation(objective, epoch, partial(outer, self.model)), self._exchange(part):
                loss = outer(self.wrapped)
                self.accelerator.backward(self.scaler.scale(loss / self.config.train.accumulate))
            losses.append(loss.detach())
        self._update()
        for head in self.heads if objective.reading == "real" else ():
            # Until the switch the dummy half follows the real one, so that what is saved deploys the base method.
            head.copy_real_rows(self.optimizer.optimizer)
        if self.average is not None and self.config.train.averaging == "ema" and epoch >= self.averaging_start:
            self.average.update(self.model)
        return torch.stack(losses).mean()

    def attack(self, x: Batch, y: Labels, epoch: int, step: int, purpose: str = "attack", part: int = 0) -> Batch:
        """Return the adversarial images of a step, a function of the seed, the purpose, the epoch and the step."""
        objective = self.objective(epoch)
        # The 0 is what one process has always drawn with: the runs of earlier versions can be made again.
        noise = generator(self.config.train.seed, purpose, epoch, step, 0)
        if part == 0 and self.folded is not None and objective.method.objective is not None:
            self.folded.refresh()
        with self._autocast(), self.draws[part]:
            return objective.attack(self.attacked, x, y, self.trained_on, noise)

    def _parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows of each part of a batch, all views of an image in the same part."""
        parts = self.config.train.accumulate
        if parts == 1:
            yield x, y
            return
        images, labels = (tensor.view(self.views, parts, -1, *tensor.shape[1:]) for tensor in (x, y))
        for part in range(parts):
            yield images[:, part].flatten(0, 1), labels[:, part].flatten(0, 1)

    def _exchange(self, part: int) -> contextlib.AbstractContextManager[Any]:
        """Let processes exchange gradients in a batch's last part alone."""
        last = part == self.config.train.accumulate - 1
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def _update(self) -> None:
        """Move the weights along the gradient, and forget it."""
        optimizer, clip = self.optimizer.optimizer, self.config.train.clip_norm
        if clip:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _ramped(self, epoch: float) -> ThreatModel:
        """Return the ball of the training attack at that time."""
        ramp = self.config.train.eps_ramp_epochs
        share = min(1.0, epoch / ramp) if ramp else 1.0
        if share == 1:
            return self.threat
        return replace(self.threat, eps=share * self.threat.eps, step_size=share * self.threat.step_size)

    def fails_on(self, image: Float[Tensor, "1 channels height width"]) -> bool:
        """Tell whether a step of that image alone fails, since a batch norm would have one value of a channel."""
        seen = image.repeat(self.views, 1, 1, 1)
        epochs = map(self.objective, range(self.config.train.epochs))
        rows = min(len(images) for objective in epochs for images in objective.passes(seen, seen))
        found: list[bool] = []

        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0].numel() == inputs[0].shape[1])

        hooks = [module.register_forward_pre_hook(look) for _, module in batch_norms(self.model)]
        try:
            with torch.random.fork_rng(devices=[]), attackable(self.model), torch.no_grad():
                self.model(image.repeat(rows, 1, 1, 1).to(self.accelerator.device))
        finally:
            for hook in hooks:
                hook.remove()
        return any(found)

    def end_epoch(self, batches: Iterable[tuple[Tensor, Tensor]], epoch: int) -> None:
        """Take the epoch's weights into their mean, where there is one, and measure its batch-norm statistics anew.

        Args:
            batches: images and labels of the epoch, as the steps had them, to measure the statistics on.
            epoch: counted from 0.
        """
        if self.average is not None and self.config.train.averaging == "swa" and epoch >= self.averaging_start:
            self.average.update(self.model)
            with self._autocast():
                update_batch_norm(self.average.module, self._forwarded(batches, epoch))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes: of a mean over local rows, the mean over the global batch."""
        return self.accelerator.reduce(values, "mean")

    def agreed(self, flag: bool) -> bool:
        """Return whether any process says so; all have to ask at the same point."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def _forwarded(self, batches: Iterable[tuple[Tensor, Tensor]], epoch: int) -> Iterator[Tensor]:
        """Yield images as this epoch's steps forwarded them."""
        for step, (x, y) in enumerate(batches):
            for part, (some, labels) in enumerate(self._parts(x, y)):
                adversarial = self.attack(some, labels, epoch, step, "batch-norm", part)
                yield from self.objective(epoch).passes(some, adversarial)

    def _compiled(self, example: Tensor, mode: str | None, notice: Callable[[str], None]) -> Sequence[nn.Module]:
        """Return the networks compiled, or as they are with a notice where the compiler fails on a forward pass."""
        networks = self.wrapped, self.attacked
        compiled: list[Any] = [torch.compile(network, mode=mode) for network in networks]
        try:
            for network in compiled:
                with attackable(network), torch.no_grad(), self._autocast():
                    network(example)
        # No C compiler, an operation that it does not know: whatever it is, training can do without.
        except Exception as error:
            notice(f"torch.compile does not work here ({type(error).__name__}): training without it")
            return networks
        return compiled

    def _autocast(self) -> torch.autocast:
        device = self.accelerator.device.type
        return torch.autocast(
            device,
            torch.float16 if self.precision is torch.float16 else torch.bfloat16,
            enabled=self.precision is not torch.float32,
        )

    def _loss(
        self, objective: methods.Objective, model: nn.Module, *, x: Tensor, adversarial: Tensor, y: Tensor
    ) -> Tensor:
        with self._autocast():
            return objective.loss(model, x, adversarial, y)

    def _perturbation(
        self, objective: methods.Objective, epoch: int, loss: Callable[[], Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        gamma = self.config.train.awp
        if not gamma or epoch < self.awp_start:
            return contextlib.nullcontext()
        unread = self.heads if objective.reading == "real" else ()
        rows = {weight: head.num_classes for head in unread for weight in head.rows()}
        return perturbed_weights(self.model, loss, gamma, self.mean, rows)

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


def _accelerator(device: str) -> "Accelerator":
    """Return the processes and their device, as the settings say: not as the launcher or an earlier run has."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

    cpu = device == "cpu" or threads.launched() or parse_flag_from_env("ACCELERATE_USE_CPU")
    before = {**PartialState._shared_state, **AcceleratorState._shared_state}
    if before and (before["_cpu"], before.get("_mixed_precision", "no")) != (cpu, "no"):
        AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the whole process
    once = GradientAccumulationPlugin(num_steps=1)
    return Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_plugin=once, dynamo_backend="no")


def _check_gradient(model: nn.Module, example: Tensor, attacked: bool) -> None:
    """Raise ValueError if no gradient reaches a network's weights or, where it is attacked, its images."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.random.fork_rng(devices=[]), attackable(model), torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        images = example.detach().clone().requires_grad_()
        outputs = model(images)
        wanted = [*weights, images]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if outputs.requires_grad:
            found = torch.autograd.grad(outputs.sum(), wanted, allow_unused=True)
    missing = "weights" if all(one is None for one in found[:-1]) else "images" if found[-1] is None else None
    if missing == "weights" or (missing == "images" and attacked):
        raise ValueError(
            f"the network's outputs have no gradient with respect to its {missing}: something in its forward pass "
            "detaches them, such as detach, torch.no_grad or argmax, or its weights do not require one"
        )


def _optimizer(settings: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    # Norms, biases and the like are vectors; to pull them to 0 is not what weight decay is for.
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    decays = ((matrices, settings.weight_decay), (vectors, 0.0))
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _precision(settings: TrainConfig, device: torch.device) -> torch.dtype:
    if settings.precision != "auto":
        return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
