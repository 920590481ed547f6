"""The benchmarks measure what they say: their arithmetic, and that the steps they time do the same work."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ducat
from benchmarks import batch_norm, others, serving, timm_networks, training_step, zoo
from benchmarks.cure import __main__ as cure
from benchmarks.cure import fronts, networks
from benchmarks.cure.fronts import Point, above, front
from benchmarks.cure.networks import Gated, Half, Held, ManyDummies, calibrated, through_stand_ins
from benchmarks.cure.objectives import changed, detached, inner, scheduled
from benchmarks.training_step import Ours, Recipe, Research
from ducat import methods, models
from ducat.attacks.adaptive import SilentDummies
from ducat.attacks.pgd import pgd
from ducat.config import Config, DummyConfig, TrainConfig
from ducat.runs import RunFolder
from ducat.threat import ThreatModel


def test_a_row_of_the_training_step_has_its_rates_and_their_ratio() -> None:
    rows = training_step.measure("trades", "recovery-aware", model="resnet8", batch_size=4, rounds=1)
    assert [row["attack"] for row in rows] == ["pgd", "pgd-cosine"]
    for row in rows:
        assert (row["method"], row["dummy"]) == ("trades", "recovery-aware")
        assert row["research_images_per_s"] > 0
        assert row["ratio"] == pytest.approx(row["ducat_images_per_s"] / row["research_images_per_s"], rel=0.02)


STEPS = (Research, partial(Ours, Recipe()), partial(Ours, Recipe(attack="pgd-cosine")))


@pytest.mark.parametrize(("method", "dummy"), [("pgd-at", "off"), ("mart", "recovery-aware")])
def test_the_steps_that_are_timed_do_the_same_work(method: str, dummy: str) -> None:
    reached, losses = [], []
    for make in STEPS:
        step = make(method, dummy, model="resnet8", batch_size=16)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adversarial = step.adversarial()
        assert (adversarial - step.x).abs().max() <= step.threat.eps + 1e-6
        step.network.eval()
        with torch.no_grad():
            reached.append(F.cross_entropy(step.objective.read(step.network(adversarial)), step.y).item())
            losses.append(step.loss(adversarial).item())
    # A new network is nearly linear in the ball, so that every attack gets about as far.
    assert reached == pytest.approx([reached[0]] * 3, rel=0.05)
    assert losses == pytest.approx([losses[0]] * 3, rel=0.05)


@pytest.mark.parametrize("method", ["pgd-at", "trades"])
def test_the_research_step_passes_through_the_network_as_often_as_counted(method: str) -> None:
    step = Research(method, "published", model="resnet8", batch_size=2)
    calls: list[int] = []
    step.network.register_forward_hook(lambda *_: calls.append(1))
    step()
    # Ten steps of the attack and both halves of the batch at once; TRADES has the clean distribution that its attack
    # compares with, and forwards both halves apart once more for its regulariser.
    assert len(calls) == 10 + 1 + (3 if method == "trades" else 0)


def test_warming_up_changes_nothing_that_is_timed() -> None:
    step = Ours(Recipe(attack="pgd-cosine"), "pgd-at", "off", model="resnet8", batch_size=2)
    before = step.step.threat, step.step.objective(0)
    step.warm_up()
    assert (step.step.threat, step.step.objective(0)) == before


def test_the_peak_of_an_evaluation_is_not_that_of_the_process_that_began_it() -> None:
    held = b"x" * (600 * 2**20)
    code = """if True:
        from pathlib import Path
        from benchmarks import memory
        memory.evaluate_run = lambda *arguments, **options: None
        memory.RunFolder.open = lambda path: None
        print(memory.evaluate(Path(), 1)["peak_mb"])
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 50 < int(done.stdout) < len(held) / 2**20


def point(clean: float, robust: float) -> Point:
    return Point("row", "mixed", [0], [clean], [0.0], [robust], 1000)


def test_a_compiled_step_gets_the_mode_of_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def compile_as_it_is(network: nn.Module, *, mode: str | None = None) -> nn.Module:
        asked.append(mode)
        return network

    monkeypatch.setattr(torch, "compile", compile_as_it_is)
    for mode in (None, "reduce-overhead"):
        step = Ours(Recipe(compiled=True, mode=mode), "pgd-at", "off", model="resnet8", batch_size=2)
        step.warm_up()
    assert asked == [None, None, "reduce-overhead", "reduce-overhead"], "the network, and the copy that is attacked"


