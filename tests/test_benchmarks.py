"""The benchmarks measure what they say: their arithmetic, and that the steps they time do the same work."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import training_step
from benchmarks.cure.fronts import Point, above, front


def test_a_row_of_the_training_step_has_its_rates_and_their_ratio() -> None:
    rows = training_step.measure("trades", "recovery-aware", model="resnet8", batch_size=4, rounds=1)
    assert [row["attack"] for row in rows] == ["pgd", "pgd-cosine"]
    for row in rows:
        assert (row["method"], row["dummy"]) == ("trades", "recovery-aware")
        assert row["research_images_per_s"] > 0
        assert row["ratio"] == pytest.approx(row["ducat_images_per_s"] / row["research_images_per_s"], rel=0.02)


STEPS = (training_step.RESEARCH, training_step.Recipe(), training_step.Recipe(attack="pgd-cosine"))


@pytest.mark.parametrize(("method", "dummy"), [("pgd-at", "off"), ("mart", "recovery-aware")])
def test_the_steps_that_are_timed_do_the_same_work(method: str, dummy: str) -> None:
    reached, losses = [], []
    for recipe in STEPS:
        step = training_step.Step(recipe, method, dummy, model="resnet8", batch_size=16)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adversarial = step._adversarial()
        assert (adversarial - step.x).abs().max() <= step.threat.radius + 1e-6
        step.network.eval()
        with torch.no_grad():
            reached.append(F.cross_entropy(step.objective._read(step.network(adversarial)), step.y).item())
            losses.append(step._loss(adversarial).item())
    # A new network is nearly linear in the ball, so that every attack gets about as far.
    assert reached == pytest.approx([reached[0]] * 3, rel=0.05)
    assert losses == pytest.approx([losses[0]] * 3, rel=0.05)


@pytest.mark.parametrize("method", ["pgd-at", "trades"])
def test_the_research_step_passes_through_the_network_as_often_as_counted(method: str) -> None:
    step = training_step.Step(training_step.RESEARCH, method, "published", model="resnet8", batch_size=2)
    calls: list[int] = []
    step.network.register_forward_hook(lambda *_: calls.append(1))
    step()
    # Ten steps of the attack, both halves of the batch, and the clean distribution that TRADES compares with.
    assert len(calls) == 10 + 2 + (method == "trades")


def test_warming_up_changes_nothing_that_is_timed() -> None:
    step = training_step.Step(training_step.Recipe(attack="pgd-cosine"), "pgd-at", "off", model="resnet8", batch_size=2)
    before = step.threat, step.objective
    step.warm_up()
    assert (step.threat, step.objective) == before


def point(clean: float, robust: float) -> Point:
    return Point("row", "mixed", [0], [clean], [0.0], [robust], 1000)


def test_the_front_is_the_upper_hull_and_rows_are_measured_against_it() -> None:
    baselines = [point(50, 30), point(60, 26), point(55, 27), point(70, 10), point(58, 20)]
    hull = front(baselines)
    assert hull == [(50, 30), (60, 26), (70, 10)]
    assert above(point(55, 29), hull) == pytest.approx(1)
    assert above(point(45, 29), hull) == pytest.approx(-1)
    assert above(point(65, 18), hull) == pytest.approx(0)
    assert above(point(71, 10), hull) is None
    assert point(50, 30).error == pytest.approx(1.449, abs=1e-3)
