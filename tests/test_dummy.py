import copy
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ducat
from ducat.dummy import DummyHead, dummy_head, dummy_heads
from ducat.models.outputs import logits_of

logit_arrays = st.integers(1, 6).flatmap(
    lambda classes: st.lists(
        st.lists(st.floats(-30, 30, width=32), min_size=2 * classes, max_size=2 * classes), min_size=1, max_size=5
    )
)


@given(st.integers(1, 20), st.floats(0, 1), st.data())
def test_two_hot_rows_share_one_between_a_class_and_its_dummy(classes: int, weight: float, data: st.DataObject) -> None:
    y = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=8)))
    expected = np.zeros((len(y), 2 * classes))
    for row, label in enumerate(y.tolist()):
        expected[row, label] += 1 - weight
        expected[row, label + classes] += weight
    targets = ducat.two_hot(y, classes, weight)
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-7)
    np.testing.assert_allclose(targets.sum(1).numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_two_hot_rejects_a_weight_outside_0_1(weight: float) -> None:
    with pytest.raises(ValueError, match="dummy_weight"):
        ducat.two_hot(torch.tensor([0]), 3, weight)


@pytest.mark.parametrize("label", [-1, 3])
def test_two_hot_rejects_a_label_that_is_no_class(label: int) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 3\)"):
        ducat.two_hot(torch.tensor([label]), 3, 0.25)


@given(logit_arrays)
def test_recovered_prediction_is_argmax_mod_c(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    classes = logits.shape[1] // 2
    recovered = ducat.recover(logits)
    assert recovered.shape == (len(rows), classes)
    # With a tie the two may name different classes, both of them right: compare what the chosen class is worth.
    chosen = recovered.argmax(1)
    assert torch.equal(recovered.gather(1, chosen[:, None]).squeeze(1), logits.amax(1))
    untied = (logits == logits.amax(1, keepdim=True)).sum(1) == 1
    assert torch.equal(chosen[untied], (logits.argmax(1) % classes)[untied])


@given(logit_arrays)
def test_logsumexp_recovery_gives_the_summed_probabilities(rows: list[list[float]]) -> None:
    logits = np.array(rows, dtype=np.float64)
    classes = logits.shape[1] // 2
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    q = ducat.recover(torch.tensor(logits), "logsumexp").softmax(1)
    np.testing.assert_allclose(q.numpy(), p[:, :classes] + p[:, classes:], atol=1e-9)


def test_recover_rejects_what_cannot_be_pairs() -> None:
    with pytest.raises(ValueError, match="must be even"):
        ducat.recover(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="'mean' is unknown: choose from max, logsumexp"):
        ducat.recover(torch.zeros(1, 4), "mean")


def plain_network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5))


@pytest.mark.parametrize("how", ["max", "logsumexp"])
def test_copied_dummy_classes_leave_the_recovered_prediction_as_it_was(how: str) -> None:
    model, x = plain_network(), torch.rand(64, 3, 2, 2)
    before = model(x)
    assert ducat.add_dummy_classes(model) is model
    recovered = ducat.RecoveredClassifier(model, how)(x)
    assert torch.equal(recovered.argmax(1), before.argmax(1))
    torch.testing.assert_close(recovered.softmax(1), before.softmax(1))