def test_a_step_that_cannot_be_compiled_is_not_timed_as_one_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise OSError("no C compiler")

    monkeypatch.setattr(torch, "compile", lambda network, *, mode=None: Failing())
    with pytest.raises(RuntimeError, match=r"torch\.compile does not work here"):
        Ours(Recipe(compiled=True), "pgd-at", "off", model="resnet8", batch_size=2)


def test_each_measurement_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda network, *, mode=None: done.append("compile") or network)
    for _ in range(2):
        recipes = {"compiled": Recipe(compiled=True)}
        training_step.measure("pgd-at", "off", model="resnet8", batch_size=2, rounds=1, recipes=recipes)
    assert done == 2 * ["reset", "compile", "compile"]


def test_the_front_is_the_upper_hull_and_rows_are_measured_against_it() -> None:
    baselines = [point(50, 30), point(60, 26), point(55, 27), point(70, 10), point(58, 20)]
    hull = front(baselines)
    assert hull == [(50, 30), (60, 26), (70, 10)]
    assert above(point(55, 29), hull) == pytest.approx(1)
    assert above(point(45, 29), hull) == pytest.approx(-1)
    assert above(point(65, 18), hull) == pytest.approx(0)
    assert above(point(71, 10), hull) is None
    assert point(50, 30).error == pytest.approx(1.449, abs=1e-3)


def content(name: str, seed: int, clean: float, robust: float) -> dict[str, Any]:
    attacks = [{"accuracy": robust + 0.1}]
    measured = {"clean": {"accuracy": clean}, "attacks": attacks, "robust": robust, "samples": 500}
    return {"name": name, "seed": seed, "evaluation": measured}


def test_seeds_of_a_row_are_one_line_of_the_table_with_the_error_of_their_mean() -> None:
    contents = [
        content("aware-0.5", 1, 0.62, 0.24),
        content("aware-0.5", 0, 0.58, 0.28),
        content("pgd-at", 0, 0.5, 0.3),
        content("mixed-0.5", 0, 0.6, 0.25),
    ]
    rows = fronts.points(contents)
    assert [(row.name, row.seeds) for row in rows] == [("pgd-at", [0]), ("mixed-0.5", [0]), ("aware-0.5", [0, 1])]
    assert (rows[-1].clean, rows[-1].robust, rows[-1].error) == pytest.approx((60, 26, 2))
    assert fronts.table(rows).splitlines()[-1].endswith("| 0, 1 | 60.0 | 36.0 | 26.0 ± 2.0 | +1.0 |")


def test_scheduled_weights_go_from_one_end_to_the_other() -> None:
    config = Config(dummy=DummyConfig("recovery-aware", start_epoch=0), train=TrainConfig(epochs=3, milestones=()))
    objective = changed(config, scheduled({"benign_weight": (0.0, 0.5)}))
    weights = [objective(epoch).targets for epoch in range(3)]
    assert [each.benign_weight for each in weights if each] == [0, 0.25, 0.5]
    assert {each.adversarial_weight for each in weights if each} == {1.0}


def test_a_row_changes_what_the_attack_maximises_and_nothing_else() -> None:
    config = Config(dummy=DummyConfig("recovery-aware", start_epoch=0), train=TrainConfig(epochs=2, milestones=()))
    plain, changes = config.objective(0), changed(config, inner(objective="margin"))(0)
    assert (plain.method.objective, changes.method.objective) == ("cross-entropy", "margin")
    assert replace(changes, method=plain.method) == plain


def test_trades_of_the_search_forwards_both_halves_together_as_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Config] = []

    def stop(config: Config, *_: object, **__: object) -> None:
        configs.append(config)
        raise InterruptedError

    monkeypatch.setattr(cure, "train", stop)
    monkeypatch.setattr(cure.Search, "network", lambda *_: nn.Identity())
    for name in ("trades-3", "trades-3-aware", "pgd-at"):
        with pytest.raises(InterruptedError):
            cure.Search(tmp_path, "digits", 0)._trained_on(name)
    assert [config.objective(0).method.forwards_apart for config in configs] == [False] * 3


