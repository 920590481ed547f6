"""How sure a measured accuracy is, and whether two of them on the same samples differ."""

import math

Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def wilson(successes: int, samples: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Wilson 1927).

    Raises:
        ValueError: if there are no samples, or more successes than samples.
    """
    if not 0 <= successes <= samples or not samples:
        raise ValueError(f"{successes} of {samples} is not a share")
    share, denominator = successes / samples, 1 + Z95 * Z95 / samples
    middle = (share + Z95 * Z95 / (2 * samples)) / denominator
    half = Z95 / denominator * math.sqrt(share * (1 - share) / samples + Z95 * Z95 / (4 * samples * samples))
    # At the ends the interval touches 0 or 1, which rounding would miss.
    return (0.0 if not successes else max(0.0, middle - half)), (1.0 if successes == samples else middle + half)


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947).

    Under the hypothesis that two classifiers are equally good, each sample that only one of them gets right is a toss
    of a fair coin.

    Args:
        first_only: samples that only the first gets right.
        second_only: samples that only the second gets right.
    """
    tosses, fewer = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(tosses, heads) for heads in range(fewer + 1))
    return min(1.0, 2 * tail / 2**tosses)
