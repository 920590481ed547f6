"""Averages of the weights over training, and training at adversarially perturbed weights.

Both work on any method: neither looks at how the loss is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

__all__ = ["WeightAverage", "perturbed_weights", "update_batch_norm"]


class WeightAverage(AveragedModel):
    """An average of the models that training passes through, kept beside the model that is trained.

    With a decay it is an exponential moving average, the n-th update (n = 0, 1, ...) weighing `1 - d_n` with
    `d_n = min(decay, (1 + n) / (10 + n))`, so that a young average follows the model instead of its initialisation.
    Without one it is stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407): the plain mean of all
    updates. Either way the first update replaces what the average held.

    Batch-norm statistics are averaged like weights, which suits an exponential average of nearby models. After
    stochastic weight averaging, estimate them anew with `update_batch_norm`. Integer buffers are copied.

    `module` is the averaged model, in eval mode and without parameter gradients; evaluate and save it as any model.
    `n_averaged` is the number of updates. `state_dict()` holds both, all tensors, and resumes the average bit by bit.

    Args:
        model: the model to follow, not wrapped for distributed training; it is copied, not kept.
        decay: weight of the past in the exponential average, in [0, 1); None for stochastic weight averaging.

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float | int | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is outside [0, 1): give for example 0.999, or none for a plain mean")
        super().__init__(model, avg_fn=self._blended, use_buffers=True)
        self.decay = decay
        self.module.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the present weights and buffers of `model`, the model under training, into the average.

        Raises:
            ValueError: the tensors of `model` are not those of the averaged model, for example because only one of
                the two has dummy classes.
        """
        averaged = [*self.module.parameters(), *self.module.buffers()]
        current = [*model.parameters(), *model.buffers()]
        if [tensor.shape for tensor in averaged] != [tensor.shape for tensor in current]:
            raise ValueError("the model no longer has the shape of its weight average: change both, or start a new one")
        self.update_parameters(model)

    def _blended(self, average: Tensor, current: Tensor, _: Tensor | int) -> Tensor:
        if not average.is_floating_point():
            return current
        # The count that comes as an argument may be on a GPU, where reading it makes the step wait.
        count = int(self.n_averaged)
        weight = 1 / (count + 1) if self.decay is None else 1 - min(self.decay, (1 + count) / (10 + count))
        return average.lerp(current, weight)


@torch.no_grad()
def update_batch_norm(model: nn.Module, batches: Iterable[Float[Tensor, "batch channels height width"]]) -> None:
    """Replace the running statistics of every batch-norm layer by their mean over `batches`.

    A model with averaged weights has activations that no trained model had, so its statistics must be measured
    (Izmailov et al. 2018, arXiv 1803.05407, section 3.2). Only batch-norm layers run in train mode meanwhile.

    Args:
        model: the model to change.
        batches: images in [0, 1], drawn as the training images were: attacked ones too, if training forwarded them.

    Raises:
        ValueError: there are no batches.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    batch_count = 0
    model.eval()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's way to ask for the plain mean of all batches
            layer.train()
        for images in batches:
            model(images)
            batch_count += 1
    finally:
        for layer in layers:
            layer.momentum = momenta[layer]
        for module, training in modes.items():
            module.training = training
    if layers and batch_count == 0:
        raise ValueError("there are no batches to estimate batch-norm statistics from: pass at least one")


@contextmanager
def perturbed_weights(
    model: nn.Module,
    loss: Callable[[], Float[Tensor, ""]],
    gamma: float | int = 5e-3,
    reduce: Callable[[Tensor], Tensor] | None = None,
    rows: Mapping[nn.Parameter, int] | None = None,
) -> Iterator[None]:
    """Within the context the weights are where, nearby, the loss is worse: adversarial weight perturbation (AWP).

    One ascent step on the loss, `w + gamma * |w| * g / |g|` for each weight w with gradient g and Frobenius norms |.|
    (Wu, Xia and Wang 2020, arXiv 2004.05884, equations 8 to 10). Biases and batch-norm parameters stay. On leaving,
    the weights are restored bit by bit, also after an error; the gradients made inside stay, so step the optimiser
    after the context. Batch-norm statistics, `.grad` and the modes of the modules are as they were when the body
    starts, so a training step updates the statistics once.

    Args:
        model: the model under training.
        loss: returns the mean loss of the present batch, attacked before, and calls `model` to do so.
        gamma: size of the perturbation relative to each weight's norm, positive; the paper uses 5e-3 to 1e-2.
        reduce: makes of a process's gradient that of all processes, where several train the model.
        rows: of weights of which the loss reads the first rows alone, how many; |w| is then the norm of those.

    Raises:
        ValueError: `gamma` is not positive.

    Example:
        >>> with perturbed_weights(model, loss, gamma=5e-3):
        ...     loss().backward()
        >>> optimizer.step()
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma} is not positive: give the relative size of the perturbation, such as 5e-3")
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    rows = {} if rows is None else rows
    with torch.enable_grad(), _batch_norm_statistics_kept(model):
        gradients = torch.autograd.grad(loss(), weights, materialize_grads=True)
        if reduce is not None:
            gradients = tuple(map(reduce, gradients))
    originals = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                # The floor leaves a weight alone whose gradient vanishes.
                scale = gamma * weight[: rows.get(weight)].norm() / gradient.norm().clamp_min(1e-20)
                weight.addcmul_(gradient, scale)
        # Autocast keeps low-precision copies of weights by identity, so it would go on with the old values.
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
        torch.clear_autocast_cache()


@contextmanager
def _batch_norm_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm in train mode normalises by the batch as always, but leaves its running statistics alone."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
