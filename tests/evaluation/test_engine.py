import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ducat
from ducat.attacks.suites import SUITES, Attack, Suite
from ducat.config import Config, DataConfig, DummyConfig, TrainConfig
from ducat.evaluation import Evaluation, behaviour, compare, second_round
from ducat.evaluation.runs import evaluate_run
from ducat.runs import RunFolder
from ducat.training import train

pytestmark = pytest.mark.slow

Templates = tuple[nn.Sequential, torch.Tensor, torch.Tensor]
THREAT = ducat.ThreatModel(eps=0.09)


def evaluate(templates: Templates, suite: str | Suite = "quick", **kwargs: object) -> Evaluation:
    return ducat.evaluate(*templates, THREAT, suite, **{"num_classes": 4, **kwargs})


def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUERIES", "DECISIONS"):
        monkeypatch.setattr(second_round, name, 100)


def numbers(evaluation: Evaluation | dict) -> dict:
    """Return the content of evaluation.json without the times."""
    content = evaluation if isinstance(evaluation, dict) else evaluation.to_dict()
    return {**content, "attacks": [{**attack, "seconds": None} for attack in content["attacks"]]}


@pytest.mark.parametrize("dummies", [False, True])
def test_the_accuracies_of_a_linear_model_are_those_of_the_closed_form(templates: Templates, dummies: bool) -> None:
    model, x, y = templates
    w, logits = model[1].weight.detach(), model(x).detach()
    lead = logits.gather(1, y[:, None]) - logits
    dual = (w[y][:, None] - w[None]).abs().sum(2)
    others = torch.arange(4)[None] != y[:, None]
    withstands = ((lead > 0.09 * dual) | ~others).all(1)
    inside = ((x - 0.09 >= 0) & (x + 0.09 <= 1)).flatten(1).all(1)
    assert inside.sum() > 10, "clipping to [0, 1] makes the closed form a bound"
    if dummies:
        model = ducat.add_dummy_classes(model)
    evaluation = evaluate((model, x, y), "quick")
    assert torch.equal(evaluation.clean, (lead + ~others > 0).all(1))
    assert torch.equal(evaluation.robust[inside], withstands[inside])
    assert 0.2 < evaluation.robust.float().mean() < 0.8
    assert not (withstands & ~evaluation.robust).any()


def test_a_network_without_dummy_classes_knows_no_difference_between_blind_and_recovery_aware(
    templates: Templates,
) -> None:
    evaluation = evaluate(templates, "light")
    assert torch.equal(evaluation.blind, evaluation.robust)
    twins = {attack.name: attack for attack in evaluation.attacks}
    for name in ("pgd-20", "ensemble"):
        assert twins[f"{name}-recovered"].same_as == name
        assert torch.equal(twins[name].correct, twins[f"{name}-recovered"].correct)


