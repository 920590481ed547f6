"""What the attacker may do: the norm, the budget, and the steps that a standard attack takes in it."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Norm = Literal["linf", "l2", "l1"]
DEFAULT_EPS: dict[str, float] = {"linf": 8 / 255, "l2": 128 / 255, "l1": 12.0}
LARGEST = 1e9  # of eps and steps: no images have so many pixels
DEFAULT_STEP: dict[str, float] = {"linf": 1 / 4, "l2": 15 / 128, "l1": 1 / 4}  # in units of eps
TOLERANCE = 1e-6  # of the ball, in the norm's units: float32 rounding of x + delta, never a larger budget
SPREAD = 0.05  # share of the pixels that an l1 step of length eps moves; a shorter step moves fewer, as far each


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


def _norms(delta: Tensor, norm: str) -> Tensor:
    """Return the lengths in float64: in float32 those of large images are off by more than `TOLERANCE`."""
    order = 1 if norm == "l1" else 2
    return torch.linalg.vector_norm(delta.flatten(1).double(), ord=order, dim=1).view(-1, *[1] * (delta.ndim - 1))


def _shrunk_l1(change: Float[Tensor, "batch pixels"], room: Float[Tensor, "batch pixels"], radius: float) -> Tensor:
    """Return the nearest changes of the l1 ball that [0, 1] has room for, of changes that are 0 or more.

    Each pixel's change shrinks by the same amount lambda, and ends between 0 and its room. The sum of the changes falls
    with lambda along straight pieces, which end where a pixel leaves its bound (change - room) and where it arrives at
    0 (change); sorting these ends finds the piece on which the sum is the radius.
    """
    ends = torch.cat([change, change - room], dim=1)
    slopes = torch.cat([torch.ones_like(change), -torch.ones_like(change)], dim=1)
    # Stable: a pixel without room arrives at 0 where it leaves its bound, and has to be counted in before out.
    ends, order = ends.sort(dim=1, descending=True, stable=True)
    slopes = slopes.gather(1, order)
    count, reach = slopes.cumsum(1), (slopes * ends).cumsum(1)
    total = reach - ends * count  # of the changes, where lambda is at each end; it grows along the row
    place = torch.searchsorted(total, total.new_full((len(total), 1), radius)).clamp(1, total.shape[1] - 1) - 1
    shrink = (reach.gather(1, place) - radius) / count.gather(1, place).clamp_min(1)
    return (change - shrink).clamp_min(0).minimum(room)


@dataclass(frozen=True, init=False)
class ThreatModel:
    """The ball around each image that the attacker may search, and the standard attack in it. Images are in [0, 1].

    Attributes:
        norm: "linf" (largest change of any pixel), "l2" (Euclidean length of the whole change) or "l1" (sum of the
            changes of all pixels).
        eps: radius, on images in [0, 1]; a number or a fraction such as "8/255". Default: 8/255 for linf, 128/255 for
            l2, 12 for l1.
        step_size: length of an attack step, in the units of eps. Default: eps / 4 for linf and l1, which is 2/255 for
            8/255; 15/128 of eps for l2, which is 15/255 for 128/255.
        steps: attack steps, at least 1.
    """

    norm: str
    eps: float
    step_size: float
    steps: int

    # A dataclass's own would give the attributes the types of the arguments.
    def __init__(
        self,
        norm: str = "linf",
        eps: float | int | str | None = None,
        step_size: float | int | str | None = None,
        steps: int = 10,
    ) -> None:
        if norm not in get_args(Norm):
            raise ValueError(f"norm={norm!r} is unknown: choose from {', '.join(get_args(Norm))}")
        eps = DEFAULT_EPS[norm] if eps is None else number(eps, "eps")
        step_size = eps * DEFAULT_STEP[norm] if step_size is None else number(step_size, "step_size")
        for name, value in {"eps": eps, "step_size": step_size}.items():
            if value < 0:
                raise ValueError(f"{name}={value:g} is negative")
            if not value <= LARGEST:
                raise ValueError(f"{name}={value:g} is longer than the way between any two images in [0, 1]")
            if norm == "linf" and value > 1:
                raise ValueError(
                    f"{name}={value:g} is outside [0, 1]: images are in [0, 1]; did you mean {value:g}/255?"
                )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps} must be a whole number, at least 1")
        for name, setting in {"norm": norm, "eps": eps, "step_size": step_size, "steps": steps}.items():
            object.__setattr__(self, name, setting)

    def random_start(
        self, x: Float[Tensor, "batch *image"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch *image"]:
        """Draw a point uniformly from each image's ball, cut to [0, 1]."""
        device = generator.device if generator is not None else x.device
        if self.norm == "linf":
            delta = torch.rand(x.shape, generator=generator, device=device).to(x) * 2 - 1
        else:
            delta = torch.randn(x.shape, generator=generator, device=device).to(x)
            if self.norm == "l1":
                # Exponential lengths with random signs, over their sum, are uniform on the sphere of l1.
                uniform = torch.rand(x.shape, generator=generator, device=device).to(x)
                uniform = uniform.clamp_max(1 - torch.finfo(x.dtype).eps / 2)  # float16 rounds some of them to 1
                delta = -torch.log1p(-uniform) * delta.sign()
            shape = (len(x), *[1] * (x.ndim - 1))
            length = torch.rand(shape, generator=generator, device=device).to(x) ** (1 / max(1, x[:1].numel()))
            delta = delta / _norms(delta, self.norm).clamp_min(1e-12).to(delta) * length
        return self.project(x + self.eps * delta, x)

    def project(
        self, adversarial: Float[Tensor, "batch *image"], x: Float[Tensor, "batch *image"]
    ) -> Float[Tensor, "batch *image"]:
        """Return the nearest point of the ball around x, cut to [0, 1]; for l1 the nearest of both at once."""
        if self.norm == "linf":
            adversarial = torch.minimum(torch.maximum(adversarial, x - self.eps), x + self.eps)
        else:
            delta = adversarial.double() - x.double()
            # Rounding to float32 may lengthen the change by up to this.
            pixels = x[:1].numel()
            radius = max(0.0, self.eps - 2**-25 * (pixels if self.norm == "l1" else pixels**0.5))
            if self.norm == "l1":
                room = torch.where(delta > 0, 1 - x.double(), x.double())
                length = _norms(delta.abs().minimum(room), "l1")
                shrunk = _shrunk_l1(delta.abs().flatten(1), room.flatten(1), radius).view_as(delta) * delta.sign()
            else:
                length = _norms(delta, "l2")
                shrunk = delta * (radius / length.clamp_min(1e-12))
            adversarial = (x.double() + torch.where(length > self.eps, shrunk, delta)).to(adversarial.dtype)
        return adversarial.clamp(0, 1)

    def direction(self, gradient: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch *image"]:
        """Return the steepest ascent direction of unit length in the norm; zero where the gradient is zero."""
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "l1":
            flat = gradient.flatten(1)
            place = flat.abs().argmax(1, keepdim=True)
            return torch.zeros_like(flat).scatter(1, place, flat.gather(1, place).sign()).view_as(gradient)
        # Scaling by the largest entry first keeps tiny gradients from underflowing when they are squared.
        gradient = gradient / gradient.flatten(1).abs().amax(1).clamp_min(1e-38).view(-1, *[1] * (gradient.ndim - 1))
        return gradient / _norms(gradient, "l2").clamp_min(1e-12).to(gradient)

    def ascend(
        self,
        adversarial: Float[Tensor, "batch *image"],
        gradient: Float[Tensor, "batch *image"],
        stride: float | Tensor,
    ) -> Float[Tensor, "batch *image"]:
        """Return the images one step further up, before they are projected.

        In linf and l2 a step goes along the steepest direction. In l1 that direction is a single pixel, which soon
        arrives at 0 or 1. There a step goes along the pixels of largest gradient that can still move, each by at most
        eps over a share `SPREAD` of the pixels, until its length is used up: the sparse steps of Tramer & Boneh (2019,
        arXiv 1904.13000), in the box of Croce & Hein (2021, arXiv 2103.01208). The shorter, the sparser.

        Args:
            adversarial: where the step begins, in [0, 1].
            gradient: of what is to rise.
            stride: length of the step in the units of eps, a number or one for each image, shape (B, 1, ...).
        """
        if self.norm != "l1":
            return adversarial + stride * self.direction(gradient)
        slope, start = gradient.flatten(1), adversarial.flatten(1)
        length = stride.flatten(1) if isinstance(stride, Tensor) else stride
        room = torch.where(slope > 0, 1 - start, start).where(slope != 0, 0)
        room = room.clamp(max=self.eps / (SPREAD * slope.shape[1]))
        order = slope.abs().argsort(dim=1, descending=True)
        ranked = room.gather(1, order)
        spent = ranked.cumsum(1) - ranked
        move = (length - spent).clamp_min(0).minimum(ranked)
        return adversarial + (torch.zeros_like(start).scatter(1, order, move) * slope.sign()).view_as(gradient)

    def distance(
        self, adversarial: Float[Tensor, "batch *image"], x: Float[Tensor, "batch *image"]
    ) -> Float[Tensor, " batch"]:
        """Return the norm of each image's change."""
        delta = (adversarial.double() - x.double()).flatten(1)
        return torch.linalg.vector_norm(delta, ord={"linf": math.inf, "l2": 2, "l1": 1}[self.norm], dim=1)

    def allows(
        self, adversarial: Float[Tensor, "batch *image"], x: Float[Tensor, "batch *image"]
    ) -> Bool[Tensor, " batch"]:
        """Tell for each image whether it is in [0, 1] and in the ball, up to `TOLERANCE`; NaN is not."""
        inside = ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
        return inside & (self.distance(adversarial, x) <= self.eps + TOLERANCE)
