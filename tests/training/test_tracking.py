import importlib.util
from pathlib import Path

import pytest

from ducat.cli import main
from ducat.config import Config
from ducat.training.tracking import Tracker, check


def without(*packages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in packages else find(name, *rest)
    )


def test_tensorboard_gets_the_numbers_and_replaces_epochs_that_are_run_again(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, losses in ((0, [3.0, 2.0, 1.0]), (1, [2.5, 0.5])):
        tracker = Tracker.start("auto", tmp_path, Config().flat(), first)
        assert tracker is not None
        for epoch, loss in enumerate(losses, start=first):
            tracker.log({"epoch": epoch, "loss": loss, "robust": 0.5, "dummy_classes": "off"})
        tracker.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 3.0), (1, 2.5), (2, 0.5)]
    assert "dummy_classes" not in events.Tags()["scalars"]


def test_auto_is_nothing_where_tensorboard_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without("tensorboard", monkeypatch=monkeypatch)
    assert Tracker.start("auto", tmp_path, {}, 0) is None
    assert Tracker.start("none", tmp_path, {}, 0) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(name, monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match=rf"train\.tracker={name} needs .*pip install .*\[{name}\]'"):
        check(name)


def test_an_unknown_tracker_is_told_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data.name", "digits", "--train.tracker", "wandbb"]) == 2
    error = capsys.readouterr().err
    assert "train.tracker" in error
    assert "'wandb', 'trackio'" in error
    assert error.count("\n") == 1