def test_predictions_are_recovered_ones_however_the_network_comes(templates: Templates) -> None:
    model, x, y = templates

    class Dummies(nn.Module):
        """Raw predictions are always a dummy class."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.cat([model(images) - 100, model(images)], dim=1)

    bare, wrapped = (evaluate((each, x, y)) for each in (Dummies(), ducat.RecoveredClassifier(Dummies())))
    assert bare.clean.all()
    assert numbers(bare) == numbers(wrapped)


def test_the_saved_images_show_what_the_flags_say(templates: Templates, tmp_path: Path) -> None:
    model, x, y = templates
    made = evaluate(templates, "light", data="Templates")
    made.save(tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == made.to_dict()
    loaded = Evaluation.load(tmp_path / "evaluation.json")
    assert loaded.to_dict() == made.to_dict()
    for name in ("labels", "clean", "robust", "blind", "adversarial"):
        assert torch.equal(getattr(loaded, name), getattr(made, name)), name
    assert loaded.adversarial.dtype == torch.float32
    assert THREAT.allows(loaded.adversarial, x).all()
    assert torch.equal(model(loaded.adversarial).argmax(1) == y, loaded.robust)
    standing = loaded.robust
    assert (loaded.adversarial[standing] != x[standing]).flatten(1).any(1).all(), "the closest image is kept"


def test_an_image_outside_the_ball_breaks_nothing(templates: Templates, monkeypatch: pytest.MonkeyPatch) -> None:
    def cheat(model: nn.Module, x: torch.Tensor, *rest: object) -> torch.Tensor:
        return 1 - x

    monkeypatch.setitem(SUITES, "quick", Suite((Attack("cheat", False, cheat), Attack("cheat", True, cheat)), False))
    evaluation = evaluate(templates)
    assert torch.equal(evaluation.robust, evaluation.clean)
    assert torch.equal(evaluation.adversarial, templates[1])


def test_nothing_else_changes(templates: Templates) -> None:
    model, x, _ = templates
    model.train()
    model[0].eval()
    state, kept = torch.random.get_rng_state(), x.clone()
    evaluate(templates, "light")
    assert [module.training for module in model.modules()] == [True, False, True]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(x, kept)


class StopError(Exception):
    pass


@pytest.mark.parametrize("chunks_done", [0, 1, 2])
def test_an_interrupted_evaluation_continues_to_the_same_flags(
    templates: Templates, tmp_path: Path, chunks_done: int
) -> None:
    settings = {"batch_size": 15}
    whole = evaluate(templates, **settings)
    said: list[str] = []

    def stop(attack: str) -> None:
        said.append(attack)
        if len(said) == 2 * chunks_done + 2:
            raise StopError

    with pytest.raises(StopError):
        evaluate(templates, **settings, parts=tmp_path / "parts", progress=stop)
    said.clear()
    continued = evaluate(templates, **settings, parts=tmp_path / "parts", progress=said.append)
    assert numbers(continued) == numbers(whole)
    assert torch.equal(continued.adversarial, whole.adversarial)
    assert said[0] == f"pgd-10, samples {15 * chunks_done + 1} to {min(15 * chunks_done + 15, 40)}"
    assert len(said) == 2 * (3 - chunks_done), "finished chunks are attacked again"


def test_what_is_left_of_other_settings_or_another_model_is_not_used(templates: Templates, tmp_path: Path) -> None:
    model = templates[0]
    evaluate(templates, parts=tmp_path)
    for change in ({"seed": 1}, {"batch_size": 20}, {"suite": "single-step"}):
        assert numbers(evaluate(templates, **change, parts=tmp_path)) == numbers(evaluate(templates, **change))
    with torch.no_grad():
        model[1].weight.mul_(torch.tensor([[1.0], [0.9], [1.0], [0.9]]))
    assert numbers(evaluate(templates, parts=tmp_path)) == numbers(evaluate(templates))


class Darker(nn.Module):
    """A network whose plain attributes decide, which are not among its weights."""

    def __init__(self, model: nn.Module, factor: float = 1.0, masked: bool = False) -> None:
        super().__init__()
        self.model, self.factor, self.masked = model, factor, masked

    def forward(self, images: Tensor) -> Tensor:
        rounded = (255 * images).round() / 255
        return self.model(self.factor * (rounded if self.masked else images + (rounded - images).detach()))


class Towards:
    """An attack that is an object."""

    def __init__(self, model: nn.Module, share: float) -> None:
        self.weight, self.share = model[1].weight.detach(), share

    def __call__(self, classifier: nn.Module, x: Tensor, y: Tensor, threat: ducat.ThreatModel, *rest: object) -> Tensor:
        step = (self.weight[(y + 1) % 4] - self.weight[y]).sign().view_as(x)
        return threat.project(x + self.share * threat.eps * step, x)

    def run(self, *arguments: Any) -> Tensor:
        return self(*arguments)

    def closed(self) -> Callable[..., Tensor]:
        settings = {"share": self.share}
        return lambda *arguments: Towards.__call__(SimpleNamespace(weight=self.weight, **settings), *arguments)


NETWORKS: dict[str, Callable[[nn.Module], Sequence[Any]]] = {
    "functions": lambda model: [lambda images: model(images), lambda images: model(1 - images)],
    "an attribute": lambda model: [Darker(model), Darker(model, 0.7)],
    "gradients alone": lambda model: [Darker(model, masked=True), Darker(model)],
}
CHANGES: dict[str, Callable[[nn.Module], Sequence[dict[str, Any]]]] = {
    "objects": lambda model: [{"attacks": [Towards(model, share)]} for share in (0.1, 1.0)],
    "bound methods": lambda model: [{"attacks": [Towards(model, share).run]} for share in (0.1, 1.0)],
    "closures": lambda model: [{"attacks": [Towards(model, share).closed()]} for share in (0.1, 1.0)],
    "surrogates": lambda model: [{"surrogates": [Darker(model, factor)]} for factor in (-1.0, 1.0)],
    "replacements": lambda model: [
        {"replacements": {"": lambda x, sign=sign: sign * model[1](x.flatten(1))}} for sign in (-1, 1)
    ],
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_left_of_another_network_is_not_used(templates: Templates, tmp_path: Path, kind: str) -> None:
    model, x, y = templates
    networks = NETWORKS[kind](model)
    expected = [numbers(evaluate((network, x, y))) for network in networks]
    assert expected[0] != expected[1]
    assert [numbers(evaluate((network, x, y), parts=tmp_path)) for network in networks] == expected


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_left_of_another_attack_is_not_used(templates: Templates, tmp_path: Path, kind: str) -> None:
    suite = idle_suite() if kind != "replacements" else "quick"
    changes = CHANGES[kind](templates[0])
    expected = [numbers(evaluate(templates, suite, **change)) for change in changes]
    assert expected[0] != expected[1]
    assert [numbers(evaluate(templates, suite, **change, parts=tmp_path)) for change in changes] == expected


def test_what_is_left_of_another_version_is_not_used(
    templates: Templates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(templates, parts=tmp_path)
    said: list[str] = []
    evaluate(templates, parts=tmp_path, progress=said.append)
    assert not said
    monkeypatch.setattr(ducat, "__version__", "0.2.0")
    evaluate(templates, parts=tmp_path, progress=said.append)
    assert said


@pytest.mark.parametrize("seeded", [False, True])
def test_chunks_of_a_random_network_are_taken_up_only_if_a_seed_repeats_it(
    templates: Templates, tmp_path: Path, seeded: bool
) -> None:
    model, x, y = templates
    own = torch.Generator().manual_seed(0)

    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images + 0.1 * torch.randn(images.shape, generator=None if seeded else own))

    said: list[str] = []
    for _ in range(2):
        said.clear()
        evaluate((Noisy(), x, y), "quick", parts=tmp_path, progress=said.append)
    assert bool(said) != seeded


SHARED = """
import os, signal, sys
from pathlib import Path
import torch
from accelerate import PartialState
import ducat
state = PartialState(cpu=True)
model, x, y = torch.load(sys.argv[1], weights_only=False)
done = []

