"""How sure a measured accuracy is, and whether two of them on the same samples differ."""


def wilson(successes: int, samples: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Wilson 1927).

    Raises:
        ValueError: if there are no samples, or more successes than samples.
    """
    from scipy.stats import binomtest  # takes longer to import than the rest of the package

    if not 0 <= successes <= samples or not samples:
        raise ValueError(f"{successes} of {samples} is not a share")
    interval = binomtest(successes, samples).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947).

    Under the hypothesis that two classifiers are equally good, each sample that only one of them gets right is a toss
    of a fair coin.

    Args:
        first_only: samples that only the first gets right.
        second_only: samples that only the second gets right.
    """
    from scipy.stats import binomtest

    tosses = first_only + second_only
    return float(binomtest(first_only, tosses).pvalue) if tosses else 1.0
