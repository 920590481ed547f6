"""How sure a measured accuracy is, and whether two of them on the same samples differ."""

# Of scipy its `special` alone: `scipy.stats` takes two seconds to import.
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

from jaxtyping import Bool
from torch import Tensor

NORMAL = NormalDist().inv_cdf(0.975)  # quantile for two-sided intervals of 95 %
NOTHING = 1e-24  # a variance that is rounding alone


def wilson(successes: int, samples: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Wilson 1927).

    Raises:
        ValueError: if there are no samples, or more successes than samples.
    """
    if not 0 <= successes <= samples or not samples:
        raise ValueError(f"{successes} of {samples} is not a share")
    share, squared = successes / samples, NORMAL**2
    middle = (share + squared / (2 * samples)) / (1 + squared / samples)
    reach = NORMAL * math.sqrt(share * (1 - share) / samples + squared / (4 * samples**2)) / (1 + squared / samples)
    # At none and at all an end of it is 0 or 1, which rounding misses.
    return middle - reach if successes else 0.0, middle + reach if successes < samples else 1.0


def clopper_pearson(successes: int, samples: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share (Clopper & Pearson 1934), which leaves out 1/2 as `mcnemar` does."""
    from scipy.special import betaincinv

    low = float(betaincinv(successes, samples - successes + 1, 0.025)) if successes else 0.0
    high = float(betaincinv(successes + 1, samples - successes, 0.975)) if successes < samples else 1.0
    return low, high


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947).

    Under the hypothesis that two classifiers are equally good, each sample that only one of them gets right is a toss
    of a fair coin.

    Args:
        first_only: samples that only the first gets right.
        second_only: samples that only the second gets right.
    """
    from scipy.special import bdtr

    fewer, tosses = min(first_only, second_only), first_only + second_only
    return min(1.0, 2 * float(bdtr(fewer, tosses, 0.5)))  # both tails, which are alike


class Difference(NamedTuple):
    """How far two methods' accuracies differ.

    Attributes:
        difference: accuracy of the second - of the first.
        ci95: its 95 % interval.
        p_value: two-sided, of no difference.
        trainings: whether the spread over training seeds is counted.
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float
    trainings: bool


def difference(first: Bool[Tensor, "first_seeds samples"], second: Bool[Tensor, "second_seeds samples"]) -> Difference:
    """Compare two methods, each trained with one or more seeds, on the same samples.

    The variance of the difference has up to three parts: of the samples, as they differ in the difference of the seeds'
    means, and of the seeds of either method, as for Welch's test. The degrees of freedom are Satterthwaite's. A method
    of one seed is taken to spread as the other does. With one seed each, only samples count, the p-value is that of
    McNemar's exact test, and the interval reaches at least as far as the exact one of the samples on which the two
    differ. Part of the seeds' spread is counted among the samples too, so that the interval is rather too wide than too
    narrow.

    Args:
        first: which samples each network of the first method gets right.
        second: the same for the second.

    Raises:
        ValueError: if the samples are not as many, or fewer than two.
    """
    from scipy.special import stdtr, stdtrit  # distribution function and quantiles of Student's t

    if first.shape[1] != second.shape[1] or first.shape[1] < 2:
        raise ValueError(f"{first.shape[1]} and {second.shape[1]} samples: give the same ones, at least two")
    gaps = second.double().mean(0) - first.double().mean(0)
    mean, samples = float(gaps.mean()), len(gaps)
    parts = [(float(gaps.var()) / samples, samples - 1)]
    seeds = [flags.double().mean(1) for flags in (first, second)]
    several = [own for own in seeds if len(own) > 1]
    trainings = bool(several)
    parts += [(float(own.var()) / len(own), len(own) - 1) for own in several]
    if len(several) == 1:  # the other's spread is taken to be this one's, so it is no more sure
        (own,) = several
        parts[-1] = float(own.var()) * (1 + 1 / len(own)), len(own) - 1
    variance = sum(part for part, _ in parts)
    if abs(mean) == 1:  # every sample differs in the same way, which of few is no certainty
        least = math.copysign(0.025 ** (1 / samples), mean)  # Clopper & Pearson's lower end
        return Difference(mean, (min(mean, least), max(mean, least)), mcnemar(0, samples), trainings)
    if variance < NOTHING:  # that all of few samples agree is no certainty either
        reach, p_value = 1 - 0.025 ** (1 / samples), min(1.0, 2 * (1 - abs(mean)) ** samples)
        return Difference(mean, (max(-1.0, mean - reach), min(1.0, mean + reach)), p_value, trainings)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    reach = float(stdtrit(freedom, 0.975)) * variance**0.5
    low, high = mean - reach, mean + reach
    if trainings:
        p_value = 2 * float(stdtr(freedom, -abs(mean) / variance**0.5))
    else:
        only = int((first & ~second).sum()), int((second & ~first).sum())
        p_value = mcnemar(*only)
        exact = [(2 * end - 1) * sum(only) / samples for end in clopper_pearson(only[1], sum(only))]
        low, high = min(low, exact[0]), max(high, exact[1])
    return Difference(mean, (max(-1.0, low), min(1.0, high)), p_value, trainings)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the order in which they came."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