def progress(attack):
    done.append(attack)
    if sys.argv[3:] and attack.endswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

evaluation = ducat.evaluate(
    model, x, y, ducat.ThreatModel(eps=0.09), "quick", num_classes=4, batch_size=10, parts=Path(sys.argv[2]),
    progress=progress
)
evaluation.save(Path(sys.argv[2]) / f"{state.process_index}.json")
Path(sys.argv[2], f"{state.process_index}.txt").write_text("\\n".join(done))
torch.distributed.destroy_process_group()
"""


def launch(templates: Templates, folder: Path, *arguments: str) -> int:
    """Evaluate in two processes, whose parts go to the folder `parts`, and return the exit code."""
    torch.save(templates, folder / "templates.pt")
    (folder / "script.py").write_text(SHARED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "script.py", "templates.pt", "parts", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(ducat.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
    )
    return done.returncode


@pytest.mark.slow
def test_several_processes_share_the_samples(templates: Templates, tmp_path: Path) -> None:
    assert launch(templates, tmp_path) == 0
    alone = numbers(evaluate(templates, batch_size=10))
    places = []
    for process in range(2):
        assert numbers(json.loads((tmp_path / "parts" / f"{process}.json").read_text())) == alone
        said = (tmp_path / "parts" / f"{process}.txt").read_text().split("\n")
        places.append({line.partition(", ")[2] for line in said})
    assert places == [{"samples 1 to 10", "samples 21 to 30"}, {"samples 11 to 20", "samples 31 to 40"}]


@pytest.mark.slow
def test_what_processes_had_finished_when_one_was_killed_is_kept(templates: Templates, tmp_path: Path) -> None:
    assert launch(templates, tmp_path, "samples 31 to 40") != 0
    assert (tmp_path / "parts" / "00001.safetensors").is_file()
    assert not (tmp_path / "parts" / "00003.safetensors").exists()
    # In processes again: here the package's functions are checked for the shapes of their tensors, and are others.
    assert launch(templates, tmp_path) == 0
    alone = numbers(evaluate(templates, batch_size=10))
    for process in range(2):
        assert numbers(json.loads((tmp_path / "parts" / f"{process}.json").read_text())) == alone
    said = (tmp_path / "parts" / "1.txt").read_text().split("\n")
    assert [line for line in said if line.endswith("samples 31 to 40")]
    assert not [line for line in said if line.endswith("samples 11 to 20")], "a finished chunk is attacked again"


def test_two_evaluations_do_not_share_a_folder(templates: Templates, tmp_path: Path) -> None:
    def second(attack: str) -> None:
        with pytest.raises(ValueError, match="parts is in use by another evaluation: wait for it"):
            evaluate(templates, parts=tmp_path / "parts")

    evaluate(templates, parts=tmp_path / "parts", progress=second)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = Config(
        data=DataConfig("digits", samples=200),
        train=TrainConfig(epochs=2, validate_every=2),
        dummy=DummyConfig("published", start_epoch=1),
    )
    return train(config, tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_a_run_evaluated_twice_gives_the_same_numbers(run: RunFolder) -> None:
    first = evaluate_run(run, "quick", samples=60)
    kept = run.evaluation_path.read_text()
    assert evaluate_run(run, "quick", samples=60) == first, "what was measured is not measured again"
    second = evaluate_run(run, "quick", samples=60, again=True)
    assert json.loads(kept) == first
    assert numbers(first) == numbers(second)
    assert first["samples"] == 60
    assert first["threat"]["eps"] == 0.2
    assert not list(run.path.rglob("*.parts*")), "finished chunks stay behind"
    x, y = ducat.data.load_test("digits", 60)
    stored = Evaluation.load(run.path)
    deployed = ducat.load(run.path)
    assert torch.equal(deployed(x).argmax(1) == y, stored.clean)
    assert torch.equal(deployed(stored.adversarial).argmax(1) == y, stored.robust)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["best", "last"])
def test_an_evaluation_says_which_checkpoint_it_is_of(run: RunFolder, which: str) -> None:
    evaluate_run(run, "quick", samples=60)
    assert evaluate_run(run, "quick", samples=20, which=which)["checkpoint"] == which
    (path,) = run.evaluations_path.glob(f"quick-linf-0.2-20-s0-{which}-*.json")
    assert Evaluation.load(path).checkpoint == which
    assert json.loads(run.evaluation_path.read_text())["samples"] == 60, "the stronger one speaks for the run"


@pytest.mark.slow
def test_a_run_can_be_attacked_by_a_suite_from_outside(run: RunFolder) -> None:
    def darken(model: nn.Module, x: Tensor, y: Tensor, threat: ducat.ThreatModel, noise: torch.Generator) -> Tensor:
        return threat.project(x - threat.eps, x)

    measured = evaluate_run(run, Suite((Attack("darken", False, darken),), audit=False, name="ours"), samples=20)
    assert measured["suite"] == "ours"
    assert "darken" in [attack["name"] for attack in measured["attacks"]]
    assert behaviour.read(run) is not None, "an evaluation measures the behaviour too"
    with pytest.raises(ValueError, match="give the suite another name"):
        evaluate_run(run, Suite((Attack("other", False, darken),), audit=False, name="ours"), samples=20)


@pytest.mark.slow
def test_a_run_can_be_attacked_in_another_ball(run: RunFolder) -> None:
    measured = evaluate_run(run, "quick", samples=20, threat=ducat.ThreatModel("l2", 0.5))
    assert (measured["threat"]["norm"], measured["threat"]["eps"]) == ("l2", 0.5)
    (path,) = run.evaluations_path.glob("quick-l2-0.5-20-*.json")
    assert (
        torch.linalg.vector_norm(
            (Evaluation.load(path).adversarial - ducat.data.load_test("digits", 20)[0]).flatten(1), dim=1
        ).max()
        <= 0.5 + 1e-6
    )


def test_a_missing_evaluation_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `ducat evaluate"):
        Evaluation.load(tmp_path)


def test_two_evaluations_are_compared_sample_by_sample(templates: Templates) -> None:
    model, x, y = templates
    first = evaluate(templates)
    flags = first.robust.clone()
    flags[first.robust.nonzero().squeeze(1)[:7]] = False
    flags[(~first.robust).nonzero().squeeze(1)[0]] = True
    compared = compare(first, replace(first, robust=flags))
    assert (compared["robust"].first_only, compared["robust"].second_only) == (7, 1)
    assert compared["robust"].difference == pytest.approx(-6 / 40)
    assert compared["robust"].p_value == pytest.approx(2 * 9 / 2**8)
    assert compared["clean"].p_value == 1
    with pytest.raises(ValueError, match="not of the same samples"):
        compare(first, evaluate((model, x[:30], y[:30])))
    with pytest.raises(ValueError, match="different threat models"):
        compare(first, replace(first, threat=ducat.ThreatModel(eps=0.1)))
    with pytest.raises(ValueError, match="different suites"):
        compare(first, replace(first, suite="light"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, x, y: (model, x[:0], y[:0]), "no samples"),
        (lambda model, x, y: (model, x * 255, y), r"images run from .* they must be in \[0, 1\]"),
        (lambda model, x, y: (model, x, y + 1), "labels run from 1 to 4, outside num_classes=4"),
        (lambda model, x, y: (nn.Sequential(model, nn.Linear(4, 7)), x, y), "7 outputs: .* 4, or 8 with dummy classes"),
        (lambda model, x, y: (nn.Sequential(model, nn.Threshold(1e9, torch.nan)), x, y), "not finite"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    templates: Templates, change: Callable[..., Templates], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(change(*templates))


def test_a_limit_of_time_is_not_negative(templates: Templates) -> None:
    with pytest.raises(ValueError, match="second_round_seconds=-1 must be at least 0"):
        evaluate(templates, "quick", second_round_seconds=-1.0)


def test_an_unknown_suite_is_named(templates: Templates) -> None:
    with pytest.raises(ValueError, match="suite 'fast' is unknown: choose from quick"):
        evaluate(templates, "fast")


@pytest.mark.parametrize("how", ["max", "logsumexp"])
def test_a_recovered_classifier_is_measured_with_its_own_recovery(how: str) -> None:
    # Two dummies of equal strength outweigh a single stronger real class by their sum, not by the larger of them.
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(4, 9, generator=generator))
    network = ducat.add_dummy_classes(model, "random", generator=generator)
    with torch.no_grad():
        network[1].weight.mul_(3)
    x = torch.rand(200, 1, 3, 3, generator=generator)
    y = ducat.recover(network(x), how).argmax(1)
    deployed = ducat.RecoveredClassifier(network, how)
    other = ducat.RecoveredClassifier(network, "max" if how == "logsumexp" else "logsumexp")
    assert (other(x).argmax(1) != y).any()
    found = ducat.evaluate(deployed, x, y, ducat.ThreatModel(eps=0.05), "quick", num_classes=4)
    assert found.clean.all()
    assert torch.equal(found.robust, deployed(found.adversarial).argmax(1) == y)
    assert 0.1 < found.robust.float().mean() < 0.9
    assert found.attacks[-1].knows_recovery
    assert found.attacks[-1].same_as is None, "the blind attacker sees the raw outputs, not the recovered ones"
    assert not ducat.evaluate(other, x, y, ducat.ThreatModel(eps=0.05), "quick", num_classes=4).clean.all()


def in_numpy(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that decides as a linear network does, and passes no gradient."""
    weight, bias = (parameter.detach().numpy() for parameter in (model[1].weight, model[1].bias))
    return lambda images: torch.from_numpy(images.detach().flatten(1).numpy() @ weight.T + bias)


