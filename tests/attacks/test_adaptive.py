from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

import ducat
from ducat.attacks.adaptive import BUDGETS, TARGETED, Round, SilentDummies, with_dummy_classes
from ducat.attacks.objectives import OBJECTIVES

THREATS = [ducat.ThreatModel("linf", 0.1), ducat.ThreatModel("l2", 0.7), ducat.ThreatModel("l1", 3.0)]


def attack(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, threat: ducat.ThreatModel, **kwargs: str
) -> torch.Tensor:
    return ducat.attacks.adaptive(model, x, y, threat, generator=torch.Generator().manual_seed(0), **kwargs)


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_objective_of_a_budget_knows_recovery(budget: str) -> None:
    plain = [each for each in BUDGETS[budget] if each.objective != TARGETED]
    assert all(OBJECTIVES[each.objective].knows_recovery and not each.targets for each in plain)
    assert all(each.targets for each in BUDGETS[budget] if each.objective == TARGETED)
    assert all(0 < each.share <= 1 for each in BUDGETS[budget])


@pytest.mark.parametrize("threat", THREATS, ids=["linf", "l2", "l1"])
def test_images_stay_in_the_ball_and_are_reproducible(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, threat: ducat.ThreatModel
) -> None:
    state = torch.random.get_rng_state()
    deployed = ducat.RecoveredClassifier(network)
    found = attack(deployed, images, labels, threat, budget="quick")
    assert threat.allows(found, images).all()
    assert torch.equal(found, attack(deployed, images, labels, threat, budget="quick"))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_benign_image_that_is_wrong_already_stays_as_it_is(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> None:
    deployed = ducat.RecoveredClassifier(network).eval()
    wrong = deployed(images).argmax(1) != labels
    assert 0 < wrong.sum() < len(images)
    found = attack(deployed, images, labels, THREATS[0], budget="quick")
    assert torch.equal(found[wrong], images[wrong])


class Sink(nn.Module):
    """A linear classifier of brightness with two classes, whose dummy classes win as soon as a pixel leaves a grid.

    The recovered prediction is the linear one, whatever the dummy classes do.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        brightness = x.flatten(1).mean(1)
        real = torch.stack([0.5 - brightness, brightness - 0.5], dim=1)
        disturbance = (x.flatten(1) - 0.4).abs().mean(1, keepdim=True)
        return torch.cat([real, real + 50 * disturbance - 0.01], dim=1)


def test_it_gets_past_a_dummy_class_that_stops_a_blind_attack() -> None:
    x, y = torch.full((4, 1, 4, 4), 0.4), torch.zeros(4, dtype=torch.long)
    threat = ducat.ThreatModel(eps=0.11)
    deployed = ducat.RecoveredClassifier(Sink())
    blind = ducat.attacks.adaptive(
        ducat.RecoveredClassifier(SilentDummies(Sink())), x, y, threat, generator=torch.Generator().manual_seed(0)
    )
    assert (deployed(blind).argmax(1) == y).all()
    assert (Sink()(blind).argmax(1) == y + 2).all(), "the blind attacker thinks it has won"
    assert (deployed(attack(Sink(), x, y, threat)).argmax(1) == 0).all(), "a bare network counts as a plain classifier"
    assert (deployed(attack(deployed, x, y, threat)).argmax(1) != y).all()


def test_a_network_with_a_dummy_head_is_attacked_as_deployed() -> None:
    x = torch.rand(2, 1, 4, 4)
    model = ducat.add_dummy_classes(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    assert with_dummy_classes(model, x) is model
    assert with_dummy_classes(ducat.RecoveredClassifier(model), x) is model
    assert isinstance(with_dummy_classes(nn.Linear(4, 3), x), SilentDummies)


def test_what_hides_a_dummy_head_behind_a_forward_of_its_own_is_attacked_as_what_it_is() -> None:
    x = torch.rand(2, 1, 4, 4)
    model = ducat.add_dummy_classes(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))

    class Own(ducat.RecoveredClassifier):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return -super().forward(images)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return ducat.recover(self.inside(images))

    for wrapper in (Own(model), Hidden()):
        view = with_dummy_classes(wrapper, x)
        assert isinstance(view, SilentDummies)
        assert torch.equal(ducat.recover(view(x)), wrapper(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["max", "logsumexp"])
def test_silent_dummies_change_neither_outputs_nor_gradients(dtype: torch.dtype, how: str) -> None:
    z = (1e3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    recovered = ducat.recover(SilentDummies(nn.Identity())(z), how)
    assert torch.equal(recovered, z)
    (gradient,) = torch.autograd.grad(recovered.float().logsumexp(1).sum(), z)
    assert torch.allclose(gradient, z.float().softmax(1).to(dtype))


@pytest.mark.parametrize(
    ("images_in", "logits_in"),
    [(torch.float32, torch.float64), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("recovered", [False, True])
def test_logits_may_be_wider_than_the_images(
    templates: tuple[nn.Sequential, torch.Tensor, torch.Tensor],
    images_in: torch.dtype,
    logits_in: torch.dtype,
    recovered: bool,
) -> None:
    model, x, y = templates
    x, threat = x.to(images_in), ducat.ThreatModel(eps=0.09)

    class Wide(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = model(images.float()).to(logits_in)
            return torch.cat([logits, logits - 1], 1) if recovered else logits

    network = ducat.RecoveredClassifier(Wide(), "logsumexp") if recovered else Wide()
    expected = model(attack(model, x.float(), y, threat)).argmax(1) == y
    found = model(attack(network, x, y, threat).float()).argmax(1) == y
    assert 0.2 < expected.float().mean() < 0.8
    assert abs(found.float().mean() - expected.float().mean()) < 0.03


@pytest.mark.parametrize("budget", ["quick", "standard"])
def test_a_network_that_masks_classes_by_minus_infinity_is_attacked(
    templates: tuple[nn.Sequential, torch.Tensor, torch.Tensor], budget: str
) -> None:
    model, x, y = templates
    masked = nn.Sequential(model, nn.ConstantPad1d((0, 2), -torch.inf))
    threat = ducat.ThreatModel(eps=0.09)
    plain, found = (attack(network, x, y, threat, budget=budget) for network in (model, masked))
    assert (model(plain).argmax(1) != y).any()
    assert torch.equal(masked(found).argmax(1) == y, model(plain).argmax(1) == y)


class Classes(nn.Module):
    """Brightness decides among four classes; it records the brightness of the images in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        brightness = x.flatten(1).mean(1)
        self.seen.append([round(value, 3) for value in brightness.tolist()])
        return torch.stack([0.5 - brightness, brightness - 0.5, brightness - 0.65, brightness - 1.5], dim=1)


def attack_darker_and_darker(monkeypatch: pytest.MonkeyPatch, *rounds: Round) -> list[list[float]]:
    """Attack five images with a ball of 0: one is wrong already, none is broken, and the brightest are the closest."""
    monkeypatch.setitem(BUDGETS, "standard", rounds)
    x, model = torch.tensor([0.1, 0.3, 0.2, 0.6, 0.4]).view(5, 1, 1, 1), Classes()
    attack(model, x, torch.zeros(5, dtype=torch.long), ducat.ThreatModel(eps=0.0))
    return model.seen


def test_later_rounds_attack_only_the_closest_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = (Round("recovered-margin", 1), Round("weighted-pair", 1, share=0.4))
    seen = [set(brightness) for brightness in attack_darker_and_darker(monkeypatch, *rounds)]
    assert seen[0] == {0.1, 0.3, 0.2, 0.6, 0.4}
    assert seen[1] == {0.1, 0.3, 0.2, 0.4}, "a sample that is wrong already is not attacked"
    assert seen[-1] == {0.4, 0.3}


def test_a_targeted_round_attacks_the_closest_pairs_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attack_darker_and_darker(monkeypatch, Round(TARGETED, 1, restarts=2, share=0.5, targets=2))
    # The 4 closest of 8 pairs are 0.4 and 0.3, each with classes 1 and 2: 2 starts make 8 rows, 5 at a time.
    batches = [brightness for brightness in seen[1:] if brightness]
    assert {len(brightness) for brightness in batches} == {5, 3}
    assert {each for brightness in batches for each in brightness} == {0.4, 0.3}


def test_a_sample_broken_by_one_target_is_not_attacked_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "standard", (Round(TARGETED, 3, restarts=3, targets=3),))
    x, model = torch.full((1, 1, 1, 1), 0.4), Classes()
    found = attack(model, x, torch.zeros(1, dtype=torch.long), ducat.ThreatModel(eps=0.2))
    assert model(found).argmax(1).item() == 1
    assert len(model.seen) <= 1 + 1 + 4 + 1 + 1, "the benign image twice, one short attack, the found image"


