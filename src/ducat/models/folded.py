"""A network as its attacker sees it: in evaluation mode, where batch norm is a scale that a convolution can absorb.

An attack step is a forward and a backward pass to the input. Folding takes every batch norm that follows a convolution
out of both, which the machine's matrix units would otherwise wait for.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Folded", "fold_batch_norm"]

TOLERANCE = 1e-3  # of a row's spread of logits: float32 in another order of summation stays far below


class Folded(nn.Module):
    """A frozen copy of a network with each batch norm folded into the convolution that feeds it.

    The copy is in evaluation mode, has no parameter gradients and works in channels_last, which CPUs are faster in. It
    computes what `model.eval()` computes, up to rounding. It does not follow the network by itself: call `refresh` when
    the network has changed.

    Args:
        model: the network; it is neither changed nor kept in another mode.
        pairs: names of convolutions and of the batch norms that take their outputs, as `fold_batch_norm` finds them.
    """

    def __init__(self, model: nn.Module, pairs: list[tuple[str, str]]) -> None:
        super().__init__()
        self.network = deepcopy(model).eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._source = [model]  # in a list, so that the network is no submodule
        self._pairs = pairs
        for convolution, norm in pairs:
            folded = self.network.get_submodule(convolution)
            assert isinstance(folded, nn.Conv2d)
            if folded.bias is None:
                folded.bias = nn.Parameter(folded.weight.new_zeros(folded.out_channels), requires_grad=False)
            parent, _, child = norm.rpartition(".")
            setattr(self.network.get_submodule(parent), child, nn.Identity())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> Folded:
        """Take over the network's present weights and statistics."""
        source, absorbed = self._source[0], {name for pair in self._pairs for name in pair}
        for name, module in source.named_modules():
            if name in absorbed:
                continue
            copies = self.network.get_submodule(name)
            for group in ("_parameters", "_buffers"):
                for key, tensor in getattr(module, group).items():
                    if tensor is not None:
                        getattr(copies, group)[key].copy_(tensor)
        for names in self._pairs:
            convolution, norm = (source.get_submodule(name) for name in names)
            folded = self.network.get_submodule(names[0])
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(folded, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = (norm.running_var + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight
            shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
            folded.weight.copy_(convolution.weight * scale.view(-1, 1, 1, 1))
            assert folded.bias is not None
            folded.bias.copy_(shift * scale if norm.bias is None else shift * scale + norm.bias)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def fold_batch_norm(model: nn.Module, x: Float[Tensor, "batch channels height width"]) -> Folded | None:
    """Return a folded copy of a network, or None where there is nothing to fold.

    Which batch norm takes the output of which convolution is seen in one forward pass, so it works for any network.
    What that pass cannot show, for example that a shortcut reads the convolution's output too, shows in the logits: a
    pair whose folding changes them is left as it is. Both are tried on a copy with random batch norms, because those of
    a new network are the identity and hide every mistake.

    A layer of a class derived from batch norm or convolution may compute anything, and is left. So is a network that
    cannot be copied, or that fails when its batch norms are gone: folding only saves time.

    Args:
        model: maps images to logits; it is left as it is.
        x: images to look with, at least one.
    """
    if not any(type(module) is nn.BatchNorm2d for module in model.modules()):
        return None
    try:
        return _folded(model, x)
    except Exception:  # other people's networks fail in any way there is
        return None


def _folded(model: nn.Module, x: Tensor) -> Folded | None:
    trial = deepcopy(model).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(torch.rand(tensor.shape, generator=random) * (high - low) + low)

    for module in trial.modules():
        if type(module) is nn.BatchNorm2d:
            draw(module.running_mean, -0.5, 0.5)
            draw(module.running_var, 0.5, 2.0)
            draw(module.weight, 0.5, 1.5)
            draw(module.bias, -0.5, 0.5)
    for parameter in trial.parameters():
        if not parameter.any():
            draw(parameter, -0.1, 0.1)  # zeros, such as those of a new head, would hide what is before them
    pairs, expected = _pairs(trial, x)
    if pairs and not _same(Folded(trial, pairs)(x), expected):
        pairs = [pair for pair in pairs if _same(Folded(trial, [pair])(x), expected)]
    return Folded(model, pairs) if pairs and _same(Folded(trial, pairs)(x), expected) else None


def _same(logits: Tensor, expected: Tensor) -> bool:
    """Tell whether logits agree, relative to each row's spread; classes that never fire are no part of it."""
    fires = expected > torch.finfo(expected.dtype).min / 4
    highest = expected.masked_fill(~fires, -torch.inf).amax(1)
    lowest = expected.masked_fill(~fires, torch.inf).amin(1)
    error = torch.where(fires, (logits - expected).abs(), (logits != expected).float()).amax(1)
    return bool((error <= TOLERANCE * (highest - lowest)).all())


def _pairs(model: nn.Module, x: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Return the names of convolutions and of the batch norms that take their outputs, and the logits."""
    names = {module: name for name, module in model.named_modules()}
    convolved: dict[int, tuple[nn.Module, Tensor]] = {}
    calls: list[nn.Module] = []
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(module)
        if isinstance(module, nn.Conv2d):
            convolved[id(output)] = module, output  # the tensor is kept, so that no other gets its identity
        elif inputs and id(inputs[0]) in convolved:
            pairs.append((convolved[id(inputs[0])][0], module))

    handles = [
        module.register_forward_hook(look)
        for module in model.modules()
        if type(module) is nn.Conv2d or (type(module) is nn.BatchNorm2d and module.track_running_stats)
    ]
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    once = [pair for pair in pairs if all(calls.count(module) == 1 for module in pair)]
    return [(names[convolution], names[norm]) for convolution, norm in once], logits
