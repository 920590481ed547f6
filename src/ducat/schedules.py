"""Learning-rate schedules as functions of the epoch: they hold no state, so there is none to save or resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["SCHEDULES", "epoch_of", "learning_rate"]

Number = int | float


def epoch_of(value: Number, epochs: int, option: str = "epoch") -> int:
    """The epoch, counted from 0, that `value` names in a run of `epochs` epochs.

    Args:
        value: a whole epoch, or a fraction of the run: 0 < `value` < 1. A fraction rounds down to a whole epoch, so
            it names an epoch that the run has.
        epochs: length of the run.
        option: what the error calls the value.

    Raises:
        ValueError: the run has no such epoch, or `value` is neither whole nor a fraction.
    """
    if 0 < value < 1:
        # 0.29 of 100 epochs is epoch 29, though the product is 28.999999999999996.
        return math.floor(value * epochs + 1e-9)
    if not 0 <= value < epochs or value != math.floor(value):
        raise ValueError(
            f"{option}={value:g} is not an epoch of this run of {epochs}: "
            f"give a whole number below {epochs}, or a fraction between 0 and 1"
        )
    return int(value)


def _constant(epoch: Number, epochs: int, **_: object) -> float:
    return 1.0


def _multi_step(epoch: Number, epochs: int, *, milestones: Sequence[Number], factor: Number, **_: object) -> float:
    return float(factor ** sum(epoch >= epoch_of(milestone, epochs, "milestones") for milestone in milestones))


def _cosine(epoch: Number, epochs: int, **_: object) -> float:
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


def _one_cycle(epoch: Number, epochs: int, *, peak: float, **_: object) -> float:
    progress = epoch / epochs
    return progress / peak if progress < peak else (1 - progress) / (1 - peak)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": _constant,
    "multi-step": _multi_step,
    "cosine": _cosine,
    "one-cycle": _one_cycle,
}
"""Every schedule by name. A row is called with epoch, epochs and, by keyword, the options of `learning_rate`."""


def learning_rate(
    schedule: str,
    epoch: Number,
    epochs: int,
    *,
    milestones: Sequence[Number] = (),
    factor: Number = 0.1,
    peak: float = 0.5,
    warm_up: Number = 0,
) -> float:
    """What to multiply the base learning rate by at a point of the run.

    Evaluate it for every step, at the middle of the step, `epoch + (batch + 0.5) / batches`: schedules that start or
    end at 0 then waste no step.

    - `constant`: 1.
    - `multi-step`: `factor` to the number of milestones reached.
    - `cosine`: half a cosine from 1 to 0 (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5).
    - `one-cycle`: up from 0 to 1 and down to 0, both linear; the cyclic rate of fast adversarial training (Wong et al.
      2020, arXiv 2001.03994).

    Args:
        schedule: a key of `SCHEDULES`.
        epoch: where in the run, in epochs, in [0, `epochs`].
        epochs: length of the run.
        milestones: epochs, as numbers or fractions (`epoch_of`), where `multi-step` multiplies the rate.
        factor: what it multiplies by, positive.
        peak: where `one-cycle` is 1, as a fraction of the run, in (0, 1).
        warm_up: length in epochs of a linear rise from 0 by which any schedule is multiplied; 0 for none.

    Raises:
        ValueError: the schedule is unknown, or a number is out of range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown: known schedules are {', '.join(SCHEDULES)}")
    if not 0 <= epoch <= epochs:
        raise ValueError(f"epoch={epoch:g} is outside this run of {epochs} epochs")
    if not factor > 0:
        raise ValueError(f"factor={factor:g} is not positive: give what each milestone multiplies the rate by")
    if not 0 < peak < 1:
        raise ValueError(f"peak={peak:g} is outside (0, 1): give the fraction of the run where the rate is highest")
    if not warm_up >= 0:
        raise ValueError(f"warm_up={warm_up:g} is negative: give a number of epochs")
    rise = min(1.0, epoch / warm_up) if warm_up > 0 else 1.0
    return rise * SCHEDULES[schedule](epoch, epochs, milestones=milestones, factor=factor, peak=peak)