def test_random_dummy_rows_come_from_the_generator_and_leave_the_real_rows_alone() -> None:
    models = [plain_network() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    real = models[0][3].weight.clone()
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        ducat.add_dummy_classes(model, "random", generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    first, same, other = (model[3].weight for model in models)
    assert torch.equal(first[:5], real)
    assert torch.equal(first, same)
    assert not torch.equal(first[5:], other[5:])
    assert first[5:].abs().max() <= 7**-0.5


def test_the_head_is_doubled_where_it_is_nested() -> None:
    model = nn.Sequential(plain_network(), nn.Identity())
    ducat.add_dummy_classes(model)
    head = dummy_head(model)
    assert head is model[0][3]
    assert (head.out_features, head.num_classes) == (10, 5)
    assert model[0][1].out_features == 7


class Base(nn.Module):
    """A classifier of 1 x 6 x 6 images with C = 4, whose parts other networks below put together otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU())
        self.fc = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Any:
        return self.fc(self.body(images))


class Projection(Base):
    """A projection is registered after the head."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(12, 4)


class Upstream(Base):
    """A layer inside has as many outputs as there are classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body.append(nn.Linear(12, 4))
        self.body.append(nn.ReLU())
        self.fc = nn.Linear(4, 4)


class NoBias(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4, bias=False)


class WeightNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(12, 4))


class OldWeightNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.fc = nn.utils.weight_norm(nn.Linear(12, 4))


class Scaled(nn.Linear):
    """A linear layer with a forward pass of its own, as cosine classifiers have."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * F.linear(F.normalize(input), F.normalize(self.weight))


class Cosine(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Scaled(12, 4)


class TwoHeads(Base):
    """A distilled transformer averages two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dist = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return (self.fc(features) + self.head_dist(features)) / 2


class Convolution(nn.Module):
    """Squeeze-and-excitation is linear, the head is a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images).relu()
        return self.head(maps * self.gate(maps.mean((2, 3))).sigmoid()[:, :, None, None]).mean((2, 3))


class ConvolutionOfOnePosition(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Unflatten(1, (12, 1, 1)), nn.Conv2d(12, 4, 1), nn.Flatten())


class OfTokens(Base):
    """A linear layer classifies every position, and the logits are those of one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images[:, 0])[:, 2]


class Named(Base):
    """What transformers returns."""

    def forward(self, images: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(images), hidden_states=None)


class Shared(Base):
    """A head that is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.fc


FOUND = {
    Base: ["fc"],
    Projection: ["fc"],
    Upstream: ["fc"],
    NoBias: ["fc"],
    WeightNorm: ["fc"],
    OldWeightNorm: ["fc"],
    Cosine: ["fc"],
    TwoHeads: ["fc", "head_dist"],
    Convolution: ["head"],
    ConvolutionOfOnePosition: ["fc.1"],
    OfTokens: ["fc"],
    Named: ["fc"],
    Shared: ["fc"],
}


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_the_layer_whose_output_is_the_logits_is_doubled(kind: type[nn.Module]) -> None:
    model, x = kind().train(), torch.rand(64, 1, 6, 6)
    state = torch.random.get_rng_state()
    before = logits_of(model(x))
    ducat.add_dummy_classes(model, images=x[:2])
    assert [name for name, module in model.named_modules() if isinstance(module, DummyHead)] == FOUND[kind]
    assert all(module.training for module in model.modules())
    after = logits_of(model(x))
    torch.testing.assert_close(after, before.repeat(1, 2))
    assert torch.equal(ducat.RecoveredClassifier(model)(x).argmax(1), before.argmax(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    # The two halves learn apart from each other, and can be made equal again.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits_of(model(x))[:, 0].mean().backward()
    optimizer.step()
    assert not torch.allclose(logits_of(model(x))[:, 0], logits_of(model(x))[:, 4])
    for head in dummy_heads(model):
        head.copy_real_rows()
    torch.testing.assert_close(logits_of(model(x))[:, :4], logits_of(model(x))[:, 4:])
    if kind is OldWeightNorm:  # which PyTorch cannot copy
        return
    copied = copy.deepcopy(model)
    assert [head.num_classes for head in dummy_heads(copied)] == [4] * len(FOUND[kind])
    torch.testing.assert_close(logits_of(copied(x)), logits_of(model(x)))


class Reshaped(Base):
    """Logits.view(-1, number of classes)."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).view(-1, 4)


class Counted(Base):
    """Something after the head has a value for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("prior", torch.ones(4))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.prior


class Probabilities(Base):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(1)


class Spectral(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.utils.parametrizations.spectral_norm(nn.Linear(12, 4))


class Norm(Base):
    """The weights are divided by the norm of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(12, 4), dim=None)


class Affine(Base):
    """Every class has a scale of its own, which two classes of a pair would not share."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * torch.tensor([1.0, 2.0, 3.0, 4.0])


class Prototypes(Base):
    """Distances from the classes' means: no layer has them as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.rand(4, 12))
        del self.fc

    def forward(self, images: Tensor) -> Tensor:
        return -torch.cdist(self.body(images), self.means)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Reshaped, r"shape \(4, 4\) instead of \(2, 8\): something in or after it counts the classes"),
        (Counted, r"does not work with twice as many outputs of fc \(RuntimeError: .* counts the classes"),
        (Probabilities, r"no linear layer or convolution gives the 4 logits of this Probabilities \(the output of fc"),
        (Spectral, r"twice as many outputs of fc \(RuntimeError: inconsistent tensor size"),
        (Norm, r"doubling fc changes the predictions"),
        (Affine, r"the output of fc is changed before it is the logits\): name the one that does by head="),
        (Prototypes, r"none has them as its output"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_network_that_cannot_be_doubled_is_refused_in_one_line_and_left_as_it_was(
    kind: type[nn.Module], message: str
) -> None:
    model, x = kind(), torch.rand(2, 1, 6, 6)
    before, parameters = model.eval()(x), dict(model.named_parameters())
    with pytest.raises(ValueError, match=message) as error:
        ducat.add_dummy_classes(model, images=x)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(model(x), before)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert dummy_head(model) is None


def test_the_head_can_be_named() -> None:
    model = ducat.add_dummy_classes(TwoHeads(), head=["fc", "head_dist"])
    assert len(dummy_heads(model)) == 2
    for head, message in {
        "head": "head='head' is no layer of the network: its last ones are body.1, fc, head_dist",
        "body": "head='body' is a Sequential: it must be nn.Linear or nn.Conv2d",
        "body.1": "head='body.1' has 12 outputs, but there are 4 logits",
        "fc": "head='fc': the logits are not the output of that layer",  # alone
    }.items():
        with pytest.raises(ValueError, match=message):
            ducat.add_dummy_classes(TwoHeads(), head=head)
    with pytest.raises(ValueError, match="head='projection': the logits are not the output of that layer"):
        ducat.add_dummy_classes(Projection(), head="projection")


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW], ids=["sgd", "adamw"])
def test_an_optimizer_made_before_is_refused_or_handed_over(make: Any) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        logits = model(torch.ones(2, 1, 6, 6))
        logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits

    model = Base()
    optimizer = make(model.parameters(), lr=0.01)
    kept = step(model, optimizer)  # noqa: F841 - a graph of the old head stays alive
    ducat.add_dummy_classes(model)
    with pytest.raises(ValueError, match="this optimiser was made before the network got dummy classes"):
        step(model, optimizer)
    # One that was handed over goes on as if each dummy row had always been there.
    model = Base()
    optimizer = make(model.parameters(), lr=0.01)
    step(model, optimizer)
    ducat.add_dummy_classes(model, optimizer=optimizer)
    assert {id(parameter) for parameter in model.parameters()} == {
        id(parameter) for parameter in optimizer.param_groups[0]["params"]
    }
    before = model.fc.weight.clone()
    step(model, optimizer)
    assert not torch.equal(model.fc.weight, before)
    torch.testing.assert_close(model.fc.weight[:4], model.fc.weight[4:])
    names = ("exp_avg", "exp_avg_sq") if make is torch.optim.AdamW else ("momentum_buffer",)
    assert all(optimizer.state[model.fc.weight][name].shape == (8, 12) for name in names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(torch.optim.LBFGS, lr=0.1), "LBFGS cannot go on .*keeps its own list.*make it after"),
        (torch.optim.Adafactor, "Adafactor cannot go on .*row_var, col_var has another shape.*make it after"),
    ],
    ids=["lbfgs", "adafactor"],
)
def test_an_optimizer_whose_state_cannot_be_doubled_is_refused(make: Any, message: str) -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model(torch.ones(2, 1, 6, 6)).square().sum()
        value.backward()
        return value

    model = Base()
    optimizer = make(model.parameters())
    optimizer.step(loss)
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match=message):
        ducat.add_dummy_classes(model, optimizer=optimizer)
    assert dummy_head(model) is None
    assert all(now is kept for now, kept in zip(model.parameters(), parameters, strict=True))
    before = model.fc.weight.clone()
    optimizer.step(loss)
    assert not torch.equal(model.fc.weight, before), "the optimiser still trains the network"


def test_adam_steps_no_further_with_dummy_classes_that_come_into_use_than_with_real_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    network = ducat.add_dummy_classes(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), images=torch.zeros(1, 1, 3, 3))
    optimizer, head = torch.optim.Adam(network.parameters(), lr=0.001), dummy_heads(network)[0]
    aware = ducat.objective("pgd-at", "recovery-aware")
    for step in range(203):
        x, y = torch.rand(16, 1, 3, 3, generator=generator), torch.randint(4, (16,), generator=generator)
        if step == 200:
            before = head.weight.detach().clone()
        optimizer.zero_grad()
        (F.cross_entropy(network(x)[:, :4], y) if step < 200 else aware.loss(network, x, x, y)).backward()
        optimizer.step()
        if step < 200:
            head.copy_real_rows(optimizer)
    real, dummy = (head.weight.detach() - before).abs().chunk(2)
    assert 0 < dummy.mean() < 3 * real.mean()


def test_add_dummy_classes_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"no images were found that this Sequential turns into logits"):
        ducat.add_dummy_classes(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="already has dummy classes"):
        ducat.add_dummy_classes(ducat.add_dummy_classes(plain_network()))
    with pytest.raises(ValueError, match="'zero' is unknown"):
        ducat.add_dummy_classes(plain_network(), "zero")
    with pytest.raises(ValueError, match='choose init="copy"'):
        ducat.add_dummy_classes(WeightNorm(), "random")
