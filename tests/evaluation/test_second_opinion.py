"""A fault of the suite does not stay silent."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import ducat
from ducat.attacks.suites import Attack, Suite
from ducat.evaluation import second_opinion
from ducat.evaluation.audit import causes, find_warnings
from ducat.evaluation.second_opinion import plain_pgd
from ducat.evaluation.subject import Function

pytestmark = pytest.mark.slow

Templates = tuple[nn.Sequential, torch.Tensor, torch.Tensor]


def idle(model: nn.Module, x: torch.Tensor, *rest: object) -> torch.Tensor:
    return x


def test_a_suite_that_attacks_nothing_is_called_a_failure_of_ours(templates: Templates) -> None:
    model, x, y = templates
    suite = Suite((Attack("idle", False, idle), Attack("idle", True, idle)), name="idle")
    found = ducat.evaluate(model, x, y, ducat.ThreatModel(eps=0.09), suite, num_classes=4)
    assert found.suite == "idle"
    assert found.scrutiny.opinion is not None
    assert found.scrutiny.opinion.broken > 10
    assert found.warnings[0].startswith("a failure of ours: a plain PGD")
    assert found.at_most
    assert found.scrutiny.second_round is not None
    assert found.scrutiny.second_round.through
    assert "robust accuracy is an upper bound" in found.warnings[-1], "the second round settled it"
    assert 0.1 < found.robust.float().mean() < 0.8
    assert torch.equal(found.robust, found.clean & (model(found.adversarial).argmax(1) == y))


def test_images_of_eight_bits_are_tried_too(templates: Templates) -> None:
    """To a network that shrinks every change of an image off the steps of 1/255, stored images are the weak spot."""
    model, x, y = templates
    x = (x * 255).round() / 255

    class Shrinking(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            nearest = x[torch.cdist(images.flatten(1), x.flatten(1)).argmin(1)]
            stored = (images * 255 - (images * 255).round()).abs().flatten(1).amax(1) < 1e-3
            shrunk = nearest + 0.3 * (images - nearest)
            return model(torch.where(stored[:, None, None, None], images, shrunk))

    threat = ducat.ThreatModel(eps=0.12)
    found = ducat.evaluate(Shrinking(), x, y, threat, "light", num_classes=4)
    assert found.scrutiny.opinion is not None
    assert found.scrutiny.opinion.broken > 10
    assert found.at_most
    assert threat.allows(found.adversarial, x).all()


def roughness(images: torch.Tensor) -> torch.Tensor:
    return images.diff(dim=3).abs().mean((1, 2, 3))


def test_it_begins_at_smoothed_images_too(templates: Templates) -> None:
    """To a network that shrinks every change, but of images that are smoother than the benign one."""
    model, x, y = templates

    class Shrinking(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            nearest = x[torch.cdist(images.flatten(1), x.flatten(1)).argmin(1)]
            smooth = roughness(images) < 0.6 * roughness(nearest)
            shrunk = nearest + 0.2 * (images - nearest)
            return model(torch.where(smooth[:, None, None, None], images, shrunk))

    threat = ducat.ThreatModel(eps=0.15)
    found = ducat.evaluate(Shrinking(), x, y, threat, "light", num_classes=4)
    assert found.scrutiny.opinion is not None
    assert found.scrutiny.opinion.broken > 10
    assert found.warnings[0].startswith("a failure of ours: a plain PGD")
    assert threat.allows(found.adversarial, x).all()


def test_hard_steps_ask_for_a_second_round_which_settles_the_number(templates: Templates) -> None:
    model, x, y = templates
    harmless = Function(lambda images: model(torch.where(images > 0.5, images, images.clone())))
    found = ducat.evaluate(harmless, x, y, ducat.ThreatModel(eps=0.09), "light", num_classes=4)
    assert found.scrutiny.hard_steps
    assert found.scrutiny.second_round is not None
    assert found.scrutiny.second_round.through
    assert 0 < found.robust.float().mean() < 1
    assert not found.at_most
    assert not found.warnings
    unsettled = replace(found.scrutiny, second_round=replace(found.scrutiny.second_round, through=None))
    assert causes(replace(found, scrutiny=unsettled)) == ["the network has hard steps"]
    assert find_warnings(replace(found, scrutiny=unsettled))[0].startswith("hard steps: ")
    plain = ducat.evaluate(model, x, y, ducat.ThreatModel(eps=0.09), "light", num_classes=4)
    assert not plain.scrutiny.hard_steps
    assert plain.scrutiny.second_round is None
    assert torch.equal(plain.robust, found.robust)


def test_where_it_begins() -> None:
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []

    class Watched(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.detach())
            return torch.stack([0 * images.flatten(1).sum(1), 1 + 0 * images.flatten(1).sum(1)], 1)

    plain_pgd(Watched(), x, torch.ones(3, dtype=torch.long), "linf", 0.1, None, seed=0)
    begun = seen[:: second_opinion.STEPS + 1]
    assert len(begun) == 5
    assert torch.equal(begun[0], x)
    assert roughness(begun[2]).lt(0.9 * roughness(x)).all()
    torch.testing.assert_close(
        begun[2][0, 0, 4, 4], x[0, 0, 3:6, 3:6].mean().clamp(x[0, 0, 4, 4] - 0.1, x[0, 0, 4, 4] + 0.1)
    )
    torch.testing.assert_close(begun[3], x + (x.mean((1, 2, 3), keepdim=True) - x).clamp(-0.1, 0.1))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.5), ("l1", 9.0)])
def test_from_smoothed_images_it_goes_in_small_steps(norm: str, eps: float) -> None:
    x = 0.3 + 0.4 * torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    weight, seen = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1)), list[torch.Tensor]()

    class Watched(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.detach())
            lead = (weight * images).flatten(1).sum(1)
            return torch.stack([lead, 100 + 0 * lead], 1)

    plain_pgd(Watched(), x, torch.ones(3, dtype=torch.long), norm, eps, None, seed=0)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    for place in (2, 3):
        first, second = seen[place * (second_opinion.STEPS + 1) :][:2]
        length = (second - first).flatten(1).norm(p=order, dim=1)
        assert length.max() < eps / 4
        assert length.max() > eps / 100


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("l2", 0.7), ("l1", 9.0)])
def test_images_of_eight_bits_have_eight_bits_and_are_in_the_ball(norm: str, eps: float) -> None:
    x = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    seen: list[torch.Tensor] = []

    class Watched(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.detach())
            return torch.stack([images.flatten(1).sum(1), 1e3 + 0 * images.flatten(1).sum(1)], 1) * 1e-3

    found = plain_pgd(Watched(), x, torch.ones(6, dtype=torch.long), norm, eps, None, seed=0)
    assert torch.equal(found, (found * 255).round() / 255), "the last start is of 8 bits"
    assert not torch.equal(found, x)
    assert all(bool(ducat.ThreatModel(norm, eps).allows(images, x).all()) for images in seen)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 0.9), ("l1", 9.0)])
@pytest.mark.parametrize("recovery", [None, "max", "logsumexp"])
def test_it_comes_to_what_the_closed_form_allows(
    templates: Templates, norm: str, eps: float, recovery: str | None
) -> None:
    model, x, y = templates
    network = model if recovery is None else nn.Sequential(ducat.add_dummy_classes(model))
    found = plain_pgd(network, x, y, norm, eps, recovery, seed=0)
    threat = ducat.ThreatModel(norm, eps)
    assert threat.allows(found, x).all()
    logits = network(found) if recovery is None else ducat.recover(network(found), recovery)
    broken = (logits.argmax(1) != y).float().mean()
    ours = ducat.attacks.adaptive(
        network if recovery is None else ducat.RecoveredClassifier(network, recovery), x, y, threat, "quick"
    )
    logits = network(ours) if recovery is None else ducat.recover(network(ours), recovery)
    reached = (logits.argmax(1) != y).float().mean()
    assert reached > 0.3
    assert broken >= reached - (0.05 if norm != "l1" else 0.5)


def test_a_pass_that_cuts_nothing_off_leaves_no_graph_behind(templates: Templates) -> None:
    model, x, y = templates

    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * images.mean())
            return self.model(images)

    network = Averaging()
    found = ducat.evaluate(network, x, y, ducat.ThreatModel(eps=0.09), "light", num_classes=4)
    assert not found.scrutiny.hard_steps
    assert not network.mean.requires_grad
    assert network.mean == 0
