"""What several processes that train one network share, so that they do what one process does on the whole batch.

DistributedDataParallel averages the gradients of the outer loss. The rest is here: batch norm takes its statistics over
the global batch, and random draws are made for the global batch. An attack runs on a process's own rows, and nothing is
exchanged inside it: in evaluation mode batch norm reads the running statistics, which are the same everywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ducat.runs import RunFolder

PIXELS = (0, 2, 3)  # all dimensions of activations but the channels


@contextmanager
def lost_processes_named(run: RunFolder) -> Iterator[None]:
    """Say in one line that another process has gone, instead of where an exchange with it failed.

    Args:
        run: what they train.

    Raises:
        OSError: an exchange with another process failed.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception of its own.
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise OSError(
            "another process of this training has ended or cannot be reached: its own message says why; go on with the "
            f"same launcher and: ducat train --resume {run.quoted}"
        ) from error


class LocalRows(TorchFunctionMode):
    """Within this context `torch.rand` and `torch.randn` draw for the global batch and return this process's rows.

    So an attack that knows nothing of processes starts each image where it would start in one process, and gives the
    numbers of one process whatever the number of processes. A tensor's first dimension counts rows: `views` times the
    local batch, all first views, then all second ones.

    Args:
        rank: this process's number, in [0, world_size).
        world_size: how many processes share the global batch, each as many rows.
        views: augmentations of each image.
    """

    def __init__(self, rank: int, world_size: int, views: int = 1) -> None:
        super().__init__()
        self.rank, self.world_size, self.views = rank, world_size, views

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in (torch.rand, torch.randn) or not args:
            return func(*args, **(kwargs or {}))
        shape = args if isinstance(args[0], int) else args[0]
        rows = shape[0] // self.views
        everyones = func((self.views, self.world_size * rows, *shape[1:]), **(kwargs or {}))
        return everyones[:, self.rank * rows : (self.rank + 1) * rows].reshape(shape)


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers, by name, that take statistics over this process's rows alone."""
    kinds = (SynchronizedBatchNorm2d, nn.SyncBatchNorm)
    named = model.named_modules()
    return [
        (name, module) for name, module in named if isinstance(module, _BatchNorm) and not isinstance(module, kinds)
    ]


def synchronize_batch_norm(model: nn.Module) -> None:
    """Let every `BatchNorm2d` of a model, in place, take its statistics in training over all processes' batches.

    One without weights (`affine=False`), a subclass, and those of other dimensions are left as they are: `batch_norms`
    returns them. Weights, buffers and their names stay. Every process must hold as many rows, and forward as often.
    PyTorch's own `SyncBatchNorm` does the same on GPUs alone; this one runs wherever the processes can exchange
    tensors.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine:
            # It has the same attributes, and stays the object that others may hold.
            module.__class__ = SynchronizedBatchNorm2d


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the global batch; in evaluation mode it is `BatchNorm2d`."""

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        if not self.training:
            return super().forward(x)
        normalized, mean, variance = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._follow(mean, variance, dist.get_world_size() * x.numel() // x.shape[1])
        return normalized

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # Without a momentum PyTorch means the plain mean of all batches.
        weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / max(1, count - 1), weight)


class _Normalize(torch.autograd.Function):
    """Batch norm in training mode (Ioffe and Szegedy 2015, arXiv 1502.03167), one exchange forward and one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        local = torch.stack(torch.var_mean(x.float(), PIXELS, correction=0))
        everyones = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, local)
        variances, means = torch.stack(everyones, dim=1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale = ctx.saved_tensors
        gradient = gradients[0].float()
        centred = (x.float() - _per_channel(mean)) * _per_channel(scale)
        # DistributedDataParallel averages these two, as the gradients of any parameter.
        for_bias, for_weight = gradient.sum(PIXELS), (gradient * centred).sum(PIXELS)
        everyones = torch.stack([for_bias, for_weight])
        dist.all_reduce(everyones)
        shift, tilt = everyones / (dist.get_world_size() * x.numel() // x.shape[1])
        for_x = _per_channel(weight * scale) * (gradient - _per_channel(shift) - centred * _per_channel(tilt))
        return for_x.to(x.dtype), for_weight, for_bias, None


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]