def test_images_of_a_surrogate_count(templates: Templates) -> None:
    model, x, y = templates
    hidden = in_numpy(model)
    alone, led = evaluate((hidden, x, y)), evaluate((hidden, x, y), surrogates=[model])
    assert alone.robust.float().mean() > 0.9
    assert torch.equal(led.robust, evaluate(templates).robust)
    assert "transfer-1" in {attack.name for attack in led.attacks}


def test_an_attack_of_the_callers_own_joins_the_worst_case(templates: Templates) -> None:
    model, x, y = templates

    def towards_the_next(classifier: nn.Module, x: torch.Tensor, y: torch.Tensor, *rest: object) -> torch.Tensor:
        assert classifier(x).shape == (len(x), 4)
        weight = model[1].weight.detach()
        step = (weight[(y + 1) % 4] - weight[y]).sign().view_as(x)
        return (x + 0.09 * step).clamp(0, 1)

    idle = Suite((Attack("idle", False, lambda model, x, *rest: x),), audit=False)
    found = evaluate(templates, idle, attacks=[towards_the_next])
    expected = model(towards_the_next(model, x, y)).argmax(1) == y
    assert torch.equal(found.robust, expected)
    assert not expected.all()
    assert found.attacks[-1].name == "own-towards_the_next"
    with pytest.raises(ValueError, match="two have the same name"):
        evaluate(templates, idle, attacks=[towards_the_next, towards_the_next])


