"""Which layer's output is the logits: seen by putting noise in its place and looking at what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ducat.models.outputs import logits_of

__all__ = ["describe", "find_heads", "forward", "images_for", "returns_tensor"]

SIZES = (32, 224, 28, 64, 8, 16, 96, 128, 256, 299, 384)  # that networks take which do not say what they take
TOLERANCE = 1e-4  # of the largest logit: float32 in another order of summation stays below


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """Return a network's logits in evaluation mode, without gradients, in float32; nothing of it is changed."""
    with _evaluating(model):
        return logits_of(model(images)).float()


def returns_tensor(model: nn.Module, images: Tensor) -> bool:
    """Tell whether a network's output is the logits as such."""
    with _evaluating(model):
        return isinstance(model(images), Tensor)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what a network of timm or transformers says of its images: "shape", "mean" and "std", those that it has.

    `shape` is (channels, H, W). A network inside of another module is found too.
    """
    for module in model.modules():
        timm = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        if isinstance(timm, Mapping) and "input_size" in timm:
            names = {"shape": "input_size", "mean": "mean", "std": "std"}
            return {name: tuple(timm[key]) for name, key in names.items() if timm.get(key) is not None}
        config = getattr(module, "config", None)
        size = getattr(config, "image_size", None)
        if hasattr(config, "model_type") and size is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            return {"shape": (getattr(config, "num_channels", 3), height, width)}
    return {}


def images_for(model: nn.Module) -> Tensor:
    """Return two random images that a network takes, from its own description or by trying.

    Raises:
        ValueError: if it takes none of those that were tried.
    """
    parameter = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.zeros(1))
    random = torch.Generator().manual_seed(0)
    for shape in _shapes(model):
        images = torch.rand(2, *shape, generator=random).to(parameter)
        try:
            forward(model, images)
        except Exception:  # networks refuse images in any way there is
            continue
        return images
    raise ValueError(
        f"no images were found that this {type(model).__name__} turns into logits of shape (batch, classes): give two "
        "that it takes as images="
    )


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    described = describe(model)
    if described:
        yield described["shape"]
    convolved = [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    inputs = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    for channels in dict.fromkeys([*convolved[:1], 3, 1]):
        if inputs and not convolved:
            side = math.isqrt(inputs[0] // channels)
            if channels * side * side == inputs[0]:
                yield (channels, side, side)
        for side in SIZES:
            yield (channels, side, side)
    yield from ((size,) for size in inputs[:1])


def find_heads(
    model: nn.Module, images: Tensor, head: str | Sequence[str] | None = None
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers, by name, whose output is the logits; of a network with several heads all of them.

    Each is linear or a convolution. Each logit depends on the layers' outputs for its class alone, and in the same way
    for every class: the logits are the output itself, or a view, a mean over positions or over heads, or a multiple.

    Args:
        model: a classifier.
        images: at least one that it takes.
        head: name of the layer, or the names of several; by default every layer with as many outputs as there are
            logits is looked at.

    Raises:
        ValueError: if there is no such layer, or the one that was named is not such a layer.
    """
    logits = forward(model, images)
    layers = _candidates(model, logits.shape[1]) if head is None else _named(model, head, logits.shape[1])
    heads = _in_effect(model, images, layers)
    if heads and _equal_by_class(model, images, heads):
        return heads
    if head is not None:
        raise ValueError(f"head={head!r}: the logits are not the output of that layer")
    tried = ", ".join(layers) if len(layers) < 5 else f"{len(layers)} of its layers"
    reason = f"the output of {tried} is changed before it is the logits" if heads else "none has them as its output"
    raise ValueError(
        f"no linear layer or convolution gives the {logits.shape[1]} logits of this {type(model).__name__} ({reason}): "
        'name the one that does by head="..."'
    )


def _candidates(model: nn.Module, outputs: int) -> dict[str, nn.Linear | nn.Conv2d]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return {name: layer for name, layer in layers.items() if _outputs(layer) == outputs}


def _named(model: nn.Module, head: str | Sequence[str], outputs: int) -> dict[str, nn.Linear | nn.Conv2d]:
    known = dict(model.named_modules())
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name in [head] if isinstance(head, str) else head:
        layer = known.get(name)
        if layer is None:
            linear = [other for other, module in known.items() if isinstance(module, nn.Linear | nn.Conv2d)]
            raise ValueError(f"head={name!r} is no layer of the network: its last ones are {', '.join(linear[-3:])}")
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"head={name!r} is a {type(layer).__name__}: it must be nn.Linear or nn.Conv2d")
        if _outputs(layer) != outputs:
            raise ValueError(f"head={name!r} has {_outputs(layer)} outputs, but there are {outputs} logits")
        found[name] = layer
    return found


def _outputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _in_effect(
    model: nn.Module, images: Tensor, layers: Mapping[str, nn.Linear | nn.Conv2d]
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return those whose output still matters when all others' outputs are given."""
    seeds = dict.fromkeys(layers, 0)
    first = _with_noise(model, images, layers, seeds)
    return {
        name: layer
        for name, layer in layers.items()
        if not torch.equal(_with_noise(model, images, layers, {**seeds, name: 1}), first)
    }


def _equal_by_class(model: nn.Module, images: Tensor, heads: Mapping[str, nn.Linear | nn.Conv2d]) -> bool:
    """Tell whether a logit depends on its class's output alone, and in the same way for all classes."""
    seeds = dict.fromkeys(heads, 0)
    first = _with_noise(model, images, heads, seeds)
    order = torch.arange(first.shape[1], device=first.device).roll(1)
    moved = _with_noise(model, images, heads, seeds, order)
    kept = torch.arange(first.shape[1], device=first.device) % 2 == 0
    mixed = _with_noise(model, images, heads, seeds, changed=~kept)
    tolerance = TOLERANCE * float(first.abs().max())
    return torch.allclose(moved, first[:, order], rtol=0, atol=tolerance) and torch.allclose(
        mixed[:, kept], first[:, kept], rtol=0, atol=tolerance
    )


def _with_noise(
    model: nn.Module,
    images: Tensor,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    seeds: Mapping[str, int],
    order: Tensor | None = None,
    changed: Tensor | None = None,
) -> Tensor:
    """Return the logits where noise takes the place of the layers' outputs, its classes in another order or changed."""

    def replaces(layer: nn.Module, random: torch.Generator) -> Any:
        dim = -1 if isinstance(layer, nn.Linear) else 1

        def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            noise, other = (torch.randn(output.shape, generator=random).to(output) for _ in range(2))
            if order is not None:
                noise = noise.index_select(dim, order)
            if changed is not None:
                rows = changed.nonzero().squeeze(1)
                noise = noise.index_copy(dim, rows, other.index_select(dim, rows))
            return noise

        return replace

    handles = [
        layer.register_forward_hook(replaces(layer, torch.Generator().manual_seed(2 * place + seeds[name])))
        for place, (name, layer) in enumerate(layers.items())
    ]
    try:
        return forward(model, images)
    finally:
        for handle in handles:
            handle.remove()
