"""Each step that hides a gradient gets one, and each classifier inside a network is found."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ducat import models
from ducat.attacks.guides import (
    Inside,
    Mixture,
    Replaced,
    Rescaled,
    Softened,
    classifiers_inside,
    has_hard_steps,
    modules_within,
)
from ducat.attacks.pgd import pgd
from ducat.attacks.queries import decisions
from ducat.attacks.surrogate import distil
from ducat.threat import ThreatModel

Templates = tuple[nn.Sequential, torch.Tensor, torch.Tensor]


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


stored = Negated.apply  # kept before anything could be put in its place


class Net(nn.Module):
    def __init__(self, forward: Callable[["Net", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear, self.wide = nn.Linear(6, 3), nn.Linear(18, 3)
        self.do = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.do(self, x)


def under_no_grad(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = x * 0.9
    return net.linear(x)


def scattered(net: Net, x: torch.Tensor) -> torch.Tensor:
    logits = net.linear(x)
    return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)


def in_place(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.linear(x.clone().mul_(255).round_().div_(255))


LEVELS = torch.tensor([0.25, 0.5, 0.75])
# How a step hides the gradient, and the least cosine of what is passed instead with the plain network's gradient.
HIDDEN: dict[str, tuple[Callable[[Net, torch.Tensor], torch.Tensor], float]] = {
    "rounding": (lambda net, x: net.linear((7 * x).round() / 7), 0.99),
    "rounding in place": (in_place, 0.99),
    "8 bits": (lambda net, x: net.linear((255 * x).byte().float() / 255), 0.99),
    "8 bits, divided": (lambda net, x: net.linear((255 * x).to(torch.uint8) / 255), 0.99),
    "3 bits by shifts": (lambda net, x: net.linear((((255 * x).byte() >> 5) << 5).float() / 255), 0.99),
    "floor division": (lambda net, x: net.linear((x // 0.1) * 0.1), 0.99),
    "buckets": (lambda net, x: net.linear(torch.bucketize(x, LEVELS) / 3.0), 0.99),
    "detached": (lambda net, x: net.linear(x.detach()), 0.99),
    "data": (lambda net, x: net.linear(x.data), 0.99),
    "under no_grad": (under_no_grad, 0.99),
    "negated gradient": (lambda net, x: net.linear(Negated.apply(x)), 0.99),
    "negated gradient, stored": (lambda net, x: net.linear(stored(x)), 0.99),
    "one-hot": (lambda net, x: F.one_hot(net.linear(x).argmax(1), 3).float(), 0.5),
    "one-hot by max": (lambda net, x: F.one_hot(net.linear(x).max(1)[1], 3).float(), 0.5),
    "one-hot by indexing": (lambda net, x: torch.eye(3)[net.linear(x).argmax(1)], 0.5),
    "one-hot by scatter": (scattered, 0.5),
    "thermometer": (lambda net, x: net.wide((x[:, :, None] > LEVELS).float().flatten(1)), -1),
    "thermometer, flattened first": (lambda net, x: net.wide((x[:, :, None] > LEVELS).flatten(1).to(x)), -1),
    "where": (lambda net, x: net.linear(torch.where(x > 0.5, 1.0, 0.0)), 0.5),
    "both bounds": (lambda net, x: net.linear(((x > 0.2) & (x < 0.7)).float()), -1),
    "a switch": (lambda net, x: torch.where((x.amax(1) > 0.5)[:, None], net.linear(x), -net.linear(x)), 0.0),
    "filled": (lambda net, x: net.linear(x.masked_fill(x < 0.3, 0.0)), 0.5),
    "equality": (lambda net, x: net.linear(torch.where((7 * x).round() / 7 == 2 / 7, 1.0, x)), -1),
    "winners take all": (lambda net, x: net.linear(x * (x >= x.topk(3, 1).values[:, -1:])), 0.5),
}


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_gradient_is_found_and_the_outputs_stay(name: str, smooth: bool) -> None:
    forward, least = HIDDEN[name]
    net = Net(forward)
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    plain = torch.autograd.grad(net.linear(x)[:, 0].sum(), x)[0]
    softened = Softened(net, smooth)(x)
    torch.testing.assert_close(softened, net(x).float())
    gradient = torch.autograd.grad(softened[:, 0].sum(), x)[0]
    assert gradient.abs().max() > 0
    assert F.cosine_similarity(gradient.flatten(), plain.flatten(), dim=0) >= least


CONTINUOUS = {"detached", "data", "under no_grad", "negated gradient", "negated gradient, stored"}


@pytest.mark.parametrize("name", HIDDEN)
def test_steps_that_compare_round_or_pick_are_seen(name: str) -> None:
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    assert has_hard_steps(Net(HIDDEN[name][0]), x) == (name not in CONTINUOUS)


def branching(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.linear(x) if x.mean() > 0.5 else -net.linear(x)


def branching_on_a_number(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.linear(x) if x.mean().item() > 0.5 else -net.linear(x)


def branching_unrecorded(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        upper = (x.mean(1, keepdim=True) > 0.5).float()
    return upper * net.linear(x) - (1 - upper) * net.linear(x)


UNSOFTENED: list[Callable[[Net, torch.Tensor], torch.Tensor]] = [
    lambda net, x: net.linear(torch.where(x != x.flip(1), x, 0 * x)),
    lambda net, x: net.linear(x.heaviside(torch.zeros(())) if not x.requires_grad else x - F.hardshrink(x)),
    lambda net, x: net.linear(x.div(0.1, rounding_mode="floor")),
    lambda net, x: net.linear(x)[:, net.linear(x).argmin(1)],
    lambda net, x: net.linear(x.gather(1, x.argsort(1))),
    lambda net, x: net.linear(x.gather(1, x.argmax(1, keepdim=True).expand_as(x))),
    lambda net, x: net.linear(x.gather(1, x.topk(6, 1)[1])),
]


@pytest.mark.parametrize("forward", [branching, branching_on_a_number, branching_unrecorded, *UNSOFTENED])
def test_branches_are_hard_steps(forward: Callable[[Net, torch.Tensor], torch.Tensor]) -> None:
    assert has_hard_steps(Net(forward), torch.rand(4, 6, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    "model",
    [
        models.build("resnet8", 10, width=4),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Softmax(1)),
        nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 16, batch_first=True), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Hardtanh(), nn.Threshold(0.1, 0.0), nn.Dropout(0.5)),
    ],
)
def test_layers_as_others_have_them_are_none(model: nn.Module) -> None:
    assert not has_hard_steps(model.eval(), torch.rand(2, 3, 8, 8))


def test_softening_leaves_a_plain_network_its_gradient() -> None:
    net = Net(lambda net, x: net.linear(x).softmax(1))
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    plain, softened = (torch.autograd.grad(model(x)[:, 0].sum(), x)[0] for model in (net, Softened(net)))
    torch.testing.assert_close(softened, plain)


def test_a_replaced_module_keeps_its_value_and_passes_the_other_gradient(templates: Templates) -> None:
    model, x, _ = templates

    class Rounded(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (7 * images).round() / 7

    network = nn.Sequential(Rounded(), model)
    replaced = Replaced(network, {"0": lambda images: images})
    given = x.clone().requires_grad_()
    assert torch.equal(replaced(given), network(x))
    expected = torch.autograd.grad(model(given)[:, 0].sum(), given)[0]
    torch.testing.assert_close(torch.autograd.grad(replaced(given)[:, 0].sum(), given)[0], expected)
    with pytest.raises(ValueError, match="replacements='one': the model has no such module; it has"):
        Replaced(network, {"one": nn.Identity()})


class Two(nn.Module):
    """Classifiers of images: one that is asked, one that is not, one kept in a list, one in a closure."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        make = [nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 4)) for _ in range(4)]
        self.asked, self.spare, self.listed = make[0], make[1], [make[2]]
        hidden = make[3]
        self.function = lambda x: hidden(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.asked(x).softmax(1) + 0 * self.function(x)


def test_classifiers_inside_are_found_wherever_they_are(templates: Templates) -> None:
    x = templates[1]
    network = Two(x).eval()
    assert {"asked", "spare", "listed.0", "function.hidden"} <= {name for name, _ in modules_within(network)}
    found = dict(classifiers_inside(network, network, x[:2], 4))
    assert {"asked", "spare", "listed.0", "function.hidden"} <= set(found)
    assert torch.equal(found["asked"](x), network.asked(x))
    assert torch.equal(found["spare"](x), network.spare(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_network_cannot_be_listened_to_and_is_asked_directly() -> None:
    net = Net(lambda net, x: net.linear(x))
    scripted = torch.jit.script(nn.Sequential(nn.Sequential(net.linear), nn.ReLU()))
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    name, inside = classifiers_inside(scripted, scripted, x, 3)[0]
    assert name == "0"
    torch.testing.assert_close(inside(x), net.linear(x))


def test_a_plain_network_has_no_other_classifier_inside(templates: Templates) -> None:
    model, x, _ = templates
    assert classifiers_inside(model, model, x[:2], 4) == []
    wrapped = nn.Sequential(nn.Identity(), model)
    assert classifiers_inside(wrapped, wrapped, x[:2], 4) == []


def test_a_part_that_the_network_does_not_ask_is_said() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    with pytest.raises(RuntimeError, match="not asked for every image"):
        Inside(network, nn.Linear(1, 1))(torch.rand(2, 1, 3, 3))


def test_rescaling_and_mixing_change_no_decision(templates: Templates) -> None:
    model, x, _ = templates
    decisions_of = model(x).argmax(1)
    scaled = Rescaled(nn.Sequential(model, nn.Hardtanh(-1e9, 1e9)))
    assert torch.equal(scaled(x).argmax(1), decisions_of)
    assert torch.equal(Mixture([model, model], [0.3, 0.7], 2.0)(x).argmax(1), decisions_of)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 1.2)])
def test_decisions_alone_break_a_linear_network(templates: Templates, norm: str, eps: float) -> None:
    model, x, y = templates
    threat = ThreatModel(norm, eps)
    found = decisions(model, x, y, threat, torch.Generator().manual_seed(0), queries=1500)
    assert threat.allows(found, x).all()
    broken = (model(found).argmax(1) != y).float().mean()
    by_gradient = pgd(model, x, y, threat, keep="first", adaptive_steps=True)
    possible = (model(by_gradient).argmax(1) != y).float().mean()
    assert possible > 0.5
    assert broken >= 0.5 * possible


def test_a_distilled_surrogate_leads_to_images_that_fool_the_network(templates: Templates) -> None:
    model, x, y = templates
    threat = ThreatModel("linf", 0.15)

    def answers(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return F.one_hot(model(images).argmax(1), 4).float()

    class Hard(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return answers(images)

    state = torch.random.get_rng_state()
    student = distil(Hard(), x, y, threat, torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)
    found = pgd(student, x, y, threat, keep="last")
    assert (model(found).argmax(1) != y).float().mean() > 0.3