def test_a_network_that_seeds_itself_does_not_repeat_the_draws_of_the_callers_own_attack(templates: Templates) -> None:
    model, x, y = templates
    drawn = []

    def seeding(images: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return model(images)

    def search(classifier: nn.Module, x: torch.Tensor, *rest: object) -> torch.Tensor:
        for _ in range(2):
            drawn.append(torch.rand(()))
            classifier(x)
        return x

    evaluate((seeding, x, y), idle_suite(), attacks=[search])
    assert drawn[0] != drawn[1]


def idle_suite() -> Suite:
    return Suite((Attack("idle", False, lambda model, x, *rest: x),), audit=False)


def noise(model: nn.Module, x: Tensor, y: Tensor, threat: ducat.ThreatModel, generator: torch.Generator) -> Tensor:
    return threat.random_start(x, generator)


def test_a_row_of_the_callers_is_run_whatever_it_is_called(templates: Templates) -> None:
    model, x, y = templates
    strong = Attack("idle", True, SUITES["quick"].attacks[0].run)
    for network in (model, ducat.add_dummy_classes(nn.Sequential(*model))):
        found = evaluate((network, x, y), idle_suite(), attacks=[strong])
        assert torch.equal(found.robust, evaluate((network, x, y), Suite((strong,), audit=False)).robust)
        assert 0 < found.robust.float().mean() < 1
        for name in ("idle", "second-round"):
            with pytest.raises(ValueError, match=f"two have the same name, {name}"):
                evaluate((network, x, y), idle_suite(), attacks=[Attack(name, False, noise)])
        # One for each norm is one row.
        by_norm = Suite(tuple(Attack("mine", False, noise, (norm,)) for norm in ("linf", "l2")), audit=False)
        assert len(evaluate((network, x, y), by_norm).attacks) == 1


def test_two_attacks_of_one_strategy_are_twins_only_if_they_are_one(templates: Templates) -> None:
    weak, strong = (Towards(templates[0], share) for share in (0.1, 1.0))
    suite = Suite((Attack("mine", False, weak), Attack("mine", True, strong)), audit=False)
    found = evaluate(templates, suite)
    assert [attack.same_as for attack in found.attacks] == [None, None]
    assert torch.equal(found.robust, evaluate(templates, Suite((suite.attacks[1],), audit=False)).robust)
    assert not found.robust.all()


def test_images_that_rounding_takes_out_of_the_ball_count_and_those_far_out_are_told() -> None:
    """In l1, a change of a thousand pixels that is normalised in float32 is longer than it should be."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        x = 0.6 * torch.rand(40, 3, 32, 32) + 0.2
    y = model(x).argmax(1)
    ball = ducat.ThreatModel("l1", 12.0)

    def all_of_it(times: float) -> Callable[..., Tensor]:
        def run(classifier: nn.Module, x: Tensor, y: Tensor, threat: ducat.ThreatModel, *rest: object) -> Tensor:
            nearest = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
            gradient = (model[1].weight[nearest] - model[1].weight[y]).detach()
            places = gradient.abs().topk(400, 1).indices
            change = torch.zeros_like(gradient).scatter(1, places, gradient.gather(1, places))
            return x + (change * (times * threat.eps / change.abs().sum(1, keepdim=True))).view_as(x)

        return run

    out = ~ball.allows(all_of_it(1.0)(model, x, y, ball), x)
    assert out.any(), "nothing has to be brought back"
    near, far = (
        ducat.evaluate(model, x, y, ball, idle_suite(), num_classes=10, attacks=[all_of_it(times)])
        for times in (1.0, 1.1)
    )
    assert not near.robust.any()
    assert not near.warnings
    assert far.robust.all()
    assert far.attacks[-1].outside == 40
    assert "own-run returned 40 images outside of the ball or of [0, 1], which break nothing" in far.warnings


def test_a_recovered_classifier_with_a_hook_is_measured_with_it(templates: Templates) -> None:
    model, x, y = templates
    hooked = ducat.RecoveredClassifier(ducat.add_dummy_classes(nn.Sequential(*model)))
    hooked.register_forward_pre_hook(lambda module, inputs: (1 - inputs[0],))
    found = evaluate((hooked, x, y))
    assert torch.equal(found.clean, hooked(x).argmax(1) == y)
    assert not found.clean.all()


def test_the_expected_robustness_of_a_random_network_is_an_upper_bound_whatever_the_majority_says(
    templates: Templates,
) -> None:
    """Each image is right in a third of the passes under attack: in none more often than not."""
    model, x, y = templates
    near = nn.Threshold(0.02, 0.0)

    class Luck(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            far = near(torch.cdist(images.flatten(1), x.flatten(1), p=1).amin(1) / 64) > 0
            lost = far & (torch.rand(len(images)) > 0.3)
            return torch.where(lost[:, None], -model(images), model(images))

    suite = Suite((Attack("noise", False, noise),), audit=False)
    found = ducat.evaluate(Luck(), x, y, THREAT, suite, num_classes=4)
    assert not found.robust.any()
    assert 0.1 < found.accuracies()["robust"] < 0.5
    assert found.at_most
    assert found.sink_gap == 0


def test_a_modules_gradient_can_be_given(templates: Templates) -> None:
    model, x, y = templates

    class Rounded(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (255 * images).round() / 255

    network = nn.Sequential(Rounded(), model)
    blocked, led = evaluate((network, x, y)), evaluate((network, x, y), replacements={"0": lambda images: images})
    assert blocked.robust.float().mean() > 0.9
    assert abs(led.robust.float().mean() - evaluate(templates).robust.float().mean()) < 0.06


def test_the_second_round_can_be_limited(templates: Templates) -> None:
    model, x, y = templates
    suite = Suite((Attack("idle", False, lambda model, x, *rest: x),))
    found = evaluate((in_numpy(model), x, y), suite, second_round_seconds=0.0)
    second = found.scrutiny.second_round
    assert second is not None
    assert second.stopped
    assert second.broken == {}
    assert found.at_most
    assert Evaluation.load(saved(found)).scrutiny == found.scrutiny


def test_a_second_round_that_is_cut_short_settles_nothing(
    templates: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rescaled logits are an equal network without signs; but what else might break more was not tried."""
    model, x, y = templates
    loud = nn.Sequential(model, nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        loud[1].weight.copy_(1e4 * torch.eye(4))
    short_searches(monkeypatch)
    whole = evaluate((loud, x, y), "demo").scrutiny.second_round
    assert whole is not None
    assert whole.through is not None
    asked: list[str] = []

    def late(scene: second_round.Scene) -> bool:
        return bool(asked)

    def progress(attack: str) -> None:
        asked.extend([attack] * attack.startswith("second round, through"))

    monkeypatch.setattr(second_round.Scene, "late", late)
    short = evaluate((loud, x, y), "demo", progress=progress)
    assert asked
    assert short.scrutiny.second_round is not None
    assert short.scrutiny.second_round.through is None
    assert short.scrutiny.second_round.stopped
    assert short.at_most


def saved(evaluation: Evaluation) -> Path:
    path = Path(tempfile.mkdtemp()) / "evaluation.json"
    evaluation.save(path)
    return path


def test_a_copy_that_would_be_another_network_is_not_attacked() -> None:
    """The stem of a pre-activation network feeds a shortcut too, which folding the norm after it would change."""
    x, _ = ducat.data.load_test("digits", 20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ducat.models.build("preact-resnet20", 10, channels=1, width=4)
        with torch.no_grad():
            for _ in range(5):
                network.train()(x)
    network.eval()
    labels = network(x).argmax(1)
    found = ducat.evaluate(network, x, labels, ducat.ThreatModel(eps=0.1), "quick", num_classes=10)
    assert found.scrutiny.folded
    noise = torch.Generator().manual_seed(0)
    images = ducat.attacks.adaptive(network, x, labels, ducat.ThreatModel(eps=0.1), "quick", generator=noise)
    assert abs(int(found.robust.sum()) - int((network(images).argmax(1) == labels).sum())) <= 2


class Sawtooth(nn.Module):
    """A linear classifier behind a steep, fine wave, whose gradient misleads, on images whose first pixel is 1."""

    def __init__(self, templates: Tensor) -> None:
        super().__init__()
        weight = 8 * (templates - templates.mean(0)).flatten(1)
        weight[:, 0] = 0
        self.head = nn.Linear(64, 4)
        self.head.weight = nn.Parameter(weight)
        self.head.bias = nn.Parameter(-weight.sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        wave = 0.003 * torch.atan2(0.9 * torch.sin(2000 * x), 1 - 0.9 * torch.cos(2000 * x))
        return self.head((x + wave * (x[:, :, :1, :1] > 0.5)).flatten(1))


def test_a_network_that_misleads_on_some_images_is_not_settled_through_itself() -> None:
    """Re-measured by its own gradients alone, such a network shows no sign; what showed one was a search."""
    random = torch.Generator().manual_seed(0)
    templates = torch.rand(4, 1, 8, 8, generator=random)
    y = torch.arange(60) % 4
    x = (0.5 + 0.12 * (templates[y] - 0.5) + 0.05 * torch.randn(60, 1, 8, 8, generator=random)).clamp(0.05, 0.95)
    x[:, :, 0, 0] = (torch.rand(60, generator=random) < 0.4).float()[:, None]
    network = Sawtooth(templates)
    found = ducat.evaluate(network, x, y, ducat.ThreatModel(eps=0.03), "light", num_classes=4)
    assert found.at_most
    assert "black-box beats white-box" in found.causes
    smooth = nn.Sequential(nn.Flatten(), network.head)
    led = ducat.attacks.adaptive(smooth, x, y, ducat.ThreatModel(eps=0.03))
    truth = (network(led).argmax(1) == y).float().mean()
    assert found.robust.float().mean() < truth + 0.1


def test_what_the_audit_breaks_counts_and_settles_nothing(
    templates: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a second round leaves it, here one that settles everything and breaks nothing."""
    model, x, y = templates

    class Rounded(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(torch.round(4 * images) / 4)

    def nothing(scene: second_round.Scene, *_: Any) -> tuple[second_round.SecondRound, Tensor]:
        return second_round.SecondRound(len(scene.y), {}, 0.0, "the network itself"), scene.kept

    monkeypatch.setattr("ducat.evaluation.engine.second_round", nothing)
    found = evaluate((Rounded(), x, y), Suite((Attack("idle", False, lambda model, x, *rest: x),), audit=True))
    (row,) = (attack for attack in found.attacks if attack.strategy == "audit")
    assert not (found.robust & ~row.correct).any()
    assert found.audit is not None
    assert (found.clean & ~row.correct).sum() >= found.audit.only_guided > 5
    assert found.scrutiny.second_round is not None
    assert found.scrutiny.second_round.through is None
    assert found.at_most


def test_what_is_examined_closely_is_of_all_classes_where_data_are_sorted(
    templates: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = templates
    order = y.argsort(stable=True)
    for name in ("AUDITED", "second_opinion.SAMPLES"):
        monkeypatch.setattr(f"ducat.evaluation.engine.{name}", 8)
    monkeypatch.setattr("ducat.evaluation.second_round.SIGNS", 8)
    short_searches(monkeypatch)
    monkeypatch.setattr("ducat.evaluation.subject.PROBED", 8)
    seen: dict[str, set[int]] = {}
    images = {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)}

    def watch(path: str, place: int) -> None:
        module, _, name = path.rpartition(".")
        real = getattr(importlib.import_module(f"ducat.evaluation.{module}"), name)

        def watched(*arguments: Any, **options: Any) -> Any:
            labels = {images[one.numpy().tobytes()] for one in arguments[place] if one.numpy().tobytes() in images}
            seen.setdefault(path, set()).update(labels)
            return real(*arguments, **options)

        monkeypatch.setattr(f"ducat.evaluation.{path}", watched)

    watch("engine.measure_signs", 2)
    watch("second_round.measure_signs", 2)
    watch("second_opinion.plain_pgd", 1)
    watch("subject._passes", 1)
    loud = nn.Sequential(model, nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        loud[1].weight.copy_(1e4 * torch.eye(4))
    ducat.evaluate(loud, x[order], y[order], ducat.ThreatModel(eps=0.03), "demo", num_classes=4)
    assert seen == {path: {0, 1, 2, 3} for path in seen}
    assert len(seen) == 4


@pytest.mark.parametrize("kept", [False, True])
def test_a_folded_copy_that_goes_astray_on_adversarial_images_is_given_up(
    templates: Templates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: bool
) -> None:
    model, x, _y = templates

    class Astray(nn.Module):
        """Right on images that are near those of the test or of the random start, and wrong at the edge of the ball."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            far = torch.cdist(images.flatten(1), x.flatten(1), p=1).amin(1) / 64 > (0.055 if kept else 0.07)
            return torch.where(far[:, None], 100 * model(x[:1]), model(images))

    monkeypatch.setattr("ducat.evaluation.engine.fold_batch_norm", lambda network, images: Astray())
    found = evaluate(templates, parts=tmp_path / "parts" if kept else None)
    assert not found.scrutiny.folded
    monkeypatch.undo()
    assert torch.equal(found.robust, evaluate(templates).robust)


@pytest.fixture
def precisions() -> Iterator[Callable[[], list[Any]]]:
    """Return a look at what PyTorch is told of the precision of float32, which is as ever after the test."""
    backends = torch.backends

    def settings() -> list[Any]:
        parts = (backends, backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        found: list[Any] = [part.fp32_precision for part in parts]
        for older in (torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32):
            try:
                found.append(older())
            except RuntimeError:
                found.append("refused")
        return found

    before = settings()
    yield settings
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for part in (backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul, backends.mkldnn.matmul):
        part.fp32_precision = "none"
    backends.cudnn.conv.fp32_precision = before[2]
    assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9 has the older switches")
@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("", "tf32"),
        ("", "ieee"),
        ("cuda.matmul", "tf32"),
        ("cudnn", "tf32"),
        ("cudnn.conv", "ieee"),
        ("mkldnn", "bf16"),
    ],
)
def test_precision_that_the_user_shortened_by_the_newer_switch_is_whole_and_comes_back(
    templates: Templates, precisions: Callable[[], list[Any]], backend: str, precision: str
) -> None:
    expected = evaluate(templates)
    part = attrgetter(backend)(torch.backends) if backend else torch.backends
    part.fp32_precision = precision
    before = precisions()
    assert torch.equal(evaluate(templates).adversarial, expected.adversarial)
    assert precisions() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_whole_float32_whatever_the_user_set(
    templates: Templates, precisions: Callable[[], list[Any]], precision: str
) -> None:
    wide = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def model(images: torch.Tensor) -> torch.Tensor:
        assert torch.get_float32_matmul_precision() == "highest"
        return images.flatten(1) @ wide

    torch.set_float32_matmul_precision(precision)
    before = precisions()
    evaluate((model, *templates[1:]))
    assert precisions() == before


def test_the_users_choice_of_algorithms_is_kept(templates: Templates, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = templates
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def watched(images: torch.Tensor) -> torch.Tensor:
        assert torch.backends.cudnn.deterministic
        return model(images)

    evaluate((watched, x, y))
