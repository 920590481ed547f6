import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ducat.evaluation.statistics import clopper_pearson, difference, holm, mcnemar, wilson

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


def test_a_difference_between_seeds_counts_images_and_trainings() -> None:
    random = torch.Generator().manual_seed(0)

    def method(share: float, seeds: int, spread: float = 0.0) -> torch.Tensor:
        shares = share + spread * torch.randn(seeds, 1, generator=random)
        return torch.rand(seeds, 400, generator=random) < shares

    sure = difference(method(0.4, 3), method(0.6, 3))
    assert sure.trainings
    assert sure.ci95[0] < sure.difference < sure.ci95[1]
    assert sure.p_value < 1e-3
    # Seeds that differ as much as the methods decide nothing, however many images there are.
    assert difference(method(0.5, 3, 0.2), method(0.55, 3, 0.2)).p_value > 0.05
    first, second = method(0.5, 1), method(0.5, 1)
    single = difference(first, second)
    assert not single.trainings
    assert single.p_value == mcnemar(int((first & ~second).sum()), int((second & ~first).sum()))
    same = difference(first, first)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    assert same.ci95 == (pytest.approx(-(1 - 0.025 ** (1 / 400))), pytest.approx(1 - 0.025 ** (1 / 400)))
    with pytest.raises(ValueError, match="give the same ones"):
        difference(first[:, :1], second[:, :1])


def test_a_few_samples_that_all_differ_prove_little() -> None:
    first, second = torch.zeros(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    found = difference(first, second)
    assert (found.difference, found.p_value) == (1.0, 0.25)
    assert found.ci95 == (pytest.approx(0.025 ** (1 / 3)), 1.0)
    assert difference(second, first).ci95[0] == -1
    agree = difference(first, first)
    assert (agree.difference, agree.p_value) == (0.0, 1.0)
    assert agree.ci95[1] > 0.5


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_same_difference_on_each_of_a_few_samples_proves_little(seeds: int) -> None:
    first, second = torch.eye(seeds).bool(), torch.ones(seeds, seeds, dtype=torch.bool)
    found = difference(first, second)
    assert found.difference == pytest.approx(1 - 1 / seeds)
    assert found.p_value == pytest.approx(2 * (1 / seeds) ** seeds)
    assert (found.ci95[0] > 0) == (found.p_value < 0.05)
    assert found.ci95[1] == 1


@pytest.mark.parametrize("more", [1, 5, 6, 40])
def test_an_interval_leaves_out_0_only_where_the_test_is_sure(more: int) -> None:
    first, second = torch.zeros(1, 1000, dtype=torch.bool), torch.zeros(1, 1000, dtype=torch.bool)
    second[:, :more] = True
    found = difference(first, second)
    assert (found.ci95[0] > 0) == (found.p_value < 0.05) == (more > 5)


@given(shares)
def test_clopper_and_pearsons_interval_is_the_one_of_the_literature(share: tuple[int, int]) -> None:
    expected = binomtest(*share).proportion_ci(0.95, method="exact")
    assert clopper_pearson(*share) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_nothing_is_found_more_often_than_it_should_where_methods_are_equal() -> None:
    random, found = torch.Generator().manual_seed(1), 0
    for _ in range(300):
        hard = torch.rand(1, 200, generator=random)
        groups = [
            torch.rand(3, 200, generator=random) < hard + 0.05 * torch.randn(3, 1, generator=random) for _ in range(2)
        ]
        found += difference(*groups).p_value < 0.05
    assert found <= 0.08 * 300


def test_holms_method_against_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
