"""What people bring, and what kind of function it is."""

import contextlib
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ducat
from ducat.evaluation.subject import Function, State, classifier, examine, images_and_labels

pytestmark = pytest.mark.slow

Templates = tuple[nn.Sequential, torch.Tensor, torch.Tensor]
THREAT = ducat.ThreatModel(eps=0.09)


class Net(nn.Module):
    """A network around a linear one, whose forward is a function of both."""

    def __init__(self, inside: nn.Module, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.inside, self.do = inside, forward
        self.asked, self.seen = 0, []
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        return self.do(self, x)


def under_no_grad(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.inside(x)


def evaluate(model: Any, x: Any, y: Any, suite: str = "quick", **settings: Any) -> ducat.Evaluation:
    return ducat.evaluate(model, x, y, THREAT, suite, **{"num_classes": 4, **settings})


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: (net.inside(x), x),
        lambda net, x: {"logits": net.inside(x)},
        lambda net, x: SimpleNamespace(logits=net.inside(x)),
        lambda net, x: net.inside(x.sub_(0.0).mul_(1.0)),
        lambda net, x: net.inside(x).bfloat16().double(),
    ],
)
def test_the_same_network_in_other_forms_gets_the_same_number(
    templates: Templates, forward: Callable[[Net, torch.Tensor], Any]
) -> None:
    model, x, y = templates
    kept = x.clone()
    expected = evaluate(model, x, y).robust.float().mean()
    assert abs(evaluate(Net(model, forward), x, y).robust.float().mean() - expected) <= 0.03
    assert torch.equal(x, kept), "the caller's images are not changed"


def test_functions_and_fixed_batch_sizes_are_taken(templates: Templates) -> None:
    model, x, y = templates
    expected = evaluate(model, x, y).robust
    assert torch.equal(evaluate(lambda images: model(images), x, y).robust, expected)
    fixed = Net(model, lambda net, images: net.inside(images.view(40, 1, 8, 8)))
    assert torch.equal(evaluate(fixed, x, y).robust, expected)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_function_that_detaches_its_images_is_taken(templates: Templates, trainable: bool) -> None:
    model, x, y = templates
    model.requires_grad_(trainable)
    hidden = [torch.ones(4, requires_grad=trainable)]
    found = evaluate(lambda images: model(images.detach()) * hidden[0], x, y)
    assert found.clean.float().mean() > 0.9
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_network_that_refuses_small_batches_by_a_value_error_gets_full_ones(templates: Templates) -> None:
    model, x, y = templates

    def whole(images: torch.Tensor) -> torch.Tensor:
        if len(images) != 40:
            raise ValueError("Expected more than 1 value per channel when training")
        return model(images)

    assert torch.equal(evaluate(whole, x, y).robust, evaluate(model, x, y).robust)
    with pytest.raises(ValueError, match=r"the network returns shape \(1, 1, 8, 8\): logits have shape"):
        evaluate(lambda images: images, x, y)