def test_the_image_that_came_closest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which starts of one sample come back."""
    monkeypatch.setitem(BUDGETS, "standard", (Round(TARGETED, 1, restarts=4, targets=3),))
    x, model = torch.tensor([0.1, 0.2]).view(2, 1, 1, 1), Classes()
    found = attack(model, x, torch.zeros(2, dtype=torch.long), ducat.ThreatModel(eps=0.1))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.2, 0.3]))


def test_a_network_that_is_not_finite_somewhere_is_broken_there(network: nn.Module, images: torch.Tensor) -> None:
    network.eval()

    class Overflowing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            far = torch.cdist(x.flatten(1), images.flatten(1), p=1).amin(1) / images[0].numel() > 0.02
            return torch.where(far[:, None], torch.nan, network(x))

    hidden = ducat.RecoveredClassifier(Overflowing())
    labels = hidden(images).argmax(1)
    assert hidden(images).isfinite().all()
    found = hidden(attack(hidden, images, labels, THREATS[0], budget="quick"))
    assert ((found.argmax(1) != labels) | ~found.isfinite().all(1)).all()


def test_an_unknown_budget_is_named(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="budget 'huge' is unknown: choose from quick, light, standard, full"):
        attack(network, images, labels, THREATS[0], budget="huge")


@pytest.mark.parametrize("arguments", [("weighted-pair", 20, 1, 1.0, 9), ("targeted-pair", 20)])
def test_a_round_says_one_thing(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="'targeted' ones alone take targets"):
        Round(*arguments)


@pytest.mark.parametrize("threat", THREATS, ids=["linf", "l2", "l1"])
def test_only_in_l1_a_start_comes_through_larger_balls(
    network: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    threat: ducat.ThreatModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[float, int]] = []

    def recorded(model, x, y, ball, goal, restarts, generator, *, start, **options):
        assert start is None or ball.allows(start, x).all()
        seen.append((ball.eps / threat.eps, ball.steps))
        return ball.random_start(x, generator) if start is None else start

    module = import_module("ducat.attacks.adaptive")  # the package has the function by that name
    monkeypatch.setattr(module, "pgd", recorded)
    ball, goal = replace(threat, steps=20), OBJECTIVES["recovered-margin"]
    found = module.ascended(network, images, labels, ball, goal, torch.Generator().manual_seed(0))
    assert threat.allows(found, images).all()
    assert seen == ([(3, 6), (2, 6), (1, 8)] if threat.norm == "l1" else [(1, 20)])
