import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import ducat
from ducat.attacks.adaptive import SilentDummies
from ducat.attacks.suites import SUITES, Attack

pytestmark = pytest.mark.slow

ROWS = {attack.name: attack for suite in SUITES.values() for attack in suite.attacks}
# Plain projected steps in l2 turn towards the gradient by a fixed factor each: so few do not get all the way.
PROJECTED_STEPS = {"pgd-10": 10, "pgd-20": 20, "pgd-20-targeted": 20}


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


def falls_short(attack: Attack, norm: str) -> bool:
    return norm == "l2" and attack.strategy in PROJECTED_STEPS


def rows() -> Iterator[object]:
    for attack in ROWS.values():
        for norm in attack.norms:
            # A random search does not get all the way to the one corner of the ball that counts.
            if attack.strategy != "square-5000" and not falls_short(attack, norm):
                yield pytest.param(attack, norm, id=f"{attack.name}-{norm}")


class Linear:
    """A linear model of two classes and an image whose prediction flips at |margin| / ||w||, in the dual norm."""

    def __init__(self, norm: str) -> None:
        self.norm = norm
        weight = torch.randn(9, generator=torch.Generator().manual_seed(0))
        self.x, self.y, margin = torch.full((1, 1, 3, 3), 0.5), torch.tensor([0]), 0.8
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).eval().requires_grad_(False)
        self.model[1].weight.copy_(torch.stack([-weight / 2, weight / 2]))
        offset = (margin + weight.sum() / 2) / 2
        self.model[1].bias.copy_(torch.stack([offset, -offset]))
        self.length = float(weight.double().norm(p={"linf": 1, "l2": 2, "l1": math.inf}[norm]))
        self.ascent = weight.double() / self.length  # in l2
        self.flip = margin / self.length

    def is_broken_by(self, attack: Attack, radius: float) -> bool:
        assert radius < 0.5, "the ball must stay inside of [0, 1], or the closed form is another"
        threat = ducat.ThreatModel(self.norm, radius)
        found = attack.run(SilentDummies(self.model), self.x, self.y, threat, torch.Generator().manual_seed(1))
        assert threat.allows(found, self.x).all()
        return bool(self.model(found).argmax(1) != self.y)


@pytest.mark.parametrize(("attack", "norm"), list(rows()))
def test_each_attack_finds_the_worst_case_of_a_linear_model(attack: Attack, norm: str) -> None:
    linear = Linear(norm)
    # In l1 AutoAttack ends with steps of a tenth of eps, and seldom meets the one pixel that counts exactly.
    slack = 0.05 if (attack.strategy, norm) == ("autoattack", "l1") else 1e-4
    assert linear.is_broken_by(attack, (1 + slack) * linear.flip)


@pytest.mark.parametrize(
    "attack", [each for each in ROWS.values() if falls_short(each, "l2")], ids=lambda each: each.name
)
def test_projected_steps_get_as_far_as_their_closed_form_says(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """In l2 only the part of the change along w and the length of the rest count, and both can be worked out."""
    linear, starts = Linear("l2"), []
    random_start = ducat.ThreatModel.random_start

    def recorded(self: ducat.ThreatModel, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        start = random_start(self, x, generator)
        starts.append((start - x).flatten().double() / self.eps)
        return start

    monkeypatch.setattr(ducat.ThreatModel, "random_start", recorded)
    linear.is_broken_by(attack, linear.flip)
    (start,) = starts
    along = float(start @ linear.ascent)
    across = float((start - along * linear.ascent).norm())
    reached = along
    for _ in range(PROJECTED_STEPS[attack.strategy]):
        along += 15 / 128  # of the radius, the default step
        length = max(1.0, math.hypot(along, across))
        along, across = along / length, across / length
        reached = max(reached, along)
    radius = linear.flip / reached
    assert linear.is_broken_by(attack, (1 + 1e-4) * radius)
    assert not linear.is_broken_by(attack, (1 - 1e-4) * radius)
