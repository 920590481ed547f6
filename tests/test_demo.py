import json
import re
from pathlib import Path

import pytest

from ducat.cli import main
from ducat.demo import NETWORKS, Demo, run
from ducat.runs import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run(tmp_path_factory.mktemp("demo") / "out", epochs=2)


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
