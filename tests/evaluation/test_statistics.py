import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ducat.evaluation.statistics import mcnemar, wilson

shares = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(shares)
def test_wilson_is_the_interval_of_the_literature(share: tuple[int, int]) -> None:
    successes, samples = share
    expected = binomtest(successes, samples).proportion_ci(0.95, method="wilson")
    low, high = wilson(successes, samples)
    assert math.isclose(low, expected.low, abs_tol=1e-9)
    assert math.isclose(high, expected.high, abs_tol=1e-9)
    assert low <= successes / samples <= high


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_a_test_of_a_fair_coin(first_only: int, second_only: int) -> None:
    tosses = first_only + second_only
    expected = binomtest(first_only, tosses, 0.5).pvalue if tosses else 1.0
    assert math.isclose(mcnemar(first_only, second_only), expected, rel_tol=1e-6)


@pytest.mark.parametrize(("successes", "samples"), [(1, 0), (-1, 5), (6, 5)])
def test_what_is_no_share_is_refused(successes: int, samples: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} of {samples} is not a share"):
        wilson(successes, samples)
