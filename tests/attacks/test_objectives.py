import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ducat
from ducat.attacks.objectives import OBJECTIVES, dlr, find, runner_up, weighted_pair

C = 5


def logits(seed: int, batch: int = 9) -> torch.Tensor:
    return 3 * torch.randn(batch, 2 * C, generator=torch.Generator().manual_seed(seed))


labels = torch.arange(9) % C
seeds = st.integers(0, 10_000)


def value(name: str, z: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    objective = OBJECTIVES[name]
    reference = objective.reference(logits(99), y) if objective.reference else None
    return objective.value(z, y, reference).numpy()


def probabilities(z: torch.Tensor) -> np.ndarray:
    exp = np.exp(z.double().numpy() - z.double().numpy().max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


@given(seeds)
def test_cross_entropies_read_the_probabilities_that_they_should(seed: int) -> None:
    z, rows = logits(seed), np.arange(9)
    p = probabilities(z)
    np.testing.assert_allclose(value("cross-entropy", z, labels), -np.log(p[rows, labels]), rtol=1e-4, atol=1e-5)
    q = p[:, :C] + p[:, C:]
    np.testing.assert_allclose(
        value("recovered-cross-entropy", z, labels), -np.log(q[rows, labels]), rtol=1e-4, atol=1e-5
    )


@given(seeds)
def test_kl_compares_with_the_benign_image(seed: int) -> None:
    z = logits(seed)
    p, p_clean = probabilities(z), probabilities(logits(99))
    np.testing.assert_allclose(value("kl", z, labels), (p_clean * np.log(p_clean / p)).sum(1), rtol=1e-3, atol=1e-4)
    q, q_clean = (each[:, :C] + each[:, C:] for each in (p, p_clean))
    np.testing.assert_allclose(
        value("recovered-kl", z, labels), (q_clean * np.log(q_clean / q)).sum(1), rtol=1e-3, atol=1e-4
    )


@given(seeds)
def test_margins_are_positive_exactly_where_the_attacker_has_won(seed: int) -> None:
    z = logits(seed)
    blindly_wrong = (z.argmax(1) != labels).numpy()
    recovered_wrong = (z.argmax(1) % C != labels).numpy()
    for name, wrong in {
        "margin": blindly_wrong,
        "dlr": blindly_wrong,
        "recovered-margin": recovered_wrong,
        "recovered-dlr": recovered_wrong,
    }.items():
        assert ((value(name, z, labels) > 0) == wrong).all(), name
        assert (OBJECTIVES[name].fooled(z, labels).numpy() == wrong).all(), name
    best_target = np.max([value(f"targeted-pair-{rank}", z, labels) for rank in range(1, C)], axis=0)
    assert ((best_target > 0) == recovered_wrong).all()


def test_moving_mass_to_the_own_dummy_class_satisfies_a_blind_attacker_only() -> None:
    z = torch.zeros(1, 2 * C)
    y = torch.tensor([2])
    z[0, 2 + C] = 9.0
    assert OBJECTIVES["cross-entropy"].fooled(z, y).item()
    assert not OBJECTIVES["recovered-cross-entropy"].fooled(z, y).item()
    assert value("cross-entropy", z, y) > 8
    assert value("recovered-cross-entropy", z, y) < 0.01
    assert value("recovered-margin", z, y) == -9
    assert value("weighted-pair", z, y) < -8.9


def test_weighted_pair_pushes_both_members_by_their_share() -> None:
    z = torch.tensor([[1.0, 0.0, 0.5, 2.0, 0.0, 0.5]], requires_grad=True)
    weighted_pair(z, torch.tensor([0])).sum().backward()
    real, dummy = np.exp(1.0) / (np.exp(1.0) + np.exp(2.0)), np.exp(2.0) / (np.exp(1.0) + np.exp(2.0))
    np.testing.assert_allclose(z.grad[0, [0, 3]].numpy(), [-real, -dummy], rtol=1e-5)
    assert z.grad[0, [1, 2, 4, 5]].sum().item() == pytest.approx(1)


def test_a_class_at_minus_infinity_never_fires_and_what_is_no_number_fools() -> None:
    z = torch.tensor([[2.0, 1.0, -torch.inf], [1.0, 2.0, -torch.inf], [2.0, 1.0, torch.nan], [1.0, 2.0, torch.inf]])
    y = torch.zeros(4, dtype=torch.long)
    assert OBJECTIVES["cross-entropy"].fooled(z, y).tolist() == [False, True, True, True]
    assert OBJECTIVES["targeted-cross-entropy"].fooled(z, y).tolist() == [True, False, False, False]
    assert OBJECTIVES["recovered-cross-entropy"].fooled(torch.cat([z, z], 1), y).tolist() == [False, True, True, True]


def test_weighted_pair_of_a_dummy_class_at_minus_infinity_is_the_margin() -> None:
    z = torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf]], requires_grad=True)
    value = weighted_pair(z, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.item() == -1
    assert gradient.tolist() == [[-1, 1, 0, 0]]


def test_runner_up_ranks_wrong_recovered_classes() -> None:
    z = torch.tensor([[9.0, 0.0, 3.0, 0.0, 5.0, 1.0]])
    y = torch.tensor([0])
    assert [runner_up(rank)(z, y).item() for rank in (0, 1, 2)] == [1, 2, 2]


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_dlr_does_not_care_for_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    z = logits(seed).double()
    torch.testing.assert_close(dlr(scale * z + shift, labels), dlr(z, labels), rtol=1e-6, atol=1e-9)


def test_dlr_matches_its_formula() -> None:
    z = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    assert dlr(z, torch.tensor([0])).item() == pytest.approx((3 - 4) / (4 - 2))
    assert dlr(z, torch.tensor([2])).item() == pytest.approx((4 - 3) / (4 - 2))


@pytest.mark.parametrize(("name", "outputs"), [("dlr", 2), ("recovered-dlr", 4)])
def test_dlr_of_two_classes_is_refused(name: str, outputs: int) -> None:
    with pytest.raises(ValueError, match=r"dlr needs at least 3 outputs, .*not 2: use 'margin'"):
        value(name, torch.zeros(1, outputs), torch.tensor([0]))


def test_every_blind_inner_objective_of_a_method_has_a_recovery_aware_twin() -> None:
    from ducat.methods import METHODS

    for method in METHODS.values():
        if method.objective is not None:
            assert not find(method.objective).knows_recovery
            recovered = find(method.objective).recovered
            assert recovered is not None
            assert recovered.knows_recovery


def test_an_unknown_objective_is_named() -> None:
    with pytest.raises(ValueError, match="objective 'pgd' is unknown: choose from cross-entropy"):
        find("pgd")


def test_the_public_name_takes_names_and_rows(network: torch.nn.Module, images: torch.Tensor) -> None:
    y = torch.zeros(len(images), dtype=torch.long)
    threat = ducat.ThreatModel(eps=0.1, steps=2)
    results = [
        ducat.attacks.pgd(network, images, y, threat, each, generator=torch.Generator().manual_seed(0))
        for each in ("weighted-pair", OBJECTIVES["weighted-pair"])
    ]
    assert torch.equal(*results)