def test_a_detached_pair_has_the_two_hot_loss_and_no_gradient_of_it_in_the_trunk() -> None:
    torch.manual_seed(0)
    model = ducat.add_dummy_classes(models.build("small", 10, channels=1), "random").eval()
    x, adversarial, y = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8), torch.arange(4)
    weights = methods.TwoHot(benign_share=0.35)
    plain, without = (
        methods.Objective(methods.METHODS["pgd-at"], "recovered", replace(weights, pair_weight=pair)) for pair in (1, 0)
    )
    first = next(model.parameters())
    values, gradients = [], []
    for objective in (detached(plain, 0.0), plain, without):
        loss = objective.loss(model, x, adversarial, y)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, first)[0])
    assert values[0] == pytest.approx(values[1], rel=1e-5) != pytest.approx(values[2], rel=1e-3)
    torch.testing.assert_close(gradients[0], gradients[2])
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2)


class Pair(nn.Module):
    """Two linear experts of two classes: one reads the first feature, the other the second."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(1).sub(0.5).mul(8).unbind(1)
        return torch.stack([-first, first, -second, second], dim=1)


def test_a_gate_mixes_probabilities_and_power_makes_the_sure_surer() -> None:
    x = torch.tensor([[[[0.9, 0.6]]], [[[0.2, 0.9]]]])
    accurate, robust = (Half(Pair(), index)(x).softmax(1) for index in (0, 1))
    mixed = Gated(Pair(), gate=0.7, sharpen=1)(x)
    torch.testing.assert_close(mixed.exp(), 0.3 * accurate + 0.7 * robust)
    plain, sharp = (Gated(Pair(), 0.999, 1, power)(x).softmax(1)[:, 1] for power in (1, 2))
    assert sharp[0] < plain[0] < plain[1] < sharp[1]


def test_stand_ins_break_a_mixture_that_hides_its_gradients() -> None:
    # Both features are within the ball of the other class; the sharp expert passes no gradient to its own.
    y = torch.tensor([0, 1, 0, 1])
    x = (0.5 + 0.05 * (2 * y - 1)).repeat(2, 1).T.reshape(4, 1, 1, 2)
    threat = ThreatModel("linf", 0.1, 0.025, 20)
    hidden = Gated(Pair(), gate=0.999, sharpen=1e6, power=2)
    assert (hidden(pgd(hidden, x, y, threat, start=x)).argmax(1) == y).all()
    found = through_stand_ins(SilentDummies(hidden), x, y, threat, torch.Generator().manual_seed(0))
    assert (found - x).abs().max() <= 0.1 + 1e-6
    assert (hidden(found).argmax(1) != y).all()


@pytest.mark.parametrize(("robust_of_0_7", "chosen"), [(0.495, 0.7), (0.48, 0.85)])
def test_a_calibrated_gate_is_the_most_accurate_that_gives_up_at_most_a_point(
    monkeypatch: pytest.MonkeyPatch, robust_of_0_7: float, chosen: float
) -> None:
    measured = {0.5: (0.9, 0.3), 0.7: (0.8, robust_of_0_7), 0.85: (0.7, 0.5), 0.95: (0.6, 0.5), 0.999: (0.5, 0.5)}
    monkeypatch.setattr(networks, "_accuracies", lambda gated, *_: measured[gated.gate])
    held = Held(torch.rand(4, 1, 1, 2), torch.zeros(4, dtype=torch.long), ThreatModel("linf", 0.1, 0.025, 10))
    assert calibrated(Pair(), held).gate == chosen


def test_several_dummy_classes_a_class_begin_as_the_network_they_are_made_from() -> None:
    torch.manual_seed(0)
    base = models.build("small", 10, channels=1)
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = base.eval()(x)
        many = ManyDummies(base, 3)(x)
    assert many.shape == (4, 20)
    torch.testing.assert_close(many[:, :10], before)
    torch.testing.assert_close(many[:, 10:], before, atol=0.2, rtol=0)


def test_joint_and_separate_statistics_are_compared_seed_by_seed() -> None:
    def row(how: str, seed: int, clean: float, seconds: float) -> dict[str, Any]:
        return {
            **{"method": "trades", "dummy_classes": "off", "batch_norm": how, "seed": seed},
            **{"clean": clean, "blind": 0.5, "robust": 0.5, "seconds": seconds},
            "data": {"title": "Digits", "train": 64},
            "environment": {"precision": "float32"},
        }

    rows = [
        row("joint", 0, 0.90, 10),
        row("joint", 1, 0.80, 10),
        row("separate", 0, 0.91, 11),
        row("separate", 1, 0.83, 13),
    ]
    table = batch_norm.markdown([*rows, row("separate", 2, 0.1, 99)])
    assert "| TRADES | off | joint | 2 | 85.0 ± 7.1 | 50.0 ± 0.0 | 50.0 ± 0.0 | 10 |" in table
    # The third seed has no counterpart, and counts in no difference.
    assert "| | | *separate − joint* | 2 | +2.0 ± 1.4 | +0.0 ± 0.0 | +0.0 ± 0.0 | ×1.20 |" in table


def test_rows_of_batch_norm_are_timed_when_warm_and_made_anew_where_they_were_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun: list[str] = []

    def interrupted(config: Config, root: Path, **_: object) -> None:
        (root / config.name).mkdir(parents=True)  # as a run's folder, it must not exist
        begun.append(config.name)
        if config.name != "warm-up":
            raise KeyboardInterrupt

    monkeypatch.setattr(batch_norm, "training", SimpleNamespace(train=interrupted))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", ["batch_norm", "--work", str(tmp_path)])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            batch_norm.main()
    assert begun == ["warm-up", "digits-trades-off-joint-s0"] * 2


def test_a_network_of_timm_that_was_measured_is_known_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picked, work = tmp_path / "picked.txt", tmp_path / "work.jsonl"
    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    monkeypatch.setattr(timm_networks, "declare_operators", lambda: None)
    monkeypatch.setattr(timm_networks, "PICKED", picked)
    monkeypatch.setattr(timm_networks, "run", lambda name, limit: {"network": name})
    monkeypatch.setattr(sys, "argv", ["timm_networks", "--work", str(work)])
    for networks_picked in ("resnet resnet10t\nvgg vgg11\n", "resnet resnet18\nvgg vgg11\n"):
        picked.write_text(networks_picked)
        timm_networks.main()
    assert [json.loads(line)["network"] for line in work.read_text().splitlines()] == ["resnet10t", "vgg11", "resnet18"]


def test_attacks_of_other_libraries_are_counted_by_what_the_deployed_classifier_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [row for row in others.ROWS if row.attack.startswith("LinfPGD") or row.library == "ducat"]
    untouched = others.Row("ducat", "none", lambda model, x, y, threat, seed: x)
    outside = others.Row("ducat", "any grey, drawn into the ball", lambda model, x, y, threat, seed: x * 0 + 0.5)
    monkeypatch.setattr(others, "ROWS", (*rows, untouched, outside))
    *found, worst = others.measure("digits-published", 40, 0)
    by_attack = {row["attack"]: row for row in found}
    x, y = ducat.data.load_test("digits", 40)
    clean = (ducat.load("zoo:digits-published")(x).argmax(1) == y).double().mean().item()
    assert float(by_attack["none"]["recovered"]) == pytest.approx(100 * clean, abs=0.05)
    assert float(by_attack["any grey, drawn into the ball"]["recovered"]) > 10, (
        "the image may go eps far and no farther"
    )
    for knowledge in ("blind", "recovered"):
        assert float(worst[knowledge]) <= min(float(row[knowledge]) for row in found)
    # The sink: blind attacks leave much of what those that know break.
    ours = by_attack['ensemble, "standard"']
    assert float(ours["recovered"]) < float(ours["blind"]) - 20


@pytest.mark.parametrize(("place", "samples"), [(0, None), (1, 1000)])
def test_a_card_is_of_the_ball_of_training_and_of_as_many_images_as_are_told(
    place: int, samples: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = zoo.ORIGINS[place].runs
    for run in runs.values():
        folder = RunFolder.create(tmp_path / run)
        folder.write_config(Config(name=run))
        # Of another ball, and on more images than any.
        other = {"suite": "standard", "checkpoint": "last", "samples": 10_000, "threat": {"norm": "linf", "eps": 1e-3}}
        folder.evaluations_path.mkdir()
        (folder.evaluations_path / "other.json").write_text(json.dumps(other))
    asked: list[dict[str, Any]] = []
    packed: list[Any] = []

    def evaluate_run(folder: RunFolder, suite: str, **options: Any) -> dict[str, Any]:
        asked.append({"suite": suite, **options})
        return {"kept": folder.name}

    monkeypatch.setattr(zoo, "evaluate_run", evaluate_run)
    monkeypatch.setattr(zoo.zoo, "pack", lambda *given, measured: packed.append(measured) or "digest")
    assert zoo.make(tmp_path, tmp_path) == dict.fromkeys(runs, "digest")
    assert packed == [{"kept": run} for run in runs.values()]
    assert asked == [{"suite": "standard", "samples": samples, "which": "last"}] * len(runs)


def test_a_server_that_does_not_start_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"did not start: see what `ducat serve {tmp_path / 'none'}` says"):
        serving.Server(tmp_path / "none")
