from collections.abc import Iterator

import pytest
import torch
from torch import nn

import ducat
from ducat.attacks.adaptive import SilentDummies
from ducat.attacks.suites import SUITES, Attack

ROWS = {attack.name: attack for suite in SUITES.values() for attack in suite.attacks}
# How near an attack comes to the closed form, where that is not 1e-4 of eps: the turn of plain PGD towards the gradient
# shrinks by a fixed factor with each step in l2, and the other two stop at a tolerance of their own.
LOOSER = {
    ("pgd-10", "l2"): 0.1,
    ("pgd-20", "l2"): 5e-3,
    ("pgd-20-targeted", "l2"): 5e-3,
    ("ensemble-quick", "l2"): 5e-3,
    ("cw", "l2"): 1e-2,
    ("ddn", "l2"): 1e-2,
}


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_asks_blind_and_recovery_aware_attackers(suite: str) -> None:
    attacks = SUITES[suite].attacks
    assert {attack.knows_recovery for attack in attacks} == {True, False}
    assert len({(attack.name, attack.norms) for attack in attacks}) == len(attacks)
    # An ensemble on one side only would mix the strength of the attack with the knowledge of recovery.
    sides = [
        {a.strategy for a in attacks if a.knows_recovery is knows and "ensemble" in a.strategy}
        for knows in (True, False)
    ]
    assert sides[0] == sides[1]


def test_the_suite_we_stand_by_has_autoattack_and_our_ensemble_on_both_sides() -> None:
    names = {attack.name for attack in SUITES["standard"].attacks}
    both = {f"{name}{side}" for name in ("autoattack", "ensemble", "pgd-20") for side in ("", "-recovered")}
    assert names >= {"fgsm", "pgd-10", "cw-30"} | both
    assert names <= {attack.name for attack in SUITES["full"].attacks}


def rows() -> Iterator[object]:
    for attack in ROWS.values():
        for norm in attack.norms:
            # A random search does not get all the way to the one corner of the ball that counts.
            if attack.strategy != "square-5000":
                yield pytest.param(attack, norm, id=f"{attack.name}-{norm}")


@pytest.mark.parametrize(("attack", "norm"), list(rows()))
def test_each_attack_finds_the_worst_case_of_a_linear_model(attack: Attack, norm: str) -> None:
    """The prediction of a two-class linear model flips at |margin| / ||w||, in the dual norm."""
    torch_generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, generator=torch_generator)
    x, y, margin = torch.full((1, 1, 3, 3), 0.5), torch.tensor([0]), 0.8
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).eval().requires_grad_(False)
    model[1].weight.copy_(torch.stack([-weight / 2, weight / 2]))
    offset = (margin + weight.sum() / 2) / 2
    model[1].bias.copy_(torch.stack([offset, -offset]))
    radius = margin / float(weight.double().norm(p=1 if norm == "linf" else 2))
    assert radius < 0.5, "the ball must stay inside of [0, 1], or the closed form is another"
    threat = ducat.ThreatModel(norm, radius * (1 + LOOSER.get((attack.strategy, norm), 1e-4)))
    found = attack.run(SilentDummies(model), x, y, threat, torch_generator)
    assert threat.allows(found, x).all()
    assert model(found).argmax(1) != y
