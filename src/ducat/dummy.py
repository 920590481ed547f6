"""The paradigm: a dummy class for every real class, two-hot targets, and runtime recovery (arXiv 2410.12671).

With C real classes the network has 2C outputs: output c < C is real class c, output c + C is its dummy class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ducat.models.heads import find_heads, forward, images_for
from ducat.models.outputs import logits_of

RECOVERIES = ("max", "logsumexp")
INITIALISATIONS = ("copy", "random")
REPLACED = "replaced_by_ducat"  # mark of a parameter that dummy classes have taken the place of
CHANGE = 1e-5  # of a logit, relative to the largest: what float32 leaves open in a product with more rows


@dataclass(frozen=True, kw_only=True)
class TwoHot:
    """Weights of the two-hot loss.

    The two-hot cross-entropy is that of the recovered classes plus a term that tells benign from adversarial images
    within a pair: CE(z, t(y, w)) = -log q_y + BCE(w, p_{y+C} / q_y).
    """

    benign_weight: float | int = 0.25
    """Share of the target that the dummy class gets for benign images, in [0, 1]."""
    adversarial_weight: float | int = 1.0
    """Share of the target that the dummy class gets for adversarial images, in [0, 1]."""
    benign_share: float | int = 0.5
    """What the benign half of the batch counts in the two-hot loss, in [0, 1]; less of it trades clean accuracy for
    robustness. The paper's is 0.5."""
    pair_weight: float | int = 1.0
    """Weight, 0 or more, of telling benign from adversarial within a pair; the paper's is 1."""

    def __post_init__(self) -> None:
        for name in ("benign_weight", "adversarial_weight", "benign_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"dummy.{name}={getattr(self, name)} is outside [0, 1]")
        if not self.pair_weight >= 0:
            raise ValueError(f"dummy.pair_weight={self.pair_weight} must be at least 0")


def two_hot(y: Int[Tensor, " batch"], num_classes: int, dummy_weight: float | int) -> Float[Tensor, "batch outputs"]:
    """Two-hot targets t(y, w) = (1 - w) e_y + w e_{y+C} (arXiv 2410.12671, section 3).

    Args:
        y: labels in [0, C), shape (B,).
        num_classes: C, the number of real classes.
        dummy_weight: w in [0, 1], the share of the target that goes to the dummy class.

    Returns:
        float32 targets of shape (B, 2C); each row sums to 1.

    Raises:
        ValueError: if `dummy_weight` is outside [0, 1] or a label is outside [0, C).
    """
    if not 0 <= dummy_weight <= 1:
        raise ValueError(f"dummy_weight={dummy_weight} is outside [0, 1]: it is the dummy class's share of the target")
    if y.device.type == "cpu" and y.numel() and not (int(y.min()) >= 0 and int(y.max()) < num_classes):
        raise ValueError(f"labels run from {int(y.min())} to {int(y.max())}, outside [0, {num_classes})")
    targets = torch.zeros(len(y), 2 * num_classes, device=y.device)
    targets.scatter_(1, y[:, None].long(), 1 - dummy_weight)
    targets.scatter_(1, y[:, None].long() + num_classes, dummy_weight)
    return targets


def recover(logits: Float[Tensor, "batch outputs"], how: str = "max") -> Float[Tensor, "batch classes"]:
    """Recover C-class logits from 2C logits: each class is the better, or the sum, of its real and its dummy half.

    `max` gives the paper's decision, argmax(z) mod C. `logsumexp` gives log(p_c + p_{c+C}) up to a constant per
    sample, the logits of the recovered probabilities q that recovery-aware training works on.

    Args:
        logits: z, shape (B, 2C).
        how: "max" or "logsumexp".

    Returns:
        Logits of shape (B, C).

    Raises:
        ValueError: if the number of outputs is odd or `how` is unknown.
    """
    if logits.shape[1] % 2:
        raise ValueError(f"{logits.shape[1]} outputs cannot be C real and C dummy classes: the number must be even")
    real, dummy = logits.chunk(2, dim=1)
    if how == "max":
        return torch.maximum(real, dummy)
    if how == "logsumexp":
        return torch.logaddexp(real, dummy)
    raise ValueError(f"recovery {how!r} is unknown: choose from {', '.join(RECOVERIES)}")


class RecoveredClassifier(nn.Module):
    """The classifier that is deployed: a network with dummy classes behind runtime recovery.

    Args:
        model: maps images (B, channels, H, W) to 2C logits, as such or as `models.outputs.logits_of` finds them.
        how: "max" or "logsumexp", see `recover`.

    The module maps images to C logits, shape (B, C), so any attack or tool for plain classifiers can run on it.
    """

    def __init__(self, model: nn.Module, how: str = "max") -> None:
        super().__init__()
        if how not in RECOVERIES:
            raise ValueError(f"recovery {how!r} is unknown: choose from {', '.join(RECOVERIES)}")
        self.model = model
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return recover(logits_of(self.model(x)), self.how)


class DummyHead(nn.Module):
    """Marks a classification head whose second half of outputs are dummy classes; `add_dummy_classes` makes one.

    Attributes:
        num_classes: C, the number of real classes; the layer has 2C outputs.
    """

    num_classes: int
    weight: Tensor
    bias: Any  # None without one

    def rows(self) -> list[nn.Parameter]:
        """Return the parameters that have a row for each real and each dummy class."""
        return [each for each in self.parameters() if each.ndim and len(each) == 2 * self.num_classes]

    @torch.no_grad()
    def copy_real_rows(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make every dummy class equal to its real class, so that the recovered decision is the real half's own.

        Args:
            optimizer: what trains the head. Adam's mean of squared gradients is copied too: by one of rows that have
                had no gradient yet, the first steps of the dummy classes would be many times too long.
        """
        for parameter in self.rows():
            squares = None if optimizer is None else optimizer.state.get(parameter, {}).get("exp_avg_sq")
            for tensor in [parameter] if squares is None else [parameter, squares]:
                tensor[self.num_classes :] = tensor[: self.num_classes]


class DummyLinear(DummyHead, nn.Linear):
    """A linear head with dummy classes."""


class DummyConv2d(DummyHead, nn.Conv2d):
    """A convolutional head with dummy classes, whose outputs are averaged over positions."""


def dummy_heads(model: nn.Module) -> list[DummyHead]:
    """Return the heads with dummy classes of a model: none, one, or several that it averages."""
    return [module for module in model.modules() if isinstance(module, DummyHead)]


def dummy_head(model: nn.Module) -> DummyHead | None:
    """Return the first head with dummy classes of a model, or None if it has none."""
    return next(iter(dummy_heads(model)), None)


def add_dummy_classes(
    model: nn.Module,
    init: str = "copy",
    head: str | Sequence[str] | None = None,
    *,
    generator: torch.Generator | None = None,
    images: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Double the layer whose output is the logits of a C-class classifier, so that every class has a dummy class.

    Which layer that is, forward passes show (`models.heads.find_heads`), and one more shows at the end that there are
    2C logits whose recovered prediction is what it was. The layer stays the same object, with its hooks; its parameters
    become new ones. An optimiser made before refuses its next step, unless it is given here.

    Args:
        model: a classifier with C outputs, from any library; its head is doubled in place: a linear layer or a
            convolution, with or without bias or weight norm, or several that are averaged.
        init: "copy" starts each dummy row as a copy of its real row, which leaves the recovered prediction exactly as
            it was; "random" draws the dummy rows as a new layer would.
        head: name of the layer, or names of several, as in `model.named_modules()`; found by default.
        generator: source of the random rows; PyTorch's global one by default.
        images: at least one image that the network takes, shape (B, channels, H, W), to look with; by default random
            ones of the shape that the network describes, or that are found by trying.
        optimizer: one made before the call, which then trains the new rows; its state, such as momentum, is doubled.

    Returns:
        The same model, with 2C outputs.

    Raises:
        ValueError: if no such layer is found, or doubling it does not double the logits, or the model already has
            dummy classes, or `init` is unknown, or the optimiser's state cannot be doubled. The model is then as it
            was.
    """
    if init not in INITIALISATIONS:
        raise ValueError(f"init {init!r} is unknown: choose from {', '.join(INITIALISATIONS)}")
    if dummy_head(model) is not None:
        raise ValueError("the model already has dummy classes")
    images = images_for(model) if images is None else images
    layers = find_heads(model, images, head)
    before = forward(model, images)
    undo: list[Callable[[], object]] = []
    replaced: dict[Tensor, Tensor] = {}
    try:
        for layer in layers.values():
            replaced.update(_double(layer, before.shape[1], undo))
        _check_doubled(model, images, before, ", ".join(layers))
        if optimizer is not None:
            _check_state(optimizer, replaced)
        if init == "random":
            for layer in layers.values():
                _draw_dummy_rows(layer, before.shape[1], generator)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    if optimizer is not None:
        _hand_over(optimizer, replaced)
    for parameter in replaced:
        setattr(parameter, REPLACED, True)
    _watch_optimizers()
    return model


def _double(layer: nn.Linear | nn.Conv2d, num_classes: int, undo: list[Callable[[], object]]) -> dict[Tensor, Tensor]:
    """Give a layer a second half of outputs, equal to the first, and return its new parameters by the old ones.

    How to undo each step is added to `undo`.
    """
    replaced: dict[Tensor, Tensor] = {}
    for module in layer.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old.ndim and len(old) == num_classes:
                replaced[old] = nn.Parameter(_doubled(old.detach()), old.requires_grad)
                setattr(module, name, replaced[old])
                undo.append(partial(setattr, module, name, old))
    kind, counts = type(layer), "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    static: dict[type, type] = {nn.Linear: DummyLinear, nn.Conv2d: DummyConv2d}
    layer.__class__ = static.get(kind) or type(f"Dummy{kind.__name__}", (DummyHead, kind), {})
    undo.append(partial(setattr, layer, "__class__", kind))
    setattr(layer, counts, 2 * num_classes)
    undo.append(partial(setattr, layer, counts, num_classes))
    layer.num_classes = num_classes  # type: ignore[assignment]
    undo.append(partial(delattr, layer, "num_classes"))
    return replaced


def _check_doubled(model: nn.Module, images: Tensor, before: Tensor, names: str) -> None:
    batch, classes = before.shape
    try:
        after = forward(model, images)
    except Exception as error:  # whatever comes after the head
        raise ValueError(
            f"the network does not work with twice as many outputs of {names} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:120]}): something in or after it counts the classes"
        ) from error
    if after.shape != (batch, 2 * classes):
        raise ValueError(
            f"with twice as many outputs of {names} the network gives shape {tuple(after.shape)} instead of "
            f"{(batch, 2 * classes)}: something in or after it counts the classes"
        )
    tolerance = CHANGE * max(1.0, float(before.abs().max()))
    close = torch.allclose(after, before.repeat(1, 2), rtol=0, atol=tolerance)
    top = before.topk(min(2, classes), dim=1).values
    clear = top[:, 0] - top[:, -1] > 2 * tolerance if classes > 1 else torch.ones(batch, dtype=torch.bool)
    same = recover(after).argmax(1) == before.argmax(1)
    if not close or not bool(same[clear.to(same.device)].all()):
        raise ValueError(
            f"doubling {names} changes the predictions, though the new rows are copies of the old: it computes with "
            "all of its outputs, as spectral norm does; remove that first"
        )


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.repeat(2, *[1] * (tensor.ndim - 1))


def _check_state(optimizer: torch.optim.Optimizer, replaced: Mapping[Tensor, Tensor]) -> None:
    """Raise ValueError if what an optimiser keeps of the head cannot be doubled row by row."""
    kept = [(name, value, old) for old in replaced for name, value in optimizer.state.get(old, {}).items()]
    other = [name for name, value, old in kept if _of_another_shape(value, old)]
    if hasattr(optimizer, "_params") or other:
        what = (
            f"its state {', '.join(other)} has another shape than the head"
            if other
            else "it keeps its own list of parameters"
        )
        raise ValueError(
            f"{type(optimizer).__name__} cannot go on with a doubled head ({what}): make it after add_dummy_classes"
        )


def _of_another_shape(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape


def _hand_over(optimizer: torch.optim.Optimizer, replaced: Mapping[Tensor, Tensor]) -> None:
    """Put doubled parameters in the place of the old ones in an optimiser, with their state."""
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
    for old, new in replaced.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {
                name: _doubled(value) if isinstance(value, Tensor) and value.shape == old.shape else value
                for name, value in state.items()
            }


def _refuse_replaced(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if any(hasattr(parameter, REPLACED) for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "this optimiser was made before the network got dummy classes and would train a head that is no longer in "
            "it: make it afterwards, or give it to add_dummy_classes(..., optimizer=...)"
        )


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_refuse_replaced)


@torch.no_grad()
def _draw_dummy_rows(layer: nn.Linear | nn.Conv2d, num_classes: int, generator: torch.Generator | None) -> None:
    if {name for name, _ in layer.named_parameters()} - {"weight", "bias"}:
        raise ValueError('init="random" is for a head with plain weights: this one is parametrised, choose init="copy"')
    bound = layer.weight[0].numel() ** -0.5
    for parameter in layer.parameters():
        rows = torch.empty_like(parameter[num_classes:], device="cpu")
        parameter[num_classes:] = rows.uniform_(-bound, bound, generator=generator)
