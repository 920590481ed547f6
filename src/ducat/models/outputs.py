"""What other people's networks return, and the logits in it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["LogitsOnly", "NoLogitsError", "as_classifier", "logits_of"]


class NoLogitsError(ValueError):
    """What a network returned holds no logits: it is no classifier."""


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a network returned, shape (B, outputs).

    Args:
        output: the logits; or an object with `logits`, or a mapping with the key "logits", as transformers returns; or
            a tuple or list that begins with any of these, as networks with auxiliary heads return in training mode.

    Raises:
        NoLogitsError: if there are no logits in it, or they have not two dimensions.
    """
    if isinstance(output, Tensor):
        if output.ndim != 2:
            raise NoLogitsError(f"the network returns shape {tuple(output.shape)}: logits have shape (batch, outputs)")
        return output
    if hasattr(output, "logits"):
        return logits_of(output.logits)
    if isinstance(output, Mapping) and "logits" in output:
        return logits_of(output["logits"])
    if isinstance(output, Sequence) and not isinstance(output, str | bytes) and output:
        return logits_of(output[0])
    raise NoLogitsError(
        f"the network returns a {type(output).__name__}, which has no logits: it must return a tensor, or a tuple that "
        "begins with it, or an object or a mapping with `logits`"
    )


class LogitsOnly(nn.Module):
    """A network whose output is the logits, whatever `model` puts around them; see `logits_of`.

    Args:
        model: maps images (B, channels, H, W) to anything that `logits_of` takes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x))


def as_classifier(model: nn.Module) -> nn.Module:
    """Return a view of a network that maps images to a tensor of logits, with the same layers and mode as the network.

    One that is such a view already is returned as it is.
    """
    if isinstance(model, LogitsOnly):
        return model
    view = LogitsOnly(model)
    view.training = model.training  # its own alone: layers inside may be in another mode than what holds them
    return view