def test_images_that_meet_are_seen_where_a_network_takes_one_size_of_batch_alone(templates: Templates) -> None:
    model, x, y = templates

    def company(images: torch.Tensor) -> torch.Tensor:
        assert len(images) == 40
        benign = (images[:, None] == x[None]).flatten(2).all(2).any(1)
        # An adversarial image among benign ones meets the network, many of them meet another that withstands.
        return model(images if int((~benign).sum()) < 3 else images.round(decimals=0))

    found = evaluate(company, x, y)
    assert found.scrutiny.nature == ["batch-dependent"]
    assert found.at_most
    assert "it takes 40 images at a time alone" in " ".join(found.warnings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_attacked_like_float32(templates: Templates, dtype: torch.dtype) -> None:
    model, x, y = templates
    expected = evaluate(model, x.to(dtype).float(), y).robust.float().mean()
    found = evaluate(model.to(dtype), x.to(dtype), y).robust.float().mean()
    model.float()
    assert abs(found - expected) <= 0.03


@pytest.mark.parametrize(
    "form",
    [
        lambda y: y.int(),
        lambda y: y.byte(),
        lambda y: y.float(),
        lambda y: y[:, None],
        lambda y: y.numpy(),
        lambda y: y.tolist(),
        lambda y: y.numpy().astype(np.uint8),
    ],
)
def test_labels_come_in_many_forms(templates: Templates, form: Callable[[torch.Tensor], Any]) -> None:
    _, x, y = templates
    assert torch.equal(images_and_labels(x, form(y), 4)[1], y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, nn.functional.one_hot(y)), r"one-hot labels become whole numbers by y.argmax\(1\)"),
        (lambda x, y: (x, y + 0.5), "not all whole numbers"),
        (lambda x, y: ((x * 255).byte(), y), r"give floating point numbers in \[0, 1\]"),
        (lambda x, y: (x[:, 0], y), r"must be \(samples, channels, height, width\)"),
        (lambda x, y: (x, y[:-1]), "40 images but 39 labels"),
        (lambda x, y: (x + 0.1, y), r"must be in \[0, 1\]"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(templates: Templates, change: Callable[..., Any], message: str) -> None:
    _, x, y = templates
    with pytest.raises(ValueError, match=message) as caught:
        images_and_labels(*change(x, y), 4)
    assert "\n" not in str(caught.value)


def test_a_network_that_fails_is_named_before_the_first_attack(templates: Templates) -> None:
    _, x, y = templates
    said: list[str] = []
    with pytest.raises(ValueError, match=r"the model fails on images of shape \(1, 8, 8\): RuntimeError"):
        evaluate(nn.Linear(9, 4), x, y, progress=said.append)
    assert said == []


def test_outputs_that_are_not_finite_are_found_on_every_image(templates: Templates) -> None:
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        broken = (images == x[33]).flatten(1).all(1)
        return torch.where(broken[:, None], torch.nan, net.inside(images))

    with pytest.raises(ValueError, match="not finite, first on benign image 33"):
        evaluate(Net(model, forward), x, y)


def test_classes_masked_by_minus_infinity_are_to_be_masked_by_a_low_number(templates: Templates) -> None:
    model, x, y = templates
    with pytest.raises(ValueError, match=r"first on benign image 0: some classes are at minus infinity.*-1e4 instead"):
        evaluate(nn.Sequential(model, nn.ConstantPad1d((0, 2), -torch.inf)), x, y, num_classes=6)
    low = evaluate(nn.Sequential(model, nn.ConstantPad1d((0, 2), -1e4)), x, y, num_classes=6)
    assert torch.equal(low.robust, evaluate(model, x, y).robust)


def test_outputs_that_are_not_finite_under_attack_count_as_wrong(templates: Templates) -> None:
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        moved = torch.cdist(images.flatten(1), x.flatten(1)).amin(1) > 0.3
        return torch.where(moved[:, None], torch.nan, net.inside(images))

    found = evaluate(Net(model, forward), x, y)
    assert not found.robust.any()
    assert any("are not finite; they count as wrong" in warning for warning in found.warnings)


def nature(model: nn.Module, templates: Templates) -> Any:
    x = templates[1]
    network = classifier(model, x, 40)
    return examine(network, x, None, THREAT, torch.Generator().manual_seed(0), len(x))


def drifts(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.asked += 1
    return net.inside(x) * (1 if net.asked % 2 else -1)


def remembers(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.seen.append(x.mean())
    return net.inside(x) + 10 * len(net.seen) * torch.eye(4)[0]


def moves(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.shift += 1
    return net.inside(x + net.shift)


def learns(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for weight in net.inside.parameters():
            weight.add_(1)
    return net.inside(x)


def replaces(net: Net, x: torch.Tensor) -> torch.Tensor:
    for module in net.inside.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(-module.weight.detach())
    return net.inside(x)


def mixes(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.inside(x - x.mean(0, keepdim=True))


def infers(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.inside(x) * (-1 if torch.is_inference_mode_enabled() else 1)


def records(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.inside(x) * (-1 if torch.is_grad_enabled() else 1)


def leads(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.inside(x) * (-1 if x.requires_grad else 1)


def noisy(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.inside(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (lambda net, x: net.inside(x), []),
        (drifts, ["stateful"]),
        (remembers, ["stateful"]),
        (moves, ["stateful"]),
        (learns, ["stateful"]),
        (replaces, ["stateful"]),
        (mixes, ["batch-dependent"]),
        (infers, ["mode-dependent"]),
        (records, ["mode-dependent"]),
        (leads, ["mode-dependent"]),
        (noisy, ["random"]),
    ],
)
def test_the_nature_of_a_network_is_found(
    templates: Templates, forward: Callable[[Net, torch.Tensor], torch.Tensor], names: list[str]
) -> None:
    net = Net(copy.deepcopy(templates[0]), forward).eval()
    before = copy.deepcopy(net.state_dict())
    found = evaluate(net, *templates[1:])
    assert found.scrutiny.nature == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_keeping_a_note_of_a_pass_is_no_fault(templates: Templates) -> None:
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        net.seen.append(net.inside(x))
        return net.seen[-1]

    found = nature(Net(templates[0], forward), templates)
    assert found.names == []
    assert found.remembers


def test_state_is_put_back_wherever_it_is(templates: Templates) -> None:
    memory = SimpleNamespace(calls=0, table={"a": 1}, array=np.zeros(3))

    def closure() -> Callable[[], int]:
        count = 0

        def up() -> int:
            nonlocal count
            count += 1
            return count

        return up

    net = Net(templates[0], lambda net, x: x)
    net.memory, net.up = memory, closure()
    state = State(net)
    assert not state.changed()
    memory.calls, memory.table["b"], net.shift, net.new = 5, 2, net.shift + 1, 3
    memory.array[1] = 4
    net.seen.append(1)
    assert net.up() == 1
    assert state.changed()
    state.restore()
    assert not state.changed()
    assert (memory.calls, memory.table, net.seen, float(net.shift)) == (0, {"a": 1}, [], 0.0)
    assert memory.array.tolist() == [0, 0, 0]
    assert not hasattr(net, "new")
    assert net.up() == 1


counting = Net(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), moves)


def through_another_function(images: torch.Tensor) -> torch.Tensor:
    return counting(images)


def test_state_of_a_network_that_a_function_names_as_a_global_is_put_back(templates: Templates) -> None:
    for function in (lambda images: counting(images), lambda images: through_another_function(images)):
        state = State(Function(function))
        function(templates[1])
        assert state.changed()
        state.restore()
        assert float(counting.shift) == 0


class Interrupted(Exception):  # noqa: N818 - as KeyboardInterrupt
    pass


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_network_is_left_as_it_was(templates: Templates, interrupted: bool) -> None:
    model, x, y = templates
    net = Net(model, lambda net, images: net.inside(images) + 0 * moves(net, images))
    hidden = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4)).train()
    statistics = [buffer.clone() for buffer in hidden.buffers()]

    def progress(attack: str) -> None:
        if interrupted:
            raise Interrupted

    for one, others in ((net, [hidden_in(hidden)]), (hidden_in(hidden), [net])):
        with pytest.raises(Interrupted) if interrupted else contextlib.nullcontext():
            evaluate(one, x, y, surrogates=others, progress=progress)
        assert float(net.shift) == 0
        assert all(torch.equal(now, kept) for now, kept in zip(hidden.buffers(), statistics, strict=True))


def hidden_in(network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function of images whose network no one puts in evaluation mode."""
    return lambda images: network(images)


def test_a_network_that_counts_its_queries_is_judged_by_a_fresh_one(templates: Templates) -> None:
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        net.asked += 1
        return net.inside(images) if net.asked < 10 else 5 * nn.functional.one_hot(y[:1].expand(len(images)), 4).float()

    found, plain = evaluate(Net(model, forward), x, y), evaluate(model, x, y)
    assert torch.equal(found.clean, plain.clean)
    assert torch.equal(found.robust, plain.robust)


def test_images_that_meet_are_judged_alone_and_in_benign_company(templates: Templates) -> None:
    """A disturbed image among benign ones meets a network that is always wrong; a whole batch of them does not."""
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        moved = torch.cdist(images.flatten(1), x.flatten(1)).amin(1) > 0.05
        logits = net.inside(images)
        return torch.where((moved & ~moved.all())[:, None], -logits, 100 * logits.detach())

    found = evaluate(Net(model, forward), x, y)
    assert found.scrutiny.nature == ["batch-dependent"]
    assert not found.robust.any()


def test_a_batch_larger_than_those_that_are_looked_at_is_looked_at_too(templates: Templates) -> None:
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        return net.inside(images) * (3 if len(images) > 100 else 1)

    found = evaluate(Net(model, forward), x.repeat(3, 1, 1, 1), y.repeat(3))
    assert found.scrutiny.nature == ["batch-dependent"]
    assert found.at_most


@pytest.mark.parametrize("batch_size", [500, 1])
@pytest.mark.parametrize("weak", [torch.is_inference_mode_enabled, lambda: not torch.is_grad_enabled()])
def test_every_mode_is_to_be_withstood(templates: Templates, weak: Callable[[], bool], batch_size: int) -> None:
    """In a mode of which attacks get no gradient, every image that was moved is misclassified."""
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        logits = net.inside(images)
        moved = torch.cdist(images.flatten(1), x.flatten(1)).amin(1) > 0.05
        return torch.where((moved & weak())[:, None], -logits, logits)

    found = evaluate(Net(model, forward), x, y, batch_size=batch_size)
    assert found.scrutiny.nature == ["mode-dependent"]
    assert found.clean.float().mean() > 0.9
    assert not found.robust.any()
    assert any("the network is mode-dependent" in warning for warning in found.warnings)


def test_a_network_that_takes_gradients_itself_answers_nothing_in_inference_mode(templates: Templates) -> None:
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            moved = images.clone().requires_grad_()
            (slope,) = torch.autograd.grad(net.inside(moved).sum(), moved, create_graph=True)
        return net.inside(images + 0 * slope)

    found = evaluate(Net(model, forward), x, y)
    assert found.scrutiny.nature == []
    assert torch.equal(found.robust, evaluate(model, x, y).robust)


def test_a_network_that_takes_gradients_itself_may_mind_its_mode(templates: Templates) -> None:
    """Such a network is judged in the modes that it answers in."""
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        if images.requires_grad:
            return net.inside(images)
        with torch.enable_grad():
            moved = images.clone().requires_grad_()
            lead = net.inside(moved).logsumexp(1).sum()
            assert lead.requires_grad
            (slope,) = torch.autograd.grad(lead, moved)
        return net.inside(images + 0.2 * slope.sign())

    found = evaluate(Net(model, forward), x, y)
    assert found.scrutiny.nature == ["mode-dependent"]
    assert found.at_most


def test_what_a_network_keeps_in_inference_mode_is_put_back(templates: Templates) -> None:
    """Such tensors take part in no gradient, which attacks would ask for afterwards."""
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled() and net.kept is None:
            net.kept = torch.full((1, 4), 3.0)
        return net.inside(images) * (1 if net.kept is None else net.kept)

    network = Net(model, forward)
    network.kept = None
    found = evaluate(network, x, y)
    assert found.scrutiny.nature == ["mode-dependent"]
    assert torch.equal(found.robust, evaluate(model, x, y).robust)
    assert network.kept is None


def test_a_random_network_gets_its_expected_accuracy(templates: Templates) -> None:
    model, x, y = templates

    def forward(net: Net, images: torch.Tensor) -> torch.Tensor:
        heads = torch.rand(len(images), 1) < 0.7
        logits = 50 * net.inside(images)
        return torch.where(heads, logits, logits.roll(1, 1))

    found = evaluate(Net(model, forward), x, y)
    assert found.scrutiny.nature == ["random"]
    numbers = found.to_dict()
    assert abs(numbers["clean"]["accuracy"] - 0.7) < 0.05
    assert found.robust_shares is not None
    assert numbers["robust"] <= numbers["blind"] <= numbers["clean"]["accuracy"]
    plain = float(evaluate(model, x, y).robust.float().mean())
    assert numbers["robust"] <= 0.7 * plain + 0.3 * (1 - plain) + 0.05


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from(["plain", "random", "nan", "doubled", "batch"]))
def test_robust_exceeds_neither_blind_nor_what_any_attack_left(seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4 if kind != "doubled" else 8, 9, generator=generator)

    def model(images: torch.Tensor) -> torch.Tensor:
        logits = images.flatten(1) @ weights.T
        if kind == "random":
            logits = logits + 0.5 * torch.randn(logits.shape, generator=generator)
        if kind == "nan":
            logits = torch.where(logits.amax(1, keepdim=True) > 2.5, torch.nan, logits)
        return logits - logits.mean(0, keepdim=True) if kind == "batch" else logits

    x = torch.rand(12, 1, 3, 3, generator=generator)
    y = (x.flatten(1) @ weights[:4].T).argmax(1)
    if kind == "nan" and not model(x).isfinite().all():
        return
    found = ducat.evaluate(model, x, y, ducat.ThreatModel(eps=0.1), "quick", num_classes=4)
    numbers = found.to_dict()
    left = [row["accuracy"] for row in numbers["attacks"]]
    assert numbers["robust"] <= min([numbers["blind"], numbers["clean"]["accuracy"], *left]) + 1e-6
    assert not (found.robust & ~found.blind).any()
    assert not any((found.robust & ~attack.correct).any() for attack in found.attacks)
