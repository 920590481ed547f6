import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ducat import checkpoint
from ducat import demo as room
from ducat.cli import main
from ducat.config import DataConfig
from ducat.demo import NETWORKS, Demo, run
from ducat.runs import RunFolder
from ducat.training import Plan, train

pytestmark = pytest.mark.slow


class Heard:
    """What the demo tells of its trainings and attacks, by the title of the network."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.steps: dict[str, list[tuple[int, int]]] = {}
        self.attacks: dict[str, list[str]] = {}
        self.rows: list[str] = []

    def listener(self, title: str) -> "Listening":
        return Listening(self, title)

    def attacking(self, title: str) -> Callable[[str], None]:
        return lambda attack: self.attacks.setdefault(title, []).append(attack)


class Listening:
    def __init__(self, heard: Heard, title: str) -> None:
        self.heard, self.title = heard, title

    def begin(self, plan: Plan) -> None:
        self.heard.plans[self.title] = plan

    def step(self, done: int, total: int) -> None:
        self.heard.steps.setdefault(self.title, []).append((done, total))

    def validating(self, attack: str) -> None: ...

    def epoch(self, row: dict) -> None: ...

    def warning(self, text: str) -> None: ...


HEARD = Heard()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run(
        tmp_path_factory.mktemp("demo") / "out",
        epochs=2,
        workers=2,
        listener=HEARD.listener,
        attacks=HEARD.attacking,
        finished=lambda title, measured: HEARD.rows.append(title),
    )


def test_what_happens_in_the_processes_is_told_here(demo: Demo) -> None:
    assert HEARD.rows[0] == "natural", "the first row is there before the others are trained"
    assert sorted(HEARD.rows) == sorted(NETWORKS)
    for title in NETWORKS:
        total = 2 * HEARD.plans[title].steps
        assert HEARD.steps[title] == [(done + 1, total) for done in range(total)]
        assert HEARD.attacks[title][:2] == ["fgsm", "pgd-20"]


def test_the_numbers_are_the_same_in_one_process(demo: Demo, tmp_path: Path) -> None:
    title = "DUCAT, published"
    alone = train(room.config(title, 0, 2), tmp_path)
    theirs, ours = (
        checkpoint.part("model", RunFolder.open(path).read("last")[0]) for path in (demo.paths[title], alone.path)
    )
    assert theirs
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert alone.metrics[-1]["robust"] == RunFolder.open(demo.paths[title]).metrics[-1]["robust"]


def test_an_error_in_a_process_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "NETWORKS", {"natural": NETWORKS["natural"]})
    plain = room.config
    monkeypatch.setattr(room, "config", lambda *arguments: replace(plain(*arguments), data=DataConfig("nothing")))
    with pytest.raises(FileNotFoundError, match="data set nothing is not prepared"):
        run(tmp_path / "out", epochs=2, workers=2)
    with pytest.raises(ValueError, match="processes=0 must be at least 1"):
        run(tmp_path / "out", workers=0)


def test_the_demo_leaves_runs_plot_and_page(demo: Demo) -> None:
    assert list(demo.evaluations) == list(NETWORKS)
    runs = sorted((demo.folder / "runs").iterdir())
    assert len(runs) == 4
    configs = [RunFolder.open(path).config for path in runs]
    assert len({(config.train, config.threat, config.model) for config in configs}) == 1, "budgets or seeds differ"
    written = [json.loads((path / "evaluation.json").read_text()) for path in runs]
    assert all(evaluation in written for evaluation in demo.evaluations.values())
    assert (demo.folder / "trade-off.svg").read_text().count("<svg") == 1
    html = (demo.folder / "report.html").read_text()
    for name, evaluation in demo.evaluations.items():
        assert name in html
        assert f"{100 * evaluation['robust']:.1f} [" in html
        assert f"{100 * evaluation['blind']:.1f} [" in html
    assert not re.search(r"""(src|href)=["']https?://""", html), "the page needs the network"


def test_every_network_meets_the_same_blind_and_recovery_aware_attacks(demo: Demo) -> None:
    attacks = [each["attacks"] for each in demo.evaluations.values()]
    # What is left standing, if anything, meets a second opinion and perhaps a second round too.
    suites = {
        tuple((one["name"], one["knows_recovery"]) for one in each if not one["name"].startswith("second-"))
        for each in attacks
    }
    assert len(suites) == 1
    knows = [knows for _, knows in suites.pop()]
    assert True in knows
    assert False in knows


def evaluation(blind: float, robust: float) -> dict:
    return {"blind": blind, "robust": robust, "sink_gap": blind - robust}


def test_the_sentences_say_what_was_measured(tmp_path: Path) -> None:
    numbers = [(0.0, 0.0), (0.7, 0.7), (0.8, 0.3), (0.75, 0.69)]
    demo = Demo(tmp_path, {name: evaluation(*pair) for name, pair in zip(NETWORKS, numbers, strict=True)})
    published, aware = demo.sentences
    assert "are 10.0 points above PGD-AT while" in published
    assert "takes 50.0 points away" in published
    assert "leaves them 40.0 points below PGD-AT (robust)" in published
    assert "are 1.0 points below PGD-AT (robust)" in aware


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["demo", "--out", str(tmp_path / "mine")]) == 2
    assert "exists, and nothing is overwritten: give another --out" in capsys.readouterr().err
    assert not list((tmp_path / "mine").iterdir())
