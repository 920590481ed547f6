import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ducat
from ducat.attacks import external

pytestmark = pytest.mark.slow

ATTACKS = [
    (external.autoattack, "linf"),
    (external.autoattack, "l2"),
    (external.autoattack, "l1"),
    (external.square, "linf"),
    (external.square, "l2"),
    (external.square, "l1"),
    (external.carlini_wagner, "l2"),
    (external.ddn, "l2"),
]
EPS = {"linf": 0.05, "l2": 0.4, "l1": 2.0}


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut AutoAttack's own budgets, whose size these tests are not about."""
    from pyautoattack import AutoAttack

    set_version = AutoAttack._set_version

    def small(self: AutoAttack, version: str) -> None:
        set_version(self, version)
        self.square.n_queries, self.apgd.n_iter, self.apgd_targeted.n_iter, self.fab.n_iter = 20, 10, 5, 5

    monkeypatch.setattr(AutoAttack, "_set_version", small)


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_images_stay_in_the_ball_and_nothing_else_changes(
    attack: Callable[..., torch.Tensor], norm: str, network: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> None:
    threat = ducat.ThreatModel(norm, EPS[norm])
    network.train()
    state, kept, traced = torch.random.get_rng_state(), images.clone(), []

    def trace(frame: object, event: str, argument: object) -> None:
        traced.append(event)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        first = attack(network, images, labels, threat, torch.Generator().manual_seed(1))
        assert sys.gettrace() is trace, "debuggers and coverage lose sight"
    finally:
        sys.settrace(before)
    second = attack(network, images, labels, threat, torch.Generator().manual_seed(1))
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert threat.allows(first, images).all()
    assert torch.equal(images, kept)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_a_network_that_seeds_the_global_generator_does_not_repeat_the_attacks_draws(
    attack: Callable[..., torch.Tensor], norm: str, network: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> None:
    class Seeding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(0)
            logits: torch.Tensor = network(x)
            return logits

    network.eval()
    threat = ducat.ThreatModel(norm, EPS[norm] / 2)
    found = [attack(model, images, labels, threat, torch.Generator().manual_seed(1)) for model in (network, Seeding())]
    assert torch.equal(*found)


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_no_images_are_no_error(
    attack: Callable[..., torch.Tensor], norm: str, network: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> None:
    assert attack(network, images[:0], labels[:0], ducat.ThreatModel(norm, EPS[norm])).shape == (0, 3, 6, 6)


def test_square_in_l1_says_that_it_needs_five_pixels(images: torch.Tensor, labels: torch.Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    threat = ducat.ThreatModel("l1", 2.0)
    with pytest.raises(ValueError, match=r"at least 5 pixels a side, not \(4, 4\)"):
        external.square(model, images[..., :4, :4], labels, threat)
    assert threat.allows(external.autoattack(model, images[..., :4, :4], labels, threat), images[..., :4, :4]).all()


@pytest.mark.parametrize("attack", [external.carlini_wagner, external.ddn])
def test_l2_attacks_refuse_another_norm(
    attack: Callable[..., torch.Tensor], network: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="measures distances in l2, but the threat model is linf"):
        attack(network, images, labels, ducat.ThreatModel())


@pytest.mark.parametrize("classes", [2, 3, 4, 12])
def test_autoattack_takes_any_number_of_classes(classes: int, images: torch.Tensor) -> None:
    torch_generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, classes))
    with torch.no_grad():
        model[1].weight.normal_(generator=torch_generator)
        model[1].bias.zero_()
    y = model(images).argmax(1)
    found = external.autoattack(model, images, y, ducat.ThreatModel(eps=0.2), torch_generator)
    assert (model(found).argmax(1) != y).all()
