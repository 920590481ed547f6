"""Each warning on a model that deserves it, and none on one that does not."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ducat
from ducat.attacks.adaptive import adaptive
from ducat.attacks.external import square
from ducat.attacks.suites import SUITES, Attack, Suite
from ducat.dummy import RecoveredClassifier

Templates = tuple[nn.Sequential, torch.Tensor, torch.Tensor]
THREAT = ducat.ThreatModel(eps=0.08)
SIGNS = {
    "sink gap": "sink gap of",
    "shortfall": "AutoAttack beats our",
    "unrepeatable": "were classified otherwise when they were looked at again",
    "gradients": "gradients vanish",
    "black box": "black-box beats white-box",
    "steps": "more steps do not lower accuracy",
    "eps": "a larger eps does not lower accuracy",
    "far": "accuracy does not fall to 0",
}


@pytest.fixture(autouse=True)
def cheap_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite of the ensemble and of an AutoAttack that is cut down to its black-box part."""

    def ensemble(model: nn.Module, x: torch.Tensor, *rest: object) -> torch.Tensor:
        y, threat, generator = rest
        return adaptive(RecoveredClassifier(model), x, y, threat, "quick", generator)

    def queries(model: nn.Module, x: torch.Tensor, *rest: object) -> torch.Tensor:
        return square(RecoveredClassifier(model), x, *rest, queries=200)

    attacks = [
        Attack(strategy, knows_recovery, run, black_box=run is queries)
        for knows_recovery in (False, True)
        for strategy, run in (("ensemble", ensemble), ("autoattack", queries))
    ]
    monkeypatch.setitem(SUITES, "standard", Suite(tuple(attacks)))


def warnings(model: nn.Module, x: torch.Tensor, y: torch.Tensor, threat: ducat.ThreatModel = THREAT) -> set[str]:
    found = ducat.evaluate(model, x, y, threat, num_classes=4).warnings
    for warning in found:
        assert re.search(r"\d", warning), "a warning names what was seen"
    matched = [[name for name, text in SIGNS.items() if text in warning] for warning in found]
    assert all(len(names) == 1 for names in matched)
    return {names[0] for names in matched}


class Before(nn.Module):
    """A linear classifier behind a function of its images."""

    def __init__(self, model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(self.function(x))


def with_gradient(x: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """Return x, whose gradient is multiplied."""
    return x.detach() + factor * (x - x.detach())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_honest_model_gets_no_warning(templates: Templates, norm: str) -> None:
    threat = ducat.ThreatModel(norm, {"linf": 0.08, "l2": 0.6}[norm])
    evaluation = ducat.evaluate(*templates, threat, num_classes=4)
    assert 0.1 < evaluation.robust.float().mean() < 0.9, "the test wants a model that attacks break in part"
    assert evaluation.warnings == []


def test_an_honest_model_with_dummy_classes_gets_no_warning(templates: Templates) -> None:
    model, x, y = templates
    assert warnings(ducat.add_dummy_classes(model), x, y) == set()


def test_a_dummy_sink_is_named(templates: Templates) -> None:
    model, x, y = templates

    class Sink(nn.Module):
        """Its dummy classes win as soon as an image of the test is disturbed, each over its own real class."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            real = model(images)
            nearest = torch.cdist(images.flatten(1), x.flatten(1), p=1).amin(1, keepdim=True)
            return torch.cat([real, real - 0.01 + 10 * nearest], dim=1)

    assert warnings(Sink(), x, y) == {"sink gap"}


def test_gradients_that_are_zero_are_named_and_all_that_follows(templates: Templates) -> None:
    """Rounding to five levels of grey hides the gradient; a random search sees through it."""
    model, x, y = templates
    assert warnings(Before(model, lambda image: torch.round(4 * image) / 4), x, y) >= {
        "gradients",
        "black box",
        "far",
    }


def test_gradients_that_vanish_in_a_saturated_softmax_are_named(templates: Templates) -> None:
    model, x, y = templates
    assert warnings(nn.Sequential(model, Scale(1e4)), x, y) == {"gradients", "eps"}


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def test_gradients_that_point_away_are_named(templates: Templates) -> None:
    model, x, y = templates
    pointing_away = Before(model, lambda image: with_gradient(image, -1.0))
    assert warnings(pointing_away, x, y, ducat.ThreatModel(eps=0.15)) >= {"black box", "eps", "far", "shortfall"}


def test_a_loss_surface_on_which_more_steps_do_worse_is_named(templates: Templates) -> None:
    """The gradient points the right way in the middle of the ball only: one long step passes, small ones turn back."""
    model, x, y = templates

    def turning(image: torch.Tensor) -> torch.Tensor:
        distance = torch.cdist(image.flatten(1), x.flatten(1), p=1).amin(1) / 64
        return with_gradient(image, torch.where(distance > 0.7 * 0.15, -1.0, 1.0).view(-1, 1, 1, 1))

    assert "steps" in warnings(Before(model, turning), x, y, ducat.ThreatModel(eps=0.15))


def test_a_random_model_is_named(templates: Templates) -> None:
    model, x, y = templates
    noise = torch.Generator().manual_seed(0)
    noisy = Before(model, lambda image: image + 0.2 * torch.randn(image.shape, generator=noise))
    assert "unrepeatable" in warnings(noisy, x, y)
