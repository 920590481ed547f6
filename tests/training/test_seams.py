"""What `train` takes from outside: a network, an objective, a validation, a suite; none of our tables is touched."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ducat
import ducat.weights
from ducat.architecture import Architecture
from ducat.attacks.adaptive import BUDGETS, Round
from ducat.attacks.objectives import OBJECTIVES, Goal
from ducat.attacks.suites import SUITES, Attack, Suite
from ducat.config import DummyConfig, MethodConfig, ModelConfig
from ducat.methods import ATTACKS, METHODS, InnerAttack, Method, Objective
from ducat.models import MODELS
from ducat.training import Initial, resume, train
from tests.support import TINY, Watcher, unvalidated

# The squared error of the probabilities: an attack, and a method that regularises by it.
BRIER = Goal(
    lambda logits, y, reference: (logits.softmax(1) - F.one_hot(y, logits.shape[1])).square().sum(1),
    recovered=Goal(
        lambda logits, y, reference: (
            (ducat.recover(logits, "logsumexp").softmax(1) - F.one_hot(y, logits.shape[1] // 2)).square().sum(1)
        ),
        knows_recovery=True,
    ),
)


def closeness(clean_logits: Tensor, adversarial_logits: Tensor, y: Tensor, weight: float | int) -> Tensor:
    return weight * (clean_logits.softmax(1) - adversarial_logits.softmax(1)).square().sum(1)


METHOD = Method("Brier", objective=BRIER, regulariser=closeness, reads_benign=True, weight=2.0)


class Outsider(nn.Module):
    """A network that no table of ours has."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_a_method_an_attack_and_a_network_of_ones_own_train_and_no_table_changes(tmp_path: Path) -> None:
    tables = [dict(table) for table in (OBJECTIVES, METHODS, ATTACKS, MODELS)]
    minimised: list[Objective] = []

    def objective(epoch: int) -> Objective:
        row = ducat.objective(METHOD, "recovery-aware", epoch >= 1, attack=InnerAttack((1.0, 0.5)))
        minimised.append(row)
        return row

    def build(architecture: Architecture) -> tuple[Architecture, nn.Module]:
        return architecture, ducat.add_dummy_classes(Outsider(architecture.num_classes))

    network = Initial(build, {"file": "nowhere"})
    config = replace(TINY, dummy=DummyConfig("recovery-aware", start_epoch=1))
    folder = train(config, tmp_path, model=network, objective=objective, validate=unvalidated)
    assert folder.manifest["status"] == "finished"
    assert {row.reading for row in minimised} == {"real", "recovered"}
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in folder.metrics)
    assert tables == [dict(table) for table in (OBJECTIVES, METHODS, ATTACKS, MODELS)]


def test_a_suite_and_an_attack_of_ones_own_measure_a_network_of_ones_own() -> None:
    tables = dict(SUITES), dict(BUDGETS)
    x, _ = ducat.data.load_test("digits", samples=20)
    model = ducat.add_dummy_classes(Outsider(10)).eval()
    y = model(x).argmax(1) % 10
    calls: list[str] = []

    def brighter(model: nn.Module, x: Tensor, y: Tensor, threat: ducat.ThreatModel, generator: Any) -> Tensor:
        calls.append("brighter")
        return threat.project(x + threat.eps, x)

    def darker(model: nn.Module, x: Tensor, y: Tensor, threat: ducat.ThreatModel, generator: Any) -> Tensor:
        calls.append("darker")
        return threat.project(x - threat.eps, x)

    suite = Suite((Attack("brighter", True, brighter),), audit=False, name="light and shade")
    threat = ducat.ThreatModel(eps=0.3)
    measured = ducat.evaluate(model, x, y, threat, suite, num_classes=10, attacks=[Attack("darker", True, darker)])
    assert measured.suite == "light and shade"
    assert {"brighter-recovered", "darker-recovered"} <= {attack.name for attack in measured.attacks}
    assert set(calls) == {"brighter", "darker"}
    rounds = [Round("weighted-pair", 2)]
    found = ducat.attacks.adaptive(ducat.RecoveredClassifier(model), x, y, threat, rounds)
    assert threat.allows(found, x).all()
    assert (dict(SUITES), dict(BUDGETS)) == tables


