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

pytestmark = pytest.mark.slow

Templates = tuple[nn.Sequential, torch.Tensor, torch.Tensor]
THREAT = ducat.ThreatModel(eps=0.08)
SIGNS = {
    "sink gap": "sink gap of",
    "shortfall": "AutoAttack beats our",
    "unrepeatable": "saved adversarial images were classified otherwise",
    "gradients": "gradients vanish",
    "black box": "black-box beats white-box",
    "steps": "more steps do not lower accuracy",
    "eps": "a larger eps does not lower accuracy",
    "far": "accuracy does not fall to 0",
    "guided": "other gradients beat the network's own",
    "random": "the network is random",
    "second round": "a second round of",
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
    assert all(len(names) == 1 for names in matched), found
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


def test_gradients_that_are_zero_are_named_and_the_second_round_breaks_what_they_hide(templates: Templates) -> None:
    """Rounding to five levels of grey hides the gradient; the straight-through gradient finds the way."""
    model, x, y = templates[0], templates[1][:20], templates[2][:20]
    rounded = Before(model, lambda image: torch.round(4 * image) / 4)
    evaluation = ducat.evaluate(rounded, x, y, THREAT, num_classes=4)
    named = {name for warning in evaluation.warnings for name, text in SIGNS.items() if text in warning}
    assert named >= {"gradients", "black box", "far", "guided", "second round"}
    assert evaluation.at_most
    assert "gradients vanish" in evaluation.causes
    second = evaluation.scrutiny.second_round
    assert second is not None
    assert sum(second.broken.values()) > 2
    # Each level may be pushed as far as the ball reaches: the best of all signs, tried in full on every pixel.
    gradient = model[1].weight[None] - model[1].weight[:, None]
    worst = torch.zeros(len(y), dtype=torch.bool)
    for k in range(4):
        towards = torch.stack([gradient[label, k] for label in y]).view_as(x)
        pushed = (x + THREAT.eps * towards.sign()).clamp(0, 1)
        worst |= rounded(pushed).argmax(1) != y
    assert (evaluation.robust.float().mean() - (~worst).float().mean()) <= 0.06


def test_a_saturated_softmax_is_seen_through_and_gets_no_warning(templates: Templates) -> None:
    """Its cross-entropy has no gradient; rescaled, the same decisions are measured as those of the plain network."""
    model, x, y = templates
    plain = ducat.evaluate(model, x, y, THREAT, num_classes=4)
    scaled = ducat.evaluate(nn.Sequential(model, Scale(1e4)), x, y, THREAT, num_classes=4)
    assert scaled.audit is not None
    assert scaled.audit.vanishing["recovered-cross-entropy"] > 10
    assert torch.equal(scaled.robust, plain.robust)
    assert scaled.warnings == []
    assert not scaled.at_most


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def test_gradients_that_point_away_are_named(templates: Templates) -> None:
    model, x, y = templates
    pointing_away = Before(model, lambda image: with_gradient(image, -1.0))
    assert warnings(pointing_away, x, y, ducat.ThreatModel(eps=0.15)) >= {"eps", "far", "second round"}


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
    assert "random" in warnings(noisy, x, y)


def test_a_blind_ensemble_that_stops_at_the_dummy_class_needs_no_work(templates: Templates) -> None:
    """AutoAttack on raw outputs ends elsewhere than our blind ensemble; what either leaves measures no strength."""
    model, x, y = templates

    class Sink(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            real = model(images)
            return torch.cat([real, real + 0.1], dim=1)

    assert "shortfall" not in warnings(Sink(), x, y)


def test_what_nothing_can_reach_is_an_upper_bound(templates: Templates) -> None:
    """A network that computes in NumPy passes no gradient, and no part of it is a module."""
    model, x, y = templates
    w, b = model[1].weight.detach().numpy(), model[1].bias.detach().numpy()

    def forward(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(images.detach().flatten(1).numpy() @ w.T + b)

    plain = ducat.evaluate(model, x, y, THREAT, num_classes=4)
    hidden = ducat.evaluate(forward, x, y, THREAT, num_classes=4)
    assert hidden.at_most
    assert not hidden.scrutiny.nature
    assert float(hidden.robust.float().mean()) <= float(plain.robust.float().mean()) + 0.05
    assert "an upper bound" in " ".join(hidden.warnings)
