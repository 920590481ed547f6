from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ducat import sweep, training
from ducat.cli import main
from ducat.config import DataConfig, DummyConfig
from ducat.progress import Live
from tests import support

BASE = replace(
    support.TINY,
    name=None,
    data=DataConfig("digits", samples=64, held_out=0),
    dummy=DummyConfig("recovery-aware", start_epoch=0),
    train=replace(support.TINY.train, epochs=1, tracker="none"),
)
GRID = {"dummy.benign_weight": ["0", "0.5"], "train.seed": ["0", "1"]}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["train.seed=0,1, 2"], {"train.seed": ["0", "1", "2"]}),
        (["dummy.kind=off,published"], {"dummy.kind": ["off", "published"]}),
        (["threat.eps=4/255,8/255", "a.b=x"], {"threat.eps": ["4/255", "8/255"], "a.b": ["x"]}),
        (["train.milestones=[0.5,0.75],[0.8]"], {"train.milestones": ["[0.5,0.75]", "[0.8]"]}),
    ],
)
def test_a_grid_is_read(texts: list[str], expected: dict[str, list[str]]) -> None:
    assert sweep.read_grid(texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["train.seed"], r"--grid train\.seed: give option=value,value, for example"),
        (["train.seed="], "give option=value,value"),
        (["train.seed=[0,1"], "the values cannot be read"),
        (["train.seed=0", "train.seed=1"], r"train\.seed is given twice"),
    ],
)
def test_a_bad_grid_is_named(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.read_grid(texts)


def test_every_combination_has_its_settings_and_a_name_of_what_changes() -> None:
    made = sweep.configs(BASE, {**GRID, "threat.eps": ["8/255"]})
    assert [config.name for config in made] == [
        f"benign_weight-{weight}-eps-8_255-s{seed}" for weight in ("0", "0.5") for seed in (0, 1)
    ]
    assert [(config.dummy.benign_weight, config.train.seed) for config in made] == [(0, 0), (0, 1), (0.5, 0), (0.5, 1)]
    assert {config.train.epochs for config in made} == {1}
    with pytest.raises(ValueError, match="s0 comes twice"):
        sweep.configs(BASE, {"train.seed": ["0", "0"]})
    with pytest.raises(ValueError, match=r"dummy\.benign_weight=2\.0 is outside \[0, 1\]"):
        sweep.configs(BASE, {"dummy.benign_weight": ["0", "2.0"]})


def run(folder: Path, grid: dict[str, list[str]] | None = None) -> sweep.Swept:
    with Live(Console(file=StringIO())) as live:
        return sweep.sweep(
            BASE,
            grid or {**GRID, "dummy.benign_weight": ["0.5"]},
            folder,
            suite="quick",
            samples=20,
            which="last",
            progress=live,
        )


def test_a_setting_that_a_combination_does_not_read_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method\.weight=3\.0 has no effect with method\.name=pgd-at"):
        run(tmp_path / "sweep", {"method.name": ["trades", "pgd-at"], "method.weight": ["3"]})
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str | None] = []
    plain = training.train

    def watched(config, *arguments):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(config.name)
        return plain(config, *arguments)

    monkeypatch.setattr(training, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "sweep")
    first = tmp_path / "sweep" / "benign_weight-0.5-s0"
    kept = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.name != ".lock"}
    monkeypatch.setattr(training, "train", plain)
    # Whoever looks at a run meanwhile takes nothing from the sweep.
    assert main(["evaluate", str(first), "--which", "last", "--suite", "single-step", "--samples", "30"]) == 0
    kept = {path: time for path, time in kept.items() if path.parent.name == "evaluations"}
    made = run(tmp_path / "sweep")
    assert {run.evaluation["suite"] for run in made.comparison.runs} == {"quick"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not made.failed
    groups = made.comparison.sections[0].groups
    assert [(group.name, group.seeds) for group in groups] == [("benign_weight-0.5", [0, 1])]
    for name in ("table.md", "table.csv", "trade-off.svg", "report.html"):
        assert (tmp_path / "sweep" / name).stat().st_size > 100
    with pytest.raises(ValueError, match=r"holds a sweep of other settings: choose another --name"):
        run(tmp_path / "sweep", {"train.seed": ["0"]})


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = training.train

    def failing(config, *arguments):
        if config.train.learning_rate == 1:
            raise FloatingPointError("the loss is nan")
        return plain(config, *arguments)

    monkeypatch.setattr(training, "train", failing)
    made = run(tmp_path / "sweep", {"train.learning_rate": ["1", "0.05"]})
    assert made.failed == {"learning_rate-1-s0": "the loss is nan"}
    assert [one.name for one in made.comparison.runs] == ["learning_rate-0.05-s0"]
    with pytest.raises(ValueError, match=r"no run of .* could be trained: the loss is nan"):
        run(tmp_path / "none", {"train.learning_rate": ["1"]})


@pytest.mark.slow
def test_the_command_says_what_it_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "base.yaml"
    config.write_text(replace(BASE, name="mine").to_yaml())
    words = ["sweep", "--config", str(config), "--runs", str(tmp_path), "--suite", "quick", "--samples", "20"]
    assert main([*words, "--which", "last", "--grid", "dummy.start_epoch=0"]) == 0
    printed = capsys.readouterr().out
    assert "start_epoch-0" in printed
    assert f"open {tmp_path / 'mine' / 'report.html'}" in "".join(printed.split("\n"))
    assert main([*words, "--grid", "dummy.strat_epoch=0"]) == 2
    assert "strat_epoch" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", '{"grid": ', "\x00"])
def test_a_damaged_note_of_a_sweep_is_named_before_anything_is_trained(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json is damaged \(.*\): choose another --name, or delete it"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
