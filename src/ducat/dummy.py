"""The paradigm: a dummy class for every real class, two-hot targets, and runtime recovery (arXiv 2410.12671).

With C real classes the network has 2C outputs: output c < C is real class c, output c + C is its dummy class.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

RECOVERIES = ("max", "logsumexp")
INITIALISATIONS = ("copy", "random")


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
        model: maps images (B, channels, H, W) to 2C logits.
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
        return recover(self.model(x), self.how)


class DummyLinear(nn.Linear):
    """A classification head whose second half of outputs are dummy classes; the type is what tells it from a plain one.

    Args:
        in_features: size of the feature vector.
        num_classes: C, the number of real classes; the layer has 2C outputs.
    """

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True) -> None:
        super().__init__(in_features, 2 * num_classes, bias=bias)
        self.num_classes = num_classes

    @torch.no_grad()
    def copy_real_rows(self) -> None:
        """Make every dummy class equal to its real class, so that the recovered decision is the real half's own."""
        for parameter in self.parameters():
            parameter[self.num_classes :] = parameter[: self.num_classes]


def dummy_head(model: nn.Module) -> DummyLinear | None:
    """Return the head with dummy classes of a model, or None if it has none."""
    return next((module for module in model.modules() if isinstance(module, DummyLinear)), None)


def add_dummy_classes(model: nn.Module, init: str = "copy", *, generator: torch.Generator | None = None) -> nn.Module:
    """Double the last linear layer of a C-class classifier, so that it has a dummy class for every class.

    Args:
        model: a classifier with C outputs; its last `nn.Linear`, in the order of `model.modules()`, is replaced in
            place. Optimisers made before the call hold the old layer's parameters.
        init: "copy" starts each dummy row as a copy of its real row, which leaves the recovered prediction exactly as
            it was; "random" draws the dummy rows as a new `nn.Linear` would.
        generator: source of the random rows; PyTorch's global one by default.

    Returns:
        The same model, with 2C outputs.

    Raises:
        ValueError: if the model has no linear layer, already has dummy classes, or `init` is unknown.
    """
    if init not in INITIALISATIONS:
        raise ValueError(f"init {init!r} is unknown: choose from {', '.join(INITIALISATIONS)}")
    if dummy_head(model) is not None:
        raise ValueError("the model already has dummy classes")
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError("the model has no nn.Linear layer to add dummy classes to")
    name, old = linears[-1]
    if not name:
        raise ValueError("the model is a bare nn.Linear, which cannot be replaced in place: wrap it in nn.Sequential")
    with torch.random.fork_rng(devices=[]):
        head = DummyLinear(old.in_features, old.out_features, bias=old.bias is not None)
    head.to(old.weight).train(old.training)
    parent, _, child = name.rpartition(".")
    with torch.no_grad():
        head.weight[: old.out_features] = old.weight
        if head.bias is not None:
            head.bias[: old.out_features] = old.bias
        if init == "copy":
            head.copy_real_rows()
        else:
            bound = old.in_features**-0.5
            for parameter in head.parameters():
                rows = torch.empty_like(parameter[old.out_features :], device="cpu")
                parameter[old.out_features :] = rows.uniform_(-bound, bound, generator=generator)
    setattr(model.get_submodule(parent), child, head)
    return model
