from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from ducat.evaluation import evaluate
from ducat.evaluation.parts import Stage
from ducat.progress import Attacks, Live, Training, told
from ducat.threat import ThreatModel
from ducat.training import Plan, train
from tests import support

PLAN = Plan(epochs=4, steps=10, epoch=0, dummy_from=2, validated=frozenset({1, 3}), validation_steps=5.0)


class Clock:
    """Time that passes where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(live: Live) -> tuple[str, str]:
    """Return what the last line of progress says, and the time left."""
    task = live.progress.tasks[-1]
    return task.description, task.fields["left"]


def row(epoch: int, *, validated: bool) -> dict:
    shares = {"clean": 0.9, "blind": 0.5, "robust": 0.4} if validated else {}
    return {"epoch": epoch, "loss": 1.5, **shares}


def test_time_left_counts_the_validations_in() -> None:
    """Steps of 1 s and validations of 20 s: 40 steps and 2 validations are 80 s."""
    clock, live = Clock(), Live(Console(file=StringIO()))
    training = Training(live, "mine", clock)
    training.begin(PLAN)
    left_before_epoch = []
    for epoch in range(4):
        for step in range(10):
            clock.now += 1
            training.step(10 * epoch + step + 1, 40)
        if epoch in PLAN.validated:
            for attack in ("pgd-10", "ensemble-quick"):
                training.validating(attack)
                description, _ = shown(live)
                assert description.startswith(f"mine: validation, attack {attack}, epoch {epoch + 1} of 4")
                clock.now += 10
        training.epoch(row(epoch, validated=epoch in PLAN.validated))
        left_before_epoch.append(shown(live)[1])
    # Before the first validation it counts as 5 steps each; from then on as the 20 s that it took.
    assert left_before_epoch == ["0:40 left", "0:40 left", "0:30 left", "0:00 left"]


def test_what_a_training_is_at() -> None:
    live = Live(Console(file=StringIO()))
    training = Training(live, "mine", Clock())
    training.begin(PLAN)
    training.step(1, 40)
    assert shown(live)[0] == "mine: training, epoch 1 of 4"
    for epoch in range(2):
        training.epoch(row(epoch, validated=epoch == 1))
    training.step(21, 40)
    told = "mine: dummy classes, epoch 3 of 4, loss 1.500, validation clean 90.0, blind 50.0, robust 40.0"
    assert shown(live)[0] == told
    printed = live.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert printed == ["mine: epoch 2 of 4, loss 1.500, validation clean 90.0, blind 50.0, robust 40.0"]


@pytest.mark.slow
def test_the_loop_says_what_is_ahead_and_that_it_validates(tmp_path: Path) -> None:
    heard: list[object] = []

    class Watching(support.Watcher):
        def begin(self, plan: Plan) -> None:
            heard.append(plan)

        def validating(self, attack: str) -> None:
            heard.append(str(attack))

    train(support.TINY, tmp_path, Watching())
    plan, *attacks = heard
    assert isinstance(plan, Plan)
    assert (plan.epochs, plan.steps, plan.epoch, plan.dummy_from) == (3, 2, 0, 3)
    assert plan.validated == {0, 1, 2}
    assert attacks == ["pgd-10", "ensemble-quick"] * 3
    train(replace(support.TINY, name="plain"), tmp_path, support.Watcher())  # a listener need not know of these


def test_attacks_say_how_many_images_are_done_and_left_standing(templates: tuple[nn.Module, ...]) -> None:
    model, x, y = templates
    heard: list[str] = []
    settings = {"num_classes": 4, "batch_size": 10}
    evaluation = evaluate(model, x, y, ThreatModel(eps=0.09), "quick", **settings, progress=heard.append)
    stages = [stage for stage in heard if isinstance(stage, Stage)]
    assert [stage.done for stage in stages] == [done for done in (0, 10, 20, 30) for _ in range(2)]
    assert {stage.samples for stage in stages} == {40}
    for attack, stage in enumerate(stages):
        seen = 10 * (attack // 2 + 1)
        assert stage.seen == seen
        # Earlier chunks have met every attack, this one only those before.
        before = int(evaluation.robust[: seen - 10].sum())
        correct = evaluation.clean if attack % 2 == 0 else evaluation.attacks[0].correct
        assert stage.standing == before + int((evaluation.clean & correct)[seen - 10 : seen].sum())
    assert 0 < int(evaluation.robust.sum()) < 40, "the numbers would say nothing"


def test_the_line_of_an_attack() -> None:
    clock, live = Clock(), Live(Console(file=StringIO()))
    attacks = Attacks(live, "mine", clock)
    attacks(Stage.of("pgd-20, samples 1 to 500", 0, 2000, 480, 500))
    line = "mine: attack pgd-20, samples 1 to 500, 0 of 2000 images done, 480 of 500 left standing"
    assert shown(live) == (line, "")
    clock.now += 60
    attacks(Stage.of("pgd-20, samples 501 to 1000", 500, 2000, 800, 1000))
    assert shown(live)[1] == "3:00 left"
    attacks("audit")
    assert shown(live)[0] == "mine: attack audit"


@pytest.mark.parametrize(("seconds", "text"), [(7.0, "0:07"), (61.6, "1:02"), (3723.0, "1:02:03")])
def test_times_are_told(seconds: float, text: str) -> None:
    assert told(seconds) == f"{text} left"