@pytest.mark.slow
def test_a_network_that_is_given_is_what_is_trained(tmp_path: Path) -> None:
    given = ducat.models.build("small", 10, channels=1, mean=(0.5,), std=(0.5,))
    config = replace(TINY, train=replace(TINY.train, learning_rate=0.0, weight_decay=0.0))
    before = {name: value.clone() for name, value in given.named_parameters()}
    folder = train(config, tmp_path, model=given, validate=unvalidated)
    after = dict(folder.load("last").named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert folder.manifest["initial"] == {"file": "a network given to train"}
    with pytest.raises(ValueError, match="model: it has 7 outputs, and 10 are needed for 10 classes"):
        train(replace(config, name="other"), tmp_path, model=ducat.models.build("small", 7, channels=1))
    with pytest.raises(ValueError, match=r"model: it does not take the data's images \(RuntimeError: "):
        train(replace(config, name="other"), tmp_path, model=nn.Sequential(nn.Flatten(), nn.Linear(5, 10)))


def test_a_network_of_ours_that_is_given_gets_dummy_classes_and_can_be_loaded(tmp_path: Path) -> None:
    given = ducat.models.build("small", 10, channels=1, width=2, mean=(0.5,), std=(0.5,))
    model = ModelConfig("small", width=2)
    config = replace(TINY, model=model, dummy=DummyConfig("recovery-aware"), train=replace(TINY.train, epochs=1))
    folder = train(config, tmp_path, model=given, validate=unvalidated)
    loaded = folder.load("last").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in given.state_dict().items())


def test_dummy_classes_that_are_not_ours_are_told_not_to_follow_the_real_ones(tmp_path: Path) -> None:
    config = replace(TINY, dummy=DummyConfig("recovery-aware", start_epoch=2))
    listener = Watcher(leave_after=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, listener, model=Outsider(20), validate=unvalidated)
    assert [warning[:54] for warning in listener.warnings] == ["the network has dummy classes that ducat did not add, "]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["off", "recovery-aware"])
@pytest.mark.parametrize("as_object", [False, True])
def test_a_network_of_ones_own_trains_and_goes_on(tmp_path: Path, kind: str, as_object: bool) -> None:
    class Wrapped(Outsider):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    def given() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return Wrapped(10) if as_object else Outsider(10)

    config = replace(TINY, dummy=DummyConfig(kind, start_epoch=1))  # type: ignore[arg-type]
    whole = train(config, tmp_path / "whole", model=given(), validate=unvalidated)
    with pytest.raises(ValueError, match=r"the network is a .*(Outsider|Wrapped) that was given to train"):
        whole.load("last")
    model = given()
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, Watcher(leave_after=1), model=model, validate=unvalidated)
    with pytest.raises(ValueError, match="give it to resume as model="):
        resume(tmp_path / "run", validate=unvalidated)
    continued = resume(tmp_path / "run", model=given(), validate=unvalidated)
    states = [ducat.weights.read(folder.checkpoint_path("last")).weights for folder in (whole, continued)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_a_run_with_an_objective_of_its_own_goes_on_with_it_alone(tmp_path: Path) -> None:
    def objective(epoch: int) -> Objective:
        return ducat.objective(METHOD, "off")

    whole = train(TINY, tmp_path / "whole", objective=objective, validate=unvalidated)
    plain = train(TINY, tmp_path / "plain", validate=unvalidated)
    assert whole.metrics[-1]["loss"] != plain.metrics[-1]["loss"]
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, Watcher(leave_after=1), objective=objective, validate=unvalidated)
    with pytest.raises(ValueError, match=r"minimises an objective of its own: give it again"):
        resume(tmp_path / "run", validate=unvalidated)
    continued = resume(tmp_path / "run", objective=objective, validate=unvalidated)
    assert [row["loss"] for row in continued.metrics] == [row["loss"] for row in whole.metrics]


