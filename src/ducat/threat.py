"""What the attacker may do: the norm, the budget, and the steps that a standard attack takes in it."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Norm = Literal["linf", "l2"]
DEFAULT_EPS: dict[str, float] = {"linf": 8 / 255, "l2": 128 / 255}
TOLERANCE = 1e-6  # of the ball, in the norm's units: float32 rounding of x + delta, never a larger budget


def number(value: float | int | str, name: str) -> float:
    """Read a finite number, or a fraction such as "8/255".

    Raises:
        ValueError: if it is neither; the message names `name`.
    """
    try:
        result = float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise ValueError(f"{name}={value!r} is not a number or a fraction such as 8/255") from None
    if not math.isfinite(result):
        raise ValueError(f"{name}={value} is not finite")
    return result


def _norms(delta: Tensor) -> Tensor:
    """Return the lengths in float64: in float32 those of large images are off by more than `TOLERANCE`."""
    return torch.linalg.vector_norm(delta.flatten(1).double(), dim=1).view(-1, *[1] * (delta.ndim - 1))


@dataclass(frozen=True)
class ThreatModel:
    """The ball around each image that the attacker may search, and the standard attack in it. Images are in [0, 1].

    Attributes:
        norm: "linf" (largest change of any pixel) or "l2" (Euclidean length of the whole change).
        eps: radius, on images in [0, 1]; a number or a fraction such as "8/255". Default: 8/255 for linf, 128/255 for
            l2.
        step_size: length of an attack step, in the units of eps. Default: eps / 4, which is 2/255 for 8/255.
        steps: attack steps, at least 1.
    """

    norm: str = "linf"
    eps: float | int | str | None = None
    step_size: float | int | str | None = None
    steps: int = 10

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm={self.norm!r} is unknown: choose from {', '.join(get_args(Norm))}")
        eps = DEFAULT_EPS[self.norm] if self.eps is None else number(self.eps, "eps")
        step_size = eps / 4 if self.step_size is None else number(self.step_size, "step_size")
        for name, value in {"eps": eps, "step_size": step_size}.items():
            if value < 0:
                raise ValueError(f"{name}={value:g} is negative")
            if self.norm == "linf" and value > 1:
                raise ValueError(
                    f"{name}={value:g} is outside [0, 1]: images are in [0, 1]; did you mean {value:g}/255?"
                )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps={self.steps} must be a whole number, at least 1")
        object.__setattr__(self, "eps", eps)
        object.__setattr__(self, "step_size", step_size)

    @property
    def radius(self) -> float:
        """eps as a number."""
        assert isinstance(self.eps, float)
        return self.eps

    @property
    def stride(self) -> float:
        """step_size as a number."""
        assert isinstance(self.step_size, float)
        return self.step_size

    def random_start(
        self, x: Float[Tensor, "batch *image"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch *image"]:
        """Draw a point uniformly from each image's ball, cut to [0, 1]."""
        device = generator.device if generator is not None else x.device
        if self.norm == "linf":
            delta = torch.rand(x.shape, generator=generator, device=device).to(x) * 2 - 1
        else:
            delta = torch.randn(x.shape, generator=generator, device=device).to(x)
            shape = (len(x), *[1] * (x.ndim - 1))
            length = torch.rand(shape, generator=generator, device=device).to(x) ** (1 / max(1, x[:1].numel()))
            delta = delta / _norms(delta).clamp_min(1e-12).to(delta) * length
        return self.project(x + self.radius * delta, x)

    def project(
        self, adversarial: Float[Tensor, "batch *image"], x: Float[Tensor, "batch *image"]
    ) -> Float[Tensor, "batch *image"]:
        """Return the nearest point of the ball around x, cut to [0, 1]."""
        if self.norm == "linf":
            adversarial = torch.minimum(torch.maximum(adversarial, x - self.radius), x + self.radius)
        else:
            delta = adversarial.double() - x.double()
            # Rounding to float32 may lengthen the change by up to this.
            radius = max(0.0, self.radius - 2**-25 * x[:1].numel() ** 0.5)
            length = _norms(delta)
            shrunk = x.double() + delta * torch.where(length > self.radius, radius / length.clamp_min(1e-12), 1.0)
            adversarial = shrunk.to(adversarial.dtype)
        return adversarial.clamp(0, 1)

    def direction(self, gradient: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch *image"]:
        """Return the steepest ascent direction of unit length in the norm; zero where the gradient is zero."""
        if self.norm == "linf":
            return gradient.sign()
        # Scaling by the largest entry first keeps tiny gradients from underflowing when they are squared.
        gradient = gradient / gradient.flatten(1).abs().amax(1).clamp_min(1e-38).view(-1, *[1] * (gradient.ndim - 1))
        return gradient / _norms(gradient).clamp_min(1e-12).to(gradient)

    def distance(
        self, adversarial: Float[Tensor, "batch *image"], x: Float[Tensor, "batch *image"]
    ) -> Float[Tensor, " batch"]:
        """Return the norm of each image's change."""
        delta = (adversarial.double() - x.double()).flatten(1)
        return torch.linalg.vector_norm(delta, ord=math.inf if self.norm == "linf" else 2, dim=1)

    def allows(
        self, adversarial: Float[Tensor, "batch *image"], x: Float[Tensor, "batch *image"]
    ) -> Bool[Tensor, " batch"]:
        """Tell for each image whether it is in [0, 1] and in the ball, up to `TOLERANCE`; NaN is not."""
        inside = ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
        return inside & (self.distance(adversarial, x) <= self.radius + TOLERANCE)
