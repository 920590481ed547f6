from __future__ import annotations

import pytest

from ducat.schedules import SCHEDULES, epoch_of, learning_rate

PAPER = {"milestones": (100, 105)}


@pytest.mark.parametrize(
    ("schedule", "epoch", "epochs", "options", "expected"),
    [
        ("constant", 0, 10, {}, 1),
        ("constant", 10, 10, {}, 1),
        ("multi-step", 0, 130, PAPER, 1),
        ("multi-step", 99.99, 130, PAPER, 1),
        ("multi-step", 100, 130, PAPER, 0.1),
        ("multi-step", 104.9, 130, PAPER, 0.1),
        ("multi-step", 105, 130, PAPER, 0.01),
        ("multi-step", 130, 130, PAPER, 0.01),
        ("multi-step", 15, 20, {"milestones": (0.5, 0.75), "factor": 0.5}, 0.25),
        ("multi-step", 14.9, 20, {"milestones": (0.75, 0.5), "factor": 0.5}, 0.5),
        ("multi-step", 5, 20, {}, 1),
        ("cosine", 0, 200, {}, 1),
        ("cosine", 50, 200, {}, 0.8535533905932737),
        ("cosine", 100, 200, {}, 0.5),
        ("cosine", 200, 200, {}, 0),
        ("one-cycle", 0, 30, {}, 0),
        ("one-cycle", 3, 30, {}, 0.2),
        ("one-cycle", 15, 30, {}, 1),
        ("one-cycle", 27, 30, {}, 0.2),
        ("one-cycle", 30, 30, {}, 0),
        ("one-cycle", 12, 30, {"peak": 0.4}, 1),
        ("one-cycle", 21, 30, {"peak": 0.4}, 0.5),
        ("one-cycle", 0.5, 1, {}, 1),
        ("constant", 0, 10, {"warm_up": 2}, 0),
        ("constant", 0.5, 10, {"warm_up": 2}, 0.25),
        ("constant", 2, 10, {"warm_up": 2}, 1),
        ("constant", 9, 10, {"warm_up": 2}, 1),
        ("cosine", 5, 10, {"warm_up": 10}, 0.25),
        ("multi-step", 5, 10, {"milestones": (5,), "warm_up": 0.5}, 0.1),
    ],
)
def test_learning_rate(schedule, epoch, epochs, options, expected):
    assert learning_rate(schedule, epoch, epochs, **options) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_is_wasted_at_the_middle_of_steps(schedule):
    epochs, batches = 3, 4
    steps = [epoch + (batch + 0.5) / batches for epoch in range(epochs) for batch in range(batches)]
    rates = [learning_rate(schedule, step, epochs, milestones=(1, 2), warm_up=1) for step in steps]
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize(
    ("value", "epochs", "expected"),
    [
        (0, 130, 0),
        (105, 130, 105),
        (105.0, 130, 105),
        (1, 130, 1),
        (1.0, 2, 1),
        (0.5, 130, 65),
        (0.5, 5, 2),
        (0.29, 100, 29),
        (0.99, 2, 1),
        (0.01, 2, 0),
    ],
)
def test_epoch_of(value, epochs, expected):
    epoch = epoch_of(value, epochs)
    assert epoch == expected
    assert isinstance(epoch, int)


@pytest.mark.parametrize("value", [-1, -0.5, 10, 11, 2.5, float("nan")])
def test_epoch_of_names_the_option_that_no_epoch_fits(value):
    with pytest.raises(ValueError, match=r"dummy.start_epoch=.* is not an epoch of this run of 10"):
        epoch_of(value, 10, "dummy.start_epoch")


@pytest.mark.parametrize(
    ("schedule", "epoch", "options", "message"),
    [
        ("cyclic", 0, {}, "schedule 'cyclic' is unknown: known schedules are constant, multi-step, cosine, one-cycle"),
        ("cosine", 11, {}, "epoch=11 is outside this run of 10 epochs"),
        ("cosine", -1, {}, "epoch=-1 is outside this run of 10 epochs"),
        ("multi-step", 0, {"milestones": (100,)}, "milestones=100 is not an epoch of this run of 10"),
        ("multi-step", 0, {"factor": 0}, "factor=0 is not positive"),
        ("one-cycle", 0, {"peak": 1.0}, "peak=1 is outside"),
        ("constant", 0, {"warm_up": -1}, "warm_up=-1 is negative"),
    ],
)
def test_what_must_raise(schedule, epoch, options, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(schedule, epoch, 10, **options)