@pytest.mark.parametrize(
    ("method", "kind"), [(name, kind) for name in METHODS for kind in ("off", "published", "recovery-aware")]
)
def test_a_loop_that_is_not_ours_gets_what_the_settings_say(method: str, kind: str) -> None:
    if METHODS[method].no_dummy_classes and kind != "off":
        with pytest.raises(ValueError, match=rf"dummy\.kind={kind} does not fit this method"):
            ducat.objective(method, kind)
        return
    config = replace(
        TINY,
        method=MethodConfig(method),
        dummy=DummyConfig(kind, start_epoch=1, benign_share=0.3),  # type: ignore[arg-type]
    )
    for epoch in (0, 1):
        ours, theirs = config.objective(epoch), ducat.objective(method, kind, epoch >= 1, benign_share=0.3)
        assert ours == theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "pgdat"}, "method 'pgdat' is unknown: did you mean pgd-at"),
        ({"dummy": "aware"}, "dummy='aware' is unknown: choose from off, published, recovery-aware"),
        ({"attack": "pdg"}, "attack 'pdg' is unknown: choose from pgd"),
        ({"benign": 1}, "benign is unknown: choose from benign_weight, adversarial_weight, benign_share, pair_weight"),
        ({"benign_weight": 2}, r"dummy\.benign_weight=2 is outside \[0, 1\]"),
        ({"active": False, "benign_weight": 2}, r"dummy\.benign_weight=2 is outside \[0, 1\]"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0\.1 is outside \[0, 1\)"),
        ({"method": "trades", "weight": -1}, r"method\.weight=-1 is outside \[0, inf\]: it is beta of its paper"),
    ],
)
def test_what_does_not_exist_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ducat.objective(**arguments)


def test_an_attack_without_a_counterpart_is_not_trained_with_blindly(network: nn.Module, images: Tensor) -> None:
    blind = Method("blind", objective=replace(BRIER, recovered=None))
    y = torch.zeros(len(images), dtype=torch.long)
    with pytest.raises(ValueError, match="blind: what its attack maximises has no recovery-aware counterpart"):
        ducat.objective(blind, "recovery-aware").attack(network, images, y, ducat.ThreatModel(eps=0.1, steps=1))


def test_a_network_with_our_names_that_computes_something_else_is_not_taken_for_ours(tmp_path: Path) -> None:
    spec = ducat.data.SPECS["digits"]

    def made(function: nn.Module | None) -> nn.Module:
        network = ducat.models.build("small", 10, channels=1, mean=spec.mean, std=spec.std)
        if function is not None:
            for name, module in list(network.named_modules()):
                if isinstance(module, nn.ReLU):
                    parent, _, last = name.rpartition(".")
                    setattr(network.get_submodule(parent), last, function)
        return network

    for name, network in (("ours", made(None)), ("other", made(nn.Tanh()))):
        folder = train(replace(TINY, name=name), tmp_path, model=network, validate=unvalidated)
        if name == "ours":
            assert torch.allclose(folder.load("last")(torch.zeros(2, 1, 8, 8)), network.eval()(torch.zeros(2, 1, 8, 8)))
        else:
            with pytest.raises(ValueError, match="was given to train, which no run folder can build"):
                folder.load("last")


def test_the_seed_is_that_of_dropout_too(tmp_path: Path) -> None:
    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))

    outputs = []
    state = torch.random.get_rng_state()
    for number, seed in enumerate((0, 0, 1)):
        config = replace(TINY, name=f"run{number}", train=replace(TINY.train, seed=seed))
        network = made()
        train(config, tmp_path, model=network, validate=unvalidated)
        outputs.append(network.eval()(torch.ones(2, 1, 8, 8)))
        torch.rand(3)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    torch.random.set_rng_state(state)


def test_a_network_of_ours_that_cannot_be_copied_trains(tmp_path: Path) -> None:
    spec = ducat.data.SPECS["digits"]
    network = ducat.models.build("small", 10, channels=1, mean=spec.mean, std=spec.std)
    lock = threading.Lock()

    def hook(module: nn.Module, inputs: Any, output: Tensor, held: Any = lock) -> None:
        module.kept = output  # a tensor of a graph is no copy of anything

    next(module for module in network.modules() if isinstance(module, nn.Conv2d)).register_forward_hook(hook)
    network(torch.rand(2, 1, 8, 8))
    assert train(TINY, tmp_path, model=network, validate=unvalidated).manifest["status"] == "finished"
